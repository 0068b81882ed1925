//! Going on with an existing log in place: one that was closed in good order, or, on a full host, one
//! that a crash has left.
//!
//! ```text
//!   good records                 end of the old log         appended
//!   Open Set Vouch Set Set Vouch | torn, lost, blank ...
//!   Open Set Vouch -   -   Vouch |                          Set Open Vouch
//!                  `-- voided: no Vouch covers them         `-- from the journal, if the log lost it
//! ```
//!
//! A new log takes an inode and the space of the map, and a host that is full has neither. This takes
//! a part of what the old log already has. `docs/overlay-format.md` argues why a crash at any point is
//! safe.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;

use super::scan::{LogScan, for_each_record};
use super::writer::LogWriter;
use super::{BATCH_RECORDS, Log, LogDir, LogEnd, RECORD_BYTES, ReserveUse, SYNC_RESERVE};
use crate::overlay::record::{BootTag, LogRecord, RECORD_LEN};
use crate::overlay::storage::Storage;

/// What has to happen to a log before it can go on in place. Records are counted from the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldLog {
    /// The number of records that stay; what follows them is overwritten with zeros.
    pub kept: u64,
    /// Those of them that do not count, without any that vouches.
    pub voided: Range<u64>,
    /// The tag that takes their places: that of the log's last `Open`.
    pub old_tag: BootTag,
    /// The records that follow those kept, known from the journal alone.
    pub missing: Vec<LogRecord>,
}

impl OldLog {
    /// Describes a log of which all good records count; `None` if it cannot go on in place.
    #[must_use]
    pub fn whole(scan: &LogScan) -> Option<Self> {
        let old_tag = scan.tag?;
        Some(Self { kept: scan.good, voided: 0..0, old_tag, missing: Vec::new() })
    }

    /// Describes a log of which the records count that its last `Vouch` covers, and those in the
    /// `journal`, which follow them; `None` if it cannot go on in place under `tag`.
    #[must_use]
    pub fn vouched(scan: &LogScan, journal: &[LogRecord], tag: BootTag) -> Option<Self> {
        let (old_tag, next, last_vouch) = (scan.tag?, scan.vouched? + 1, scan.last_vouch?);
        // Under the same tag a daemon killed meanwhile would let all count that is left.
        if old_tag == tag || next < scan.first {
            return None;
        }
        // A record of the journal has the sequence that it has in the log.
        let vouched = next - scan.first;
        let known = usize::try_from(scan.good.saturating_sub(vouched)).unwrap_or(usize::MAX);
        let missing = journal.get(known..).unwrap_or_default().to_vec();
        if missing.iter().any(|record| matches!(record, LogRecord::Poisoned { .. })) {
            return None;
        }
        let counted = (vouched + journal.len() as u64).min(scan.good);
        // The `Vouch` has to stay until another one covers what it does.
        let vouch = last_vouch - scan.first;
        let (kept, voided) = (counted.max(vouch + 1), counted..vouch.max(counted));
        Some(Self { kept, voided, old_tag, missing })
    }

    /// Returns the number of records that count, from the first on, in front of those missing.
    #[must_use]
    pub fn counted(&self) -> u64 {
        if self.voided.is_empty() { self.kept } else { self.voided.start }
    }
}

impl Log {
    /// Continues a log that was closed in good order.
    ///
    /// # Errors
    /// The host's errno from appending `Open` and making it durable.
    pub fn reopen(
        log_dir: Arc<dyn LogDir>,
        uuid: Uuid,
        block_size: u64,
        file: Arc<dyn Storage>,
        scan: &LogScan,
        tag: BootTag,
    ) -> io::Result<Self> {
        let vouched = scan.vouched.unwrap_or(0);
        let place = (scan.first, scan.last_sequence() + 1);
        let log = Self::from_parts(log_dir, uuid, block_size, file, place, vouched);
        log.keep_reserve();
        log.append(&[LogRecord::Open { tag }], ReserveUse::Full)?;
        // Every later `Vouch` claims that the records before it, including this `Open`, are
        // durable.
        log.sync()?;
        Ok(log)
    }

