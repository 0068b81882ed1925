//! The files that the program has open, as the kernel tells.
//!
//! A name may have been turned to another file between our look at it and the program's. So what counts
//! is what the program has: the image that was checked must be among it, and it must be the same after
//! each start.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::confined::PathHandle;

/// What tells a file from another, and from itself after a change: device, inode, size and time of last
/// modification.
type FileMark = (u64, u64, u64, i64, i64);

fn mark_of(found: &Metadata) -> FileMark {
    (found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec())
}

/// The files of one program, whenever it is started.
pub(super) struct OpenedFiles {
    image: Arc<File>,
    mark: FileMark,
    /// Where the image may name files.
    dirs: Vec<PathBuf>,
    /// The other files, once the program was started.
    found: Mutex<Option<Found>>,
}

struct Found {
    marks: Vec<(PathBuf, FileMark)>,
    files: Vec<(PathBuf, PathHandle)>,
}

impl OpenedFiles {
    /// Expects `image`, as it is now, and files below `dirs`.
    pub(super) fn of(image: &Arc<File>, dirs: &[PathBuf]) -> io::Result<Self> {
        let mark = mark_of(&image.metadata()?);
        Ok(Self { image: Arc::clone(image), mark, dirs: dirs.to_vec(), found: Mutex::default() })
    }

    /// Judges the files that the program has open after a start.
    ///
    /// # Errors
    /// The reason why the image is not the one that it was.
    pub(super) fn check(&self, files: Vec<PathHandle>) -> Result<(), String> {
        let (device, inode, ..) = self.mark;
        let is_image = |found: &Metadata| (found.dev(), found.ino()) == (device, inode);
        if !files.iter().any(|file| is_image(file.metadata())) {
            return Err("another file was put in its place".to_owned());
        }
        let now = self.image.metadata().map_err(|error| error.to_string())?;
        if mark_of(&now) != self.mark {
            return Err("the file was changed".to_owned());
        }
        let mut others = Found { marks: Vec::new(), files: Vec::new() };
        for file in files {
            let found = file.metadata();
            let kind = found.file_type();
            if is_image(found) || !(kind.is_file() || kind.is_block_device()) {
                continue;
            }
            let Ok(path) = file.real_path() else { continue };
            let mark = mark_of(found);
            let is_new = others.marks.iter().all(|(_, other)| *other != mark);
            if is_new && self.dirs.iter().any(|dir| path.starts_with(dir)) {
                others.marks.push((path.clone(), mark));
                others.files.push((path, file));
            }
        }
        others.marks.sort();
        others.files.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut found = self.found.lock();
        match &*found {
            None => *found = Some(others),
            Some(known) if known.marks == others.marks => {}
            Some(_) => return Err("a file that it needs is another one, or was changed".to_owned()),
        }
        Ok(())
    }

    /// Takes the other files that were found at the first start, by their paths.
    pub(super) fn take_found(&self) -> Vec<(PathBuf, PathHandle)> {
        let mut found = self.found.lock();
        found.as_mut().map(|found| std::mem::take(&mut found.files)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_image_must_be_open_and_everything_as_it_was() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["image", "extent", "other"] {
            fs::write(path(name), name).unwrap();
        }
        let image = Arc::new(File::open(path("image")).unwrap());
        let handle = |name: &str| PathHandle::at(&path(name)).unwrap();
        let dirs = [dir.path().canonicalize().unwrap()];
        let files = OpenedFiles::of(&image, &dirs).unwrap();
        let line = files.check(vec![handle("extent")]).unwrap_err();
        assert!(line.contains("another file"), "{line}");
        let null = || PathHandle::at("/dev/null".as_ref()).unwrap();
        let outside = || PathHandle::at("/etc/passwd".as_ref()).unwrap();
        let given = vec![handle("image"), handle("extent"), null(), outside(), handle("extent")];
        files.check(given).unwrap();
        let found = files.take_found();
        assert_eq!(found.len(), 1);
        assert!(found[0].0.ends_with("extent"));
        files.check(vec![handle("extent"), handle("image")]).unwrap();
        for given in [vec![handle("image")], vec![handle("image"), handle("other")]] {
            let line = files.check(given).unwrap_err();
            assert!(line.contains("that it needs"), "{line}");
        }
        fs::write(path("extent"), "changed").unwrap();
        assert!(files.check(vec![handle("image"), handle("extent")]).is_err());
        fs::write(path("extent"), "extent").unwrap();
        fs::write(path("image"), "changed").unwrap();
        let line = files.check(vec![handle("image")]).unwrap_err();
        assert!(line.contains("was changed"), "{line}");
    }
}
