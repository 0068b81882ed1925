//! The mount options, `-o OPT,..`, in the syntax of mount(8) and fstab.

use super::error::{escaped, nearest, parse_decimal};
use super::{SpecError, keys};

/// The options of a mount. The last of several contradictory options wins, as in mount(8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// `allow_other`: other users may access the mount, within the limits of owner and mode.
    pub allow_other: bool,
    /// `nonempty`: the mountpoint may contain files, which the mount hides.
    pub nonempty: bool,
    /// `ro`: nothing in the mount can be changed, whatever the modes of the disks.
    pub read_only: bool,
    /// `nodev`, on unless `dev` is given, like fusermount3.
    pub nodev: bool,
    /// `nosuid`, on unless `suid` is given, like fusermount3.
    pub nosuid: bool,
    /// `noexec`.
    pub noexec: bool,
    /// `noatime`.
    pub noatime: bool,
    /// `io_timeout=SECONDS`: seconds that a base may take to answer before a request fails with
    /// `EIO`; 1 to 3600.
    pub io_timeout: u64,
    /// `fsname=NAME`: the source that the mount table shows; `None` leaves the choice to the
    /// caller.
    pub fsname: Option<String>,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            allow_other: false,
            nonempty: false,
            read_only: false,
            nodev: true,
            nosuid: true,
            noexec: false,
            noatime: false,
            io_timeout: 30,
            fsname: None,
        }
    }
}

/// The effect of an option.
enum OptionEffect {
    /// A flag without a value.
    Flag(fn(&mut MountOptions)),
    /// An option with a value: an example of the value, and the setter.
    Value(&'static str, fn(&mut MountOptions, &str) -> Result<(), SpecError>),
    /// An option for mount(8), systemd or other readers of fstab, or one that is always on.
    Ignored,
}

/// Every option except `x-*`.
static OPTIONS: &[(&str, OptionEffect)] = &[
    ("allow_other", OptionEffect::Flag(|options| options.allow_other = true)),
    ("nonempty", OptionEffect::Flag(|options| options.nonempty = true)),
    ("ro", OptionEffect::Flag(|options| options.read_only = true)),
    ("rw", OptionEffect::Flag(|options| options.read_only = false)),
    ("nodev", OptionEffect::Flag(|options| options.nodev = true)),
    ("dev", OptionEffect::Flag(|options| options.nodev = false)),
    ("nosuid", OptionEffect::Flag(|options| options.nosuid = true)),
    ("suid", OptionEffect::Flag(|options| options.nosuid = false)),
    ("noexec", OptionEffect::Flag(|options| options.noexec = true)),
    ("exec", OptionEffect::Flag(|options| options.noexec = false)),
    ("noatime", OptionEffect::Flag(|options| options.noatime = true)),
    ("io_timeout", OptionEffect::Value("SECONDS", set_io_timeout)),
    ("fsname", OptionEffect::Value("NAME", set_fsname)),
    // Always on: the kernel checks owner and mode.
    ("default_permissions", OptionEffect::Ignored),
    ("defaults", OptionEffect::Ignored),
    ("auto", OptionEffect::Ignored),
    ("noauto", OptionEffect::Ignored),
    ("nofail", OptionEffect::Ignored),
    ("user", OptionEffect::Ignored),
    ("users", OptionEffect::Ignored),
    ("nouser", OptionEffect::Ignored),
    ("_netdev", OptionEffect::Ignored),
];

fn set_io_timeout(options: &mut MountOptions, text: &str) -> Result<(), SpecError> {
    let seconds = parse_decimal(text).filter(|seconds| (1..=3600).contains(seconds));
    options.io_timeout = seconds.ok_or_else(|| {
        SpecError::value(text, "a time-out: take whole seconds from 1 to 3600").within("io_timeout")
    })?;
    Ok(())
}

fn set_fsname(options: &mut MountOptions, text: &str) -> Result<(), SpecError> {
    if text.chars().any(char::is_control) {
        let wanted = "a name for the mount table: drop the control characters";
        return Err(SpecError::value(text, wanted).within("fsname"));
    }
    options.fsname = Some(text.to_owned());
    Ok(())
}

/// Parses mount options: each item is one option, or several separated by commas. Empty options are
/// skipped, as in mount(8).
///
/// # Errors
/// [`SpecError`] for the first option that is unknown, unsupported, or has a wrong value.
pub fn parse_mount_options<T: AsRef<str>>(
    list: impl IntoIterator<Item = T>,
) -> Result<MountOptions, SpecError> {
    let mut options = MountOptions::default();
    for item in list {
        for option in item.as_ref().split(',').filter(|option| !option.is_empty()) {
            apply_option(&mut options, option)?;
        }
    }
    Ok(options)
}

fn apply_option(options: &mut MountOptions, option: &str) -> Result<(), SpecError> {
    let (name, value) = match option.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (option, None),
    };
    if name.starts_with("x-") {
        return Ok(());
    }
    let Some((_, effect)) = OPTIONS.iter().find(|(known, _)| *known == name) else {
        return Err(unknown_option(name, option));
    };
    match (effect, value) {
        (OptionEffect::Ignored, None) => {}
        (OptionEffect::Flag(set), None) => set(options),
        (OptionEffect::Value(_, set), Some(value)) if !value.is_empty() => set(options, value)?,
        (OptionEffect::Value(sample, _), _) => {
            return Err(SpecError::key(name, format!("needs a value: write {name}={sample}")));
        }
        (OptionEffect::Flag(_) | OptionEffect::Ignored, Some(_)) => {
            return Err(SpecError::key(option, format!("takes no value: write {name}")));
        }
    }
    Ok(())
}

