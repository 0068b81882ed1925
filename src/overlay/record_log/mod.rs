//! The durable map of a layer: an append-only log of 32-byte records.
//!
//! ```text
//!   Open  Size  Set  Set ... Vouch | Set  Set  Vouch  Set  Set
//!   `------- compacted ----------' |                 `-- not vouched: lost with the power --'
//! ```
//!
//! Sequences are contiguous in a file, so a record's position follows from its sequence. The log gets
//! shorter in two ways, both by writing a new file and renaming it over the old one: recovery
//! rewrites it as exactly the records that are trusted, and while it is in use it is compacted when it
//! has grown far beyond its map. `docs/overlay-format.md` argues why a crash at any point is safe.
//!
//! `scan` reads a log and judges it, `writer` writes a new one, `resume` goes on with an old one.

mod resume;
mod scan;
mod writer;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use uuid::Uuid;

pub use self::resume::{OldLog, give_up_reserve};
use self::scan::for_each_record;
pub use self::scan::{LogEnd, LogScan, count_changes, replay, scan};
use self::writer::LogWriter;
use super::host_file::Create;
use super::record::{BootTag, LayerMap, LogRecord, RECORD_LEN};
use super::storage::Storage;
use crate::host::{self, is_out_of_space};

/// The step in bytes in which space is preallocated on the host: 1 MiB.
const PREALLOCATE_STEP: u64 = 1 << 20;
/// Bytes reserved for records that free space, so that a full file system can be emptied again:
/// 2,048 records.
const LOG_RESERVE: u64 = 64 << 10;
/// The last bytes of the reserve, kept for the records of a sync and a close: without those records
/// no freed space could be returned.
const SYNC_RESERVE: u64 = 4 << 10;
/// The end of that part, kept for a sync and a close where nothing more can be reserved: 3 records.
const LAST_RESERVE: u64 = 3 * RECORD_BYTES;
/// Bytes that a closed log keeps for whoever opens it on a full host: 16 records, mostly inside a block that it
/// has anyway.
const CLOSED_RESERVE: u64 = 16 * RECORD_BYTES;
/// The fewest records for which rewriting a log when it is opened pays off (8 KiB).
const MIN_RECORDS_TO_REWRITE: u64 = 1 << 8;
/// The fewest records for which compacting a log while it is in use pays off (2 MiB).
const MIN_RECORDS_TO_COMPACT: u64 = 1 << 16;
/// Records read or written at a time: 1 MiB.
const BATCH_RECORDS: usize = (1 << 20) / RECORD_LEN;
const RECORD_BYTES: u64 = RECORD_LEN as u64;

/// The directory of a layer's log, which can replace the log by a new one.
pub trait LogDir: Send + Sync {
    /// Lets `fill` write a new log, makes that durable and renames it over the old log.
    ///
    /// # Errors
    /// The host's errno; the old log is still in place in that case.
    fn replace_log(
        &self,
        fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<ReplacedLog>;

    /// Opens the layer's journal. A missing journal is created durably if `create` says so, and is
    /// `None` otherwise.
    ///
    /// # Errors
    /// The host's errno.
    fn journal(&self, create: Create) -> io::Result<Option<Arc<dyn Storage>>>;
}

/// A new log that has replaced the old one.
pub struct ReplacedLog {
    /// The file of the new log.
    pub file: Arc<dyn Storage>,
    /// Whether the rename is durable. If not, a power cut may bring back the old log, which does
    /// not hold the records appended to this one.
    pub dir_synced: io::Result<()>,
}

/// How much of the reserve an append may use when space is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveUse {
    /// Records that lead to more space being used: refused before the reserve is touched.
    Keep,
    /// Records that free space: may use all but the last part of the reserve.
    Partial,
    /// Records that vouch for others or mark the log itself: may use all of the reserve.
    Full,
}

/// The log of a layer that is open for writing.
pub struct Log {
    uuid: Uuid,
    block_size: u64,
    dir: Arc<dyn LogDir>,
    tail: Mutex<LogTail>,
    /// The `upto` of the last durable `Vouch`.
    vouched: AtomicU64,
}

/// The end of the log. Its lock is held for one small write at a time.
struct LogTail {
    file: Arc<dyn Storage>,
    /// The sequence of the record at offset 0.
    first: u64,
    /// The sequence of the next record.
    next: u64,
    /// Bytes of the file for which the host has preallocated space.
    preallocated: u64,
    /// The number of records at which to compact the log.
    compact_at: u64,
    /// The errno for every sync, after the rename of the file could not be made durable.
    dir_sync_error: Option<i32>,
}

impl LogTail {
    fn end(&self) -> u64 {
        (self.next - self.first) * RECORD_BYTES
    }

    /// Removes what follows the last record, except for `kept` bytes of reserved space: that space, or the
    /// part of an append that was written before it failed, which would count as damage after a crash.
    fn cut_off(&mut self, kept: u64) {
        let mut end = self.end();
        if self.preallocated != u64::MAX {
            end = self.preallocated.clamp(end, end + kept);
            self.preallocated = end;
        }
        // On a host that cannot truncate, zeros remain, which hold no record.
        let _ = self.file.truncate(end);
    }

