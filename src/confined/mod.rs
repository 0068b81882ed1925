//! The one way to open a file under a name that others chose, and the one way to create one.
//!
//! Overlays, stores, states of transfers, configurations and images may have been made by somebody
//! else. A name in them, and the file under a name, is hostile until it was checked:
//!
//! | possible | reaction |
//! |---|---|
//! | a name with `/`, `..`, an absolute path | refused: a name is one plain component |
//! | a symbolic link | refused (`O_NOFOLLOW`) |
//! | a named pipe, a socket, a device, a directory | refused, and never waited for (`O_NONBLOCK`) |
//! | a file of somebody else | refused: its owner is root, this process's user or the directory's |
//! | a file that never ends | read up to a limit, then refused |
//! | a file in the place of a new one | never written into (`O_EXCL`) |
//!
//! All functions work relative to an open directory, so that a rename of a directory above it has no
//! effect. [`trust`](crate::trust) decides whether the directory itself is trusted, and
//! [`trusted_path`](crate::trusted_path) which links may lead to it.

mod path_handle;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

pub(crate) use self::path_handle::{MountIds, open_path};
pub use self::path_handle::{PathHandle, mount_id, real_path};

/// The access for which a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileAccess {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
    /// Reading and writing, or reading alone on a read-only file system.
    AsAllowed,
}

impl FileAccess {
    fn flags(self) -> OFlags {
        match self {
            Self::Read => OFlags::RDONLY,
            Self::ReadWrite | Self::AsAllowed => OFlags::RDWR,
        }
    }
}

/// Opens the regular file or block device at `path`, which the user has named, or a record that the
/// user trusts. Links on the way are followed. Files of other types are refused without waiting.
///
/// # Errors
/// The host's errno; [`io::ErrorKind::InvalidInput`] for a file of another type.
pub fn open_input(path: &Path, access: FileAccess) -> io::Result<File> {
    PathHandle::at(path)?.open_input(access)
}

/// Opens the regular file `name` in `dir`.
///
/// # Errors
/// The host's errno; [`io::ErrorKind::InvalidInput`] for a link, for something that is no regular
/// file, for a file of another user, and for a name that is not one plain component.
pub fn open_file(dir: &File, name: impl AsRef<Path>, access: FileAccess) -> io::Result<File> {
    let name = single_component(name.as_ref())?;
    let open = |access: FileAccess| open_nonblocking(dir, name, access.flags() | OFlags::NOFOLLOW);
    let opened = match open(access) {
        Err(error)
            if access == FileAccess::AsAllowed && error.raw_os_error() == Some(libc::EROFS) =>
        {
            open(FileAccess::Read)
        }
        opened => opened,
    };
    let file = opened.map_err(|error| explain_file_type(dir, name, error))?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(wrong_type_error(found.file_type()));
    }
    check_owner(dir, found.uid())?;
    Ok(file)
}

/// Opens the directory `name` in `dir`.
///
/// # Errors
/// The errors of [`open_file`].
pub fn open_subdir(dir: &File, name: impl AsRef<Path>) -> io::Result<File> {
    let name = single_component(name.as_ref())?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let opened = open_nonblocking(dir, name, flags);
    let file = opened.map_err(|error| explain_file_type(dir, name, error))?;
    check_owner(dir, file.metadata()?.uid())?;
    Ok(file)
}

/// Reads the regular file `name` in `dir`, of at most `limit` bytes.
///
/// # Errors
/// The errors of [`open_file`]; `EFBIG` for a longer file.
pub fn read_file(dir: &File, name: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
    read_to_limit(&open_file(dir, name, FileAccess::Read)?, limit)
}

/// Reads all of `file`, which holds at most `limit` bytes.
///
/// # Errors
/// `EFBIG` for a longer file; the host's errno.
pub fn read_to_limit(file: impl Read, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::from_raw_os_error(libc::EFBIG));
    }
    Ok(bytes)
}

