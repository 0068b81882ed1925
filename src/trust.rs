//! Trust in directories of other users.
//!
//! An overlay or a store is obeyed with the rights of the user who mounts it: the base that it names
//! is read, and written to by a commit; layers that it does not name are deleted. Therefore no other
//! user may be able to write it. A directory is trusted when only root and this process's user can
//! put anything into it or into its place:
//!
//! ```text
//!   /            root's, 0755                      fine
//!   /tmp         root's, 1777                      fine: sticky, nobody can rename what is not his
//!   /srv/images  root's, 0775                      root refuses: its group can put anything there
//!   /home/u1     u1's                              root and u2 refuse: u1 can
//! ```
//!
//! The user who became root by sudo or pkexec is trusted too, since that user could do anything
//! without a trick. `--trust DIR` allows what is refused, for everything in and below DIR. Only open
//! directories are examined, upwards through `..`, so that no rename can interfere.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use parking_lot::RwLock;
use rustix::fs::{Mode, OFlags};

use crate::confined;
use crate::host::mountinfo::{MountEntry, mounts};

/// A directory, by device and inode.
type DirId = (u64, u64);

/// The directories given to [`allow`], for the life of this process. They are held open, because the
/// inode number of a deleted directory is reused.
static ALLOWED_DIRS: RwLock<Vec<(DirId, File)>> = RwLock::new(Vec::new());

fn allowed() -> Vec<DirId> {
    ALLOWED_DIRS.read().iter().map(|(id, _)| *id).collect()
}

/// The reason why a directory is not trusted; one line, which the caller prefixes with the path of
/// the overlay or file concerned.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Another user could have changed the contents.
    #[error("cannot be trusted: '{}' {why}: move it, or use --trust '{}'", dir.display(), dir.display())]
    Untrusted {
        /// The directory, or one above it.
        dir: PathBuf,
        /// The other user's means.
        why: String,
    },
    /// Another user could have put this symbolic link there.
    #[error("the link '{}' {why}: name what it leads to", path.display())]
    Link {
        /// The link.
        path: PathBuf,
        /// The other user's means.
        why: String,
    },
    /// The path of the directory does not lead to the directory.
    #[error("cannot be trusted: {0}")]
    Unreachable(io::Error),
    /// A system call on the host failed.
    #[error("cannot be looked at: {0}")]
    Io(#[from] io::Error),
}

/// Trusts everything in and below the directory at `path`, which is absolute.
///
/// # Errors
/// The host's errno; a line when links lead elsewhere.
pub fn allow(path: &Path) -> io::Result<()> {
    let dir = File::from(rustix::fs::open(path, OPEN_DIR_FLAGS, Mode::empty())?);
    let real = path_of(&dir);
    // A link of another user could lead to `/`.
    if real != path.components().collect::<PathBuf>() {
        let real = real.display();
        return Err(io::Error::other(format!("links lead from there to '{real}': name that")));
    }
    let found = dir.metadata()?;
    let id = (found.dev(), found.ino());
    let mut allowed = ALLOWED_DIRS.write();
    if allowed.iter().all(|(other, _)| *other != id) {
        allowed.push((id, dir));
    }
    Ok(())
}

/// Refuses `dir` when another user could have put anything into it or into its place.
///
/// # Errors
/// [`TrustError`].
pub fn check(dir: &File) -> Result<(), TrustError> {
    check_as(dir, Use::Contents, &Principal::current(), &allowed())
}

/// Refuses `dir` when another user could rename or remove what this process creates in it, or put
/// another directory into its place. Entries of other users do not matter: `/tmp` is fine.
///
/// # Errors
/// [`TrustError`].
pub fn check_parent(dir: &File) -> Result<(), TrustError> {
    check_as(dir, Use::Parent, &Principal::current(), &allowed())
}

/// The use for which a directory is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// All entries of the directory are used.
    Contents,
    /// One entry of this user is used, which is judged separately.
    Parent,
}