    /// Ensures that `len` more bytes will find space.
    fn preallocate(&mut self, len: u64, reserve_use: ReserveUse) -> io::Result<()> {
        let kept = match reserve_use {
            ReserveUse::Keep => LOG_RESERVE,
            ReserveUse::Partial => SYNC_RESERVE,
            ReserveUse::Full => 0,
        };
        let end = self.end() + len + kept;
        if end <= self.preallocated {
            return Ok(());
        }
        let upto = end.next_multiple_of(PREALLOCATE_STEP);
        match self.file.allocate(self.end()..upto) {
            Ok(()) => self.preallocated = upto,
            Err(error) if is_out_of_space(&error) => {
                let has_room = match reserve_use {
                    // Without a reserve to keep, the write itself shows whether there is still room.
                    ReserveUse::Full => true,
                    // A log that was opened on a full host has only a little, which has to free the rest.
                    ReserveUse::Partial => self.end() + len + LAST_RESERVE <= self.preallocated,
                    ReserveUse::Keep => false,
                };
                return if has_room { Ok(()) } else { Err(error) };
            }
            // The host cannot preallocate space: every append may then fail with ENOSPC.
            Err(_) => self.preallocated = u64::MAX,
        }
        Ok(())
    }
}

/// Returns whether a log that was closed in good order should be rewritten rather than continued:
/// every opening and closing adds to it, even if nothing changes. A large log is compacted while it
/// is in use, not during a mount.
pub fn is_worth_rewriting(scan: &LogScan, map: &LayerMap) -> bool {
    (MIN_RECORDS_TO_REWRITE..MIN_RECORDS_TO_COMPACT).contains(&scan.good)
        && (map.records().count() as u64) < scan.good / 4
}

impl Log {
    /// Writes a new log that holds `map` and nothing else, opened under `tag`, starting with
    /// sequence `first`. All of it is vouched: the caller must have made the data durable.
    ///
    /// # Errors
    /// The host's errno; the old log, if any, is still in place in that case, or nobody knows whether
    /// a power cut brings it back.
    pub fn create(
        log_dir: Arc<dyn LogDir>,
        uuid: Uuid,
        block_size: u64,
        map: &LayerMap,
        tag: BootTag,
        first: u64,
    ) -> io::Result<Self> {
        let (log, dir_synced) = Self::replace(log_dir, uuid, block_size, map, tag, first)?;
        dir_synced?;
        Ok(log)
    }

    /// Does the work of [`create`](Self::create), and returns also whether the log's name is durable.
    ///
    /// # Errors
    /// The host's errno; the old log, if any, is still in place in that case.
    pub fn replace(
        log_dir: Arc<dyn LogDir>,
        uuid: Uuid,
        block_size: u64,
        map: &LayerMap,
        tag: BootTag,
        first: u64,
    ) -> io::Result<(Self, io::Result<()>)> {
        let mut next = first;
        let ReplacedLog { file, dir_synced } = log_dir.replace_log(&mut |file| {
            let mut writer = LogWriter::new(file, uuid, first);
            writer.write_record(&LogRecord::Open { tag })?;
            map.records().try_for_each(|record| writer.write_record(&record))?;
            let upto = writer.sequence;
            writer.write_record(&LogRecord::Vouch { upto, durable: upto })?;
            writer.flush()?;
            next = writer.sequence;
            Ok(())
        })?;
        // The last record vouches for all records.
        let log = Self::from_parts(log_dir, uuid, block_size, file, (first, next), next - 1);
        Ok((log, dir_synced))
    }

    fn from_parts(
        log_dir: Arc<dyn LogDir>,
        uuid: Uuid,
        block_size: u64,
        file: Arc<dyn Storage>,
        (first, next): (u64, u64),
        vouched: u64,
    ) -> Self {
        let compact_at = MIN_RECORDS_TO_COMPACT.max((next - first) * 4);
        let tail = LogTail { file, first, next, preallocated: 0, compact_at, dir_sync_error: None };
        Self {
            uuid,
            block_size,
            dir: log_dir,
            tail: Mutex::new(tail),
            vouched: AtomicU64::new(vouched),
        }
    }

    /// Appends `records` in one write and returns the sequence of the last one.
    ///
    /// # Errors
    /// `ENOSPC`, also when only the part of the reserve is left that `reserve_use` may not use;
    /// otherwise the host's errno. Nothing was appended in that case.
    pub fn append(&self, records: &[LogRecord], reserve_use: ReserveUse) -> io::Result<u64> {
        let mut tail = self.tail.lock();
        tail.preallocate((records.len() * RECORD_LEN) as u64, reserve_use)?;
        let mut few = [0; 4 * RECORD_LEN];
        let mut many = Vec::new();
        let bytes = if records.len() <= 4 {
            &mut few[..records.len() * RECORD_LEN]
        } else {
            many.resize(records.len() * RECORD_LEN, 0);
            &mut many[..]
        };
        let mut sequence = tail.next;
        for (record, slot) in records.iter().zip(bytes.chunks_exact_mut(RECORD_LEN)) {
            slot.copy_from_slice(&record.encode(&self.uuid, sequence));
            sequence += 1;
        }
        if let Err(error) = tail.file.write_at(&[IoSlice::new(bytes)], tail.end()) {
            tail.cut_off(0);
            return Err(error);
        }
        tail.next = sequence;
        Ok(sequence - 1)
    }

