//! The helpers of mount(8), `mount.cowslip SOURCE MOUNTPOINT [-sfnv] [-o OPT,..]` and
//! `umount.cowslip MOUNTPOINT [-flnrv]`, under the names that mount(8) and fstab use.
//!
//! SOURCE is a TOML file (`*.toml`), one disk, or `none`. The options contain the mount's own
//! options, the keys of the disk, and `config=`, `store=`, `trust=`, `cache=`, `log=`:
//!
//! ```text
//!   /srv/vm.img  /mnt/vm  cowslip  overlay=/srv/vm.cow,allow_other,nofail  0 0
//! ```
//!
//! Keys of a disk are told from mount options by the parsers in `config`, so there is no second
//! list of either.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::mount::{current_dir, start_mount};
use super::plan::{CommonArgs, MountCommand};
use super::umount::{self, EndMode, UmountArgs};
use super::{CliError, EXIT_OK};
use crate::config::{self, CacheMode, SpecError};
use crate::mount::DaemonMode;
use crate::stream::context::StdioMode;

/// The helper that this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HelperKind {
    /// `mount.cowslip`, `mount.fuse.cowslip`
    Mount,
    /// `umount.cowslip`, `umount.fuse.cowslip`
    Umount,
}

/// Returns the helper that the program was called as, and the arguments after its name.
pub(super) fn helper_kind(args: &[OsString]) -> Option<(HelperKind, &[OsString])> {
    let (program, rest) = args.split_first()?;
    match Path::new(program).file_name()?.as_bytes() {
        b"mount.cowslip" | b"mount.fuse.cowslip" => Some((HelperKind::Mount, rest)),
        b"umount.cowslip" | b"umount.fuse.cowslip" => Some((HelperKind::Umount, rest)),
        _ => None,
    }
}

pub(super) fn run(role: HelperKind, args: &[OsString]) -> anyhow::Result<u8> {
    let words = HelperArgs::parse(role, args)?;
    match role {
        HelperKind::Umount => umount::run(&words.umount_args()?),
        HelperKind::Mount => mount(words),
    }
}

fn mount(words: HelperArgs) -> anyhow::Result<u8> {
    let (fake, verbose) = (words.has_flag(b'f'), words.has_flag(b'v'));
    let dir = current_dir()?;
    let plan = words.mount_command(&dir)?.into_plan(&dir)?;
    if fake {
        return Ok(EXIT_OK);
    }
    // At boot nobody reads the notes; warnings are printed anyway.
    let mut quiet = io::sink();
    let mut stdout = io::stdout();
    let notes: &mut dyn io::Write = if verbose { &mut stdout } else { &mut quiet };
    Ok(start_mount(&plan, notes)?.into_exit_code())
}

/// The arguments of a helper, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct HelperArgs {
    /// Letters of the flags, such as `sn`.
    flags: Vec<u8>,
    /// Values of all `-o`.
    options: Vec<OsString>,
    /// All other arguments.
    operands: Vec<OsString>,
}

impl HelperArgs {
    /// Sorts `args`. Flags may be combined (`-sn`), and may stand before or after the operands.
    fn parse(role: HelperKind, args: &[OsString]) -> anyhow::Result<Self> {
        let known: &[u8] = match role {
            HelperKind::Mount => b"sfnvrw",
            HelperKind::Umount => b"flnrvi",
        };
        let mut words = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let bytes = arg.as_bytes();
            match bytes {
                b"--" => words.operands.extend(args.by_ref().cloned()),
                [b'-', letter @ (b'o' | b't' | b'N'), joined @ ..] => {
                    let value = match joined {
                        [] => args.next().cloned(),
                        joined => Some(OsString::from_vec(joined.to_vec())),
                    };
                    let value = value.ok_or_else(|| usage_error(arg, "needs a value"))?;
                    match letter {
                        b'o' => words.options.push(value),
                        b't' => {} // the type is known
                        _ => return Err(usage_error(arg, "is not supported")),
                    }
                }
                [b'-', flags @ ..] if !flags.is_empty() => {
                    if !flags.iter().all(|flag| known.contains(flag)) {
                        return Err(usage_error(arg, "is unknown"));
                    }
                    words.flags.extend(flags);
                }
                _ => words.operands.push(arg.clone()),
            }
        }
        Ok(words)
    }

    fn has_flag(&self, flag: u8) -> bool {
        self.flags.contains(&flag)
    }

    /// Returns the arguments for `umount`. `-f` asks for no more than is done for a dead mount
    /// anyway.
    fn umount_args(self) -> anyhow::Result<UmountArgs> {
        let how = match self.has_flag(b'l') {
            true => EndMode::Lazy,
            false => EndMode::WhenUnused,
        };
        let [mountpoint] = <[OsString; 1]>::try_from(self.operands)
            .map_err(|_| CliError::usage("a helper takes one place: umount.cowslip MOUNTPOINT"))?;
        Ok(UmountArgs::new(mountpoint.into(), how))
    }

    /// Returns the mount command that the arguments describe.
    fn mount_command(self, dir: &Path) -> anyhow::Result<MountCommand> {
        let flags = self.flags;
        let [source, mountpoint] = <[OsString; 2]>::try_from(self.operands).map_err(|_| {
            CliError::usage("a helper takes two places: mount.cowslip SOURCE MOUNTPOINT")
        })?;
        let mut sorted = HelperOptions::default();
        for option in self.options.iter().flat_map(|list| split_commas(list)) {
            sorted.add_option(option, dir)?;
        }
        for flag in flags {
            match flag {
                b'r' => sorted.common.options.push("ro".into()),
                b'w' => sorted.common.options.push("rw".into()),
                _ => {}
            }
        }
        Ok(MountCommand {
            disks: sorted.disks(&source)?,
            mountpoint: Some(mountpoint.into()),
            source: Some(source.to_string_lossy().into_owned()),
            common: sorted.common,
            mode: DaemonMode::Background,
            stdio: StdioMode::Unavailable,
        })
    }
}

