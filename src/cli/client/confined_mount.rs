//! The way to the control files of a mount: no link is followed, and nothing outside the mount is
//! opened.
//!
//! Any program can serve a mount of cowslip's type, and its answers have effects: requests are written
//! to its files, and the files it names are opened. So only mounts of root and of the calling user
//! are asked, and no path leads out of a mount: every component is opened separately, must not be a
//! link, and must lie in the mount itself.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use super::answer;
use super::error::AskAbort;
use crate::confined::MountIds;
use crate::control::api::DiskStatus;
use crate::host::mountinfo::{self, MountEntry};

/// Maximum number of disks listed in a mount that does not show its whole status.
const MAX_DISKS: usize = 10_000;

/// Flags for opening a directory on the way to a file.
const OPEN_DIR_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The way into a mount: a path, and the mount it must lead to.
#[derive(Clone, Debug)]
pub(super) struct ConfinedMount {
    way: WayIn,
    /// The ids of the mount that all its files are on. The kernel tells them without asking the file
    /// system, which may be another user's by now.
    ids: MountIds,
}

/// The path to the root of a mount.
#[derive(Clone, Debug)]
enum WayIn {
    /// The mountpoint.
    Path(PathBuf),
    /// Through a directory that is held open: [`MountHandle::access_path`](crate::mount::kernel::MountHandle::access_path).
    Handle(PathBuf),
}

impl ConfinedMount {
    /// Returns the mount at `mountpoint`, if it can be trusted. Makes no call into the mount.
    pub(super) fn at(mountpoint: &Path) -> io::Result<Self> {
        let Some(entry) = mountinfo::mount_at(mountpoint).filter(MountEntry::is_cowslip) else {
            return Err(not_there());
        };
        // The table tells no unique id.
        let ids = MountIds { id: entry.id, unique: None };
        Self::new(&entry, ids, WayIn::Path(entry.mountpoint.clone()))
    }

    /// Returns the mount of `entry`, reached by `path` while its handle is held, if it can be trusted.
    /// No later mount at the same place is taken for it.
    pub(super) fn of_handle(entry: &MountEntry, ids: MountIds, path: PathBuf) -> io::Result<Self> {
        Self::new(entry, ids, WayIn::Handle(path))
    }

    fn new(entry: &MountEntry, ids: MountIds, way: WayIn) -> io::Result<Self> {
        if !entry.is_trusted() {
            return Err(io::Error::other(AskAbort::Foreign(entry.owner.unwrap_or(u32::MAX))));
        }
        Ok(Self { way, ids })
    }

    /// Opens the file or directory reached from `from` by `names`. Refuses links, special names and
    /// anything outside the mount.
    fn walk(&self, from: File, names: &[&str], flags: OFlags) -> io::Result<File> {
        let mut at = from;
        for (index, name) in names.iter().enumerate() {
            let mut parts = Path::new(name).components();
            let is_plain = matches!(parts.next(), Some(Component::Normal(part)) if part == *name);
            if !is_plain || parts.next().is_some() {
                return Err(not_confined("a name that is no plain one"));
            }
            let is_last = index + 1 == names.len();
            let flags = if is_last { flags | OFlags::CLOEXEC } else { OPEN_DIR_FLAGS };
            // Open without blocking, so that a named pipe cannot hang the client.
            let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            let opened = rustix::io::retry_on_intr(|| {
                rustix::fs::openat(at.as_fd(), *name, flags, Mode::empty())
            });
            at = match opened {
                Err(Errno::LOOP) => return Err(not_confined("a link")),
                opened => File::from(opened?),
            };
            self.check_mount(&at)?;
        }
        Ok(at)
    }

    /// Opens the root directory of the mount.
    fn open_root(&self) -> io::Result<File> {
        let root = match &self.way {
            WayIn::Path(path) => mountinfo::open_resolved(path)?,
            WayIn::Handle(path) => rustix::fs::open(path, OPEN_DIR_FLAGS, Mode::empty())?.into(),
        };
        match self.ids.are_of(&root)? {
            true => Ok(root),
            false => Err(not_there()),
        }
    }

    /// Opens a directory of control files, which stays that of one disk from then on. Fails with
    /// `ESTALE` when that disk does not have the inode number `inode`.
    pub(super) fn open_control_dir(
        &self,
        names: &[String],
        inode: Option<u64>,
    ) -> io::Result<File> {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let dir = self.walk(self.open_root()?, &names, OPEN_DIR_FLAGS)?;
        if let Some(inode) = inode {
            let status: DiskStatus =
                answer::read_document(self.open_in(&dir, &["status"], OFlags::RDONLY)?)?;
            if status.inode != inode {
                return Err(Errno::STALE.into());
            }
        }
        Ok(dir)
    }

