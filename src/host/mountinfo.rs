//! The table of mounts, and the mount that a path lies in, read from `/proc/self/mountinfo`
//! (proc_pid_mountinfo(5)) and from symlinks outside the mounts.
//!
//! No system call ever enters a cowslip mount, so a hung or dead mount is found like a working one.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::confined::{is_own, mount_id};

/// File system type of every cowslip mount, in mtab and mountinfo.
pub const FSTYPE: &str = "fuse.cowslip";

/// One line of `/proc/self/mountinfo`. Format: proc_pid_mountinfo(5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Mount ID; the same as `mnt_id` in a process's fdinfo.
    pub id: u64,
    /// ID of the parent mount.
    pub parent: u64,
    /// Major and minor device number of the file system: `st_dev` of its files.
    pub dev: (u32, u32),
    /// Root of the mount within the file system; `/` except for bind mounts.
    pub root: PathBuf,
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// The file system type, such as `fuse.cowslip`.
    pub fstype: String,
    /// The source that was given to mount(2).
    pub source: OsString,
    /// User ID of the user who mounted it, where the file system reports one, as FUSE does
    /// (`user_id`); of a mount below a FUSE mount of another user, that user.
    pub owner: Option<u32>,
}

impl MountEntry {
    /// Returns whether this is a cowslip mount, by its type.
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

    /// Returns whether another user serves the mount, or one on the way to it: a request may never be
    /// answered, and not even SIGKILL ends a process that waits for that.
    pub fn is_foreign(&self) -> bool {
        self.owner.is_some_and(|owner| !is_own(owner))
    }

    /// Returns whether the mount's contents may be trusted: it is served by root or by this
    /// process's user.
    pub fn is_trusted(&self) -> bool {
        self.owner.is_some_and(is_own)
    }
}

/// Returns the user ID in the options of a FUSE mount.
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

/// Parses the `text` of a mountinfo file; malformed lines are skipped.
pub(crate) fn parse_mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n').filter_map(MountEntry::parse).collect()
}

/// Returns all mounts that this process sees, in the kernel's order.
///
/// # Errors
/// The host's errno when `/proc` is not mounted.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let mut entries = parse_mountinfo(&fs::read("/proc/self/mountinfo")?);
    inherit_owners(&mut entries);
    Ok(entries)
}

/// Gives each mount below a FUSE mount of another user that user as its owner: whoever looks at the
/// path of the inner one asks the outer one's server first.
fn inherit_owners(entries: &mut [MountEntry]) {
    let foreign: HashMap<u64, u32> = entries
        .iter()
        .filter(|entry| entry.is_foreign())
        .filter_map(|entry| Some((entry.id, entry.owner?)))
        .collect();
    if foreign.is_empty() {
        return;
    }
    let parents: HashMap<u64, u64> = entries.iter().map(|entry| (entry.id, entry.parent)).collect();
    for entry in entries {
        // At most as many steps as there are mounts: a table read while it changed may have a cycle.
        let mut above = entry.parent;
        for _ in 0..parents.len() {
            if let Some(owner) = foreign.get(&above) {
                entry.owner = Some(*owner);
                break;
            }
            let Some(next) = parents.get(&above) else { break };
            above = *next;
        }
    }
}

/// Returns all mounts like [`mounts`], or none, with a warning, when `/proc` cannot be read.
pub(crate) fn mounts_or_empty() -> Vec<MountEntry> {
    mounts().unwrap_or_else(|error| {
        log::warn!("cannot read /proc/self/mountinfo: {error}");
        Vec::new()
    })
}

/// Returns the mount that contains `path` (absolute, without symlinks), as a path walk from `/`
/// finds it: every step takes the mount met first, so a mount hidden under another is not found.
fn visible_mount<'a>(entries: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    let ids: HashSet<u64> = entries.iter().map(|entry| entry.id).collect();
    let mut at: Option<&MountEntry> = None;
    // At most as many steps as there are mounts: a table read while it changed may contain a cycle.
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