fn usage_error(arg: &OsStr, why: &str) -> anyhow::Error {
    let arg = arg.to_string_lossy();
    CliError::usage(format!("'{arg}' {why}: see mount(8), external helpers"))
}

/// Splits at commas, and skips empty options.
fn split_commas(list: &OsStr) -> impl Iterator<Item = &OsStr> {
    let pieces = list.as_bytes().split(|byte| *byte == b',');
    pieces.filter(|piece| !piece.is_empty()).map(OsStr::from_bytes)
}

/// The options of fstab, sorted by receiver.
#[derive(Default)]
struct HelperOptions {
    common: CommonArgs,
    /// Keys of the disk, as `KEY=VALUE`.
    keys: Vec<OsString>,
}

impl HelperOptions {
    fn add_option(&mut self, option: &OsStr, dir: &Path) -> anyhow::Result<()> {
        let bytes = option.as_bytes();
        let cut = bytes.iter().position(|byte| *byte == b'=');
        let (key, value) = bytes.split_at(cut.unwrap_or(bytes.len()));
        let value = value.get(1..).map(OsStr::from_bytes);
        let path = value.map(PathBuf::from);
        match (key, path) {
            (b"config" | b"store" | b"log" | b"trust", path)
                if path.as_deref().is_none_or(|path| path == Path::new("")) =>
            {
                let key = key.escape_ascii();
                return Err(CliError::usage(format!("{key} needs a value: write {key}=PATH")));
            }
            (b"config", path @ Some(_)) => self.common.config = path,
            (b"store", path @ Some(_)) => self.common.store = path,
            (b"log", path @ Some(_)) => self.common.log = path,
            (b"trust", Some(dir)) => self.common.trust.dirs.push(dir),
            (b"cache", Some(word)) => {
                let cache = word.to_string_lossy().parse::<CacheMode>();
                self.common.cache =
                    Some(cache.map_err(|error| CliError::usage(error.to_string()))?);
            }
            _ if is_disk_key(option, dir) => self.keys.push(option.to_owned()),
            // An option unknown to both is refused as a mount option.
            _ => {
                let option = option.to_string_lossy().into_owned();
                self.common.options.push(option);
            }
        }
        Ok(())
    }

    /// Returns the disks that `source` denotes; a TOML file is stored as the configuration instead.
    fn disks(&mut self, source: &OsStr) -> anyhow::Result<Vec<OsString>> {
        let is_config = Path::new(source).extension() == Some(OsStr::new("toml"));
        if is_config {
            self.common.config = Some(source.into());
        }
        if is_config || source == "none" || source == "cowslip" {
            return match self.keys.first() {
                None => Ok(Vec::new()),
                Some(key) => Err(CliError::usage(format!(
                    "'{}' is a disk's key, and '{}' is no disk: write it in the TOML file",
                    key.to_string_lossy(),
                    source.to_string_lossy()
                ))),
            };
        }
        let mut disk = source.to_owned();
        for key in &self.keys {
            disk.push(",");
            disk.push(key);
        }
        Ok(vec![disk])
    }
}

