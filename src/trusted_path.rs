//! Paths of what cowslip writes or believes, walked so that no other user decides where they lead.
//!
//! In a directory like `/tmp` anybody can put a symbolic link in the place of a file or directory
//! that is expected there, and the kernel follows it unless `fs.protected_symlinks` is set, which
//! says nothing of directories that only a group may write. So paths are walked here, one component
//! at a time, each opened in the directory before it, and a link is followed only if no other user
//! could have put it there ([`trust::check_link`]):
//!
//! ```text
//!   /tmp/lab/o.cow     /tmp  root's, 1777
//!    │   └── o.cow     a link of uid 1234: refused, wherever it leads
//!    └────── lab       root's link, or this user's: followed
//! ```
//!
//! Whether what lies at the end may be believed is [`trust`]'s to say. The images that a user names
//! as bases are opened as any program would open them ([`PathHandle::at`]).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FsWord, Mode, OFlags};
use rustix::io::Errno;

use crate::confined::{self, FileAccess, PathHandle, invalid_input, is_own, wrong_type_error};
use crate::trust::{self, TrustError};

/// Maximum number of links to follow; the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Opens the directory at `path`.
///
/// # Errors
/// The host's errno, `ENOTDIR` when something else is there; a line about a link of another user.
pub fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let found = walk(path)?.file;
    Ok(File::from(rustix::fs::openat(found, ".", flags, Mode::empty())?))
}

/// Opens the directory at `path`; creates it, and those above it that are missing, for this user alone
/// (0700), where no other user could put something else into its place.
///
/// # Errors
/// [`TrustError`] of the nearest directory above that exists; the host's errno.
pub fn open_or_create_dirs(path: &Path) -> Result<File, TrustError> {
    match open_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        opened => return Ok(opened?),
    }
    let (above, name) = parent_and_name(path)?;
    let above = open_or_create_dirs(above)?;
    trust::check_parent(&above)?;
    match confined::create_dir(&above, name) {
        // Somebody else was faster. The caller judges what is inside.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Ok(confined::open_subdir(&above, name)?)
        }
        created => Ok(created?),
    }
}

/// Finds what is at `path`, without opening it.
///
/// # Errors
/// The host's errno; a line about a link of another user.
pub fn locate(path: &Path) -> io::Result<PathHandle> {
    PathHandle::of(walk(path)?.file)
}

/// Opens the regular file or block device at `path` to read it. Whether it may be believed is
/// [`check_file`]'s to say.
///
/// # Errors
/// The errors of [`locate`]; [`io::ErrorKind::InvalidInput`] for a file of another type.
pub fn open_input(path: &Path) -> io::Result<File> {
    locate(path)?.open_input(FileAccess::Read)
}

/// Refuses `file`, which is open, when another user could have written it or put it where it is. Returns
/// the path of its directory: absolute, without links.
///
/// # Errors
/// The host's errno; [`io::ErrorKind::InvalidInput`] with a [`TrustError`].
pub fn check_file(file: &File) -> io::Result<PathBuf> {
    let mut dir = confined::real_path(file)?;
    dir.pop();
    trust::check_file(file, &open_dir(&dir)?).map_err(invalid_trust)?;
    Ok(dir)
}

/// Opens the file at `path` to append to it, and to read it if this user may; creates it, for this user
/// alone, where there is nothing. A character device is accepted too, nothing else.
///
/// # Errors
/// The host's errno, `EEXIST` for a link to nothing; [`io::ErrorKind::InvalidInput`] for anything
/// else, and for what is another user's or could have been put there by one.
pub fn open_append(path: &Path) -> io::Result<File> {
    let found = match walk(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return create_log(path),
        found => found?,
    };
    let located = PathHandle::of(found.file.try_clone()?)?;
    let kind = located.metadata().file_type();
    if !kind.is_file() && !kind.is_char_device() {
        return Err(wrong_type_error(kind));
    }
    if kind.is_file() {
        if !is_own(located.metadata().uid()) {
            return Err(invalid_input("it belongs to another user"));
        }
        trust::check_hard_links(&found.file, &found.parent).map_err(invalid_trust)?;
    }
    match located.open(OFlags::RDWR | OFlags::APPEND) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            located.open(OFlags::WRONLY | OFlags::APPEND)
        }
        opened => opened,
    }
}

fn create_log(path: &Path) -> io::Result<File> {
    let (dir, name) = parent_and_name(path)?;
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    Ok(File::from(rustix::fs::openat(walk(dir)?.file, name, flags, mode)?))
}

