//! Output of a picture to a file, a device or stdout.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::base::lock;
use crate::cli::client::check_answers;
use crate::config::Overwrite;
use crate::confined::{PathHandle, is_own};
use crate::host::os_message;
use crate::part_file::{PartFileError, UnnamedFile};
use crate::trusted_path;

/// Writes `text` to `out`, or to stdout if that is `-`. A file is replaced as a whole or not at all,
/// and keeps its mode; a device or a pipe is written to.
///
/// # Errors
/// A line for the user with the path; also for an existing file unless `overwrite` allows to replace
/// it, and for the image of a disk in use.
pub(super) fn save(out: &Path, text: &str, overwrite: Overwrite) -> anyhow::Result<()> {
    if out == Path::new("-") {
        return crate::cli::print(text);
    }
    check_answers(out)?;
    let failed = |error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::NotFound => ": its directory must exist",
            io::ErrorKind::IsADirectory => ": name a file in it",
            io::ErrorKind::PermissionDenied => ": name a file that you may write",
            _ => "",
        };
        anyhow::anyhow!("cannot write '{}': {}{remedy}", out.display(), os_message(&error))
    };
    match trusted_path::locate(out) {
        Ok(found) if found.metadata().is_file() => {
            if overwrite == Overwrite::No {
                let shown = out.display();
                anyhow::bail!("'{shown}' is there already: name another, or use --overwrite");
            }
            lock::check_unused(&found, out)?;
            // The target of a symbolic link is replaced, not the link.
            let mode = Permissions::from_mode(found.metadata().permissions().mode() & 0o777);
            let real = found.real_path().map_err(failed)?;
            replace_file(&real, text.as_bytes(), Some(mode), Overwrite::Yes)
        }
        Ok(found) => write_device(&found, text.as_bytes()),
        // A link to nothing was created for another purpose.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !out.is_symlink() => {
            replace_file(out, text.as_bytes(), None, Overwrite::No)
        }
        Err(error) => Err(error),
    }
    .map_err(failed)
}

/// Writes to a device, or to a pipe of root or of this user.
fn write_device(found: &PathHandle, bytes: &[u8]) -> io::Result<()> {
    let kind = found.metadata().file_type();
    if kind.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    // It may be the base of a disk, or hold a file system; a picture belongs on none.
    if kind.is_block_device() {
        return Err(io::Error::other("it is a block device: name a file"));
    }
    if kind.is_fifo() && !is_own(found.metadata().uid()) {
        return Err(io::Error::from_raw_os_error(libc::EPERM));
    }
    // Opening does not wait for a reader of the pipe.
    found.open(OFlags::WRONLY)?.write_all(bytes)
}

/// Creates or replaces the file at `path`. `mode` is that of the replaced file; `None`: the default
/// mode of a new file.
fn replace_file(
    path: &Path,
    bytes: &[u8],
    mode: Option<Permissions>,
    overwrite: Overwrite,
) -> io::Result<()> {
    let perm = if mode.is_some() { 0o600 } else { 0o666 };
    let fresh = UnnamedFile::create(path, perm).map_err(|error| match error {
        PartFileError::Host { error, .. } => error,
        error => io::Error::other(error.to_string()),
    })?;
    let written = fresh.file().write_all(bytes).and_then(|()| match mode {
        Some(mode) => fresh.file().set_permissions(mode),
        None => Ok(()),
    });
    if let Err(error) = written {
        fresh.discard();
        return Err(error);
    }
    fresh.commit(overwrite).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn link_to_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nothing"), &link).unwrap();
        assert!(save(&link, "new", Overwrite::No).is_err());
        assert!(link.is_symlink() && !dir.path().join("nothing").exists());
    }

    #[test]
    fn file_is_replaced_as_a_whole_and_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("map.svg");
        save(&out, "first", Overwrite::No).unwrap();
        fs::set_permissions(&out, Permissions::from_mode(0o640)).unwrap();
        let before = File::open(&out).unwrap();
        save(&out, "2nd", Overwrite::Yes).unwrap();
        assert_eq!(fs::read(&out).unwrap(), b"2nd");
        assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(io::read_to_string(before).unwrap(), "first");
        assert_eq!(names(dir.path()), ["map.svg"]);
    }

    #[test]
    fn target_of_a_link_is_replaced_and_the_link_stays() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        fs::write(dir.path().join("real"), b"old").unwrap();
        std::os::unix::fs::symlink("real", &link).unwrap();
        save(&link, "new", Overwrite::Yes).unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read(dir.path().join("real")).unwrap(), b"new");
    }

    #[test]
    fn device_is_written_to() {
        save(Path::new("/dev/null"), "gone", Overwrite::No).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn write_error_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let line = |path: &Path| save(path, "x", Overwrite::No).unwrap_err().to_string();
        let missing = dir.path().join("no/map.svg");
        assert_eq!(
            line(&missing),
            format!(
                "cannot write '{}': No such file or directory: its directory must exist",
                missing.display()
            )
        );
        assert!(line(dir.path()).ends_with("': Is a directory: name a file in it"));
        assert!(names(dir.path()).is_empty());
    }
}
