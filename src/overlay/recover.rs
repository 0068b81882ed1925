//! From the files of a layer to a running overlay: reading the log, deciding which records count,
//! and writing a new log of exactly those, or on a full host making one of the old log.
//!
//! ```text
//!   closed in good order          every record counts, whatever happened since
//!   same tag, not closed          the daemon died: every record counts, after a sync of both files;
//!                                 more than one unreadable at the end is damage
//!   another tag                   maybe a power cut: records covered by the last Vouch count
//!   Poisoned                      records covered by its `durable` count, read from the device
//! ```

use std::io::{self, IoSlice};
use std::sync::Arc;

use uuid::Uuid;

use super::Overlay;
use super::data_check;
use super::error::LogError;
use super::host_file::Create;
use super::journal::{self, JournalContents};
use super::record::{BootTag, LayerMap, MAX_SEQUENCE};
use super::record_log::{self, Log, LogDir, LogEnd, LogScan, OldLog};
use super::state::{BlockIndex, BlockState};
use super::storage::Storage;
use crate::host::{self, is_out_of_space};

/// The highest sequence after which a log is continued, half of what is accepted: a daemon that
/// begins here does not reach the other half in 73,000 years, so no log that was opened once is
/// refused later for a sequence past the limit. No log gets here that was not forged.
const MAX_CONTINUED: u64 = MAX_SEQUENCE / 2;
/// The first sequence of a log that is not continued. Lower than [`MAX_CONTINUED`], and far beyond the
/// generations of a journal that was not forged: none of its old entries belongs to the new log.
const RENUMBERED: u64 = MAX_SEQUENCE / 4;

/// The condition in which an overlay was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovered {
    /// Just created.
    New,
    /// Closed in good order.
    Clean,
    /// The daemon had died; no acknowledged change is lost.
    All,
    /// The daemon had died, and the last record of the log is damaged: what it said is lost.
    Damaged,
    /// Treated as after a power cut: in the state of the last sync.
    Vouched {
        /// The number of changes of the map and the size known to have come after that sync.
        lost: u64,
    },
}

impl Recovered {
    /// Combines the conditions of two layers of one disk.
    #[must_use]
    pub fn combine(self, other: Self) -> Self {
        match (self, other) {
            (Self::Vouched { lost }, Self::Vouched { lost: more }) => {
                Self::Vouched { lost: lost + more }
            }
            (found @ Self::Vouched { .. }, _) | (_, found @ Self::Vouched { .. }) => found,
            (Self::Damaged, _) | (_, Self::Damaged) => Self::Damaged,
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::New, other) => other,
            (found, _) => found,
        }
    }
}

/// The files of one layer.
pub struct LayerFiles {
    /// The sparse data file.
    pub data: Arc<dyn Storage>,
    /// The log.
    pub log: Arc<dyn Storage>,
    /// The directory in which the log can be replaced.
    pub log_dir: Arc<dyn LogDir>,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// The block size in bytes.
    pub block_size: u32,
}

/// A log, and how much of it counts.
#[derive(Debug)]
pub struct TrustedLog {
    /// The result of reading the log.
    pub scan: LogScan,
    /// The number of records that count, from the first on.
    pub records: u64,
    /// The condition in which the layer was found.
    pub recovered: Recovered,
    /// Whether the log says that a sync has failed, or said so at first.
    pub is_poisoned: bool,
    /// The records and blocks that the journal adds.
    pub journal: JournalContents,
}

