//! The intent file, which records that a revert or a reset has begun.
//!
//! FICLONE of many extents takes many transactions of the host: a crash in between leaves a file
//! that is neither the old nor the new one. So the intent file is durable before the FICLONE begins
//! and is removed once the new contents are durable; the next open that finds an intent file
//! repeats the FICLONE.
//!
//! ```text
//!   checksum = "crc32c:0123abcd"        of everything that follows
//!   from = "snapshot"                   or "base"
//!   name = "monday"
//! ```

use std::fmt;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use super::ReflinkError;
use crate::confined;
use crate::name;
use crate::overlay::checksummed;
use crate::overlay::error::OverlayError;

/// The name of the intent file.
const INTENT_FILE: &str = "intent";
/// The name under which the intent file is written before it is renamed.
const NEW_INTENT_FILE: &str = "intent.new";
/// The longest intent file in bytes: an escaped name of 255 bytes and a few words.
const MAX_INTENT_LEN: u64 = 64 << 10;

/// The source that the disk becomes a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum RevertSource {
    /// The base: a reset.
    Base,
    /// One of the snapshots: a revert.
    Snapshot {
        /// The snapshot's name.
        name: String,
    },
}

impl fmt::Display for RevertSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("reset"),
            Self::Snapshot { name } => write!(f, "revert to '{name}'"),
        }
    }
}

fn encode(source: &RevertSource) -> io::Result<Vec<u8>> {
    let body = toml::to_string(source).map_err(io::Error::other)?;
    Ok(checksummed::encode(&body))
}

fn decode(bytes: &[u8]) -> Option<RevertSource> {
    let source = toml::from_str(checksummed::decode(bytes)?).ok()?;
    match &source {
        // Whatever the file says, the source must be a snapshot and nothing else.
        RevertSource::Snapshot { name } if name::check(name).is_err() => None,
        _ => Some(source),
    }
}

/// Records in `dir`, durably, that the disk is about to become a copy of `source`.
///
/// # Errors
/// The host's errno. The intent file may exist nevertheless, when only the last sync failed.
pub(super) fn write(dir: &File, source: &RevertSource) -> io::Result<()> {
    confined::replace_file(dir, INTENT_FILE, NEW_INTENT_FILE, &encode(source)?)
}

/// Removes the intent file, durably.
///
/// # Errors
/// The host's errno; calling this again is harmless.
pub(super) fn clear(dir: &File) -> io::Result<()> {
    confined::remove_file(dir, INTENT_FILE)?;
    dir.sync_all()
}

/// Returns the operation that a crash has interrupted, if any.
///
/// # Errors
/// [`ReflinkError::Intent`] when the intent file is damaged; otherwise the host's errno.
pub(super) fn read(dir: &File) -> Result<Option<RevertSource>, ReflinkError> {
    // The operation of an unfinished intent file never began.
    let _ = confined::remove_file(dir, NEW_INTENT_FILE);
    match confined::read_file(dir, INTENT_FILE, MAX_INTENT_LEN) {
        Ok(bytes) => decode(&bytes).map(Some).ok_or(ReflinkError::Intent),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(OverlayError::io("reading its 'intent'")(error).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trusted_path::open_dir;

    fn monday() -> RevertSource {
        RevertSource::Snapshot { name: "mon\"day".to_owned() }
    }

    #[test]
    fn an_intent_exists_until_it_is_cleared() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_dir(temp.path()).unwrap();
        assert_eq!(read(&dir).unwrap(), None);
        for source in [RevertSource::Base, monday()] {
            write(&dir, &source).unwrap();
            assert_eq!(read(&dir).unwrap(), Some(source));
        }
        clear(&dir).unwrap();
        clear(&dir).unwrap();
        assert_eq!(read(&dir).unwrap(), None);
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_intent_with_any_changed_byte_is_rejected() {
        let bytes = encode(&monday()).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert_eq!(decode(&changed), None, "byte {at}");
        }
        assert_eq!(decode(&bytes), Some(monday()));
    }
}
