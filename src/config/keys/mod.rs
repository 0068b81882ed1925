//! The keys of a disk, for the command line and TOML: `table.rs` is the one table of keys, `key.rs`
//! reads the value of one, and `check.rs` knows which keys exclude or need one another.

mod check;
mod key;
mod table;

use std::path::Path;

use self::check::{
    check_direct, check_flow, check_mode, check_part, check_passthrough, check_protocol,
    check_reflink, check_stream, check_tls,
};
use self::key::DiskKey;
use self::table::KEYS;
use super::error::{escaped, hint};
use super::raw_value::RawValue;
use super::{DiskMode, DiskSpec, Format, SpecError};

/// Returns whether `name` is a key of a disk or a stream.
pub(super) fn is_key(name: &str) -> bool {
    KEYS.iter().any(|key| key.name == name)
}

/// Returns the row of the key `name`.
fn find_key(name: &str) -> Result<&'static DiskKey, SpecError> {
    if let Some(key) = KEYS.iter().find(|key| key.name == name) {
        return Ok(key);
    }
    // Values that people write without their key.
    let hint = if DiskMode::NAMES.iter().any(|(mode, _)| *mode == name) {
        format!("did you mean 'mode={name}'?")
    } else if name.parse::<Format>().is_ok() {
        format!("did you mean 'format={name}'?")
    } else if name == "name" {
        "the name stands first, NAME=SOURCE".to_owned()
    } else {
        hint(name, &KEYS.iter().map(|key| key.name).collect::<Vec<_>>())
    };
    Err(SpecError::Unknown { what: "key", given: escaped(name), hint })
}

