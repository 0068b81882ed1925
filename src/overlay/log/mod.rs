//! The durable map of a layer: an append-only log of 32-byte records.
//!
//! ```text
//!   Open  Size  Set  Set ... Vouch | Set  Set  Vouch  Set  Set
//!   `------- compacted ----------' |                 `-- not vouched: lost with the power --'
//! ```
//!
//! Sequences are contiguous in a file, so a record's place follows from its sequence. The log is
//! reduced in two ways, both by writing a new file and renaming it over the old one: at recovery,
//! to exactly what is trusted, and while running, when it has grown far beyond the map it holds.
//! `docs/overlay-format.md` argues why each cut point is safe.
//!
//! `scan` reads a log and judges it, `writer` writes a new one.

mod scan;
mod writer;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use uuid::Uuid;

use self::scan::for_each_record;
pub use self::scan::{LogEnd, LogScan, count_changes, replay, scan};
use self::writer::LogWriter;
use super::data::{Create, Storage};
use super::is_out_of_space;
use super::record::{BootTag, LayerMap, LogRecord, RECORD_LEN};
use crate::host;

/// Space is reserved on the host in steps of this many bytes.
const RESERVE_STEP: u64 = 1 << 20;
/// Kept back for the records that give space back, so that a full file system can be emptied
/// again: 2,048 records.
const LOG_RESERVE: u64 = 64 << 10;
/// The last of the reserve, for the records that a sync and a close need: without them nothing
/// that was freed could be given back.
const SYNC_RESERVE: u64 = 4 << 10;
/// A log below this many records is not worth it at its opening either (8 KiB).
const MIN_RECORDS_TO_REWRITE: u64 = 1 << 8;
/// A log below this many records is never worth reducing while it is in use (2 MiB).
const MIN_RECORDS_TO_COMPACT: u64 = 1 << 16;
/// Records read or written at a time: 1 MiB.
const BATCH_RECORDS: usize = (1 << 20) / RECORD_LEN;
const RECORD_BYTES: u64 = RECORD_LEN as u64;

/// Where a layer's log lives: what can put a new one in place of the old.
pub trait LogDir: Send + Sync {
    /// Lets `fill` write a new log, makes it durable and puts it in the place of the old.
    ///
    /// # Errors
    /// The host's errno; the old log is still in place then.
    fn replace_log(
        &self,
        fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<ReplacedLog>;

    /// The layer's journal; made, durably, when it is not there and `create` says so.
    ///
    /// # Errors
    /// The host's errno.
    fn journal(&self, create: Create) -> io::Result<Option<Arc<dyn Storage>>>;
}

/// A new log that is in its place.
pub struct ReplacedLog {
    /// Its file.
    pub file: Arc<dyn Storage>,
    /// Whether its place is durable. If not, a power cut may bring the old log back, which does
    /// not hold what is appended to this one.
    pub dir_synced: io::Result<()>,
}

/// What a record is for when space is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveUse {
    /// It leads to more space being used: refused before the reserve is touched.
    Keep,
    /// It gives space back: may use the reserve but for its last part.
    Partial,
    /// It vouches for others, or marks the log itself: may use all there is.
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

/// Where the next record goes. Its lock is held for one small write.
struct LogTail {
    file: Arc<dyn Storage>,
    /// The sequence of the record at offset 0.
    first: u64,
    /// The sequence of the next record.
    next: u64,
    /// Bytes of the file for which the host holds space.
    reserved: u64,
    /// Reduce the log once it holds this many records.
    compact_at: u64,
    /// The errno for every sync, once the file's place in its directory could not be made durable.
    dir_sync_error: Option<i32>,
}

impl LogTail {
    fn end(&self) -> u64 {
        (self.next - self.first) * RECORD_BYTES
    }