    /// Continues the log in `file`, which was not closed in good order and which `scan` describes, as
    /// `old` says. All of it is vouched: the caller must have made the data durable, and must have
    /// closed the layers below.
    ///
    /// # Errors
    /// The host's errno; the log adds up to the same as before in that case.
    pub fn resume(
        log_dir: Arc<dyn LogDir>,
        uuid: Uuid,
        block_size: u64,
        file: Arc<dyn Storage>,
        scan: &LogScan,
        (old, tag): (&OldLog, BootTag),
    ) -> io::Result<Self> {
        // First what would count without its end, then the end.
        if !old.voided.is_empty() {
            let from = old.voided.start;
            let mut writer = LogWriter::at(&*file, uuid, scan.first + from, from * RECORD_BYTES);
            for _ in old.voided.clone() {
                writer.write_record(&LogRecord::Open { tag: old.old_tag })?;
            }
            writer.flush()?;
            file.sync()?;
        }
        if old.kept < scan.good || scan.end != LogEnd::Whole {
            blank(&*file, old.kept)?;
            // What is appended has the sequences of what was there: the two must never mix.
            file.sync()?;
        }
        let mut next = scan.first + old.kept;
        if !old.missing.is_empty() {
            let mut writer = LogWriter::at(&*file, uuid, next, old.kept * RECORD_BYTES);
            old.missing.iter().try_for_each(|record| writer.write_record(record))?;
            writer.flush()?;
            file.sync()?;
            next = writer.sequence;
        }
        let place = (scan.first, next);
        let log = Self::from_parts(log_dir, uuid, block_size, file, place, next);
        log.keep_reserve();
        // The last record vouches for the `Open` before it.
        let vouch = LogRecord::Vouch { upto: next, durable: next - 1 };
        log.append(&[LogRecord::Open { tag }, vouch], ReserveUse::Full)?;
        log.sync()?;
        Ok(log)
    }

    /// Goes on to use the space that the log's last user reserved: a full host may refuse to reserve it
    /// again.
    fn keep_reserve(&self) {
        let mut tail = self.tail.lock();
        if let (Ok(len), Ok(held)) = (tail.file.len(), tail.file.allocated())
            && held >= len
        {
            tail.preallocated = len;
        }
    }
}

/// Overwrites with zeros what is not zeros from record `from` on. That takes no space, and gives none up
/// that the log needs next.
fn blank(file: &dyn Storage, from: u64) -> io::Result<()> {
    let fill = |run: &Range<u64>| {
        let zeros = vec![0; usize::try_from(run.end - run.start).unwrap_or(0) * RECORD_LEN];
        file.write_at(&[IoSlice::new(&zeros)], run.start * RECORD_BYTES)
    };
    let mut run = from..from;
    // The last bytes may be less than a record.
    let end = file.len()?.div_ceil(RECORD_BYTES);
    for_each_record(file, from, end, &mut |position, bytes| {
        if *bytes == [0; RECORD_LEN] {
            return Ok(());
        }
        if run.end != position || run.end - run.start >= BATCH_RECORDS as u64 {
            fill(&run)?;
            run = position..position;
        }
        run.end = position + 1;
        Ok(())
    })?;
    fill(&run)
}

/// Gives the space back that the log in `file`, of `records` records and nothing else, has reserved past
/// what it needs to go on.
///
/// # Errors
/// The host's errno.
pub fn give_up_reserve(file: &dyn Storage, records: u64) -> io::Result<()> {
    let end = (records * RECORD_BYTES + SYNC_RESERVE).next_multiple_of(SYNC_RESERVE);
    if file.len()? > end { file.truncate(end) } else { Ok(()) }
}