/// Returns whether `option` starts with a key of a disk, even with a wrong value, by parsing a
/// sample disk.
fn is_disk_key(option: &OsStr, dir: &Path) -> bool {
    if config::parse_mount_options([option.to_string_lossy()]).is_ok() {
        return false;
    }
    let mut disk = OsString::from("probe=blank:1,");
    disk.push(option);
    let is_unknown = |error: &SpecError| matches!(error, SpecError::Unknown { what: "key", .. });
    match config::parse_disk(&disk, dir, &|_: &Path| false) {
        Ok(_) => true,
        Err(SpecError::Within { why, .. }) => !is_unknown(&why),
        Err(error) => !is_unknown(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    fn wish(words: &[&str]) -> anyhow::Result<MountCommand> {
        HelperArgs::parse(HelperKind::Mount, &args(words))?.mount_command(Path::new("/"))
    }

    #[test]
    fn program_name_selects_the_helper() {
        let role =
            |name: &str| helper_kind(&args(&[name, "x"])).map(|(role, rest)| (role, rest.len()));
        assert_eq!(role("/sbin/mount.cowslip"), Some((HelperKind::Mount, 1)));
        assert_eq!(role("mount.fuse.cowslip"), Some((HelperKind::Mount, 1)));
        assert_eq!(role("/sbin/umount.fuse.cowslip"), Some((HelperKind::Umount, 1)));
        assert_eq!(role("/usr/bin/cowslip"), None);
    }

    #[test]
    fn options_are_sorted_into_mount_options_and_disk_keys() {
        let line = "rw,overlay=/srv/vm.cow,allow_other,nofail,x-systemd.automount,resize=off,\
                    cache=none,log=/l,uid=7";
        let wish = wish(&["/srv/vm.img", "/mnt/vm", "-sn", "-o", line]).unwrap();
        assert_eq!(wish.disks, ["/srv/vm.img,overlay=/srv/vm.cow,resize=off,uid=7"]);
        assert_eq!(wish.common.options, ["rw", "allow_other", "nofail", "x-systemd.automount"]);
        assert_eq!(wish.common.cache, Some(CacheMode::None));
        assert_eq!(wish.common.log, Some("/l".into()));
        assert_eq!(wish.source.as_deref(), Some("/srv/vm.img"));
        assert_eq!(wish.mountpoint, Some("/mnt/vm".into()));
    }

    #[test]
    fn toml_source_is_a_configuration_and_accepts_no_keys() {
        let toml = wish(&["/etc/vm.toml", "/mnt", "-oro"]).unwrap();
        assert_eq!(toml.common.config, Some("/etc/vm.toml".into()));
        assert!(toml.disks.is_empty());
        assert_eq!(toml.source.as_deref(), Some("/etc/vm.toml"));
        let error = wish(&["/etc/vm.toml", "/mnt", "-o", "overlay=/x"]).unwrap_err();
        assert!(error.to_string().contains("write it in the TOML file"));
    }

    #[test]
    fn store_needs_no_source() {
        let wish = wish(&["none", "/mnt", "-o", "store=/srv/store"]).unwrap();
        assert!(wish.disks.is_empty());
        assert_eq!(wish.common.store, Some("/srv/store".into()));
    }

    #[test]
    fn option_that_names_a_path_needs_one() {
        for key in ["config", "store", "log", "trust"] {
            for option in [key.to_owned(), format!("{key}=")] {
                let error = wish(&["none", "/mnt", "-o", &option]).unwrap_err();
                let line = format!("{key} needs a value: write {key}=PATH");
                assert_eq!(error.to_string(), line);
            }
        }
    }

    #[test]
    fn unknown_option_is_refused_as_a_mount_option() {
        let wish = wish(&["/srv/vm.img", "/mnt", "-o", "allow_othr"]).unwrap();
        let error = wish.into_plan(Path::new("/")).err().unwrap().to_string();
        assert!(error.contains("did you mean \"allow_other\"?"), "{error}");
    }

    #[test]
    fn key_with_a_wrong_value_still_belongs_to_the_disk() {
        let wish = wish(&["/srv/vm.img", "/mnt", "-o", "block=5,format=raw,mode=rw"]).unwrap();
        assert_eq!(wish.disks, ["/srv/vm.img,block=5,format=raw,mode=rw"]);
    }

    #[test]
    fn umount_helper_accepts_the_flags_of_mount_8() {
        let words = HelperArgs::parse(
            HelperKind::Umount,
            &args(&["/mnt", "-n", "-l", "-t", "fuse.cowslip"]),
        );
        let umount = words.unwrap().umount_args().unwrap();
        assert_eq!(umount, UmountArgs::new("/mnt".into(), EndMode::Lazy));
        assert!(HelperArgs::parse(HelperKind::Umount, &args(&["/mnt", "-x"])).is_err());
        assert!(wish(&["/srv/vm.img"]).is_err());
        assert!(wish(&["a", "b", "-N", "/proc/1/ns/mnt"]).is_err());
        assert!(wish(&["a", "b", "-o"]).is_err());
    }
}