    /// Sees to it that `len` more bytes will find space.
    fn reserve(&mut self, len: u64, purpose: ReserveUse) -> io::Result<()> {
        let kept = match purpose {
            ReserveUse::Keep => LOG_RESERVE,
            ReserveUse::Partial => SYNC_RESERVE,
            ReserveUse::Full => 0,
        };
        let end = self.end() + len + kept;
        if end <= self.reserved {
            return Ok(());
        }
        let upto = end.next_multiple_of(RESERVE_STEP);
        match self.file.extend(self.end()..upto) {
            Ok(()) => self.reserved = upto,
            Err(error) if is_out_of_space(&error) => {
                // Past the reserve the write itself says whether there is still room.
                return if purpose == ReserveUse::Full { Ok(()) } else { Err(error) };
            }
            // A host that cannot reserve: every append then takes its chance.
            Err(_) => self.reserved = u64::MAX,
        }
        Ok(())
    }
}

/// Whether a log that was closed in good order had better be written anew than continued: every
/// opening and closing adds to it, though nobody changes anything. A large one is reduced while
/// it is in use, not while somebody waits for a mount.
pub fn is_worth_rewriting(scan: &LogScan, image: &LayerMap) -> bool {
    (MIN_RECORDS_TO_REWRITE..MIN_RECORDS_TO_COMPACT).contains(&scan.good)
        && (image.records().count() as u64) < scan.good / 4
}

impl Log {
    /// Writes a new log that holds `image` and nothing else, opened under `tag`, its first
    /// sequence `first`, all of it vouched: the caller has made the data durable.
    ///
    /// # Errors
    /// The host's errno; the old log, if any, is still in place then.
    pub fn create(
        home: Arc<dyn LogDir>,
        uuid: Uuid,
        block: u64,
        image: &LayerMap,
        tag: BootTag,
        first: u64,
    ) -> io::Result<Self> {
        let mut next = first;
        let ReplacedLog { file, dir_synced: placed } = home.replace_log(&mut |file| {
            let mut writer = LogWriter::new(file, uuid, first);
            writer.write_record(&LogRecord::Open { tag })?;
            image.records().try_for_each(|record| writer.write_record(&record))?;
            let upto = writer.sequence;
            writer.write_record(&LogRecord::Vouch { upto, durable: upto })?;
            writer.flush()?;
            next = writer.sequence;
            Ok(())
        })?;
        placed?;
        // Its last record vouches for all of it.
        Ok(Self::from_parts(home, uuid, block, file, (first, next), next - 1))
    }

    /// Goes on with a log that was closed in good order.
    ///
    /// # Errors
    /// The host's errno from appending `Open` and making it durable.
    pub fn reopen(
        home: Arc<dyn LogDir>,
        uuid: Uuid,
        block: u64,
        file: Arc<dyn Storage>,
        scan: &LogScan,
        tag: BootTag,
    ) -> io::Result<Self> {
        let vouched = scan.vouched.unwrap_or(0);
        let log = Self::from_parts(
            home,
            uuid,
            block,
            file,
            (scan.first, scan.last_sequence() + 1),
            vouched,
        );
        log.append(&[LogRecord::Open { tag }], ReserveUse::Full)?;
        // Every `Vouch` to come says that what was there at the beginning is durable.
        log.sync()?;
        Ok(log)
    }

    fn from_parts(
        home: Arc<dyn LogDir>,
        uuid: Uuid,
        block: u64,
        file: Arc<dyn Storage>,
        (first, next): (u64, u64),
        vouched: u64,
    ) -> Self {
        let reduce_at = MIN_RECORDS_TO_COMPACT.max((next - first) * 4);
        let tail =
            LogTail { file, first, next, reserved: 0, compact_at: reduce_at, dir_sync_error: None };
        Self {
            uuid,
            block_size: block,
            dir: home,
            tail: Mutex::new(tail),
            vouched: AtomicU64::new(vouched),
        }
    }