/// Stores every key in `disk`, whose source is known already, and checks the combination.
///
/// # Errors
/// [`SpecError`] for the first key that is unknown, repeated, not for this kind of disk, or has a
/// wrong value; then for the first bad combination.
pub(super) fn apply_keys(
    disk: &mut DiskSpec,
    keys: &[(String, RawValue)],
    dir: &Path,
) -> Result<(), SpecError> {
    let mut seen: Vec<(&'static DiskKey, &RawValue)> = Vec::new();
    for (name, value) in keys {
        let key = find_key(name)?;
        if seen.iter().any(|(other, _)| other.name == key.name) {
            return Err(SpecError::key(key.name, "is given twice: drop one of them"));
        }
        seen.push((key, value));
    }
    check_flow(disk, &seen)?;
    check_part(&seen)?;
    // Set a stream's direction first, since the other keys depend on it.
    let (first, rest): (Vec<_>, Vec<_>) = seen.iter().partition(|(key, _)| key.is_flow());
    for (key, value) in first.into_iter().chain(rest) {
        key.check_kind(disk)?;
        key.set_value(disk, value, dir)?;
    }
    // Check only now, since `mode` may have been the last key.
    check_mode(disk)?;
    seen.iter().try_for_each(|(key, _)| key.check(disk))?;
    check_reflink(disk)?;
    check_passthrough(disk)?;
    check_direct(disk)?;
    check_tls(disk)?;
    check_protocol(disk)?;
    check_stream(disk, &seen)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::super::parse_disk;
    use super::key::KeyScope;
    use super::*;
    use crate::config::{
        DirectIo, Locking, OverlayKind, Partitions, Passthrough, Resize, SourcePart,
    };

    fn read(text: &str) -> DiskSpec {
        parse_disk(text, Path::new("/home"), &|_| false).unwrap()
    }

    fn why(text: &str) -> String {
        parse_disk(text, Path::new("/home"), &|_| false).unwrap_err().to_string()
    }

    #[test]
    fn key_table_has_no_duplicates() {
        let names: HashSet<&str> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(names.len(), KEYS.len());
    }

    #[test]
    fn every_key_sets_its_field() {
        let disk = read(
            "vm.img,overlay=d,block=64K,limit=1G,size=20G,resize=off,uid=1,gid=2,perm=0640,\
             lock=off,format=qcow2,mode=cow",
        );
        assert_eq!(disk.overlay.as_deref(), Some(Path::new("/home/d")));
        assert_eq!(
            (disk.block, disk.limit, disk.size),
            (Some(65_536), Some(1 << 30), Some(20 << 30))
        );
        assert_eq!((disk.uid, disk.gid, disk.perm), (Some(1), Some(2), Some(0o640)));
        assert_eq!((disk.resize, disk.locking), (Resize::Fixed, Locking::Off));
        assert_eq!((disk.format, disk.mode), (Some(Format::Qcow2), DiskMode::Cow));
    }

    #[test]
    fn reflink_needs_a_persistent_overlay_over_a_whole_file() {
        assert_eq!(read("v.img,overlay=d,reflink").overlay_kind, OverlayKind::Reflink);
        assert_eq!(read("v.img,reflink=on,overlay=d").overlay_kind, OverlayKind::Reflink);
        assert_eq!(read("v.img,overlay=d,reflink=off").overlay_kind, OverlayKind::Blocks);
        assert_eq!(read("v.img,overlay=d").overlay_kind, OverlayKind::Blocks);
        for (keys, hint) in [
            ("v.img,reflink", "write overlay=DIR,reflink"),
            ("v=blank:1M,overlay=d,reflink", "this disk is blank"),
            ("v.img,overlay=d,block=4K,reflink", "'block' is not for reflink"),
            ("v.img,overlay=d,reflink,limit=1G", "'limit' is not for reflink"),
            ("v.img,mode=rw,reflink", "this disk is mode=rw"),
        ] {
            assert!(why(keys).contains(hint), "{}", why(keys));
        }
    }

    #[test]
    fn part_of_a_file_is_a_byte_range_or_a_partition() {
        let bytes = |offset, len| SourcePart::Bytes { offset, len };
        for (keys, part) in [
            ("v.img", SourcePart::Whole),
            ("v.img,offset=1M", bytes(1 << 20, None)),
            ("v.img,len=3", bytes(0, Some(3))),
            ("v.img,len=4G,offset=512", bytes(512, Some(4 << 30))),
            ("v.img,offset=0,mode=rw", bytes(0, None)),
            ("v.img,partition=12,mode=ro", SourcePart::Partition(12)),
        ] {
            assert_eq!(read(keys).part, part, "{keys}");
        }
        for (keys, hint) in [
            ("v.img,offset=513", "offset: '513' is not an offset: take a multiple of 512"),
            ("v.img,len=0", "len: '0' is not a length"),
            ("v.img,partition=0", "partition: '0' is not a number: count from 1"),
            ("v.img,partition=-1", "count from 1"),
            ("v.img,partition=4294967296", "count from 1"),
            ("v.img,partition=sda1", "count from 1"),
            ("v.img,partition", "needs a value: write partition=1"),
            ("v.img,offset=", "needs a value: write offset=1M"),
            ("v.img,len=1MB", "units are powers of 1024"),
            ("v.img,len=1,partition=1", "'partition' is there beside len="),
            ("v.img,partition=1,offset=0", "'partition' is there beside offset="),
            ("v.img,partiton=1", "did you mean 'partition'?"),
            ("v.img,ofset=1M", "did you mean 'offset'?"),
            ("v=blank:1M,offset=512", "this disk is blank"),
            ("v=blank:1M,len=512", "this disk is blank"),
            ("v=stream:1M,to=measure:,partition=1", "is not for streams"),
            ("v.img,overlay=d,reflink,partition=1", "'reflink' is for whole files"),
            ("v.img,overlay=d,reflink,partitions", "'partitions' is not for reflink"),
            ("v=stream:1M,to=measure:,partitions", "'partitions' is not for streams"),
            ("v.img,passthrough", "is for mode=ro and mode=rw"),
            ("v.img,mode=ro,passthrough,len=512", "is for whole files"),
            ("v.img,mode=rw,passthrough,partitions", "does not go with partitions"),
            ("v=blank:1M,passthrough", "this disk is blank"),
            ("v.img,overlay=d,reflink,direct", "'direct' is not for reflink"),
            ("v.img,mode=ro,direct,passthrough", "'direct' is not for passthrough"),
            ("v.img,format=qcow2,direct", "'direct' is for raw bases"),
            ("v=stream:1M,to=measure:,direct", "'direct' is not for streams"),
            ("v.img,partitions=2", "unknown setting '2'"),
        ] {
            assert!(why(keys).contains(hint), "{keys}: {}", why(keys));
        }
    }

    #[test]
    fn partitions_are_allowed_for_every_disk_but_streams() {
        for text in ["v.img", "v.img,mode=ro", "v.img,mode=rw", "v.img,len=1M", "b=blank:1M"] {
            assert_eq!(read(text).partitions, Partitions::Hidden);
            assert_eq!(read(&format!("{text},partitions")).partitions, Partitions::Shown);
            assert_eq!(read(&format!("{text},partitions=off")).partitions, Partitions::Hidden);
        }
    }

    #[test]
    fn bare_switch_means_on() {
        assert_eq!(read("v.img,mode=ro,passthrough").passthrough, Passthrough::On);
        assert_eq!(read("v.img,passthrough=off").passthrough, Passthrough::Off);
        for text in ["v.img", "v.img,mode=ro", "v.img,mode=rw,len=1M,partitions", "b=blank:1M"] {
            assert_eq!(read(text).direct, DirectIo::Off);
            assert_eq!(read(&format!("{text},direct")).direct, DirectIo::On);
            assert_eq!(read(&format!("{text},direct=off")).direct, DirectIo::Off);
        }
        assert_eq!(read("vm.img,resize,lock").resize, Resize::Follow);
        assert_eq!(read("vm.img,resize=on,lock=on").locking, Locking::Qemu);
        assert!(why("vm.img,lock=no").contains("lock: unknown setting 'no'; known are on, off"));
    }

    #[test]
    fn bare_key_that_is_no_switch_needs_a_value() {
        assert_eq!(
            why("v.img,overlay"),
            "disk 'v.img,overlay': 'overlay' needs a value: write overlay=DIR"
        );
        for key in ["overlay=", "mode", "format", "block", "limit=", "size", "uid", "perm="] {
            assert!(why(&format!("v.img,{key}")).contains("needs a value"), "{key}");
        }
    }

    #[test]
    fn unknown_key_error_suggests_the_nearest() {
        for (key, hint) in [
            ("mdoe=ro", "unknown key 'mdoe'; did you mean 'mode'?"),
            ("overly=x", "did you mean 'overlay'?"),
            ("Size=1G", "did you mean 'size'?"),
            ("ro", "unknown key 'ro'; did you mean 'mode=ro'?"),
            ("qcow2", "did you mean 'format=qcow2'?"),
            ("name=x", "the name stands first, NAME=SOURCE"),
            ("colour=red", "known are overlay, reflink, mode, format, block, limit"),
        ] {
            assert!(
                why(&format!("v.img,{key}")).contains(hint),
                "{}",
                why(&format!("v.img,{key}"))
            );
        }
    }

    #[test]
    fn repeated_key_is_refused() {
        assert!(why("v.img,uid=1,uid=1").contains("'uid' is given twice"));
        assert!(why("v.img,lock,lock=off").contains("'lock' is given twice"));
    }

    #[test]
    fn overlay_keys_are_refused_without_an_overlay() {
        for mode in ["ro", "rw"] {
            for key in [
                "overlay=d",
                "block=4K",
                "limit=1G",
                "size=1G",
                "resize=on",
                "resize=off",
                "cow-on-read=on",
                "cow-on-cache=off",
            ] {
                let message = why(&format!("v.img,{key},mode={mode}"));
                let name = key.split('=').next().unwrap();
                let line = format!("'{name}' is for mode=cow, and this disk is mode={mode}");
                assert!(message.contains(&line), "{message}");
                assert!(why(&format!("v.img,mode={mode},{key}")).contains(&line));
            }
            read(&format!("v.img,mode={mode},format=raw,lock=off,uid=0,gid=0,perm=0"));
        }
    }

    #[test]
    fn file_keys_are_refused_for_a_blank_disk() {
        for key in ["format=raw", "lock=off", "lock", "mode=ro", "mode=rw"] {
            assert!(why(&format!("b=blank:1G,{key}")).contains("this disk is blank"), "{key}");
        }
        read("b=blank:1G,mode=cow,overlay=d,block=4K,limit=1M,size=2G,resize=off,uid=1,perm=600");
    }

    #[test]
    fn stream_keys_are_refused_for_other_disks() {
        let streams = [KeyScope::Streams, KeyScope::Outputs, KeyScope::Inputs];
        for key in KEYS.iter().filter(|key| streams.contains(&key.scope)) {
            for text in [format!("v.img,{}=1", key.name), format!("b=blank:1G,{}", key.name)] {
                assert!(why(&text).contains("is only for streams"), "{text}");
            }
        }
    }

    #[test]
    fn block_size_is_a_power_of_two_from_512_to_2m() {
        assert_eq!(read("v.img,block=512").block, Some(512));
        assert_eq!(read("v.img,block=2M").block, Some(2 << 20));
        for block in ["0", "1", "256", "513", "5000", "4M", "3K", "4294967808", "4G"] {
            assert!(why(&format!("v.img,block={block}")).contains("power of two"), "{block}");
        }
    }

    #[test]
    fn perm_is_octal() {
        for (text, perm) in [("0", 0), ("644", 0o644), ("0644", 0o644), ("0777", 0o777)] {
            assert_eq!(read(&format!("v.img,perm={text}")).perm, Some(perm));
        }
        for text in ["1777", "8", "0o644", "+644", "-1", "rw", "10000000000000"] {
            assert!(why(&format!("v.img,perm={text}")).contains("octal"), "{text}");
        }
    }

    #[test]
    fn uid_and_gid_are_numbers() {
        assert_eq!(read("v.img,uid=4294967294").uid, Some(u32::MAX - 1));
        for text in ["root", "-1", "4294967295", "4294967296", "+1", "1K"] {
            assert!(why(&format!("v.img,uid={text}")).contains("number"), "{text}");
            assert!(why(&format!("v.img,gid={text}")).contains("gid: "), "{text}");
        }
    }

    #[test]
    fn non_utf8_value_is_accepted_only_for_a_path() {
        let text = OsStr::from_bytes(b"v.img,overlay=d\xff");
        let disk = parse_disk(text, Path::new("/home"), &|_| false).unwrap();
        assert_eq!(disk.overlay.unwrap().as_os_str().as_bytes(), b"/home/d\xff");
        for text in [&b"v.img,mode=r\xff"[..], b"v.img,size=\xff", b"v.img,\xff=1", b"\xff=v.img"] {
            assert!(parse_disk(OsStr::from_bytes(text), Path::new("/"), &|_| false).is_err());
        }
        let text = OsStr::from_bytes(b"v.img,gid=\xff");
        let error = parse_disk(text, Path::new("/"), &|_| false).unwrap_err().to_string();
        assert!(error.ends_with("is not UTF-8: write it as in gid=1000"), "{error}");
    }
}