    /// Returns the encoded bytes of `count` existing records from sequence `first` on.
    ///
    /// # Errors
    /// The host's errno.
    pub fn raw_records(&self, first: u64, count: u64) -> io::Result<Vec<[u8; RECORD_LEN]>> {
        let (file, from) = {
            let tail = self.tail.lock();
            if let Some(code) = tail.dir_sync_error {
                return Err(host::os_error(code));
            }
            (Arc::clone(&tail.file), first - tail.first)
        };
        let mut records = Vec::new();
        for_each_record(&*file, from, from + count, &mut |_, bytes| {
            records.push(*bytes);
            Ok(())
        })?;
        Ok(records)
    }

    /// Returns the `upto` of the last durable `Vouch`.
    #[must_use]
    pub fn vouched(&self) -> u64 {
        self.vouched.load(Ordering::SeqCst)
    }

    /// Notes that a `Vouch` up to `upto` has become durable.
    pub fn set_vouched(&self, upto: u64) {
        self.vouched.store(upto, Ordering::SeqCst);
    }

    /// Returns the layer's uuid.
    #[must_use]
    pub fn uuid(&self) -> &Uuid {
        &self.uuid
    }

    /// Returns the directory of the layer's files.
    #[must_use]
    pub fn dir(&self) -> &dyn LogDir {
        &*self.dir
    }

    /// Returns the sequence of the last record appended.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        self.tail.lock().next - 1
    }

    /// Makes every record appended so far durable.
    ///
    /// # Errors
    /// The host's errno.
    pub fn sync(&self) -> io::Result<()> {
        let file = {
            let tail = self.tail.lock();
            if let Some(code) = tail.dir_sync_error {
                return Err(host::os_error(code));
            }
            Arc::clone(&tail.file)
        };
        file.sync()
    }

    /// Makes every record durable and frees the preallocated space when the log is closed, except for a few
    /// records.
    ///
    /// # Errors
    /// The host's errno.
    pub fn finish(&self) -> io::Result<()> {
        let mut tail = self.tail.lock();
        // On a full host it keeps less.
        let _ = tail.preallocate(CLOSED_RESERVE, ReserveUse::Full);
        tail.cut_off(CLOSED_RESERVE);
        drop(tail);
        self.sync()
    }

    /// Returns whether the log has grown enough beyond its map to be worth compacting.
    #[must_use]
    pub fn needs_compaction(&self) -> bool {
        let tail = self.tail.try_lock();
        tail.is_some_and(|tail| tail.next - tail.first >= tail.compact_at)
    }

    /// Replaces the records up to `durable`, all vouched, by the shortest sequence that adds up to
    /// the same map; later records are copied unchanged. The caller ensures that no sync is in
    /// progress.
    ///
    /// # Errors
    /// The host's errno; the old log continues in that case. When only the rename is not durable,
    /// the new log continues and fails at its next sync.
    pub fn compact(&self, durable: u64, tag: BootTag) -> io::Result<()> {
        let (file, first) = {
            let tail = self.tail.lock();
            (Arc::clone(&tail.file), tail.first)
        };
        // No lock is needed: these records do not change any more.
        let mut map = LayerMap::new(0, 0);
        replay(&*file, &self.uuid, durable + 1 - first, self.block_size, &mut map)?;
        let count = map.records().count() as u64 + 2;
        let mut tail = self.tail.lock();
        if count >= (durable + 1 - first) / 2 {
            tail.compact_at = (tail.next - tail.first) * 2;
            return Ok(());
        }
        let start = durable + 1 - count;
        let copied = durable + 1 - first..tail.next - first;
        let ReplacedLog { file: new, dir_synced } = self.dir.replace_log(&mut |out| {
            let mut writer = LogWriter::new(out, self.uuid, start);
            writer.write_record(&LogRecord::Open { tag })?;
            map.records().try_for_each(|record| writer.write_record(&record))?;
            writer.write_record(&LogRecord::Vouch { upto: durable, durable })?;
            for_each_record(&*file, copied.start, copied.end, &mut |_, bytes| {
                writer.write_raw(bytes)
            })?;
            writer.flush()
        })?;
        self.set_vouched(durable);
        tail.file = new;
        tail.first = start;
        tail.preallocated = 0;
        tail.compact_at = MIN_RECORDS_TO_COMPACT.max(count * 4);
        if let Err(error) = &dir_synced {
            tail.dir_sync_error = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        dir_synced
    }
}