/// Creates the file `name` in `dir` for reading and writing, for this user alone (0600).
///
/// # Errors
/// `EEXIST` when the name is taken, also by a link; the host's errno.
pub fn create_file(dir: impl AsFd, name: impl AsRef<Path>) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let name = single_component(name.as_ref())?;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Creates a file as [`create_file`] does, under a name that only a leftover of an earlier attempt can
/// have. The leftover is unlinked first.
///
/// # Errors
/// The host's errno, `EISDIR` among them.
pub fn recreate_file(dir: impl AsFd, name: impl AsRef<Path>) -> io::Result<File> {
    match create_file(&dir, &name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            remove_file(&dir, &name)?;
            create_file(dir, name)
        }
        created => created,
    }
}

/// Unlinks `name` in `dir`, if it exists. A link is removed itself, never its target.
///
/// # Errors
/// The host's errno, `EISDIR` among them.
pub fn remove_file(dir: impl AsFd, name: impl AsRef<Path>) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, single_component(name.as_ref())?, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Creates the directory `name` in `dir`, for this user alone (0700), and opens it.
///
/// # Errors
/// `EEXIST` when the name is taken; the host's errno.
pub fn create_dir(dir: &File, name: impl AsRef<Path>) -> io::Result<File> {
    let name = single_component(name.as_ref())?;
    rustix::fs::mkdirat(dir, name, Mode::RUSR | Mode::WUSR | Mode::XUSR)?;
    open_subdir(dir, name)
}

/// Replaces the file `name` in `dir` by one that contains `bytes`, durably. The new file is called
/// `new` until it is complete.
///
/// # Errors
/// The host's errno. The old file is still in place, unless only the sync of the directory failed.
pub fn replace_file(
    dir: &File,
    name: impl AsRef<Path>,
    new: impl AsRef<Path>,
    bytes: &[u8],
) -> io::Result<()> {
    let mut file = recreate_file(dir, &new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    rustix::fs::renameat(dir, new.as_ref(), dir, single_component(name.as_ref())?)?;
    dir.sync_all()
}

/// Returns the names in `dir`, except `.` and `..`.
///
/// # Errors
/// The host's errno; a line for a name that is not UTF-8, which cowslip never creates.
pub fn entry_names(dir: &File) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        let name = entry.file_name().to_str().map_err(|_| {
            let shown = entry.file_name().to_string_lossy();
            io::Error::other(format!("it holds '{shown}', which is not cowslip's: move it away"))
        })?;
        names.push(name.to_owned());
    }
    Ok(names)
}

/// Returns the error for a directory that is kept because of the foreign file `name` in it.
#[must_use]
pub fn foreign_entry_error(dir: &str, name: &str) -> io::Error {
    io::Error::other(format!("'{dir}' holds '{name}', which is not cowslip's: it is left alone"))
}

/// Returns `name` if it is one plain component.
fn single_component(name: &Path) -> io::Result<&Path> {
    let mut parts = name.components();
    match (parts.next(), parts.next()) {
        // `components` drops a `/` at the end.
        (Some(Component::Normal(part)), None) if part == name.as_os_str() => Ok(name),
        _ => Err(invalid_input("its name is not one plain component")),
    }
}

/// Opens `name` without waiting for the other end of a pipe or for a terminal.
fn open_nonblocking(dir: impl AsFd, name: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd: OwnedFd =
        rustix::io::retry_on_intr(|| rustix::fs::openat(&dir, name, flags, Mode::empty()))?;
    // Devices obey the flag; regular files ignore it, except for leases.
    let set = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, set - OFlags::NONBLOCK)?;
    Ok(File::from(fd))
}

/// Whether `owner` is root or this process's user.
#[must_use]
pub fn is_own(owner: u32) -> bool {
    owner == 0 || owner == rustix::process::geteuid().as_raw()
}