    /// Opens the regular file reached from `dir` by `names`.
    pub(super) fn open_in(&self, dir: &File, names: &[&str], flags: OFlags) -> io::Result<File> {
        let file = self.walk(dir.try_clone()?, names, flags)?;
        if !file.metadata()?.is_file() {
            return Err(not_confined("something that is no file"));
        }
        Ok(file)
    }

    /// Lists the subdirectories of the directory `name`.
    pub(super) fn list_dirs(&self, name: &str) -> io::Result<Vec<String>> {
        let dir = self.walk(self.open_root()?, &[name], OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&dir)?.take(MAX_DISKS) {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            if entry.file_type() == rustix::fs::FileType::Directory && !name.starts_with('.') {
                names.push(name.into_owned());
            }
        }
        Ok(names)
    }

    fn check_mount(&self, file: &File) -> io::Result<()> {
        match self.ids.are_of(file)? {
            true => Ok(()),
            false => Err(not_confined("what lies outside of it")),
        }
    }
}

fn not_there() -> io::Error {
    io::Error::other("it is no cowslip mount any more, or another mount hides it")
}

fn not_confined(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("it shows {what} where its file should be"))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Creates a directory that looks like a mount.
    pub(in super::super) fn mount() -> (tempfile::TempDir, ConfinedMount) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(".cowslip/d/snapshots")).unwrap();
        let path = dir.path().canonicalize().unwrap();
        let ids = MountIds::of(File::open(&path).unwrap()).unwrap();
        let confined = ConfinedMount { way: WayIn::Path(path), ids };
        (dir, confined)
    }

    fn open(confined: &ConfinedMount, names: &[&str]) -> io::Result<File> {
        confined.open_in(&confined.open_root()?, names, OFlags::RDONLY)
    }

    #[test]
    fn walk_never_leaves_the_mount() {
        use std::os::unix::fs::symlink;
        let (dir, confined) = mount();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("secret"), b"secret").unwrap();
        std::fs::write(at(".cowslip/d/status"), b"{}").unwrap();
        symlink(at("secret"), at(".cowslip/status")).unwrap();
        symlink("/dev", at(".cowslip/e")).unwrap();
        symlink("d", at(".cowslip/f")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at(".cowslip/log"), Mode::RUSR).unwrap();
        assert!(open(&confined, &[".cowslip", "d", "status"]).is_ok());
        let refused = |names: &[&str]| open(&confined, names).unwrap_err();
        let dir = [".cowslip", "d", "snapshots"];
        for name in ["/etc/passwd", "../status", "..", ".", "", "a/../b", "/"] {
            let error = refused(&[&dir[..], &[name]].concat());
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
        for names in [&[".cowslip", "status"][..], &[".cowslip", "log"], &[".cowslip", "d"]] {
            assert_eq!(refused(names).kind(), io::ErrorKind::InvalidInput, "{names:?}");
        }
        for names in [[".cowslip", "e", "null"], [".cowslip", "f", "status"]] {
            assert!(refused(&names).raw_os_error() == Some(libc::ENOTDIR), "{names:?}");
        }
        let status = [".cowslip", "d", "status"];
        let ids = MountIds { id: confined.ids.id + 1, ..confined.ids };
        let line = open(&ConfinedMount { ids, ..confined }, &status).unwrap_err().to_string();
        assert!(line.contains("no cowslip mount any more"), "{line}");
    }

    #[test]
    fn later_mount_with_the_same_id_is_not_entered() {
        let (dir, confined) = mount();
        std::fs::write(dir.path().join(".cowslip/d/status"), b"{}").unwrap();
        let open_as = |unique| {
            let ids = MountIds { unique, ..confined.ids };
            open(&ConfinedMount { ids, ..confined.clone() }, &[".cowslip", "d", "status"])
        };
        let earlier = confined.ids.unique.map_or(1, |unique| unique - 1);
        let line = open_as(Some(earlier)).unwrap_err().to_string();
        assert!(line.contains("no cowslip mount any more"), "{line}");
        // As on a kernel without unique ids.
        assert!(open_as(None).is_ok());
    }
}