    /// Appends `records` in one write and returns the sequence of the last.
    ///
    /// # Errors
    /// `ENOSPC`, also while only the reserve is left that `purpose` may not use; the host's errno.
    /// Nothing was appended then.
    pub fn append(&self, records: &[LogRecord], purpose: ReserveUse) -> io::Result<u64> {
        let mut tail = self.tail.lock();
        tail.reserve((records.len() * RECORD_LEN) as u64, purpose)?;
        let mut few = [0; 4 * RECORD_LEN];
        let mut many = Vec::new();
        let bytes = if records.len() <= 4 {
            &mut few[..records.len() * RECORD_LEN]
        } else {
            many.resize(records.len() * RECORD_LEN, 0);
            &mut many[..]
        };
        let mut sequence = tail.next;
        for (record, place) in records.iter().zip(bytes.chunks_exact_mut(RECORD_LEN)) {
            place.copy_from_slice(&record.encode(&self.uuid, sequence));
            sequence += 1;
        }
        tail.file.write_at(&[IoSlice::new(bytes)], tail.end())?;
        tail.next = sequence;
        Ok(sequence - 1)
    }

    /// The bytes of `count` records from sequence `first` on, which are there.
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
        for_each_record(&*file, from, from + count, &mut |bytes| {
            records.push(*bytes);
            Ok(())
        })?;
        Ok(records)
    }

    /// The `upto` of the last durable `Vouch`.
    #[must_use]
    pub fn vouched(&self) -> u64 {
        self.vouched.load(Ordering::SeqCst)
    }

    /// A `Vouch` up to `upto` has become durable.
    pub fn set_vouched(&self, upto: u64) {
        self.vouched.store(upto, Ordering::SeqCst);
    }

    /// The layer's uuid.
    #[must_use]
    pub fn uuid(&self) -> &Uuid {
        &self.uuid
    }

    /// Where its files are.
    #[must_use]
    pub fn dir(&self) -> &dyn LogDir {
        &*self.dir
    }

    /// The sequence of the last record appended.
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

    /// Makes every record durable and gives back the space reserved for more: the end.
    ///
    /// # Errors
    /// The host's errno.
    pub fn finish(&self) -> io::Result<()> {
        let mut tail = self.tail.lock();
        if tail.reserved != 0 {
            // A host that cannot cut leaves zeros there, which say nothing.
            let _ = tail.file.truncate(tail.end());
            tail.reserved = 0;
        }
        drop(tail);
        self.sync()
    }

    /// Whether the log has grown enough beyond its map to be worth reducing.
    #[must_use]
    pub fn needs_compaction(&self) -> bool {
        let tail = self.tail.lock();
        tail.next - tail.first >= tail.compact_at
    }

    /// Reduces the records up to `durable`, all vouched, to what they add up to; those after it
    /// are copied as they are. The caller sees to it that no sync is in flight.
    ///
    /// # Errors
    /// The host's errno; the log goes on as it was then. When only the new log's place is not
    /// durable the log goes on there, and fails at its next sync.
    pub fn compact(&self, durable: u64, tag: BootTag) -> io::Result<()> {
        let (file, first) = {
            let tail = self.tail.lock();
            (Arc::clone(&tail.file), tail.first)
        };
        // Without the lock: these records do not change any more.
        let mut image = LayerMap::new(0, 0);
        replay(&*file, &self.uuid, durable + 1 - first, self.block_size, &mut image)?;
        let count = image.records().count() as u64 + 2;
        let mut tail = self.tail.lock();
        if count >= (durable + 1 - first) / 2 {
            tail.compact_at = (tail.next - tail.first) * 2;
            return Ok(());
        }
        let start = durable + 1 - count;
        let copied = durable + 1 - first..tail.next - first;
        let ReplacedLog { file: new, dir_synced: placed } = self.dir.replace_log(&mut |out| {
            let mut writer = LogWriter::new(out, self.uuid, start);
            writer.write_record(&LogRecord::Open { tag })?;
            image.records().try_for_each(|record| writer.write_record(&record))?;
            writer.write_record(&LogRecord::Vouch { upto: durable, durable })?;
            for_each_record(&*file, copied.start, copied.end, &mut |bytes| {
                writer.write_raw(bytes)
            })?;
            writer.flush()
        })?;
        self.set_vouched(durable);
        tail.file = new;
        tail.first = start;
        tail.reserved = 0;
        tail.compact_at = MIN_RECORDS_TO_COMPACT.max(count * 4);
        if let Err(error) = &placed {
            tail.dir_sync_error = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        placed
    }
}
