//! Rebase: records the new location of the base of an overlay that is not mounted.
//!
//! An overlay over another base is garbage, so the new base must match the record of the old one:
//! the size and a hash of samples. The inode and the modification time may differ, as for a copy.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{OfflineError, is_store, single_target};
use crate::base::formats::BaseFormat;
use crate::base::{self, BaseAccess, BaseError, BaseOptions};
use crate::config::{
    DirectIo, DiskSource, Format, Locking, Passthrough, RemoteAddress, RemoteSpec, SourcePart,
};
use crate::host::os_message;
use crate::identity::Identity;
use crate::overlay::persist::{self, LockedOverlay};
use crate::overlay::stack::{BaseRecord, FileRecord, RecordedSource, SourceLocation, Stack};
use crate::remote::{self, RemoteImage};

/// Policy for a base that does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnMismatch {
    /// The overlay stays as it is.
    Refuse,
    /// The overlay gets the base nevertheless.
    Accept,
}

/// The result of a rebase. A base is a path, or the address of an image on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rebased {
    /// The base is recorded as it is already.
    Unchanged {
        /// The base; a path without links.
        base: String,
    },
    /// The overlay has another base now.
    Moved {
        /// The new base; a path without links.
        base: String,
        /// The recorded old base.
        was: String,
        /// How the new base differs from the old one, if a mismatch was accepted.
        difference: Option<String>,
    },
}

/// Makes `new`, a file or an image on a server, the base of the overlay at `dir`. Backing files of an
/// image must lie in its directory or below one of `allow_backing`.
///
/// # Errors
/// [`OfflineError`]; the overlay is unchanged then.
pub(crate) fn rebase(
    dir: &Path,
    new: &DiskSource,
    on_mismatch: OnMismatch,
    allow_backing: &[PathBuf],
) -> Result<Rebased, OfflineError> {
    if is_store(dir) {
        return Err(OfflineError::Store(dir.to_owned()));
    }
    let target = single_target(dir)?;
    let overlay =
        persist::lock_overlay(target.overlay_path()).map_err(OfflineError::overlay(dir))?;
    let part = overlay.stack.base.part();
    let Some(was) = overlay.stack.base.source() else {
        return Err(OfflineError::NoBase(dir.to_owned()));
    };
    let format = was.format.to_owned();
    let known = format.parse::<Format>().ok().filter(|format| BaseFormat::of(*format).is_read());
    let Some(known) = known else {
        return Err(OfflineError::Format { dir: dir.to_owned(), format });
    };
    // Use the recorded format: if the contents match, there is nothing to detect.
    let found = NewBase::inspect(new, Some(known), part, allow_backing)?;
    let difference = difference(&overlay, dir, &was, &found)?;
    let shown = found.shown();
    if let Some(difference) = &difference {
        // If the file looks like another format, that is the clearer error.
        if BaseFormat::of(known).is_plain() {
            NewBase::inspect(new, None, part, &[])?;
        }
        if on_mismatch == OnMismatch::Refuse {
            return Err(OfflineError::OtherBase {
                base: source_text(new),
                dir: dir.to_owned(),
                difference: difference.clone(),
            });
        }
    }
    let old = was.location.text();
    let record = found.into_record(&format, was.part);
    if record == overlay.stack.base {
        return Ok(Rebased::Unchanged { base: shown });
    }
    let stack = Stack { base: record, ..overlay.stack.clone() };
    overlay.into_dir().replace_stack(stack).map_err(OfflineError::overlay(dir))?;
    Ok(Rebased::Moved { base: shown, was: old, difference })
}

/// Describes how `found` differs from the base that the overlay recorded; `None` if it is the same
/// base or a copy of it.
fn difference(
    overlay: &LockedOverlay,
    dir: &Path,
    was: &RecordedSource<'_>,
    found: &NewBase,
) -> Result<Option<String>, OfflineError> {
    if overlay.is_committing().map_err(OfflineError::overlay(dir))? {
        // The contents are neither old nor new, so only the file itself can be compared.
        return Ok(was.identity.file_difference(&found.identity).map(|difference| {
            let shown = dir.display();
            format!(
                "{difference}, and a commit was cut short that cowslip commit '{shown}' finishes"
            )
        }));
    }
    let of_backing_files = || {
        if was.needs.len() != found.needs.len() {
            return Some("it needs other files".to_owned());
        }
        was.needs.iter().zip(&found.needs).find_map(|(was, is)| {
            let difference = was.identity.differences_of_copy(&is.identity)?;
            Some(format!("its backing file '{}': {difference}", is.path.display()))
        })
    };
    Ok(content_difference(was, found).or_else(of_backing_files))
}