fn check_owner(dir: &File, owner: u32) -> io::Result<()> {
    if is_own(owner) || owner == dir.metadata()?.uid() {
        return Ok(());
    }
    Err(invalid_input(&format!("it belongs to another user (uid {owner})")))
}

/// Replaces the errno by the type of file for a link, a pipe or a socket, since the errno only says
/// why it cannot be opened.
fn explain_file_type(dir: &File, name: &Path, error: io::Error) -> io::Error {
    let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    match (error.raw_os_error(), found) {
        (Some(libc::ELOOP | libc::ENOTDIR | libc::ENXIO | libc::EISDIR), Ok(found)) => {
            let kind = rustix::fs::FileType::from_raw_mode(found.st_mode);
            invalid_input(&format!("it is {}", file_type_text(kind)))
        }
        _ => error,
    }
}

pub(crate) fn wrong_type_error(kind: std::fs::FileType) -> io::Error {
    use rustix::fs::FileType as Type;
    let kind = match () {
        () if kind.is_dir() => Type::Directory,
        () if kind.is_fifo() => Type::Fifo,
        () if kind.is_socket() => Type::Socket,
        () if kind.is_char_device() => Type::CharacterDevice,
        () if kind.is_block_device() => Type::BlockDevice,
        () if kind.is_file() => Type::RegularFile,
        () => Type::Unknown,
    };
    invalid_input(&format!("it is {}", file_type_text(kind)))
}

fn file_type_text(kind: rustix::fs::FileType) -> &'static str {
    use rustix::fs::FileType as Type;
    match kind {
        Type::Symlink => "a symbolic link, which is not followed here",
        Type::Directory => "a directory",
        Type::Fifo => "a named pipe, not a file",
        Type::Socket => "a socket, not a file",
        Type::CharacterDevice => "a character device, not a file",
        Type::BlockDevice => "a block device, not a file",
        Type::RegularFile => "a file, not a directory",
        Type::Unknown => "no file",
    }
}

