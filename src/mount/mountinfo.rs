//! Which mounts there are and which of them a path lies in, read from `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)) and from symlinks outside the mounts.
//!
//! No call is ever made into a cowslip mount, so one that hangs or is dead is found as well as one
//! that works.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

/// The type of every cowslip mount, in mtab and mountinfo.
pub const FSTYPE: &str = "fuse.cowslip";

/// One line of `/proc/self/mountinfo`. Format: proc_pid_mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The mount's id; what `mnt_id` means in a process's fdinfo.
    pub id: u64,
    /// The id of the mount it is mounted on.
    pub parent: u64,
    /// Major and minor number of the file system: `st_dev` of its files.
    pub dev: (u32, u32),
    /// The part of the file system that shows here; `/` except for bind mounts.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The type, such as `fuse.cowslip`.
    pub fstype: String,
    /// The source, as it was mounted.
    pub source: OsString,
    /// Who mounted it, where the file system says so: FUSE does (`user_id`).
    pub owner: Option<u32>,
}

impl MountEntry {
    /// Whether it is one of ours, by its type.
    pub fn is_cowslip(&self) -> bool {
        self.fstype == FSTYPE
    }

    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let number = |field: Option<&[u8]>| str::from_utf8(field?).ok()?.parse().ok();
        let id = number(fields.next())?;
        let parent = number(fields.next())?;
        let (major, minor) = str::from_utf8(fields.next()?).ok()?.split_once(':')?;
        let dev = (major.parse().ok()?, minor.parse().ok()?);
        let root = PathBuf::from(unescape(fields.next()?));
        let mountpoint = PathBuf::from(unescape(fields.next()?));
        // The mount's options and any number of optional fields end at a lone dash.
        fields.find(|&field| field == b"-")?;
        let fstype = unescape(fields.next()?).to_string_lossy().into_owned();
        let source = unescape(fields.next()?);
        let owner = fields.next().and_then(fuse_owner);
        Some(Self { id, parent, dev, root, mountpoint, fstype, source, owner })
    }

    /// Whether what it says may be believed: whoever serves it is root or this process's user.
    pub fn is_trusted(&self) -> bool {
        let own = rustix::process::geteuid().as_raw();
        self.owner.is_some_and(|owner| owner == 0 || owner == own)
    }
}

/// The user in a FUSE mount's own options.
fn fuse_owner(options: &[u8]) -> Option<u32> {
    let options = str::from_utf8(options).ok()?;
    options.split(',').find_map(|option| option.strip_prefix("user_id="))?.parse().ok()
}

/// Undoes the kernel's octal escapes (`\040` is a space).
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                tail
            }
            _ => {
                bytes.push(*first);
                tail
            }
        };
    }
    OsString::from_vec(bytes)
}

/// Reads a mountinfo file's `text`; a line that makes no sense is left out.
pub(super) fn parse_mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(MountEntry::parse).collect()
}

/// All mounts this process sees, in the kernel's order.
///
/// # Errors
/// The host's errno when `/proc` is not mounted.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse_mountinfo(&fs::read("/proc/self/mountinfo")?))
}

/// As [`mounts`], for those who can do nothing about a missing `/proc`.
pub(super) fn mounts_or_empty() -> Vec<MountEntry> {
    mounts().unwrap_or_else(|error| {
        log::warn!("cannot read /proc/self/mountinfo: {error}");
        Vec::new()
    })
}

/// The mount that `path` (absolute, without symlinks) lies in, as a walk from `/` would find it:
/// at every step the mount that is met first, so what lies hidden under another is not found.
fn visible_mount<'a>(entries: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let ids: HashSet<u64> = entries.iter().map(|entry| entry.id).collect();
    let mut at: Option<&MountEntry> = None;
    // As many steps as there are mounts: a table read while it changed may hold a circle.
    for _ in entries {
        let next = entries
            .iter()
            .filter(|entry| match at {
                Some(at) => entry.parent == at.id && entry.id != at.id,
                // In a chroot the mount of `/` itself may be missing from the table.
                None => !ids.contains(&entry.parent) || entry.parent == entry.id,
            })
            .filter(|entry| path.starts_with(&entry.mountpoint))
            .max_by_key(|entry| std::cmp::Reverse(entry.mountpoint.as_os_str().len()));
        let Some(next) = next else { break };
        at = Some(next);
    }
    at
}

/// `path` made absolute and free of symlinks, without a call into any cowslip mount: from its
/// mountpoint on the rest is taken as it is spelt. Names that do not exist are kept too.
///
/// # Errors
/// `ELOOP` on a circle of symlinks; the errno of getcwd(2) for a relative path.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    resolve_in(&mounts_or_empty(), path)
}

fn resolve_in(entries: &[MountEntry], path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    walk(entries, &path, |link| fs::read_link(link).ok())
}

