//! The check that a base is the one that its overlay records, and unchanged.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::context::OpenContext;
use super::error::OpenError;
use crate::config::format_size;
use crate::disk::base_description::{BaseDescription, UnreadableBase, identity_of};
use crate::overlay::stack::{BaseRecord, FileRecord, view_fields};

/// The way in which a base does not fit its overlay; text to follow the overlay's directory.
pub(super) enum BaseMismatch {
    /// Another base than the recorded one.
    OtherBase(String),
    /// The recorded base with changed contents.
    Changed(String),
}

/// Refuses a base other than the one with which the overlay at `dir` was created, and one that has
/// changed since, unless the context allows it.
pub(super) fn check_base(
    dir: &Path,
    recorded: &BaseRecord,
    description: &BaseDescription,
    context: &OpenContext<'_>,
) -> Result<(), OpenError> {
    let mismatch = |why| Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    match find_mismatch(recorded, description)? {
        Some(BaseMismatch::OtherBase(why)) => mismatch(why),
        Some(BaseMismatch::Changed(why)) if context.force => {
            log::warn!("overlay '{}' {why}; used all the same (--force)", dir.display());
            Ok(())
        }
        Some(BaseMismatch::Changed(why)) => {
            mismatch(format!("{why}: restore the base, or use --force and risk nonsense"))
        }
        None => Ok(()),
    }
}

/// Compares the base `now` with the recorded one.
pub(super) fn find_mismatch(
    recorded: &BaseRecord,
    now: &BaseDescription,
) -> Result<Option<BaseMismatch>, UnreadableBase> {
    Ok(match (recorded, now) {
        (BaseRecord::Blank { size: old }, BaseDescription::Blank(new)) if old == new => None,
        (BaseRecord::Blank { size: old }, BaseDescription::Blank(new)) => {
            Some(other_base(&blank(*old), &blank(*new)))
        }
        (BaseRecord::Blank { size }, BaseDescription::File { path, .. }) => {
            Some(BaseMismatch::OtherBase(format!(
                "is one of {}, not of {}: a hydrated overlay is detached from its base, mount it as NAME=blank:{size},overlay=...",
                blank(*size),
                quoted(path)
            )))
        }
        (BaseRecord::File { path, .. }, BaseDescription::Blank(size)) => {
            Some(other_base(&quoted(path), &blank(*size)))
        }
        (BaseRecord::File { .. }, BaseDescription::File { .. }) => {
            match find_other_file(recorded, now) {
                Some(other) => Some(other),
                None => find_changed_file(recorded, now)?,
            }
        }
    })
}

/// Compares path, format and part of two files.
fn find_other_file(recorded: &BaseRecord, now: &BaseDescription) -> Option<BaseMismatch> {
    let (
        BaseRecord::File { path: old_path, format: old_format, offset, len, .. },
        BaseDescription::File { path, file, format, view, .. },
    ) = (recorded, now)
    else {
        return None;
    };
    let (old, new) = (quoted(old_path), quoted(path));
    if *old_format != format.to_string() {
        return Some(other_base(&format!("{old} as {old_format}"), &format!("{new} as {format}")));
    }
    if old_path != path && !is_same_file(old_path, file) {
        if old_path.exists() {
            return Some(other_base(&old, &new));
        }
        return Some(BaseMismatch::OtherBase(format!(
            "is one of {old}, which is gone: if it is {new} now, say so with cowslip rebase"
        )));
    }
    let (old_part, part) = ((*offset, *len), view_fields(view.as_ref()));
    (old_part != part).then(|| {
        let (old_part, part) = (describe_part(old_part), describe_part(part));
        other_base(&format!("{old} {old_part}"), &format!("{new} {part}"))
    })
}

/// Compares the contents of a file, and of the files that it needs, with the recorded ones.
fn find_changed_file(
    recorded: &BaseRecord,
    now: &BaseDescription,
) -> Result<Option<BaseMismatch>, UnreadableBase> {
    let (
        BaseRecord::File { identity: recorded, needs: recorded_needs, .. },
        BaseDescription::File { path, file, needs, .. },
    ) = (recorded, now)
    else {
        return Ok(None);
    };
    let current = identity_of(path, file)?;
    let remedy = match recorded.differences_of_copy(&current) {
        Some(_) => "",
        None => "; if it is a copy of that, use cowslip rebase",
    };
    let change = match recorded.differences(&current) {
        None => find_changed_need(recorded_needs, needs)?,
        change => change,
    };
    Ok(change.map(|change| {
        let path = quoted(path);
        BaseMismatch::Changed(format!("does not fit its base {path} any more ({change}{remedy})"))
    }))
}

fn other_base(old: &str, new: &str) -> BaseMismatch {
    BaseMismatch::OtherBase(format!(
        "is one of {old}, not of {new}: name the base it was made with"
    ))
}

fn blank(size: u64) -> String {
    format!("a blank disk of {}", format_size(size))
}

fn quoted(path: &Path) -> String {
    format!("'{}'", path.display())
}

/// Describes a part of a base, given by its start and length in bytes.
fn describe_part(part: (Option<u64>, Option<u64>)) -> String {
    let (offset, len) = (part.0.unwrap_or(0), part.1);
    match (part, len.and_then(|len| offset.checked_add(len))) {
        ((None, None), _) => "as a whole".to_owned(),
        (_, None) => format!("from byte {offset} on"),
        (_, Some(end)) => format!("as bytes {offset}..{end}"),
    }
}

/// Describes the first difference between the files that a base needs now and the recorded ones.
fn find_changed_need(
    recorded: &[FileRecord],
    now: &[(PathBuf, Arc<File>)],
) -> Result<Option<String>, UnreadableBase> {
    let (old, new) = (recorded.len(), now.len());
    if old != new {
        return Ok(Some(format!("it needs {new} other files, and needed {old}")));
    }
    for (recorded, (path, file)) in recorded.iter().zip(now) {
        let shown = path.display();
        if recorded.path != *path && !is_same_file(&recorded.path, file) {
            let old = recorded.path.display();
            return Ok(Some(format!("it needs '{shown}' instead of '{old}'")));
        }
        if let Some(change) = recorded.identity.differences(&identity_of(path, file)?) {
            return Ok(Some(format!("its backing file '{shown}': {change}")));
        }
    }
    Ok(None)
}

/// Whether `path` leads to `file`, by device and inode.
fn is_same_file(path: &Path, file: &File) -> bool {
    let (Ok(there), Ok(here)) = (std::fs::metadata(path), file.metadata()) else {
        return false;
    };
    (there.dev(), there.ino()) == (here.dev(), here.ino())
}