pub(crate) fn invalid_input(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why.to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::trusted_path::open_dir;

    /// A directory with one of everything that is not what is expected, and its open file.
    fn room() -> (tempfile::TempDir, File) {
        let room = tempfile::tempdir().unwrap();
        let at = |name: &str| room.path().join(name);
        std::fs::write(at("file"), b"0123456789").unwrap();
        std::fs::create_dir(at("dir")).unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("dir"), at("link-to-dir")).unwrap();
        symlink(at("nothing"), at("dangling")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), Mode::RUSR | Mode::WUSR).unwrap();
        UnixListener::bind(at("socket")).unwrap();
        let dir = open_dir(room.path()).unwrap();
        (room, dir)
    }

    #[test]
    fn only_a_regular_file_is_opened_and_nothing_is_waited_for() {
        let (_room, dir) = room();
        for access in [FileAccess::Read, FileAccess::ReadWrite] {
            assert!(open_file(&dir, "file", access).is_ok());
            for (name, why) in [
                ("dir", "a directory"),
                ("link", "a symbolic link"),
                ("dangling", "a symbolic link"),
                ("fifo", "a named pipe"),
                ("socket", "a socket"),
            ] {
                let error = open_file(&dir, name, access).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
                assert!(error.to_string().contains(why), "{name}: {error}");
            }
            let missing = open_file(&dir, "nothing", access).unwrap_err();
            assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    fn only_a_directory_is_opened_as_one() {
        let (_room, dir) = room();
        assert!(open_subdir(&dir, "dir").is_ok());
        for name in ["file", "link", "link-to-dir", "fifo", "socket"] {
            let error = open_subdir(&dir, name).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
    }

    #[test]
    fn path_named_by_the_user_may_be_a_link_but_not_a_pipe() {
        let (room, _) = room();
        for name in ["file", "link"] {
            assert!(open_input(&room.path().join(name), FileAccess::Read).is_ok());
        }
        for name in ["dir", "fifo", "socket", "dangling"] {
            assert!(open_input(&room.path().join(name), FileAccess::Read).is_err(), "{name}");
        }
        assert!(open_input(Path::new("/dev/null"), FileAccess::Read).is_err());
    }

    #[test]
    fn located_file_is_opened_even_if_its_name_leads_elsewhere() {
        let (room, dir) = room();
        let at = |name: &str| room.path().join(name);
        let real = room.path().canonicalize().unwrap();
        let located = PathHandle::at(&at("link")).unwrap();
        assert_eq!(located.real_path().unwrap(), real.join("file"));
        std::fs::rename(at("file"), at("moved (deleted)")).unwrap();
        std::fs::write(at("file"), b"other").unwrap();
        assert_eq!(located.real_path().unwrap(), real.join("moved (deleted)"));
        let file = located.open(OFlags::RDONLY).unwrap();
        assert_eq!(read_to_limit(file, 100).unwrap(), b"0123456789");
        std::fs::remove_file(at("moved (deleted)")).unwrap();
        let error = located.real_path().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        // A pipe nobody writes into is looked at without being opened.
        assert!(PathHandle::at(&at("fifo")).unwrap().metadata().file_type().is_fifo());
        drop(dir);
    }

    #[test]
    fn a_name_is_one_plain_component() {
        let (room, dir) = room();
        let absolute = room.path().join("file");
        let absolute = absolute.to_str().unwrap();
        for name in ["", ".", "..", "/", "dir/", "dir/x", "../x", "./file", absolute] {
            for error in [
                open_file(&dir, name, FileAccess::Read).unwrap_err(),
                open_subdir(&dir, name).unwrap_err(),
                create_file(&dir, name).unwrap_err(),
                create_dir(&dir, name).unwrap_err(),
                remove_file(&dir, name).unwrap_err(),
            ] {
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name:?}: {error}");
            }
        }
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        let (room, dir) = room();
        // The tests run as root.
        std::os::unix::fs::chown(room.path().join("file"), Some(12345), None).unwrap();
        let error = open_file(&dir, "file", FileAccess::Read).unwrap_err();
        assert!(error.to_string().contains("uid 12345"), "{error}");
        std::os::unix::fs::chown(room.path(), Some(12345), None).unwrap();
        assert!(open_file(&dir, "file", FileAccess::Read).is_ok());
    }

    #[test]
    fn reading_stops_at_the_limit() {
        let (_room, dir) = room();
        assert_eq!(read_file(&dir, "file", 10).unwrap(), b"0123456789");
        let error = read_file(&dir, "file", 9).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
    }

    #[test]
    fn created_files_are_new_and_private() {
        let (room, dir) = room();
        let mode = |name: &str| {
            std::fs::symlink_metadata(room.path().join(name)).unwrap().permissions().mode() & 0o777
        };
        for name in ["file", "dir", "link", "dangling", "fifo"] {
            assert!(create_file(&dir, name).is_err(), "{name}");
            assert!(create_dir(&dir, name).is_err(), "{name}");
        }
        create_file(&dir, "new").unwrap();
        create_dir(&dir, "new-dir").unwrap();
        assert_eq!((mode("new"), mode("new-dir")), (0o600, 0o700));
    }

    #[test]
    fn a_file_is_replaced_whatever_lies_under_the_names() {
        let (room, dir) = room();
        // `new` leads to a file that must stay as it is, and so does the name itself.
        symlink(room.path().join("file"), room.path().join("state.new")).unwrap();
        symlink(room.path().join("file"), room.path().join("state")).unwrap();
        replace_file(&dir, "state", "state.new", b"text").unwrap();
        assert_eq!(read_file(&dir, "state", 100).unwrap(), b"text");
        assert_eq!(read_file(&dir, "file", 100).unwrap(), b"0123456789");
        assert!(!room.path().join("state.new").exists());
    }
}
