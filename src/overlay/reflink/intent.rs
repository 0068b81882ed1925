//! The note that a revert or a reset has begun.
//!
//! FICLONE of many extents is many transactions of the host: a crash inside leaves a file that is
//! neither the old nor the new one. So the note is durable before it begins and goes when the new
//! file is durable; who opens the overlay and finds it does the FICLONE once more.
//!
//! ```text
//!   checksum = "crc32c:0123abcd"        of all that follows
//!   from = "snapshot"                   or "base"
//!   name = "monday"
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};

use rustix::fs::{AtFlags, OFlags};
use serde::{Deserialize, Serialize};

use super::ReflinkError;
use crate::overlay::stack::{create_at, doing, open_at};

/// The file's name.
const INTENT: &str = "intent";
/// The name it is written under.
const FRESH: &str = "intent.new";

/// What the disk is to be a copy of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "lowercase", deny_unknown_fields)]
pub enum Origin {
    /// Its base: a reset.
    Base,
    /// One of its snapshots: a revert.
    Snapshot {
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("reset"),
            Self::Snapshot { name } => write!(f, "revert to '{name}'"),
        }
    }
}

fn encode(origin: &Origin) -> io::Result<Vec<u8>> {
    let body = toml::to_string(origin).map_err(io::Error::other)?;
    let crc = crc32c::crc32c(body.as_bytes());
    Ok(format!("checksum = \"crc32c:{crc:08x}\"\n{body}").into_bytes())
}

fn decode(bytes: &[u8]) -> Option<Origin> {
    let (head, body) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    let crc = crc32c::crc32c(body.as_bytes());
    if head != format!("checksum = \"crc32c:{crc:08x}\"") {
        return None;
    }
    toml::from_str(body).ok()
}

/// Notes in `dir`, durably, that the disk is about to become a copy of `origin`.
///
/// # Errors
/// The host's errno. The note may be there all the same, when only the last sync failed.
pub(super) fn note(dir: &File, origin: &Origin) -> io::Result<()> {
    let mut file = create_at(dir, FRESH)?;
    file.write_all(&encode(origin)?)?;
    file.sync_all()?;
    rustix::fs::renameat(dir, FRESH, dir, INTENT)?;
    dir.sync_all()
}

/// Takes the note away.
///
/// # Errors
/// The host's errno; doing it once more is harmless then.
pub(super) fn clear(dir: &File) -> io::Result<()> {
    match rustix::fs::unlinkat(dir, INTENT, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => dir.sync_all(),
        Err(error) => Err(error.into()),
    }
}

/// What a crash has left undone.
///
/// # Errors
/// [`ReflinkError::Intent`] when the note is damaged; the host's errno.
pub(super) fn read(dir: &File) -> Result<Option<Origin>, ReflinkError> {
    // One that was being written has begun nothing.
    let _ = rustix::fs::unlinkat(dir, FRESH, AtFlags::empty());
    let file = match open_at(dir, INTENT, OFlags::RDONLY) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(doing("opening its 'intent'")(error).into()),
    };
    let mut bytes = Vec::new();
    // A name and a few words; one that never ends is none.
    file.take(1 << 16).read_to_end(&mut bytes).map_err(doing("reading its 'intent'"))?;
    decode(&bytes).map(Some).ok_or(ReflinkError::Intent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::stack::open_dir;

    fn monday() -> Origin {
        Origin::Snapshot { name: "mon\"day\n".to_owned() }
    }

    #[test]
    fn a_note_is_there_until_it_is_cleared() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open_dir(temp.path()).unwrap();
        assert_eq!(read(&dir).unwrap(), None);
        for origin in [Origin::Base, monday()] {
            note(&dir, &origin).unwrap();
            assert_eq!(read(&dir).unwrap(), Some(origin));
        }
        clear(&dir).unwrap();
        clear(&dir).unwrap();
        assert_eq!(read(&dir).unwrap(), None);
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let bytes = encode(&monday()).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert_eq!(decode(&changed), None, "byte {at}");
        }
        assert_eq!(decode(&bytes), Some(monday()));
    }
}
