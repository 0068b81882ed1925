//! The check that a base is the one that its overlay records, and unchanged.

use std::path::Path;

use super::context::OpenContext;
use super::error::OpenError;
use crate::config::format_size;
use crate::disk::base_description::{BaseDescription, UnreadableBase};
use crate::overlay::stack::{BaseRecord, FileRecord, RecordedSource, SourceLocation};

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
    let current = now.to_record()?;
    Ok(match (recorded.source(), current.source()) {
        (Some(old), Some(new)) => find_other_source(&old, &new, now)
            .or_else(|| find_changed_source(&old, &new, now).map(BaseMismatch::Changed)),
        (None, Some(new)) => Some(BaseMismatch::OtherBase(format!(
            "is one of {}, not of {}: a hydrated overlay is detached from its base, mount it as NAME=blank:{},overlay=...",
            blank(recorded),
            new.location,
            recorded.blank_size()
        ))),
        (Some(old), None) => Some(other_base(&old.location.to_string(), &blank(&current))),
        (None, None) if recorded == &current => None,
        (None, None) => Some(other_base(&blank(recorded), &blank(&current))),
    })
}

/// Compares place, format and part of two sources of bytes.
fn find_other_source(
    old: &RecordedSource<'_>,
    new: &RecordedSource<'_>,
    now: &BaseDescription,
) -> Option<BaseMismatch> {
    let (was, is) = (&old.location, &new.location);
    if old.format != new.format {
        let (was, is) = (format!("{was} as {}", old.format), format!("{is} as {}", new.format));
        return Some(other_base(&was, &is));
    }
    if was != is && !was.leads_to(now.file().map(|file| &**file)) {
        if was.is_gone() {
            return Some(BaseMismatch::OtherBase(format!(
                "is one of {was}, which is gone: if it is {is} now, say so with cowslip rebase"
            )));
        }
        return Some(other_base(&was.to_string(), &is.to_string()));
    }
    (old.part != new.part).then(|| {
        let (old_part, part) = (describe_part(old.part), describe_part(new.part));
        other_base(&format!("{was} {old_part}"), &format!("{is} {part}"))
    })
}

/// Compares the contents of a source, and of the files that it needs, with the recorded ones.
fn find_changed_source(
    old: &RecordedSource<'_>,
    new: &RecordedSource<'_>,
    now: &BaseDescription,
) -> Option<String> {
    let remedy = match old.identity.differences_of_copy(new.identity) {
        Some(_) => "",
        None => "; if it is a copy of that, use cowslip rebase",
    };
    let change = old.identity.differences(new.identity);
    let change = change.or_else(|| find_changed_need(old.needs, new.needs, now))?;
    Some(format!("does not fit its base {} any more ({change}{remedy})", new.location))
}

fn other_base(old: &str, new: &str) -> BaseMismatch {
    BaseMismatch::OtherBase(format!(
        "is one of {old}, not of {new}: name the base it was made with"
    ))
}

fn blank(record: &BaseRecord) -> String {
    format!("a blank disk of {}", format_size(record.blank_size()))
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
    current: &[FileRecord],
    now: &BaseDescription,
) -> Option<String> {
    let (old, new) = (recorded.len(), current.len());
    if old != new {
        return Some(format!("it needs {new} other files, and needed {old}"));
    }
    for ((recorded, current), file) in recorded.iter().zip(current).zip(now.needs()) {
        let shown = current.path.display();
        if recorded.path != current.path
            && !SourceLocation::File(&recorded.path).leads_to(Some(file))
        {
            let old = recorded.path.display();
            return Some(format!("it needs '{shown}' instead of '{old}'"));
        }
        if let Some(change) = recorded.identity.differences(&current.identity) {
            return Some(format!("its backing file '{shown}': {change}"));
        }
    }
    None
}