/// Resolves `path` to an absolute path without symlinks, with no call into a cowslip mount or a FUSE
/// mount of another user: below the mountpoint of one, names are taken literally. Names that do not exist are kept too.
///
/// # Errors
/// `ELOOP` on a cycle of symlinks; the errno of getcwd(2) for a relative path.
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
    /// Maximum number of symlinks to follow; the kernel's own limit (path_resolution(7)).
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
        if visible_mount(entries, &at).is_some_and(|entry| entry.is_cowslip() || entry.is_foreign())
        {
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

/// Returns the topmost mount at exactly `path`, of any type.
pub fn entry_at(path: &Path) -> Option<MountEntry> {
    let entries = mounts_or_empty();
    let path = resolve_in(&entries, path).ok()?;
    mount_at_in(&entries, &path).cloned()
}

/// Returns the topmost mount at exactly `mountpoint`, a path as the table has it: compared as text,
/// so that no file system on the way is asked.
pub fn mount_at(mountpoint: &Path) -> Option<MountEntry> {
    mount_at_in(&mounts_or_empty(), mountpoint).cloned()
}

fn mount_at_in<'a>(entries: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    visible_mount(entries, path).filter(|entry| entry.mountpoint == path)
}

/// A FUSE mount of another user on the way to a file.
#[derive(Debug, thiserror::Error)]
#[error("'{}' is a FUSE file system of another user (uid {uid}), who may never answer",
    mountpoint.display())]
pub struct ForeignMountError {
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The user.
    pub uid: u32,
}

/// Opens the file at `path`, absolute and without symlinks as [`resolve`] returns it, with `O_PATH`.
/// Each component is opened in the one before it, and must lie on no FUSE mount of another user: even
/// when one is mounted over a directory meanwhile, its server gets no request.
///
/// # Errors
/// The host's errno; a [`ForeignMountError`].
pub fn open_resolved(path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = File::from(rustix::fs::open("/", flags, Mode::empty())?);
    // In a chroot the mount of `/` itself may be missing from the table.
    let mut allowed = mount_id(&at)?;
    for name in path.components().filter(|part| matches!(part, Component::Normal(_))) {
        // The root of a mount is opened without a request to the file system.
        at = rustix::fs::openat(&at, name.as_os_str(), flags, Mode::empty())?.into();
        let id = mount_id(&at)?;
        if id == allowed {
            continue;
        }
        let entry = mounts()?.into_iter().find(|entry| entry.id == id).ok_or(Errno::STALE)?;
        if let (true, Some(uid)) = (entry.is_foreign(), entry.owner) {
            let mountpoint = entry.mountpoint;
            return Err(io::Error::other(ForeignMountError { mountpoint, uid }));
        }
        allowed = id;
    }
    Ok(at)
}

/// Opens what is at `path`, which was recorded some time ago and is named by nobody now, with `O_PATH`, as
/// [`open_resolved`] does: what is mounted on the way by now gets no request if it is another user's.
///
/// # Errors
/// The host's errno; a [`ForeignMountError`].
pub fn open_recorded(path: &Path) -> io::Result<File> {
    open_resolved(&resolve(path)?)
}