/// Reads the log and decides which records count under `tag`. Changes nothing but caches.
///
/// # Errors
/// [`LogError`]; the contents of a damaged log are never guessed.
pub fn examine(files: &LayerFiles, tag: BootTag) -> Result<TrustedLog, LogError> {
    let mut scan = record_log::scan(&*files.log, &files.uuid)?;
    // Kept from the first reading, because the record itself may never have reached the device.
    let (poisoned, generation) = (scan.poisoned, scan.generation);
    // Whether only the daemon died: everything it wrote is still in the host's cache.
    let is_cache_intact = poisoned.is_none() && !scan.closed && scan.tag == Some(tag);
    let is_synced = is_cache_intact && files.data.sync().is_ok() && files.log.sync().is_ok();
    if poisoned.is_some() || is_cache_intact != is_synced {
        // Cached data may never have reached the device.
        files.data.drop_cache();
        files.log.drop_cache();
        scan = record_log::scan(&*files.log, &files.uuid)?;
    }
    let damaged = |scan: &LogScan, why| Err(LogError::Damaged { record: scan.good, why });
    match scan.end {
        LogEnd::Unknown(kind) => return Err(LogError::Newer(kind)),
        LogEnd::Damaged => return damaged(&scan, "its checksum or its place is wrong"),
        LogEnd::Gap if is_synced => {
            return damaged(&scan, "it is missing, and later records are there");
        }
        // A daemon dies between two records, or at worst inside one.
        LogEnd::Torn if is_synced && scan.unreadable > 1 => {
            return damaged(&scan, "neither it nor what follows can be read");
        }
        LogEnd::Gap | LogEnd::Torn | LogEnd::Whole => {}
    }
    let is_poisoned = poisoned.is_some();
    let births = scan.vouched.zip(scan.born);
    let Some((vouched, born)) = births.filter(|(vouched, born)| vouched >= born) else {
        return damaged(&scan, "no record vouches for the layer's beginning");
    };
    let upto = |sequence: u64| (sequence + 1).saturating_sub(scan.first).min(scan.good);
    // The records up to `sequence`, and the journal's entries of `generation`.
    let less = |sequence, generation| -> Result<TrustedLog, LogError> {
        let journal = read_journal(files, generation)?;
        // Losing a record that only vouches or names who opened the layer is no loss.
        let known = journal.end.max(sequence + 1).saturating_sub(scan.first).min(scan.good);
        let lost = record_log::count_changes(&*files.log, &files.uuid, known..scan.good)?;
        let recovered = Recovered::Vouched { lost };
        let (scan, records) = (scan.clone(), upto(sequence));
        Ok(TrustedLog { scan, records, recovered, is_poisoned, journal })
    };
    let all = |recovered| {
        let (records, journal) = (scan.good, JournalContents::default());
        Ok(TrustedLog { scan: scan.clone(), records, recovered, is_poisoned, journal })
    };
    match poisoned {
        Some(durable) if durable > scan.last_sequence() => {
            damaged(&scan, "it was durable once and is gone")
        }
        // What the file was born with is durable even if a reduction has overtaken the record.
        Some(durable) if durable < born => less(born, born),
        Some(durable) => less(durable, generation.unwrap_or(durable)),
        None if scan.closed => all(Recovered::Clean),
        None if is_synced && scan.end == LogEnd::Torn => all(Recovered::Damaged),
        None if is_synced => all(Recovered::All),
        None => less(vouched, vouched),
    }
}

/// Reads, from the device, what the journal adds to a log that is durable up to `generation`.
fn read_journal(files: &LayerFiles, generation: u64) -> io::Result<JournalContents> {
    let Some(file) = files.log_dir.journal(Create::Never)? else {
        return Ok(JournalContents::default());
    };
    file.drop_cache();
    journal::read(&*file, &files.uuid, files.block_size, generation)
}

/// Builds the map from the records that count.
///
/// # Errors
/// The host's errno.
pub fn load_map(files: &LayerFiles, trusted: &TrustedLog) -> Result<LayerMap, LogError> {
    let mut map = LayerMap::new(0, 0);
    let block_size = u64::from(files.block_size);
    record_log::replay(&*files.log, &files.uuid, trusted.records, block_size, &mut map)?;
    trusted.journal.records.iter().for_each(|record| map.apply(record, block_size));
    Ok(map)
}

/// Rejects a layer whose data file ends before data that `map` names: those bytes would read as
/// zeros.
///
/// # Errors
/// [`LogError::DataMissing`]; the host's errno.
pub fn check_data(files: &LayerFiles, map: &LayerMap) -> Result<(), LogError> {
    let missing = data_check::missing_data(&*files.data, map, u64::from(files.block_size))?;
    match missing.first {
        Some(first) => Err(LogError::DataMissing { bytes: missing.bytes, first }),
        None => Ok(()),
    }
}