fn walk(
    entries: &[MountEntry],
    path: &Path,
    read_link: impl Fn(&Path) -> Option<PathBuf>,
) -> io::Result<PathBuf> {
    /// The kernel's own limit (path_resolution(7)).
    const MAX_LINKS: usize = 40;

    let names = |path: &Path| -> Vec<OsString> {
        let names = path.components().filter(|part| match part {
            Component::Normal(_) | Component::ParentDir => true,
            Component::Prefix(_) | Component::RootDir | Component::CurDir => false,
        });
        names.map(|part| part.as_os_str().to_owned()).rev().collect()
    };
    let mut pending = names(path);
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = pending.pop() {
        if name == OsStr::new("..") {
            at.pop();
            continue;
        }
        at.push(name);
        if visible_mount(entries, &at).is_some_and(MountEntry::is_cowslip) {
            continue;
        }
        let Some(target) = read_link(&at) else {
            continue;
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        at.pop();
        if target.is_absolute() {
            at = PathBuf::from("/");
        }
        pending.extend(names(&target));
    }
    Ok(at)
}

/// The topmost mount at exactly `path`, of whatever type.
pub fn entry_at(path: &Path) -> Option<MountEntry> {
    let entries = mounts_or_empty();
    let path = resolve_in(&entries, path).ok()?;
    visible_mount(&entries, &path).filter(|entry| entry.mountpoint == path).cloned()
}

/// All cowslip mounts this process sees, dead ones too; bind mounts of single files are left out.
pub fn cowslip_mounts() -> Vec<MountEntry> {
    let mut entries = mounts_or_empty();
    entries.retain(|entry| entry.is_cowslip() && entry.root == Path::new("/"));
    entries
}

/// A path inside a cowslip mount: see [`enclosing_mount`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathInMount {
    /// The mount.
    pub mount: MountEntry,
    /// The path from the mount's own root on, without a leading `/`; empty for the mountpoint.
    pub inner: PathBuf,
}

/// The cowslip mount that `path` lies in. Makes no call into it, so a mount that hangs is found
/// as well as one that works; whether the path exists there is not known.
pub fn enclosing_mount(path: &Path) -> Option<PathInMount> {
    let entries = mounts_or_empty();
    let path = resolve_in(&entries, path).ok()?;
    enclosing_mount_in(&entries, &path)
}