/// Splits `path` into its directory and the last component.
///
/// # Errors
/// `EISDIR` if it does not end with a name.
pub fn parent_and_name(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name = path.file_name().ok_or(Errno::ISDIR)?;
    let dir = path.parent().filter(|dir| *dir != Path::new(""));
    Ok((dir.unwrap_or(Path::new(".")), name))
}

/// Where a walk ended; both are opened with `O_PATH`.
struct Walked {
    /// The directory in which the last component was found, after all links.
    parent: File,
    file: File,
}

fn walk(path: &Path) -> io::Result<Walked> {
    if path.as_os_str().is_empty() {
        return Err(Errno::NOENT.into());
    }
    let mut file = open_start(path)?;
    let mut parent = file.try_clone()?;
    let mut pending = components(path);
    let mut links = 0;
    while let Some(name) = pending.pop() {
        let found = open_component(&file, &name)?;
        if !found.metadata()?.file_type().is_symlink() {
            (parent, file) = (file, found);
            continue;
        }
        trust::check_link(&file, &found, Path::new(&name)).map_err(invalid_trust)?;
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        if is_on_procfs(&file)? {
            // The text of a link such as /proc/self/fd/3 does not say where the kernel leads.
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let target = rustix::fs::openat(&file, &name, flags, Mode::empty())?;
            (parent, file) = (file, target.into());
            continue;
        }
        let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        if target.is_absolute() {
            file = open_start(&target)?;
            parent = file.try_clone()?;
        }
        pending.extend(components(&target));
    }
    Ok(Walked { parent, file })
}

/// Opens the directory in which the walk of `path` starts.
fn open_start(path: &Path) -> io::Result<File> {
    let start = if path.is_absolute() { "/" } else { "." };
    Ok(File::from(open_path(CWD, start.as_ref(), OFlags::DIRECTORY)?))
}

/// Opens the component `name` in `dir`: a link itself, not what it leads to.
fn open_component(dir: &File, name: &OsStr) -> io::Result<File> {
    // Only with O_DIRECTORY does the kernel mount what autofs has there.
    let opened = match open_path(dir, name, OFlags::DIRECTORY) {
        Err(Errno::NOTDIR) => open_path(dir, name, OFlags::empty()),
        opened => opened,
    };
    Ok(File::from(opened?))
}

fn open_path(dir: impl AsFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// The components of `path`, the last one first. A slash at the end is a last component `.`, which
/// only a directory has.
fn components(path: &Path) -> Vec<OsString> {
    let bytes = path.as_os_str().as_bytes();
    let names = bytes.split(|&byte| byte == b'/').filter(|name| !name.is_empty());
    let mut names: Vec<OsString> = names.map(|name| OsStr::from_bytes(name).to_owned()).collect();
    if bytes.ends_with(b"/") {
        names.push(".".into());
    }
    names.reverse();
    names
}

fn is_on_procfs(dir: &File) -> io::Result<bool> {
    /// `PROC_SUPER_MAGIC` (linux/magic.h).
    const PROC: FsWord = 0x9fa0;
    Ok(rustix::fs::fstatfs(dir)?.f_type == PROC)
}

fn invalid_trust(error: trust::TrustError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// Returns the path of the directory at `path`: absolute, without links.
///
/// # Errors
/// The errors of [`open_dir`] and [`confined::real_path`].
pub fn real_dir(path: &Path) -> io::Result<PathBuf> {
    confined::real_path(walk(path)?.file)
}

/// Where programs are besides the directories of `PATH`, which may be short in a service.
const PROGRAM_DIRS: &[&str] = &["/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"];

/// Finds the program `name` in a directory of `PATH`, or where programs usually are. Returns its path,
/// absolute and without links; `None` when it is nowhere, or only where another user could have put it.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = PROGRAM_DIRS.iter().map(PathBuf::from);
    let dirs = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).chain(usual);
    dirs.into_iter().find_map(|dir| trusted_program(&dir.join(name)))
}

fn trusted_program(path: &Path) -> Option<PathBuf> {
    let file = walk(path).ok()?.file;
    let found = file.metadata().ok()?;
    let real = confined::real_path(&file).ok()?;
    let dir = open_dir(real.parent()?).ok()?;
    let is_program = found.is_file() && found.mode() & 0o111 != 0;
    let is_trusted = trust::check(&dir).is_ok() && trust::check_file(&file, &dir).is_ok();
    (is_program && is_trusted).then_some(real)
}