/// Opens a layer for writing: returns the map of the records that count, and a log to continue with
/// that holds nothing else. Layers `below` are closed where the log vouches for this one.
///
/// # Errors
/// [`LogError`]; the layer's files add up to the same as before in that case.
pub fn open_log(
    files: &LayerFiles,
    tag: BootTag,
    below: &[Arc<Overlay>],
) -> Result<(LayerMap, Log, Recovered), LogError> {
    let trusted = examine(files, tag)?;
    let map = load_map(files, &trusted)?;
    // Blocks in the journal are not in the data file yet.
    if trusted.journal.blocks.is_empty() {
        check_data(files, &map)?;
    }
    let is_kept = trusted.recovered == Recovered::Clean
        && highest(&trusted) <= MAX_CONTINUED
        && !record_log::is_worth_rewriting(&trusted.scan, &map);
    let log = if is_kept {
        reopen(files, &trusted, tag)?
    } else {
        let (log, dir_synced) = match rewrite(files, &trusted, &map, tag) {
            Err(full) if is_out_of_space(&full) => {
                (resume(files, (&trusted, &map), tag, below, &full)?, Ok(()))
            }
            written => written?,
        };
        dir_synced?;
        journal::clear(&*files.log_dir);
        log
    };
    Ok((map, log, trusted.recovered))
}

/// Returns the highest sequence that the log or the journal has used.
fn highest(trusted: &TrustedLog) -> u64 {
    trusted.scan.highest.max(trusted.journal.end)
}

/// Continues a log that was closed in good order.
fn reopen(files: &LayerFiles, trusted: &TrustedLog, tag: BootTag) -> io::Result<Log> {
    let (log_dir, log) = (Arc::clone(&files.log_dir), Arc::clone(&files.log));
    Log::reopen(log_dir, files.uuid, u64::from(files.block_size), log, &trusted.scan, tag)
}

/// Writes a new log that holds `map`; also returns whether its name is durable.
fn rewrite(
    files: &LayerFiles,
    trusted: &TrustedLog,
    map: &LayerMap,
    tag: BootTag,
) -> io::Result<(Log, io::Result<()>)> {
    replay_journal(files, trusted, map)?;
    let highest = highest(trusted);
    let first = if highest <= MAX_CONTINUED { highest + 1 } else { RENUMBERED };
    let log_dir = Arc::clone(&files.log_dir);
    Log::replace(log_dir, files.uuid, u64::from(files.block_size), map, tag, first)
}

/// Goes on without the space for a new log, which a host refused with `full`: with the old log where that
/// can be, or with what the end of the old log gives up.
fn resume(
    files: &LayerFiles,
    (trusted, map): (&TrustedLog, &LayerMap),
    tag: BootTag,
    below: &[Arc<Overlay>],
    full: &io::Error,
) -> io::Result<Log> {
    let scan = &trusted.scan;
    if trusted.recovered == Recovered::Clean && highest(trusted) <= MAX_CONTINUED {
        return reopen(files, trusted, tag);
    }
    let give_up_reserve = || match scan.end {
        LogEnd::Whole => record_log::give_up_reserve(&*files.log, scan.good),
        _ => Ok(()),
    };
    let Some(old) = resumable(files, trusted, map, tag)? else {
        log::debug!("the log cannot go on in place ({full}): trying a new one again");
        give_up_reserve()?;
        let (log, dir_synced) = rewrite(files, trusted, map, tag)?;
        return dir_synced.map(|()| log);
    };
    if replay_journal(files, trusted, map).is_err_and(|error| is_out_of_space(&error)) {
        give_up_reserve()?;
    }
    replay_journal(files, trusted, map)?;
    below.iter().try_for_each(|layer| layer.close_sealed())?;
    let (log_dir, log) = (Arc::clone(&files.log_dir), Arc::clone(&files.log));
    Log::resume(log_dir, files.uuid, u64::from(files.block_size), log, scan, (&old, tag))
}