/// Refuses the configuration `file`, in the directory `dir`, when another user could have written it.
///
/// # Errors
/// [`TrustError`].
pub fn check_file(file: &File, dir: &File) -> Result<(), TrustError> {
    let viewer = Principal::current();
    let found = file.metadata()?;
    let allowed = allowed();
    let why = viewer.objection(found.uid(), found.mode() & !STICKY_BIT);
    let why = why.or(FuseMounts::default().objection(file, &viewer)?);
    match why.or(viewer.hard_link_objection(&found, &dir.metadata()?)) {
        Some(why) if !is_below(dir, &allowed)? => {
            Err(TrustError::Untrusted { dir: path_of(file), why })
        }
        Some(_) => Ok(()),
        None => check_as(dir, Use::Parent, &viewer, &allowed),
    }
}

/// Refuses to follow the symbolic link `name`, open as `link`, in the directory `dir`, when another
/// user could have put it there.
///
/// # Errors
/// [`TrustError`].
pub fn check_link(dir: &File, link: &File, name: &Path) -> Result<(), TrustError> {
    let viewer = Principal::current();
    let found = link.metadata()?;
    let why = viewer.objection(found.uid(), 0);
    let why = why.or(FuseMounts::default().objection(link, &viewer)?);
    match why.or(viewer.hard_link_objection(&found, &dir.metadata()?)) {
        Some(why) if !is_below(dir, &allowed())? => {
            Err(TrustError::Link { path: path_of(dir).join(name), why })
        }
        _ => Ok(()),
    }
}

/// Refuses `file` of the directory `dir` when another user could have given it the name that it has
/// there.
///
/// # Errors
/// [`TrustError`].
pub fn check_hard_links(file: &File, dir: &File) -> Result<(), TrustError> {
    let why = Principal::current().hard_link_objection(&file.metadata()?, &dir.metadata()?);
    match why {
        Some(why) if !is_below(dir, &allowed())? => {
            Err(TrustError::Untrusted { dir: path_of(file), why })
        }
        _ => Ok(()),
    }
}

/// Flags by which a directory is opened for examination: its entries need not be readable.
const OPEN_DIR_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
/// The mode bit that keeps users from renaming entries of others.
const STICKY_BIT: u32 = 0o1000;

/// The user on whose behalf a directory is judged.
struct Principal {
    uid: u32,
    /// The user who became root by sudo or pkexec.
    invoker: Option<u32>,
}

impl Principal {
    fn current() -> Self {
        /// Read once, because a daemon clears its environment.
        static INVOKER: LazyLock<Option<u32>> = LazyLock::new(|| {
            let named = |name| std::env::var(name).ok()?.parse().ok();
            named("SUDO_UID").or_else(|| named("PKEXEC_UID"))
        });
        let uid = rustix::process::geteuid().as_raw();
        Self { uid, invoker: INVOKER.filter(|_| uid == 0) }
    }

    fn is_trusted(&self, owner: u32) -> bool {
        owner == 0 || owner == self.uid || Some(owner) == self.invoker
    }

    /// Describes how another user can write an entry with this owner and mode; `None` when no other
    /// user can.
    fn objection(&self, owner: u32, mode: u32) -> Option<String> {
        if !self.is_trusted(owner) {
            return Some(format!("belongs to another user (uid {owner}), who can change it"));
        }
        if mode & STICKY_BIT != 0 {
            return None;
        }
        if mode & 0o002 != 0 {
            return Some("can be written by every user".to_owned());
        }
        // The group of an ordinary user often has no other member, and the umask lets it write.
        (mode & 0o020 != 0 && self.uid == 0).then(|| "can be written by its group".to_owned())
    }

    /// Describes how another user could have given `file` its name in `dir`: without
    /// `fs.protected_hardlinks` any user can add a name for any file in a directory that the user can
    /// write, a sticky one included.
    fn hard_link_objection(&self, file: &Metadata, dir: &Metadata) -> Option<String> {
        let is_shared = self.objection(dir.uid(), dir.mode() & !STICKY_BIT).is_some();
        (file.nlink() > 1 && is_shared)
            .then(|| "has more than one name, and another user could have made this one".to_owned())
    }
}

