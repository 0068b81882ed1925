//! Builds a [`MountPlan`] from a command line, a configuration or fstab. All paths in a plan are
//! absolute.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::CliError;
use super::client::check_answers;
use crate::config::{self, CacheMode, Config, DiskSpec, ServerSpec};
use crate::confined;
use crate::host::file_system::{FsKind, HostFs};
use crate::host::mountinfo;
use crate::mount::{DaemonMode, MountPlan, OnChangedBase};
use crate::remote;
use crate::stream::context::StdioMode;
use crate::trust;
use crate::trusted_path;

/// Maximum length of a configuration in bytes: some ten thousand disks.
const MAX_CONFIG_LEN: u64 = 4 << 20;

/// The arguments on trust, for every command that opens an overlay or a store.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct TrustArgs {
    /// Believe what lies in or below DIR although another user can write there
    #[arg(long = "trust", value_name = "DIR")]
    pub(super) dirs: Vec<PathBuf>,
}

impl TrustArgs {
    /// Makes this process trust the directories, and the daemon that it may become. Returns them as
    /// absolute paths; relative ones start at `dir`.
    ///
    /// # Errors
    /// A line for the user.
    pub(super) fn allow(&self, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
        trust_dirs(self.dirs.iter().map(|trusted| dir.join(trusted)))
    }
}

fn trust_dirs(dirs: impl Iterator<Item = PathBuf>) -> anyhow::Result<Vec<PathBuf>> {
    let allow = |dir: PathBuf| {
        trust::allow(&dir).with_context(|| format!("cannot trust '{}'", dir.display()))?;
        Ok(dir)
    };
    dirs.map(allow).collect()
}

/// The arguments on servers, for every command that opens bases.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct ServerArgs {
    /// Use the keys auth=, tls-ca=, tls-cert= and tls-key= for every image below ADDRESS that has none of
    /// its own
    #[arg(long = "server", value_name = "ADDRESS,KEY=VALUE")]
    servers: Vec<OsString>,
}

impl ServerArgs {
    /// Makes this process use the keys, and the daemon that it may become. Relative paths start at
    /// `dir`.
    ///
    /// # Errors
    /// A line for the user.
    pub(super) fn apply(&self, dir: &Path) -> anyhow::Result<()> {
        for text in &self.servers {
            let server = ServerSpec::parse(text, dir);
            remote::add_server(server.map_err(|error| CliError::usage(error.to_string()))?);
        }
        Ok(())
    }
}

/// The arguments that `mount` and `run` have in common.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct CommonArgs {
    /// Take disks and options from a TOML file; the command line wins over it
    #[arg(long, value_name = "FILE.toml")]
    pub(super) config: Option<PathBuf>,
    /// Keep files that are created in the mount in DIR
    #[arg(long, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    /// Let an image have files that it names below DIR; those of a qcow2 image may lie beside it, too
    #[arg(long, value_name = "DIR")]
    pub(super) allow_backing: Vec<PathBuf>,
    /// What the kernel caches: auto, none or writeback
    #[arg(long, value_name = "auto|none|writeback")]
    pub(super) cache: Option<CacheMode>,
    /// Write the daemon's log to FILE
    #[arg(long, value_name = "FILE")]
    pub(super) log: Option<PathBuf>,
    /// Mount options: allow_other, nonempty, ro, noexec, noatime, io_timeout=SECONDS, fsname=NAME
    #[arg(short = 'o', value_name = "OPT,..")]
    pub(super) options: Vec<String>,
    /// Use a base that changed under its overlay
    #[arg(long)]
    pub(super) force: bool,
    #[command(flatten)]
    pub(super) servers: ServerArgs,
    #[command(flatten)]
    pub(super) trust: TrustArgs,
}

/// A request to mount, not checked yet.
#[derive(Clone, Debug)]
pub(super) struct MountCommand {
    /// The mountpoint; `None`: that of the configuration.
    pub(super) mountpoint: Option<PathBuf>,
    /// The source shown in the mount table; `fsname=` has precedence. `None`: derived from the disks.
    pub(super) source: Option<String>,
    /// The disks as given on the command line.
    pub(super) disks: Vec<OsString>,
    /// Options and configuration.
    pub(super) common: CommonArgs,
    /// In the foreground or in the background.
    pub(super) mode: DaemonMode,
    /// Whether streams may use our standard input and output.
    pub(super) stdio: StdioMode,
}