fn enclosing_mount_in(entries: &[MountEntry], path: &Path) -> Option<PathInMount> {
    let seen = visible_mount(entries, path).filter(|entry| entry.is_cowslip())?;
    let below = path.strip_prefix(&seen.mountpoint).ok()?;
    let root = Path::new("/");
    let inner = match below.as_os_str().is_empty() {
        true => seen.root.clone(), // join("") would add a slash
        false => seen.root.join(below),
    };
    // A file bound somewhere else is found in the whole mount, where `.cowslip` is.
    let whole = entries.iter().find(|entry| entry.dev == seen.dev && entry.root == root);
    let inner = inner.strip_prefix(root).ok()?.to_owned();
    Some(PathInMount { mount: whole.filter(|_| seen.root != root).unwrap_or(seen).clone(), inner })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    fn entry(id: u64, parent: u64, mountpoint: &str, fstype: &str) -> MountEntry {
        let line = format!("{id} {parent} 0:{id} / {mountpoint} rw - {fstype} src rw");
        MountEntry::parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn a_mountinfo_line_is_read_with_optional_fields_and_escapes() {
        let line = b"36 35 98:0 /a\\040b /mnt/x\\134y\xff rw,noatime master:1 shared:2 - \
                     fuse.cowslip /srv/a,b\\011c.img rw,user_id=0";
        let entry = MountEntry::parse(line).unwrap();
        assert_eq!((entry.id, entry.parent, entry.dev), (36, 35, (98, 0)));
        assert_eq!(entry.root, Path::new("/a b"));
        assert_eq!(entry.mountpoint.as_os_str().as_bytes(), b"/mnt/x\\y\xff");
        assert_eq!(entry.source, "/srv/a,b\tc.img");
        assert!(entry.is_cowslip());
        assert_eq!((entry.owner, entry.is_trusted()), (Some(0), true));
    }

    #[test]
    fn a_mount_of_another_user_or_of_nobody_known_is_not_trusted() {
        let trusted = |options: &str| {
            let line = format!("36 35 0:9 / /m rw - fuse.cowslip x {options}");
            MountEntry::parse(line.as_bytes()).unwrap().is_trusted()
        };
        let own = rustix::process::geteuid().as_raw();
        assert!(trusted("rw,user_id=0,group_id=0") && trusted(&format!("rw,user_id={own}")));
        for options in ["rw,user_id=12345", "rw", "rw,user_id=", "rw,group_id=0,user_id=x", ""] {
            assert!(!trusted(options), "{options}");
        }
    }

    #[test]
    fn a_mount_with_an_empty_source_is_read() {
        let entry = MountEntry::parse(b"36 35 0:9 / /m rw -  tmpfs  rw");
        assert!(entry.is_some_and(|entry| entry.fstype.is_empty()));
        let entry = MountEntry::parse(b"36 35 0:9 / /m rw - tmpfs  rw").unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.len()), ("tmpfs", 0));
    }

    #[test]
    fn our_own_mountinfo_is_read_whole() {
        let text = fs::read("/proc/self/mountinfo").unwrap();
        let lines = text.iter().filter(|&&byte| byte == b'\n').count();
        assert!(lines > 0);
        assert_eq!(parse_mountinfo(&text).len(), lines);
    }

    #[test]
    fn half_an_escape_is_kept_as_it_is() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"\\"), "\\");
        assert_eq!(unescape(b"\\134040"), "\\040");
        assert_eq!(unescape(b"\\777"), "\\777");
    }

    #[test]
    fn the_topmost_visible_mount_is_found() {
        let table = [
            entry(1, 0, "/", "ext4"),
            entry(2, 1, "/m", "fuse.cowslip"),
            entry(3, 2, "/m", "fuse.cowslip"),
            entry(4, 1, "/hidden/m", "fuse.cowslip"),
            entry(5, 1, "/hidden", "tmpfs"),
        ];
        let id = |path: &str| visible_mount(&table, Path::new(path)).map(|entry| entry.id);
        assert_eq!(id("/m/vm1.img"), Some(3));
        assert_eq!(id("/m"), Some(3));
        assert_eq!(id("/mm"), Some(1));
        assert_eq!(id("/hidden/m/vm1.img"), Some(5));
    }

    #[test]
    fn a_table_without_a_root_or_with_a_circle_does_not_hang() {
        let chroot = [entry(7, 3, "/m", "fuse.cowslip")];
        assert_eq!(visible_mount(&chroot, Path::new("/m/x")).map(|entry| entry.id), Some(7));
        assert_eq!(visible_mount(&chroot, Path::new("/n")), None);
        let circle = [entry(1, 0, "/", "x"), entry(2, 3, "/", "x"), entry(3, 2, "/", "x")];
        assert!(visible_mount(&circle, Path::new("/m")).is_some());
    }

    #[test]
    fn symlinks_are_followed_outside_a_mount_only() {
        let table = [entry(1, 0, "/", "ext4"), entry(2, 1, "/srv/m", "fuse.cowslip")];
        let read_link = |link: &Path| {
            assert!(!link.starts_with("/srv/m"), "the mount was asked about {link:?}");
            match link.to_str()? {
                "/link" => Some("../srv/./m".into()),
                "/again" => Some("/link".into()),
                "/loop" => Some("loop".into()),
                _ => None,
            }
        };
        let walked = |path: &str| walk(&table, Path::new(path), read_link);
        assert_eq!(walked("/link/vm1.img").unwrap(), Path::new("/srv/m/vm1.img"));
        assert_eq!(walked("/again/a/../vm1.img").unwrap(), Path::new("/srv/m/vm1.img"));
        assert_eq!(walked("/srv/m/../new").unwrap(), Path::new("/srv/new"));
        assert_eq!(walked("/../..").unwrap(), Path::new("/"));
        assert_eq!(walked("/loop").unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn a_file_bound_elsewhere_is_found_in_the_whole_mount() {
        let mut bound = entry(3, 1, "/etc/disk", "fuse.cowslip");
        bound.root = "/vm1.img".into();
        bound.dev = (0, 2);
        let table = [entry(1, 0, "/", "ext4"), bound, entry(2, 1, "/m", "fuse.cowslip")];
        let enclosed = |path: &str| {
            let enclosed = enclosing_mount_in(&table, Path::new(path))?;
            Some((enclosed.mount.id, enclosed.inner))
        };
        assert_eq!(enclosed("/etc/disk"), Some((2, "vm1.img".into())));
        assert_eq!(enclosed("/m/a/b"), Some((2, "a/b".into())));
        assert_eq!(enclosed("/m"), Some((2, "".into())));
        assert_eq!(enclosed("/etc"), None);
    }

    proptest! {
        #[test]
        fn what_the_kernel_escapes_comes_back(bytes: Vec<u8>) {
            let mut escaped = Vec::new();
            for &byte in &bytes {
                match byte {
                    b' ' | b'\t' | b'\n' | b'\\' | b'#' => {
                        escaped.extend(format!("\\{byte:03o}").bytes());
                    }
                    _ => escaped.push(byte),
                }
            }
            prop_assert_eq!(unescape(&escaped).into_vec(), bytes);
        }

        #[test]
        fn no_mountinfo_line_panics(line: Vec<u8>) {
            let _ = MountEntry::parse(&line);
        }
    }
}