/// Returns what to do to a log that was not closed so that it can go on in place; `None` where it has to
/// be written anew.
fn resumable(
    files: &LayerFiles,
    trusted: &TrustedLog,
    map: &LayerMap,
    tag: BootTag,
) -> io::Result<Option<OldLog>> {
    // A failed sync has to be known until the new log is durable.
    if trusted.is_poisoned || highest(trusted) > MAX_CONTINUED {
        return Ok(None);
    }
    if matches!(trusted.recovered, Recovered::All | Recovered::Damaged) {
        return Ok(OldLog::whole(&trusted.scan));
    }
    let Some(old) = OldLog::vouched(&trusted.scan, &trusted.journal.records, tag) else {
        return Ok(None);
    };
    let mut again = LayerMap::new(0, 0);
    let block_size = u64::from(files.block_size);
    record_log::replay(&*files.log, &files.uuid, old.counted(), block_size, &mut again)?;
    old.missing.iter().for_each(|record| again.apply(record, block_size));
    // Nothing else is to come of it, whatever somebody has put into the files.
    let is_same = again.records().eq(map.records());
    Ok(is_same.then_some(old))
}

/// Writes the journal's blocks into the data file, durably, because the new log will vouch for
/// them.
fn replay_journal(files: &LayerFiles, trusted: &TrustedLog, map: &LayerMap) -> io::Result<()> {
    let is_data = |block: &BlockIndex| map.blocks.state(*block) == BlockState::Data;
    let blocks = &trusted.journal.blocks;
    for (block, bytes) in blocks.iter().filter(|(block, _)| is_data(block)) {
        let at = block.0.checked_mul(u64::from(files.block_size));
        // A log may call a block Data whose offset no disk with such large blocks has.
        let at = at.ok_or_else(|| host::os_error(libc::EFBIG))?;
        files.data.write_at(&[IoSlice::new(bytes)], at)?;
    }
    if blocks.is_empty() { Ok(()) } else { files.data.sync() }
}

impl Overlay {
    /// Opens a layer for use, over the layers `below` that may not be closed yet. `limit` caps the bytes
    /// of data that the layer may hold.
    ///
    /// # Errors
    /// The errors of [`open_log`].
    pub fn open(
        files: &LayerFiles,
        tag: BootTag,
        limit: Option<u64>,
        below: &[Arc<Self>],
    ) -> Result<(Self, Recovered), LogError> {
        if files.data.host_file().is_some_and(|file| host::is_read_only(file.first())) {
            return Self::open_read_only(files, tag);
        }
        let (map, log, recovered) = open_log(files, tag, below)?;
        let data = Arc::clone(&files.data);
        let overlay = Self::new(files.block_size, data, map, Some(log), tag, limit);
        match recovered {
            Recovered::Clean => overlay.find_reserved(),
            _ => overlay.reclaim(),
        }
        Ok((overlay, recovered))
    }

    /// Opens a layer that cannot be written to: its recovered map is kept in memory only.
    fn open_read_only(files: &LayerFiles, tag: BootTag) -> Result<(Self, Recovered), LogError> {
        let trusted = examine(files, tag)?;
        let map = load_map(files, &trusted)?;
        let is_data = |block: &BlockIndex| map.blocks.state(*block) == BlockState::Data;
        if trusted.journal.blocks.keys().any(is_data) {
            // The data file does not hold these blocks' bytes.
            return Err(LogError::ReadOnly);
        }
        check_data(files, &map)?;
        let mut layer = Self::closed(files.block_size, Arc::clone(&files.data), map, tag);
        layer.is_read_only = true;
        Ok((layer, trusted.recovered))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicBool, Ordering};

    use parking_lot::Mutex;
    use proptest::prelude::*;

    use super::super::host_file::HostFile;
    use super::super::record::LogRecord;
    use super::super::record_log::ReplacedLog;
    use super::*;

    const LAYER: Uuid = Uuid::from_u128(1);
    const TAG: BootTag = BootTag([1; 2]);

    fn temp() -> Arc<HostFile> {
        Arc::new(HostFile::single(tempfile::tempfile().unwrap()))
    }

    /// A directory without a journal, which keeps the log that replaces another, or has no space for it.
    #[derive(Default)]
    struct NewLog(Mutex<Option<Arc<HostFile>>>, AtomicBool);

    impl LogDir for NewLog {
        fn replace_log(
            &self,
            fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
        ) -> io::Result<ReplacedLog> {
            if self.1.load(Ordering::Relaxed) {
                return Err(host::os_error(libc::ENOSPC));
            }
            let file = temp();
            fill(&*file)?;
            *self.0.lock() = Some(Arc::clone(&file));
            Ok(ReplacedLog { file, dir_synced: Ok(()) })
        }

