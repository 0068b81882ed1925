//! What lies at the bottom of a disk, what its overlay remembers of it, and whether the two fit.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open::{OpenContext, OpenError};
use crate::base::identity::Identity;
use crate::base::{Base, BaseOptions};
use crate::config::{DiskSource, DiskSpec, Format, format_size};
use crate::overlay::stack::{BaseRecord, FileRecord, StackError, view_fields};

/// What lies at the bottom of a disk, as far as `keep` and `status` need it.
pub(super) enum Bottom {
    /// A file or block device.
    File {
        path: PathBuf,
        file: Arc<File>,
        format: Format,
        /// The part of it that the disk stands on; none for all of it.
        view: Option<Range<u64>>,
        needs: Vec<(PathBuf, Arc<File>)>,
        allow_backing: Vec<PathBuf>,
    },
    /// Zeros, so many bytes.
    Blank(u64),
}

/// The units of what begins at byte `start` of something in units of `unit` bytes: a power of two,
/// and at least a sector, which tools count on.
pub(super) fn grain_at(start: u64, unit: u32) -> u32 {
    let unit = if unit.is_power_of_two() { unit } else { 512 };
    let start = u32::try_from(start & start.wrapping_neg()).unwrap_or(u32::MAX);
    if start == 0 { unit.max(512) } else { unit.min(start).max(512) }
}

impl Bottom {
    pub(super) fn of(base: &Base, how: BaseOptions<'_>) -> Self {
        match (&base.path, &base.file) {
            (Some(path), Some(file)) => {
                let (path, file) = (path.clone(), Arc::clone(file));
                let allow_backing = how.allow_backing.to_vec();
                let (format, needs) = (how.format.unwrap_or(Format::Raw), base.needs.clone());
                let view = base.view.clone();
                Self::File { path, file, format, view, needs, allow_backing }
            }
            _ => Self::Blank(base.size),
        }
    }

    /// In what units its holes come, in bytes: no hole begins or ends between two of them, unless
    /// its part begins at no sector of the file.
    pub(super) fn grain(&self) -> u32 {
        let Self::File { file, view, .. } = self else { return u32::MAX };
        let unit = file.metadata().map_or(0, |found| found.blksize());
        let start = view.as_ref().map_or(0, |view| view.start);
        grain_at(start, u32::try_from(unit).unwrap_or(u32::MAX))
    }

    /// What an overlay remembers of it.
    pub(super) fn to_record(&self) -> Result<BaseRecord, OpenError> {
        match self {
            Self::Blank(size) => Ok(BaseRecord::Blank { size: *size }),
            Self::File { path, file, format, view, needs, .. } => {
                let (offset, len) = view_fields(view.as_ref());
                let record = |(path, file): &(PathBuf, Arc<File>)| {
                    Ok(FileRecord { path: path.clone(), identity: identity_of(path, file)? })
                };
                Ok(BaseRecord::File {
                    path: path.clone(),
                    format: format.to_string(),
                    offset,
                    len,
                    identity: identity_of(path, file)?,
                    needs: needs.iter().map(record).collect::<Result<_, OpenError>>()?,
                })
            }
        }
    }

    /// Whether it is the very file that `recorded` speaks of, whatever it holds by now.
    pub(super) fn is_recorded_file(&self, recorded: &BaseRecord) -> Result<bool, OpenError> {
        let (Self::File { path, file, .. }, BaseRecord::File { identity, .. }) = (self, recorded)
        else {
            return Ok(false);
        };
        Ok(identity.file_difference(&identity_of(path, file)?).is_none())
    }

    /// Its path, when it has one.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } => Some(path),
            Self::Blank(_) => None,
        }
    }

    pub(super) fn file(&self) -> Option<&Arc<File>> {
        match self {
            Self::File { file, .. } => Some(file),
            Self::Blank(_) => None,
        }
    }

    /// Whether `base` is read from the same files, by device and inode.
    pub(super) fn is_same_files(&self, base: &Base) -> bool {
        let id = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).ok();
        let needed = base.needs.iter().map(|(_, file)| &**file);
        let others = base.file.as_deref().into_iter().chain(needed);
        self.files().map(id).eq(others.map(id))
    }

    /// Every file that it is read from.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        let (file, needs) = match self {
            Self::File { file, needs, .. } => (Some(file), needs.as_slice()),
            Self::Blank(_) => (None, [].as_slice()),
        };
        file.into_iter().chain(needs.iter().map(|(_, file)| file)).map(AsRef::as_ref)
    }

    pub(super) fn allow_backing(&self) -> &[PathBuf] {
        match self {
            Self::File { allow_backing, .. } => allow_backing,
            Self::Blank(_) => &[],
        }
    }

    pub(super) fn metadata(&self) -> Option<Metadata> {
        match self {
            Self::File { file, .. } => file.metadata().ok(),
            Self::Blank(_) => None,
        }
    }
}

/// Refuses a base that is not the one the overlay at `dir` was made with, or has changed.
pub(super) fn check_base(
    dir: &Path,
    recorded: &BaseRecord,
    bottom: &Bottom,
    setting: &OpenContext<'_>,
) -> Result<(), OpenError> {
    let mismatch = |why| Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    match find_mismatch(recorded, bottom)? {
        Some(BaseMismatch::OtherBase(why)) => mismatch(why),
        Some(BaseMismatch::Changed(why)) if setting.force => {
            log::warn!("overlay '{}' {why}; used all the same (--force)", dir.display());
            Ok(())
        }
        Some(BaseMismatch::Changed(why)) => {
            mismatch(format!("{why}: restore the base, or use --force and risk nonsense"))
        }
        None => Ok(()),
    }
}