/// Refuses a recorded `path` that leads to a FUSE mount of another user. Whether anything else is there is
/// left to whoever opens it.
///
/// # Errors
/// A [`ForeignMountError`].
pub fn check_recorded(path: &Path) -> io::Result<()> {
    match open_recorded(path) {
        Err(error) if is_foreign_mount(&error) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Whether `error` is a [`ForeignMountError`].
#[must_use]
pub fn is_foreign_mount(error: &io::Error) -> bool {
    error.get_ref().and_then(|error| error.downcast_ref::<ForeignMountError>()).is_some()
}

/// Returns all cowslip mounts that this process sees, including dead ones; bind mounts of single
/// files are left out.
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
    /// The path relative to the mount's own root; empty for the mountpoint.
    pub inner: PathBuf,
}

/// Returns the cowslip mount that contains `path`. No call enters the mount, so a hung mount is
/// found like a working one; whether the path exists in the mount is not known.
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
    // For a file bound elsewhere, return the whole mount, since only that has `.cowslip`.
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
    fn mountinfo_line_with_optional_fields_and_escapes_is_parsed() {
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
    fn mount_of_another_or_unknown_user_is_not_trusted() {
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
    fn mount_with_an_empty_source_is_parsed() {
        let entry = MountEntry::parse(b"36 35 0:9 / /m rw -  tmpfs  rw");
        assert!(entry.is_some_and(|entry| entry.fstype.is_empty()));
        let entry = MountEntry::parse(b"36 35 0:9 / /m rw - tmpfs  rw").unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.len()), ("tmpfs", 0));
    }

    #[test]
    fn every_line_of_our_own_mountinfo_is_parsed() {
        let text = fs::read("/proc/self/mountinfo").unwrap();
        let lines = text.iter().filter(|&&byte| byte == b'\n').count();
        assert!(lines > 0);
        assert_eq!(parse_mountinfo(&text).len(), lines);
    }

    #[test]
    fn incomplete_escape_is_kept_unchanged() {
        assert_eq!(unescape(b"a\\04"), "a\\04");
        assert_eq!(unescape(b"\\"), "\\");
        assert_eq!(unescape(b"\\134040"), "\\040");
        assert_eq!(unescape(b"\\777"), "\\777");
    }

    #[test]
    fn visible_mount_is_the_topmost() {
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
    fn mount_table_without_a_root_or_with_a_cycle_does_not_hang() {
        let chroot = [entry(7, 3, "/m", "fuse.cowslip")];
        assert_eq!(visible_mount(&chroot, Path::new("/m/x")).map(|entry| entry.id), Some(7));
        assert_eq!(visible_mount(&chroot, Path::new("/n")), None);
        let circle = [entry(1, 0, "/", "x"), entry(2, 3, "/", "x"), entry(3, 2, "/", "x")];
        assert!(visible_mount(&circle, Path::new("/m")).is_some());
    }

    #[test]
    fn symlinks_are_followed_only_outside_cowslip_and_foreign_mounts() {
        let mut foreign = entry(3, 1, "/home/y", "fuse.sshfs");
        foreign.owner = Some(54321);
        let table = [entry(1, 0, "/", "ext4"), entry(2, 1, "/srv/m", "fuse.cowslip"), foreign];
        let read_link = |link: &Path| {
            let is_mount = ["/srv/m", "/home/y"].iter().any(|mount| link.starts_with(mount));
            assert!(!is_mount, "the mount was asked about {link:?}");
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
        assert_eq!(walked("/home/y/a/../b").unwrap(), Path::new("/home/y/b"));
        assert_eq!(walked("/../..").unwrap(), Path::new("/"));
        assert_eq!(walked("/loop").unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn bind_mounted_file_resolves_to_the_whole_mount() {
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
        fn unescape_undoes_the_kernels_escapes(bytes: Vec<u8>) {
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
        fn parser_survives_any_line(line: Vec<u8>) {
            let _ = MountEntry::parse(&line);
        }
    }

    #[test]
    fn mount_below_another_users_fuse_mount_is_that_users() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/a rw\n\
            2 1 0:50 / /h rw - fuse.x x rw,user_id=54321\n\
            3 2 0:51 / /h/m rw - fuse.cowslip y rw,user_id=0\n\
            4 1 0:52 / /m rw - fuse.cowslip z rw,user_id=0\n\
            5 3 8:2 / /h/m/d rw - ext4 /dev/b rw\n";
        let mut entries = parse_mountinfo(table);
        inherit_owners(&mut entries);
        let owners: Vec<_> = entries.iter().map(|entry| entry.owner).collect();
        assert_eq!(owners, [None, Some(54321), Some(54321), Some(0), Some(54321)]);
    }
}