        fn journal(&self, _: Create) -> io::Result<Option<Arc<dyn Storage>>> {
            Ok(None)
        }
    }

    /// A layer with blocks of 4 KiB whose log holds `records`, each with its sequence; `None` is
    /// blank.
    fn layer(records: &[(u64, Option<LogRecord>)]) -> (LayerFiles, Arc<NewLog>) {
        let encoded = |(sequence, record): &(u64, Option<LogRecord>)| {
            record.as_ref().map_or([0; 32], |record| record.encode(&LAYER, *sequence))
        };
        let log = temp();
        log.write_at(&[IoSlice::new(&records.iter().flat_map(encoded).collect::<Vec<_>>())], 0)
            .unwrap();
        let log_dir = Arc::new(NewLog::default());
        (with_log(log, Arc::clone(&log_dir)), log_dir)
    }

    fn with_log(log: Arc<HostFile>, log_dir: Arc<NewLog>) -> LayerFiles {
        LayerFiles { data: temp(), log, log_dir, uuid: LAYER, block_size: 4096 }
    }

    /// Numbers `records` from `first` on.
    fn numbered(first: u64, records: Vec<LogRecord>) -> Vec<(u64, Option<LogRecord>)> {
        (first..).zip(records.into_iter().map(Some)).collect()
    }

    fn open(tag: BootTag) -> LogRecord {
        LogRecord::Open { tag }
    }

    fn size(size: u64) -> LogRecord {
        LogRecord::Size { size, lower_limit: 0 }
    }

    /// Opens a layer for writing, checks that its log can be read again, and returns its size in
    /// bytes.
    fn opened_twice(files: &LayerFiles, log_dir: &NewLog, tag: BootTag) -> Result<u64, LogError> {
        let (map, log, _) = open_log(files, tag, &[])?;
        log.append(&[LogRecord::Close], record_log::ReserveUse::Full).unwrap();
        drop(log);
        let new = log_dir.0.lock().take();
        let rewritten = new.map(|log| with_log(log, Arc::default()));
        let again = rewritten.as_ref().unwrap_or(files);
        let trusted = examine(again, tag).unwrap();
        assert_eq!(trusted.recovered, Recovered::Clean);
        let loaded = load_map(again, &trusted).unwrap();
        assert!(map.records().eq(loaded.records()));
        Ok(map.size)
    }

    #[test]
    fn a_log_with_the_last_sequences_is_numbered_anew() {
        for tag in [TAG, BootTag([2; 2])] {
            for closed in [false, true] {
                for last in [MAX_CONTINUED, MAX_CONTINUED + 1, MAX_SEQUENCE - 1, MAX_SEQUENCE] {
                    let first = last - 2 - u64::from(closed);
                    let vouch = LogRecord::Vouch { upto: first + 2, durable: 0 };
                    let mut records = vec![open(TAG), size(4096), vouch];
                    records.extend(closed.then_some(LogRecord::Close));
                    let (files, log_dir) = layer(&numbered(first, records));
                    assert_eq!(opened_twice(&files, &log_dir, tag).unwrap(), 4096, "{last}");
                }
            }
        }
    }

    #[test]
    fn a_sequence_past_the_gap_that_does_not_belong_there_is_damage() {
        let vouch = LogRecord::Vouch { upto: 3, durable: 0 };
        let poisoned = LogRecord::Poisoned { durable: 0, vouched: 0 };
        let mut records = numbered(1, vec![open(TAG), size(4096), vouch]);
        records.extend([(0, None), (MAX_SEQUENCE, Some(poisoned))]);
        let (files, _) = layer(&records);
        let error = open_log(&files, BootTag([2; 2]), &[]).err();
        assert!(matches!(error, Some(LogError::Damaged { record: 3, .. })), "{error:?}");
    }