impl MountCommand {
    /// Builds the plan. Relative paths start at `dir`, those in a configuration at its directory.
    ///
    /// # Errors
    /// A usage error for invalid or missing arguments; the host's error for the configuration.
    pub(super) fn into_plan(self, dir: &Path) -> anyhow::Result<MountPlan> {
        self.common.trust.allow(dir)?;
        self.common.servers.apply(dir)?;
        let (config_path, config) = match &self.common.config {
            Some(path) => (Some(path), read_config(path, dir)?),
            None => (None, Config::default()),
        };
        trust_dirs(config.trust.into_iter())?;
        config.servers.into_iter().for_each(remote::add_server);
        let mut disks = config.disks;
        for text in &self.disks {
            disks.push(parse_disk_arg(text, dir)?);
        }
        config::check_names(&disks).map_err(|error| CliError::usage(error.to_string()))?;
        let options = config.options.iter().chain(&self.common.options);
        let options = config::parse_mount_options(options)
            .map_err(|error| CliError::usage(error.to_string()))?;
        let cache = self.common.cache.or(config.cache).unwrap_or_default();
        config::check_cache(&disks, cache).map_err(|error| CliError::usage(error.to_string()))?;
        let absolute = |path: PathBuf| dir.join(path);
        let store = self.common.store.map(absolute).or(config.store);
        let named = self.common.allow_backing.into_iter().map(absolute);
        let allow_backing = config.allow_backing.into_iter().chain(named).collect();
        let mountpoint = self.mountpoint.map(absolute).or(config.mountpoint);
        let mountpoint = mountpoint.ok_or_else(|| {
            CliError::usage("MOUNTPOINT is missing: cowslip mount MOUNTPOINT [DISK]...")
        })?;
        if disks.is_empty() && store.is_none() {
            let remedy = "name a DISK, --config FILE.toml or --store DIR";
            return Err(CliError::usage(format!("there is nothing to mount: {remedy}")));
        }
        let derived = config_path
            .map(|path| path.as_os_str())
            .or(self.disks.first().map(OsString::as_os_str))
            .unwrap_or(OsStr::new("cowslip"));
        let derived = || derived.to_string_lossy().into_owned();
        // Everybody sees it.
        let source = config::without_queries(&self.source.unwrap_or_else(derived)).into_owned();
        Ok(MountPlan {
            mountpoint,
            source: options.fsname.clone().unwrap_or(source),
            disks,
            store,
            allow_backing,
            cache,
            options,
            log: self.common.log.map(absolute).or(config.log),
            on_changed_base: match self.common.force {
                true => OnChangedBase::Accept,
                false => OnChangedBase::Refuse,
            },
            mode: self.mode,
            stdio: self.stdio,
        })
    }
}

/// Parses a disk. A file with a comma in its name is recognised, if it exists.
///
/// # Errors
/// A usage error.
pub(super) fn parse_disk_arg(text: &OsStr, dir: &Path) -> anyhow::Result<DiskSpec> {
    // A call into a mount may hang with it.
    let exists = |path: &Path| mountinfo::enclosing_mount(path).is_none() && path.exists();
    config::parse_disk(text, dir, &exists).map_err(|error| CliError::usage(error.to_string()))
}

fn read_config(path: &Path, dir: &Path) -> anyhow::Result<Config> {
    let full = dir.join(path);
    check_answers(&full)?;
    let (text, base_dir) = read_trusted(&full)
        .with_context(|| format!("cannot read the configuration '{}'", path.display()))?;
    config::parse_config(&text, &base_dir)
        .map_err(|error| CliError::usage(format!("'{}' {error}", path.display())))
}