/// Describes how the bytes of `found` differ from the recorded ones. Where one of them is known only by
/// the version that its server names, samples of both are compared.
fn content_difference(was: &RecordedSource<'_>, found: &NewBase) -> Option<String> {
    let (old, new) = (was.identity, &found.identity);
    let is_comparable = old.hash == new.hash || (old.version().or(new.version())).is_none();
    if is_comparable || old.size != new.size {
        return old.differences_of_copy(new);
    }
    let unknown = |why: String| Some(format!("its contents cannot be compared: {why}"));
    let old = match old.version() {
        None => old.clone(),
        Some(_) => match sample_recorded(was) {
            Ok(old) => old,
            Err(why) => return unknown(why),
        },
    };
    match found.sampled_identity() {
        Ok(new) => old.differences_of_copy(&new),
        Err(error) => unknown(os_message(&error)),
    }
}

/// Returns the samples of a recorded base that is known by its version, if the server still has that.
fn sample_recorded(was: &RecordedSource<'_>) -> Result<Identity, String> {
    let SourceLocation::Remote(address) = was.location else {
        return Err("it is no image on a server".to_owned());
    };
    let address = RemoteAddress::parse(address).map_err(|error| error.to_string())?;
    let image = remote::open(&RemoteSpec::new(address)).map_err(|error| error.to_string())?;
    let failed = |error: io::Error| format!("{}: {}", was.location, os_message(&error));
    if let Some(difference) = was.identity.differences(&image.identity().map_err(failed)?) {
        return Err(format!("{} has changed: {difference}", was.location));
    }
    image.sampled_identity().map_err(failed)
}

/// The place of the candidate for the new base.
enum NewLocation {
    /// Real path.
    File(PathBuf),
    Remote(RemoteImage),
}

/// The candidate for the new base.
struct NewBase {
    location: NewLocation,
    identity: Identity,
    /// Backing files.
    needs: Vec<FileRecord>,
}

impl NewBase {
    /// Opens the base at `source`, and collects what an overlay records of a base.
    fn inspect(
        source: &DiskSource,
        format: Option<Format>,
        part: SourcePart,
        allow_backing: &[PathBuf],
    ) -> Result<Self, OfflineError> {
        let (access, locking, passthrough) = (BaseAccess::Read, Locking::Qemu, Passthrough::Off);
        let direct = DirectIo::Off;
        let options =
            BaseOptions { format, part, access, locking, passthrough, direct, allow_backing };
        let base = base::open(source, options)?;
        let shown = source_text(source);
        let failed = |error| OfflineError::host(format!("cannot read the base '{shown}'"))(error);
        let record = |(path, file): &(PathBuf, Arc<File>)| {
            Ok(FileRecord { path: path.clone(), identity: Identity::of(file)? })
        };
        let needs = base.needs.iter().map(record).collect::<io::Result<_>>();
        let missing = || BaseError::Missing(PathBuf::from(&shown));
        let location = match &base.remote {
            Some(remote) => NewLocation::Remote(remote.clone()),
            None => NewLocation::File(base.path.clone().ok_or_else(missing)?),
        };
        Ok(Self {
            location,
            identity: base.identity().map_err(failed)?.ok_or_else(missing)?,
            needs: needs.map_err(failed)?,
        })
    }

    /// Returns the identity by samples, also of an image that is known by its version.
    fn sampled_identity(&self) -> io::Result<Identity> {
        match &self.location {
            NewLocation::Remote(remote) => remote.sampled_identity(),
            NewLocation::File(_) => Ok(self.identity.clone()),
        }
    }

    /// The path or the address.
    fn shown(&self) -> String {
        match &self.location {
            NewLocation::File(path) => path.display().to_string(),
            NewLocation::Remote(remote) => remote.address().to_string(),
        }
    }

    /// Returns the record for an overlay over this base, in the format `format`; `part` is the start
    /// and the length of the part, as recorded.
    fn into_record(self, format: &str, part: (Option<u64>, Option<u64>)) -> BaseRecord {
        let Self { location, identity, needs } = self;
        let (format, (offset, len)) = (format.to_owned(), part);
        match location {
            NewLocation::File(path) => {
                BaseRecord::File { path, format, offset, len, identity, needs }
            }
            NewLocation::Remote(remote) => {
                let address = remote.address().to_string();
                BaseRecord::Remote { address, format, offset, len, identity, needs }
            }
        }
    }
}