fn check_as(
    dir: &File,
    purpose: Use,
    viewer: &Principal,
    allowed: &[DirId],
) -> Result<(), TrustError> {
    // The directories above are reached through `..`: in another mount namespace, others decide which
    // these are.
    confined::real_path(dir).map_err(TrustError::Unreachable)?;
    let mut objection = None;
    let mut mounts = FuseMounts::default();
    let mut failed = None;
    let mut is_target = purpose == Use::Contents;
    let is_allowed = walk_up(dir, |at, found| {
        if allowed.contains(&(found.dev(), found.ino())) {
            return true;
        }
        if objection.is_none() {
            // The sticky bit protects entries of this user from others; in the target itself any entry
            // counts.
            let mode = if is_target { found.mode() & !STICKY_BIT } else { found.mode() };
            let why = viewer.objection(found.uid(), mode);
            let why = why.or_else(|| {
                mounts.objection(at, viewer).unwrap_or_else(|error| {
                    failed = Some(error);
                    None
                })
            });
            objection = why.map(|why| TrustError::Untrusted { dir: path_of(at), why });
        }
        is_target = false;
        false
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    match objection {
        Some(error) if !is_allowed => Err(error),
        _ => Ok(()),
    }
}

/// The FUSE mounts on the way to a directory. The server of such a mount decides which files it has
/// and who owns them.
#[derive(Default)]
struct FuseMounts {
    entries: Option<Vec<MountEntry>>,
    /// The mount that was looked at last.
    last: Option<u64>,
}

impl FuseMounts {
    /// Why the mount that `file` lies on is another's to change; `None` when it is not, or was looked
    /// at just before.
    fn objection(&mut self, file: &File, viewer: &Principal) -> io::Result<Option<String>> {
        let id = confined::mount_id(file)?;
        if self.last.replace(id) == Some(id) {
            return Ok(None);
        }
        let entries = match &mut self.entries {
            Some(entries) => entries,
            none => none.insert(mounts()?),
        };
        let Some(entry) = entries.iter().find(|entry| entry.id == id) else {
            return Ok(is_fuse(file).then(|| "lies on a FUSE file system that is gone".to_owned()));
        };
        Ok(entry.owner.filter(|owner| !viewer.is_trusted(*owner)).map(|owner| {
            format!("lies on a FUSE file system of another user (uid {owner}), who can change it")
        }))
    }
}

/// Whether `file`, whose mount is not in mountinfo, lies on FUSE or cannot say. A server can unmount
/// itself while it is looked at; in a chroot the mount of `/` is missing from the table.
fn is_fuse(file: &File) -> bool {
    /// `FUSE_SUPER_MAGIC` (linux/magic.h).
    const FUSE: rustix::fs::FsWord = 0x6573_5546;
    rustix::fs::fstatfs(file).map_or(true, |found| found.f_type == FUSE)
}

fn is_below(dir: &File, allowed: &[DirId]) -> io::Result<bool> {
    walk_up(dir, |_, found| allowed.contains(&(found.dev(), found.ino())))
}

/// Goes from `dir` up to the root until `is_found` says so, and tells whether it did. What cannot be
/// searched ends the way: nothing above it is this user's to judge.
fn walk_up(dir: &File, mut is_found: impl FnMut(&File, &Metadata) -> bool) -> io::Result<bool> {
    let mut at = dir.try_clone()?;
    let mut found = at.metadata()?;
    loop {
        if is_found(&at, &found) {
            return Ok(true);
        }
        let above = match rustix::fs::openat(&at, "..", OPEN_DIR_FLAGS, Mode::empty()) {
            Ok(above) => File::from(above),
            Err(rustix::io::Errno::ACCESS) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let next = above.metadata()?;
        if (next.dev(), next.ino()) == (found.dev(), found.ino()) {
            return Ok(false);
        }
        (at, found) = (above, next);
    }
}

/// Where `file` is now, for people.
fn path_of(file: &File) -> PathBuf {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::read_link(link).unwrap_or_else(|_| "?".into())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;
    use crate::trusted_path::open_dir;

    const ROOT: Principal = Principal { uid: 0, invoker: None };
    const U1: Principal = Principal { uid: 12345, invoker: None };

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn id(path: &Path) -> DirId {
        let found = fs::metadata(path).unwrap();
        (found.dev(), found.ino())
    }

    /// Why `viewer` does not believe the directory at `path`.
    fn refused(viewer: &Principal, path: &Path, allowed: &[DirId]) -> Option<String> {
        let dir = open_dir(path).unwrap();
        check_as(&dir, Use::Contents, viewer, allowed).err().map(|error| error.to_string())
    }

    #[test]
    fn directory_that_another_user_can_write_is_refused_anywhere_on_the_way() {
        let room = tempfile::tempdir().unwrap();
        let (home, inner) = (room.path().join("home"), room.path().join("home/a/o.cow"));
        fs::create_dir_all(&inner).unwrap();
        for viewer in [&ROOT, &U1] {
            assert_eq!(refused(viewer, &inner, &[]).filter(|_| viewer.uid == 0), None);
        }
        for (path, bits, why) in [
            (&home, 0o777, "every user"),
            (&home, 0o775, "its group"),
            (&inner, 0o770, "its group"),
            // Anybody may put things into it; the bit is no help there.
            (&inner, 0o1777, "every user"),
        ] {
            mode(path, bits);
            let line = refused(&ROOT, &inner, &[]).unwrap();
            assert!(line.contains(why) && line.contains(&*path.to_string_lossy()), "{line}");
            mode(path, 0o755);
        }
        // As in /tmp.
        mode(&home, 0o1777);
        assert_eq!(refused(&ROOT, &inner, &[]), None);
        chown(&home, Some(12345), None).unwrap();
        let line = refused(&ROOT, &inner, &[]).unwrap();
        assert!(line.contains("uid 12345") && line.contains("--trust"), "{line}");
    }

    #[test]
    fn an_ordinary_user_believes_himself_root_and_his_group() {
        let room = tempfile::tempdir().unwrap();
        let own = room.path().join("own");
        fs::create_dir(&own).unwrap();
        mode(room.path(), 0o755);
        assert_eq!(refused(&U1, &own, &[]), None);
        chown(&own, Some(12345), None).unwrap();
        mode(&own, 0o775);
        assert_eq!(refused(&U1, &own, &[]), None);
        mode(&own, 0o777);
        assert!(refused(&U1, &own, &[]).unwrap().contains("every user"));
        chown(&own, Some(54321), None).unwrap();
        assert!(refused(&U1, &own, &[]).unwrap().contains("uid 54321"));
    }

    #[test]
    fn user_who_became_root_by_sudo_is_trusted_and_nobody_else() {
        let room = tempfile::tempdir().unwrap();
        chown(room.path(), Some(12345), None).unwrap();
        let by = |uid| Principal { uid: 0, invoker: Some(uid) };
        assert_eq!(refused(&by(12345), room.path(), &[]), None);
        assert!(refused(&by(54321), room.path(), &[]).is_some());
    }

    #[test]
    fn directory_allowed_by_name_is_trusted_with_everything_below() {
        let room = tempfile::tempdir().unwrap();
        let inner = room.path().join("home/o.cow");
        fs::create_dir_all(&inner).unwrap();
        let home = room.path().join("home");
        chown(&inner, Some(12345), None).unwrap();
        chown(&home, Some(12345), None).unwrap();
        assert!(refused(&ROOT, &inner, &[]).is_some());
        for allowed in [&inner, &home, &room.path().to_owned()] {
            assert_eq!(refused(&ROOT, &inner, &[id(allowed)]), None);
        }
        // What is above what was named is not believed for its sake.
        assert!(refused(&ROOT, &home, &[id(&inner)]).is_some());
    }

    #[test]
    fn a_configuration_is_trusted_as_its_directory_is() {
        let room = tempfile::tempdir().unwrap();
        let path = room.path().join("a.toml");
        fs::write(&path, "").unwrap();
        let check = || check_file(&File::open(&path).unwrap(), &open_dir(room.path()).unwrap());
        check().unwrap();
        mode(&path, 0o666);
        assert!(check().unwrap_err().to_string().contains("every user"));
        mode(&path, 0o644);
        chown(&path, Some(12345), None).unwrap();
        assert!(check().unwrap_err().to_string().contains("uid 12345"));
    }
}