/// What a disk over the recorded `base` is, if nobody says otherwise.
///
/// # Errors
/// [`StackError::Syntax`]: a format that is not known.
pub fn spec_over(name: &str, base: &BaseRecord) -> Result<DiskSpec, StackError> {
    Ok(match base {
        BaseRecord::Blank { size } => DiskSpec::new(name.to_owned(), DiskSource::Blank(*size)),
        BaseRecord::File { path, format, .. } => {
            let known = format.parse();
            let known =
                known.map_err(|_| StackError::Syntax(format!("a base of format {format}")))?;
            let mut spec = DiskSpec::new(name.to_owned(), DiskSource::File(path.clone()));
            spec.format = Some(known);
            spec.part = base.part();
            spec
        }
    })
}

/// How a base does not fit its overlay.
pub(super) enum BaseMismatch {
    /// It is another one.
    OtherBase(String),
    /// It is not what it was.
    Changed(String),
}

pub(super) fn find_mismatch(
    recorded: &BaseRecord,
    now: &Bottom,
) -> Result<Option<BaseMismatch>, OpenError> {
    let other = |was: String, is: String| {
        Ok(Some(BaseMismatch::OtherBase(format!(
            "is one of {was}, not of {is}: name the base it was made with"
        ))))
    };
    let blank = |size: u64| format!("a blank disk of {}", format_size(size));
    let named = |path: &Path| format!("'{}'", path.display());
    match (recorded, now) {
        (BaseRecord::Blank { size: was }, Bottom::Blank(is)) if was == is => Ok(None),
        (BaseRecord::Blank { size: was }, Bottom::Blank(is)) => other(blank(*was), blank(*is)),
        (BaseRecord::Blank { size }, Bottom::File { path, .. }) => {
            Ok(Some(BaseMismatch::OtherBase(format!(
                "is one of {}, not of {}: a hydrated overlay is detached from its base, mount it as NAME=blank:{size},overlay=...",
                blank(*size),
                named(path)
            ))))
        }
        (BaseRecord::File { path, .. }, Bottom::Blank(size)) => other(named(path), blank(*size)),
        (
            BaseRecord::File { path: was, identity, format, needs: needed, offset, len },
            Bottom::File { path, file, format: is, view, needs, .. },
        ) => {
            if *format != is.to_string() {
                return other(
                    format!("{} as {format}", named(was)),
                    format!("{} as {is}", named(path)),
                );
            }
            if was != path && !is_same_file(was, file) {
                if was.exists() {
                    return other(named(was), named(path));
                }
                return Ok(Some(BaseMismatch::OtherBase(format!(
                    "is one of {}, which is gone: if it is {} now, say so with cowslip rebase",
                    named(was),
                    named(path)
                ))));
            }
            if (*offset, *len) != view_fields(view.as_ref()) {
                return other(
                    format!("{} {}", named(was), describe_part((*offset, *len))),
                    format!("{} {}", named(path), describe_part(view_fields(view.as_ref()))),
                );
            }
            let is = identity_of(path, file)?;
            let changed = identity.differences(&is);
            let cure = match identity.differences_of_copy(&is) {
                Some(_) => "",
                None => "; if it is a copy of that, use cowslip rebase",
            };
            let changed = match changed {
                None => changed_needs(needed, needs)?,
                changed => changed,
            };
            Ok(changed.map(|what| {
                let named = named(path);
                BaseMismatch::Changed(format!(
                    "does not fit its base {named} any more ({what}{cure})"
                ))
            }))
        }
    }
}

/// A part of a base, by where it begins and how many bytes it has.
fn describe_part(part: (Option<u64>, Option<u64>)) -> String {
    let (offset, len) = (part.0.unwrap_or(0), part.1);
    match (part, len.and_then(|len| offset.checked_add(len))) {
        ((None, None), _) => "as a whole".to_owned(),
        (_, None) => format!("from byte {offset} on"),
        (_, Some(end)) => format!("as bytes {offset}..{end}"),
    }
}

/// What of the files that a base needs is not as it was.
fn changed_needs(
    was: &[FileRecord],
    now: &[(PathBuf, Arc<File>)],
) -> Result<Option<String>, OpenError> {
    if was.len() != now.len() {
        return Ok(Some(format!("it needs {} other files, and needed {}", now.len(), was.len())));
    }
    for (was, (path, file)) in was.iter().zip(now) {
        let shown = path.display();
        if was.path != *path && !is_same_file(&was.path, file) {
            return Ok(Some(format!("it needs '{shown}' instead of '{}'", was.path.display())));
        }
        if let Some(what) = was.identity.differences(&identity_of(path, file)?) {
            return Ok(Some(format!("its backing file '{shown}': {what}")));
        }
    }
    Ok(None)
}

fn identity_of(path: &Path, file: &File) -> Result<Identity, OpenError> {
    Identity::of(file).map_err(|error| OpenError::Unreadable { path: path.to_owned(), error })
}

fn is_same_file(path: &Path, file: &File) -> bool {
    let (Ok(there), Ok(here)) = (std::fs::metadata(path), file.metadata()) else {
        return false;
    };
    (there.dev(), there.ino()) == (here.dev(), here.ino())
}