#[cfg(test)]
mod tests {
    use std::fs::Metadata;
    use std::os::unix::fs::{chown, lchown, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::fs::{RenameFlags, renameat_with};

    use super::*;

    /// Two directories: one of root's, and one in which every user may write.
    fn room() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let room = tempfile::tempdir().unwrap();
        let (own, shared) = (room.path().join("own"), room.path().join("shared"));
        std::fs::create_dir(&own).unwrap();
        std::fs::create_dir(&shared).unwrap();
        std::fs::write(own.join("file"), "own").unwrap();
        rustix::fs::chmod(&shared, Mode::from_raw_mode(0o1777)).unwrap();
        (room, own, shared)
    }

    #[test]
    fn a_path_is_walked_as_the_kernel_walks_it() {
        let (room, own, _) = room();
        let at = |name: &str| room.path().join(name);
        symlink("own", at("relative")).unwrap();
        symlink(at("relative"), at("absolute")).unwrap();
        symlink("../shared/../own/file", own.join("far")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink("file/", own.join("slash")).unwrap();
        symlink("nothing", own.join("dangling")).unwrap();
        let fd = File::open(own.join("file")).unwrap();
        let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let paths =
            ["own", "own/", "own/file", "own/file/", "own/file/x", "relative/file", "own/."];
        let paths =
            paths.iter().chain(&["absolute/far", "absolute/../own/./file", "loop", "loop/x"]);
        let paths = paths.chain(&["own/slash", "own/dangling", "own/nothing/x", "../../../..", ""]);
        let paths = paths.map(|path| if path.is_empty() { PathBuf::new() } else { at(path) });
        let proc = ["/", "/dev/null", &magic, "/proc/self/status", "."].map(PathBuf::from);
        for path in paths.chain(proc) {
            let id = |found: Metadata| (found.dev(), found.ino(), found.file_type());
            let errno = |error: io::Error| error.raw_os_error();
            let walked = locate(&path).map(|found| id(found.metadata().clone())).map_err(errno);
            let known = std::fs::metadata(&path).map(id).map_err(errno);
            assert_eq!(walked, known, "{}", path.display());
        }
    }

    #[test]
    fn missing_directories_are_created_where_nobody_else_can_replace_them() {
        let (_room, own, shared) = room();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
        for above in [&own, &shared] {
            drop(open_or_create_dirs(&above.join("a/b/./c/")).unwrap());
            assert_eq!(["a", "a/b", "a/b/c"].map(|name| mode(&above.join(name))), [0o700; 3]);
            drop(open_or_create_dirs(&above.join("a/b/c")).unwrap());
        }
        symlink("nothing", own.join("dangling")).unwrap();
        for name in ["dangling", "dangling/x", "file", "file/x", "a/missing/.."] {
            let refused = open_or_create_dirs(&own.join(name));
            assert!(matches!(refused, Err(TrustError::Io(_))), "{name}");
        }
        rustix::fs::chmod(&shared, Mode::from_raw_mode(0o777)).unwrap();
        let refused = open_or_create_dirs(&shared.join("x/y"));
        assert!(matches!(refused, Err(TrustError::Untrusted { .. })));
        assert!(!shared.join("x").exists() && !own.join("nothing").exists());
    }

    #[test]
    fn a_link_is_followed_only_if_no_other_user_could_have_made_it() {
        let (_room, own, shared) = room();
        let link = shared.join("link");
        symlink(&own, &link).unwrap();
        open_dir(&link).unwrap();
        lchown(&link, Some(12345), None).unwrap();
        for path in [link.clone(), link.join("file"), link.join("nothing")] {
            let error = locate(&path).unwrap_err();
            assert!(error.to_string().contains("uid 12345"), "{error}");
        }
        // A second name, which any user can give a link of root's on some hosts.
        lchown(&link, Some(0), None).unwrap();
        std::fs::hard_link(&link, shared.join("second")).unwrap();
        let error = locate(&link).unwrap_err();
        assert!(error.to_string().contains("more than one name"), "{error}");
    }

    #[test]
    fn a_log_that_changes_places_with_a_link_is_never_what_the_link_leads_to() {
        let (_room, own, shared) = room();
        let (log, link) = (shared.join("x.log"), shared.join("link"));
        std::fs::write(&log, "log").unwrap();
        symlink(own.join("file"), &link).unwrap();
        lchown(&link, Some(12345), None).unwrap();
        chown(&shared, Some(12345), None).unwrap();
        let inode = std::fs::metadata(&log).unwrap().ino();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    renameat_with(CWD, &log, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                }
            });
            let opened = (0..2000).filter_map(|_| open_append(&log).ok());
            let inodes: Vec<u64> =
                opened.map(|file| file.metadata().map_or(0, |found| found.ino())).collect();
            is_over.store(true, Ordering::Relaxed);
            assert!(inodes.iter().all(|found| *found == inode));
        });
    }
}