/// Describes the source that the user named.
fn source_text(source: &DiskSource) -> String {
    match source {
        DiskSource::File(path) => path.display().to_string(),
        DiskSource::Remote(remote) => remote.address.to_string(),
        DiskSource::Blank(_) => "blank".to_owned(),
        DiskSource::Stream(_) => "stream".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use uuid::Uuid;

    use super::*;
    use crate::config::OverlayKind;
    use crate::overlay::FORMAT_VERSION;
    use crate::overlay::persist::{NewOverlay, OverlayPath};
    use crate::overlay::record::LayerMap;
    use crate::overlay::stack::LayerRecord;
    use crate::trusted_path::open_dir;

    /// Creates an overlay `o` over the file `a`, in a temporary directory.
    fn make(format: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a");
        fs::write(&path, [7; 9000]).unwrap();
        let identity = inspect(&path).1;
        put(
            home.path(),
            BaseRecord::File {
                path,
                format: format.to_owned(),
                offset: None,
                len: None,
                identity,
                needs: Vec::new(),
            },
        );
        home
    }

    fn put(home: &Path, base: BaseRecord) {
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            base,
            kind: OverlayKind::Blocks,
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block: 4096, parent: None }],
            snapshots: Vec::new(),
        };
        let new = NewOverlay { stack, map: &LayerMap::new(9000, 9000), limit: None };
        drop(persist::create(OverlayPath { dir: &home.join("o"), layers: None }, new).unwrap());
    }

    fn try_rebase(home: &Path, name: &str, on_mismatch: OnMismatch) -> Result<Rebased, String> {
        rebase(&home.join("o"), &DiskSource::File(home.join(name)), on_mismatch, &[])
            .map_err(|error| error.to_string())
    }

    fn inspect(path: &Path) -> (PathBuf, Identity) {
        let source = DiskSource::File(path.to_owned());
        let found = NewBase::inspect(&source, None, SourcePart::Whole, &[]).unwrap();
        (PathBuf::from(found.shown()), found.identity)
    }

    fn base_of(home: &Path) -> (PathBuf, Identity) {
        let stack = Stack::read(&open_dir(&home.join("o")).unwrap()).unwrap();
        let BaseRecord::File { path, identity, .. } = stack.base else { panic!("blank") };
        (path, identity)
    }

    #[test]
    fn copy_becomes_the_base_under_its_real_path() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("copy"), [7; 9000]).unwrap();
        symlink("copy", home.join("link")).unwrap();
        let text = |name: &str| home.join(name).display().to_string();
        let (base, was) = (text("copy"), text("a"));
        let rebased = try_rebase(home, "link", OnMismatch::Refuse).unwrap();
        assert_eq!(rebased, Rebased::Moved { base: base.clone(), was, difference: None });
        assert_eq!(base_of(home), inspect(&home.join("copy")));
        let again = try_rebase(home, "copy", OnMismatch::Refuse).unwrap();
        assert_eq!(again, Rebased::Unchanged { base });
    }

    #[test]
    fn different_base_is_accepted_only_by_force() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("other"), [8; 9000]).unwrap();
        let before = base_of(home);
        let line = try_rebase(home, "other", OnMismatch::Refuse).unwrap_err();
        assert!(line.contains("is not the base") && line.contains("its contents differ"), "{line}");
        assert_eq!(base_of(home), before);
        let rebased = try_rebase(home, "other", OnMismatch::Accept).unwrap();
        let Rebased::Moved { difference, .. } = rebased else { panic!("{rebased:?}") };
        assert_eq!(difference.as_deref(), Some("its contents differ"));
        assert_eq!(base_of(home), inspect(&home.join("other")));
    }

    #[test]
    fn unusable_base_is_refused_even_by_force() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("qcow2"), [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 8992]].concat())
            .unwrap();
        for (name, why) in [
            ("none", "does not exist"),
            ("o", "is a directory"),
            ("qcow2", "looks like a qcow2 image"),
        ] {
            let line = try_rebase(home, name, OnMismatch::Accept).unwrap_err();
            assert!(line.contains(why) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn error_says_why_an_overlay_cannot_be_rebased() {
        let home = tempfile::tempdir().unwrap();
        put(home.path(), BaseRecord::Blank { size: 9000 });
        fs::write(home.path().join("a"), [7; 9000]).unwrap();
        assert!(
            try_rebase(home.path(), "a", OnMismatch::Accept)
                .unwrap_err()
                .contains("over a blank disk")
        );
        let home = make("luks");
        assert!(
            try_rebase(home.path(), "a", OnMismatch::Accept)
                .unwrap_err()
                .contains("of format luks")
        );
        let home = make("raw");
        let dir = home.path().join("o");
        let held = persist::lock_overlay(OverlayPath { dir: &dir, layers: None }).unwrap();
        assert!(
            try_rebase(home.path(), "a", OnMismatch::Accept).unwrap_err().contains("is in use")
        );
        drop(held);
        fs::create_dir(home.path().join("names")).unwrap();
        let source = DiskSource::File(dir);
        let line = rebase(home.path(), &source, OnMismatch::Accept, &[]).unwrap_err().to_string();
        assert!(line.contains("is a store: name one of its disks"), "{line}");
    }
}
