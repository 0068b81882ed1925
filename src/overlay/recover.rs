//! From the files of a layer to a running overlay: reading the log, deciding what of it counts,
//! and writing a new log of exactly that.
//!
//! ```text
//!   closed in good order          every record counts, whatever happened since
//!   same tag, not closed          the daemon died: every record counts, after a sync of both files
//!   another tag                   the power may have gone: what the last Vouch covers counts
//!   Poisoned                      what its `durable` covers counts, read from the device
//! ```

use std::io::{self, IoSlice};
use std::sync::Arc;

use uuid::Uuid;

use super::Overlay;
use super::blocks::{BlockIndex, BlockState};
use super::data::{Create, Storage};
use super::journal::{self, JournalContents};
use super::log::{self, Log, LogDir, LogEnd, LogScan};
use super::record::{BootTag, LayerMap};
use crate::host;

/// How an overlay was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// It was made just now.
    New,
    /// Closed in good order.
    Clean,
    /// The daemon had died; nothing that was acknowledged is lost.
    All,
    /// Read as after a power cut: as it was at the last sync.
    Vouched {
        /// Changes of the map and the size that are known to have come after that sync.
        lost: u64,
    },
}

impl Recovered {
    /// What is to be said of two layers of one disk.
    #[must_use]
    pub fn combine(self, other: Self) -> Self {
        match (self, other) {
            (Self::Vouched { lost }, Self::Vouched { lost: more }) => {
                Self::Vouched { lost: lost + more }
            }
            (found @ Self::Vouched { .. }, _) | (_, found @ Self::Vouched { .. }) => found,
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::New, other) => other,
            (found, _) => found,
        }
    }
}

/// Why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The host said no.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The log is not what was once written.
    #[error("the log is damaged at record {record} ({why}): restore the overlay from a backup")]
    Damaged {
        /// The first record that is not good, counted from 0.
        record: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What has to be written first cannot be.
    #[error(
        "it was not closed in good order, and its file system is read-only: mount it once where it can be written to"
    )]
    ReadOnly,
    /// A later version wrote it.
    #[error("the log holds a record of kind {0}: it was written by a newer version of cowslip")]
    Newer(u8),
}

/// The files of one layer.
pub struct LayerFiles {
    /// The sparse data file.
    pub data: Arc<dyn Storage>,
    /// The log.
    pub log: Arc<dyn Storage>,
    /// What can replace the log.
    pub log_dir: Arc<dyn LogDir>,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// Its block size in bytes.
    pub block_size: u32,
}

/// What a log says, and how much of it counts.
#[derive(Debug)]
pub struct TrustedLog {
    /// What was found in the log.
    pub scan: LogScan,
    /// The first records that count.
    pub records: u64,
    /// How it was found.
    pub recovered: Recovered,
    /// What the journal adds to them.
    pub journal: JournalContents,
}

/// Reads the log and decides what of it counts under `tag`. Changes nothing but caches.
///
/// # Errors
/// [`LogError`]; a damaged log is never guessed at.
pub fn examine(files: &LayerFiles, tag: BootTag) -> Result<TrustedLog, LogError> {
    let mut scan = log::scan(&*files.log, &files.uuid)?;
    // Kept: the record itself may be one that never reached the device.
    let (poisoned, generation) = (scan.poisoned, scan.generation);
    let is_alive = poisoned.is_none() && !scan.closed && scan.tag == Some(tag);
    let is_synced = is_alive && files.data.sync().is_ok() && files.log.sync().is_ok();
    if poisoned.is_some() || is_alive != is_synced {
        // What the cache holds may never have reached the device.
        files.data.drop_cache();
        files.log.drop_cache();
        scan = log::scan(&*files.log, &files.uuid)?;
    }
    let damaged = |scan: &LogScan, why| Err(LogError::Damaged { record: scan.good, why });
    match scan.end {
        LogEnd::Unknown(kind) => return Err(LogError::Newer(kind)),
        LogEnd::Damaged => return damaged(&scan, "its checksum or its place is wrong"),
        LogEnd::Gap if is_synced => {
            return damaged(&scan, "it is missing, and later records are there");
        }
        LogEnd::Gap | LogEnd::Torn | LogEnd::Whole => {}
    }
    let Some(vouched) = scan.vouched else {
        return damaged(&scan, "no record vouches for the layer's beginning");
    };
    let upto = |sequence: u64| (sequence + 1).saturating_sub(scan.first).min(scan.good);
    // Up to `sequence`, and what the journal holds from `generation` on.
    let less = |sequence, generation| -> Result<TrustedLog, LogError> {
        let journal = read_journal(files, generation)?;
        // A record that only vouches, or says who opened the layer, is no loss.
        let known = journal.end.max(sequence + 1).saturating_sub(scan.first).min(scan.good);
        let lost = log::count_changes(&*files.log, &files.uuid, known..scan.good)?;
        let recovered = Recovered::Vouched { lost };
        Ok(TrustedLog { scan: scan.clone(), records: upto(sequence), recovered, journal })
    };
    let all = |recovered| {
        let (count, journal) = (scan.good, JournalContents::default());
        Ok(TrustedLog { scan: scan.clone(), records: count, recovered, journal })
    };
    match poisoned {
        Some(durable) if durable > scan.last_sequence() => {
            damaged(&scan, "it was durable once and is gone")
        }
        Some(durable) => less(durable, generation.unwrap_or(durable)),
        None if scan.closed => all(Recovered::Clean),
        None if is_synced => all(Recovered::All),
        None => less(vouched, vouched),
    }
}