/// Reads a file that may contain commands (`to=cmd:`), so that nobody else may write it. Returns its
/// text, and the real path of the directory of the file itself, which contains no links.
fn read_trusted(path: &Path) -> anyhow::Result<(String, PathBuf)> {
    let file = trusted_path::open_input(path)?;
    let dir = trusted_path::check_file(&file)?;
    let fs = HostFs::of(&file)?;
    if fs.kind == FsKind::Pseudo {
        anyhow::bail!("it is a {} file of the kernel: name a file", fs.name);
    }
    let bytes = confined::read_to_limit(file, MAX_CONFIG_LEN)?;
    Ok((String::from_utf8(bytes).context("it is not UTF-8")?, dir))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{EXIT_USAGE, exit_code};
    use super::*;

    fn command(mountpoint: Option<&str>, disks: &[&str]) -> MountCommand {
        MountCommand {
            mountpoint: mountpoint.map(PathBuf::from),
            source: None,
            disks: disks.iter().map(OsString::from).collect(),
            common: CommonArgs::default(),
            mode: DaemonMode::Background,
            stdio: StdioMode::Unavailable,
        }
    }

    fn refused(command: MountCommand) -> String {
        let Err(error) = command.into_plan(Path::new("/here")) else { panic!("not refused") };
        assert_eq!(exit_code(&error), EXIT_USAGE);
        error.to_string()
    }

    #[test]
    fn relative_paths_start_at_the_callers_directory() {
        let mut command = command(Some("m"), &["vm.img", "/srv/b.img"]);
        command.common.store = Some("store".into());
        command.common.log = Some("log".into());
        let plan = command.into_plan(Path::new("/here")).unwrap();
        assert_eq!(plan.mountpoint, Path::new("/here/m"));
        assert_eq!(plan.store.as_deref(), Some(Path::new("/here/store")));
        assert_eq!(plan.log.as_deref(), Some(Path::new("/here/log")));
        let sources: Vec<_> = plan.disks.iter().map(|disk| disk.source.clone()).collect();
        let file = |path: &str| config::DiskSource::File(path.into());
        assert_eq!(sources, [file("/here/vm.img"), file("/srv/b.img")]);
        assert_eq!(plan.source, "vm.img");
    }

    #[test]
    fn command_line_has_precedence_over_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let toml = "mountpoint = \"m\"\ncache = \"none\"\nlog = \"l\"\noptions = \"ro,noexec\"\n\
                    [[disk]]\nsource = \"vm.img\"\n";
        fs::write(dir.path().join("a.toml"), toml).unwrap();
        let mut command = command(None, &["b=blank:1G"]);
        command.common.config = Some("a.toml".into());
        command.common.cache = Some(CacheMode::Writeback);
        command.common.options = vec!["rw".into()];
        let plan = command.into_plan(dir.path()).unwrap();
        assert_eq!(plan.mountpoint, dir.path().join("m"));
        assert_eq!(plan.log, Some(dir.path().join("l")));
        assert_eq!(plan.cache, CacheMode::Writeback);
        assert!(!plan.options.read_only && plan.options.noexec);
        let names: Vec<_> = plan.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["vm.img", "b"]);
        assert_eq!(plan.source, "a.toml");
    }

    #[test]
    fn invalid_arguments_are_usage_errors_with_a_remedy() {
        assert!(refused(command(Some("m"), &[])).contains("name a DISK"));
        assert!(refused(command(None, &["vm.img"])).contains("MOUNTPOINT is missing"));
        assert!(refused(command(Some("m"), &["a/x", "b/x"])).contains("NAME=SOURCE"));
        let mut odd = command(Some("m"), &["x"]);
        odd.common.options = vec!["out.zst".into()];
        assert!(refused(odd).contains("quote the disk"));
    }

    #[test]
    fn error_in_the_configuration_names_its_line() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.toml"), "\nmuntpoint = \"m\"\n").unwrap();
        let mut command = command(None, &[]);
        command.common.config = Some("a.toml".into());
        let error = command.into_plan(dir.path()).err().unwrap().to_string();
        assert!(error.starts_with("'a.toml' line 2: unknown key 'muntpoint'"), "{error}");
    }

    #[test]
    fn source_in_the_mount_table_can_be_chosen() {
        let mut named = command(Some("m"), &["vm.img"]);
        named.source = Some("/srv/verbatim".into());
        let dir = Path::new("/here");
        assert_eq!(named.clone().into_plan(dir).unwrap().source, "/srv/verbatim");
        named.common.options = vec!["fsname=lab".into()];
        assert_eq!(named.into_plan(dir).unwrap().source, "lab");
        let mut stored = command(Some("m"), &[]);
        stored.common.store = Some("s".into());
        assert_eq!(stored.into_plan(dir).unwrap().source, "cowslip");
    }
}
