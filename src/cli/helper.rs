//! As mount(8)'s helper: `mount.cowslip SOURCE MOUNTPOINT [-sfnv] [-o OPT,..]` and
//! `umount.cowslip MOUNTPOINT [-flnrv]`, under the names that mount(8) and fstab know.
//!
//! SOURCE is a TOML file (`*.toml`), one disk, or `none`. In the options stand the mount's own,
//! the disk's keys, and `config=`, `store=`, `trust=`, `cache=`, `log=`:
//!
//! ```text
//!   /srv/vm.img  /mnt/vm  cowslip  overlay=/srv/vm.cow,allow_other,nofail  0 0
//! ```
//!
//! A disk's keys are told from options by asking `spec`, so there is no second list of either.

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
use crate::stream::sink::StdioMode;

/// Which helper this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HelperKind {
    /// `mount.cowslip`, `mount.fuse.cowslip`
    Mount,
    /// `umount.cowslip`, `umount.fuse.cowslip`
    Umount,
}

/// The helper that the program was called as, and the arguments after its name.
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
    // At boot nobody reads them; warnings are printed all the same.
    let mut quiet = io::sink();
    let mut stdout = io::stdout();
    let notes: &mut dyn io::Write = if verbose { &mut stdout } else { &mut quiet };
    Ok(start_mount(&plan, notes)?.into_exit_code())
}

/// A helper's arguments, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct HelperArgs {
    /// The letters of the flags, such as `sn`.
    flags: Vec<u8>,
    /// What was behind every `-o`.
    options: Vec<OsString>,
    /// The rest.
    operands: Vec<OsString>,
}

impl HelperArgs {
    /// Sorts `args`. Flags may stand together (`-sn`), and before and behind the places.
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
                        b't' => {} // the type, which is known
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

    /// What `umount_args` is to do. `-f` asks for no more than we do anyway with a dead mount.
    fn umount_args(self) -> anyhow::Result<UmountArgs> {
        let how = match self.has_flag(b'l') {
            true => EndMode::Lazy,
            false => EndMode::WhenUnused,
        };
        let [mountpoint] = <[OsString; 1]>::try_from(self.operands)
            .map_err(|_| CliError::usage("a helper takes one place: umount.cowslip MOUNTPOINT"))?;
        Ok(UmountArgs::new(mountpoint.into(), how))
    }

    /// What is to be mounted.
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

/// Splits at commas.
fn split_commas(list: &OsStr) -> impl Iterator<Item = &OsStr> {
    let pieces = list.as_bytes().split(|byte| *byte == b',');
    pieces.filter(|piece| !piece.is_empty()).map(OsStr::from_bytes)
}

/// fstab's options, each where it belongs.
#[derive(Default)]
struct HelperOptions {
    common: CommonArgs,
    /// `KEY=VALUE` of the disk.
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
            // What is unknown to both is refused as an option.
            _ => {
                let option = option.to_string_lossy().into_owned();
                self.common.options.push(option);
            }
        }
        Ok(())
    }

    /// The disks that `source` means; a configuration is noted as such.
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

/// Whether `option` begins with a disk's key, its value right or wrong: some disk is asked.
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
    fn the_name_decides_what_the_program_is() {
        let role =
            |name: &str| helper_kind(&args(&[name, "x"])).map(|(role, rest)| (role, rest.len()));
        assert_eq!(role("/sbin/mount.cowslip"), Some((HelperKind::Mount, 1)));
        assert_eq!(role("mount.fuse.cowslip"), Some((HelperKind::Mount, 1)));
        assert_eq!(role("/sbin/umount.fuse.cowslip"), Some((HelperKind::Umount, 1)));
        assert_eq!(role("/usr/bin/cowslip"), None);
    }

    #[test]
    fn options_go_to_the_mount_and_keys_to_the_disk() {
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
    fn a_toml_file_is_a_configuration_and_takes_no_keys() {
        let toml = wish(&["/etc/vm.toml", "/mnt", "-oro"]).unwrap();
        assert_eq!(toml.common.config, Some("/etc/vm.toml".into()));
        assert!(toml.disks.is_empty());
        assert_eq!(toml.source.as_deref(), Some("/etc/vm.toml"));
        let error = wish(&["/etc/vm.toml", "/mnt", "-o", "overlay=/x"]).unwrap_err();
        assert!(error.to_string().contains("write it in the TOML file"));
    }

    #[test]
    fn a_store_needs_no_source() {
        let wish = wish(&["none", "/mnt", "-o", "store=/srv/store"]).unwrap();
        assert!(wish.disks.is_empty());
        assert_eq!(wish.common.store, Some("/srv/store".into()));
    }

    #[test]
    fn an_option_unknown_to_both_is_refused_as_an_option() {
        let wish = wish(&["/srv/vm.img", "/mnt", "-o", "allow_othr"]).unwrap();
        let error = wish.into_plan(Path::new("/")).err().unwrap().to_string();
        assert!(error.contains("did you mean \"allow_other\"?"), "{error}");
    }

    #[test]
    fn a_key_with_a_wrong_value_is_still_the_disks() {
        let wish = wish(&["/srv/vm.img", "/mnt", "-o", "block=5,format=raw,mode=rw"]).unwrap();
        assert_eq!(wish.disks, ["/srv/vm.img,block=5,format=raw,mode=rw"]);
    }

    #[test]
    fn an_unmount_takes_mount_8s_flags() {
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