/// What the journal adds to a log that is durable up to `generation`, read from the device.
fn read_journal(files: &LayerFiles, generation: u64) -> io::Result<JournalContents> {
    let Some(file) = files.log_dir.journal(Create::Never)? else {
        return Ok(JournalContents::default());
    };
    file.drop_cache();
    journal::read(&*file, &files.uuid, files.block_size, generation)
}

/// Reads what counts of a log into a map.
///
/// # Errors
/// The host's errno.
pub fn load_map(files: &LayerFiles, trusted: &TrustedLog) -> Result<LayerMap, LogError> {
    let mut image = LayerMap::new(0, 0);
    let block = u64::from(files.block_size);
    log::replay(&*files.log, &files.uuid, trusted.records, block, &mut image)?;
    trusted.journal.records.iter().for_each(|record| image.apply(record, block));
    Ok(image)
}

/// Opens a layer for writing: what counts of its log, and a log to go on with that holds nothing
/// else.
///
/// # Errors
/// [`LogError`]; the layer's files are as they were then.
pub fn open_log(files: &LayerFiles, tag: BootTag) -> Result<(LayerMap, Log, Recovered), LogError> {
    let trusted = examine(files, tag)?;
    let image = load_map(files, &trusted)?;
    let home = Arc::clone(&files.log_dir);
    let (uuid, block) = (files.uuid, u64::from(files.block_size));
    let is_kept =
        trusted.recovered == Recovered::Clean && !log::is_worth_rewriting(&trusted.scan, &image);
    let log = if is_kept {
        Log::reopen(home, uuid, block, Arc::clone(&files.log), &trusted.scan, tag)?
    } else {
        replay_journal(files, &trusted, &image)?;
        let first = trusted.scan.highest.max(trusted.journal.end) + 1;
        let log = Log::create(home, uuid, block, &image, tag, first)?;
        journal::clear(&*files.log_dir);
        log
    };
    Ok((image, log, trusted.recovered))
}

/// Writes the journal's bytes to where they belong, durably: the log to come vouches for them.
fn replay_journal(files: &LayerFiles, trusted: &TrustedLog, image: &LayerMap) -> io::Result<()> {
    let is_data = |block: &BlockIndex| image.blocks.state(*block) == BlockState::Data;
    let blocks = &trusted.journal.blocks;
    for (block, bytes) in blocks.iter().filter(|(block, _)| is_data(block)) {
        let at = block.0.checked_mul(u64::from(files.block_size));
        // A log can call a block Data that no disk of such large blocks has.
        let at = at.ok_or_else(|| host::os_error(libc::EFBIG))?;
        files.data.write_at(&[IoSlice::new(bytes)], at)?;
    }
    if blocks.is_empty() { Ok(()) } else { files.data.sync() }
}

impl Overlay {
    /// Opens a layer for use. `limit` caps the bytes of data it may hold.
    ///
    /// # Errors
    /// As [`open_log`].
    pub fn open(
        files: &LayerFiles,
        tag: BootTag,
        limit: Option<u64>,
    ) -> Result<(Self, Recovered), LogError> {
        if files.data.host_file().is_some_and(|file| host::is_read_only(file.first())) {
            return Self::open_read_only(files, tag);
        }
        let (image, log, recovered) = open_log(files, tag)?;
        let data = Arc::clone(&files.data);
        let overlay = Self::new(files.block_size, data, image, Some(log), tag, limit);
        if recovered != Recovered::Clean {
            overlay.reclaim();
        }
        Ok((overlay, recovered))
    }

    /// Opens a layer that nothing can be written to: what counts of its log is in memory alone.
    fn open_read_only(files: &LayerFiles, tag: BootTag) -> Result<(Self, Recovered), LogError> {
        let trusted = examine(files, tag)?;
        let image = load_map(files, &trusted)?;
        let is_data = |block: &BlockIndex| image.blocks.state(*block) == BlockState::Data;
        if trusted.journal.blocks.keys().any(is_data) {
            // The data file does not have those bytes.
            return Err(LogError::ReadOnly);
        }
        let mut layer = Self::closed(files.block_size, Arc::clone(&files.data), image, tag);
        layer.is_read_only = true;
        Ok((layer, trusted.recovered))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::data::HostFile;
    use super::super::log::ReplacedLog;
    use super::*;

    struct Nowhere;

    impl LogDir for Nowhere {
        fn replace_log(
            &self,
            _: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
        ) -> io::Result<ReplacedLog> {
            Err(host::os_error(libc::ENOSYS))
        }

        fn journal(&self, _: Create) -> io::Result<Option<Arc<dyn Storage>>> {
            Ok(None)
        }
    }

    #[test]
    fn a_block_past_the_largest_offset_is_not_written() {
        let file = || Arc::new(HostFile::single(tempfile::tempfile().unwrap()));
        let (data, log, home) = (file(), file(), Arc::new(Nowhere));
        let uuid = Uuid::from_u128(1);
        let files = LayerFiles { data, log, log_dir: home, uuid, block_size: 2 << 20 };
        let last = BlockIndex((1 << 54) - 1);
        let mut image = LayerMap::new(0, 0);
        image.blocks.set(last..BlockIndex(last.0 + 1), BlockState::Data);
        let scan = LogScan {
            first: 1,
            good: 1,
            highest: 1,
            tag: None,
            vouched: Some(1),
            poisoned: None,
            generation: None,
            closed: false,
            end: LogEnd::Whole,
        };
        let journal = JournalContents {
            blocks: BTreeMap::from([(last, vec![1])]),
            ..JournalContents::default()
        };
        let trusted = TrustedLog { scan, records: 1, recovered: Recovered::All, journal };
        let error = replay_journal(&files, &trusted, &image).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        assert_eq!(files.data.len().unwrap(), 0);
    }
}