/// Returns the error for an unknown `option`, which usually belongs to a disk or is misspelled.
fn unknown_option(name: &str, option: &str) -> SpecError {
    let given = escaped(option);
    if name == "allow_root" {
        return SpecError::key(
            name,
            "is not supported: use allow_other, and uid= and perm= of a disk",
        );
    }
    let hint = if keys::is_key(name) {
        format!("it is a disk's key: write it after the disk, SOURCE,{given}")
    } else if let Some(near) = nearest(name, OPTIONS.iter().map(|(known, _)| *known)) {
        format!("did you mean \"{near}\"?")
    } else {
        // The shell has split `vm=stream:1G,to=cmd:zstd -o out.zst` into three words.
        format!("quote the disk: 'NAME=SOURCE,KEY=VALUE -o {given}'")
    };
    SpecError::UnknownOption { given, hint }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(list: &str) -> MountOptions {
        parse_mount_options([list]).unwrap()
    }

    fn why(list: &str) -> String {
        parse_mount_options([list]).unwrap_err().to_string()
    }

    #[test]
    fn default_mount_is_private_and_safe() {
        let options = read("");
        assert_eq!(options, MountOptions::default());
        assert!(options.nodev && options.nosuid);
        assert!(!options.allow_other && !options.read_only && !options.nonempty);
        assert_eq!(options.io_timeout, 30);
    }

    #[test]
    fn every_option_sets_its_field() {
        let expected = MountOptions {
            allow_other: true,
            nonempty: true,
            read_only: true,
            nodev: false,
            nosuid: false,
            noexec: true,
            noatime: true,
            io_timeout: 3600,
            fsname: Some("/srv/a=b.toml".to_owned()),
        };
        let list = "allow_other,nonempty,ro,dev,suid,noexec,noatime,io_timeout=3600";
        let items = [list, "fsname=/srv/a=b.toml"];
        assert_eq!(parse_mount_options(items).unwrap(), expected);
        assert_eq!(parse_mount_options(items.map(String::from)).unwrap(), expected);
    }

    #[test]
    fn last_of_two_opposite_options_wins() {
        assert!(!read("ro,rw").read_only);
        assert!(read("rw,ro").read_only);
        assert!(!read("noexec,exec").noexec);
        assert!(read("dev,nodev").nodev);
        assert!(read("suid,nosuid").nosuid);
        assert_eq!(read("io_timeout=5,io_timeout=6").io_timeout, 6);
    }

    #[test]
    fn options_for_fstab_readers_are_ignored() {
        let list = "defaults,auto,noauto,nofail,user,users,_netdev,nouser,default_permissions,\
                    x-systemd.requires=/srv,x-gvfs-hide,,";
        assert_eq!(read(list), MountOptions::default());
    }

    #[test]
    fn stray_word_error_says_to_quote_the_disk() {
        assert_eq!(
            why("out.zst"),
            "unknown mount option \"out.zst\"; quote the disk: \
             'NAME=SOURCE,KEY=VALUE -o out.zst'"
        );
    }

    #[test]
    fn misspelled_option_error_suggests_the_nearest() {
        assert_eq!(
            why("allow_othr"),
            "unknown mount option \"allow_othr\"; did you mean \"allow_other\"?"
        );
        assert!(why("io-timeout=3").contains("did you mean \"io_timeout\"?"));
    }

    #[test]
    fn disk_key_error_says_to_write_it_after_the_disk() {
        assert!(why("overlay=/srv/x").ends_with("SOURCE,overlay=/srv/x"));
    }

    #[test]
    fn allow_root_error_suggests_allow_other() {
        assert!(why("allow_root").contains("use allow_other"));
    }

    #[test]
    fn values_are_required_or_refused_per_option() {
        assert!(why("ro=1").contains("takes no value"));
        assert!(why("defaults=1").contains("takes no value"));
        for list in ["io_timeout", "io_timeout=", "fsname="] {
            assert!(why(list).contains("needs a value"), "{list}");
        }
        for list in ["io_timeout=0", "io_timeout=3601", "io_timeout=+5", "io_timeout=1.5"] {
            assert!(why(list).contains("from 1 to 3600"), "{list}");
        }
        assert!(!why("fsname=a\nb").contains('\n'));
    }

    proptest! {
        #[test]
        fn parser_survives_any_text(text in "(?s:.{0,40})|[a-z_]{1,12}=?[a-z0-9,]{0,9}") {
            if let Err(error) = parse_mount_options([&text]) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