    #[test]
    fn a_vouch_for_less_than_the_layers_beginning_is_damage() {
        let vouch = |upto| LogRecord::Vouch { upto, durable: upto };
        let found = |later| {
            let records = vec![open(TAG), size(4096), vouch(12), size(8192), vouch(later)];
            let (files, log_dir) = layer(&numbered(10, records));
            opened_twice(&files, &log_dir, BootTag([2; 2]))
        };
        assert_eq!(found(13).unwrap(), 8192);
        assert_eq!(found(12).unwrap(), 4096);
        for upto in [0, 9, 11] {
            assert!(matches!(found(upto), Err(LogError::Damaged { .. })), "{upto}");
        }
    }

    #[test]
    fn a_poisoned_record_that_a_reduction_has_overtaken_leaves_the_layers_beginning() {
        let poisoned = LogRecord::Poisoned { durable: 5, vouched: 4 };
        let vouch = LogRecord::Vouch { upto: 12, durable: 12 };
        let records = vec![open(TAG), size(4096), vouch, size(8192), poisoned];
        let (files, log_dir) = layer(&numbered(10, records));
        assert_eq!(opened_twice(&files, &log_dir, TAG).unwrap(), 4096);
    }

    /// A record that names sequences from `first` on, of its own or of others.
    fn any_record(first: u64) -> impl Strategy<Value = LogRecord> {
        let sequence = || prop_oneof![9 => first..first + 20, 1 => 0..=MAX_SEQUENCE];
        prop_oneof![
            (0..3u64).prop_map(|tag| open(BootTag([tag; 2]))),
            (0..1u64 << 20).prop_map(size),
            (sequence(), sequence()).prop_map(|(upto, durable)| LogRecord::Vouch { upto, durable }),
            (sequence(), sequence())
                .prop_map(|(durable, vouched)| LogRecord::Poisoned { durable, vouched }),
            Just(LogRecord::Close),
            Just(LogRecord::Intent),
        ]
    }

    /// The first sequence of a log, and what follows its beginning: records, each with what is odd
    /// about it.
    fn any_log() -> impl Strategy<Value = (u64, Vec<(LogRecord, u32)>)> {
        let first = prop_oneof![
            0..20u64,
            MAX_CONTINUED - 20..MAX_CONTINUED + 20,
            MAX_SEQUENCE - 20..=MAX_SEQUENCE,
        ];
        first.prop_flat_map(|first| {
            (Just(first), proptest::collection::vec((any_record(first), 0..12u32), 0..16))
        })
    }

    proptest! {
        #[test]
        fn a_forged_log_is_refused_or_can_be_read_after_it_was_opened(
            (first, records) in any_log(),
            odd in prop_oneof![0..40u64, MAX_SEQUENCE - 40..=MAX_SEQUENCE],
            tag in 0..3u64,
            is_full: bool,
        ) {
            let born = LogRecord::Vouch { upto: first + 1, durable: 0 };
            let mut log = numbered(first, vec![open(TAG), born]);
            for (record, choice) in records {
                let next = first + log.len() as u64;
                log.push(match choice {
                    0 => (next, None),
                    1 => (odd, Some(record)),
                    _ => (next, Some(record)),
                });
            }
            let (files, log_dir) = layer(&log);
            log_dir.1.store(is_full, Ordering::Relaxed);
            let _ = opened_twice(&files, &log_dir, BootTag([tag; 2]));
        }
    }

    #[test]
    fn a_journal_block_past_the_largest_offset_is_not_written() {
        let log_dir = Arc::new(NewLog::default());
        let files = LayerFiles { block_size: 2 << 20, ..with_log(temp(), log_dir) };
        let last = BlockIndex((1 << 54) - 1);
        let mut map = LayerMap::new(0, 0);
        map.blocks.set(last..BlockIndex(last.0 + 1), BlockState::Data);
        let scan = LogScan {
            first: 1,
            good: 1,
            highest: 1,
            tag: None,
            born: Some(1),
            vouched: Some(1),
            last_vouch: Some(1),
            poisoned: None,
            generation: None,
            closed: false,
            is_settled: false,
            end: LogEnd::Whole,
            unreadable: 0,
        };
        let journal = JournalContents {
            blocks: BTreeMap::from([(last, vec![1])]),
            ..JournalContents::default()
        };
        let trusted =
            TrustedLog { scan, records: 1, recovered: Recovered::All, is_poisoned: false, journal };
        let error = replay_journal(&files, &trusted, &map).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        assert_eq!(files.data.len().unwrap(), 0);
    }
}
