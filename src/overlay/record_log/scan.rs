//! Reading a log: which records are good, how they end, and the map they add up to.

use std::io;
use std::ops::Range;

use uuid::Uuid;

use super::{BATCH_RECORDS, RECORD_BYTES};
use crate::host;
use crate::layer::Wait;
use crate::overlay::record::{BootTag, DecodedRecord, LayerMap, LogRecord, RECORD_LEN};
use crate::overlay::storage::Storage;
use crate::pool::check_cancelled;
use crate::zeros::is_zero;

/// The result of reading a log from end to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogScan {
    /// The sequence of the first record.
    pub first: u64,
    /// The number of good records, from the start on.
    pub good: u64,
    /// The highest sequence seen anywhere; no new record may use it again.
    pub highest: u64,
    /// The tag of the last good `Open`.
    pub tag: Option<BootTag>,
    /// The sequence of the first good `Vouch`: the end of the state that the file was born with,
    /// which was durable before the file had its name.
    pub born: Option<u64>,
    /// The `upto` of the last good `Vouch`.
    pub vouched: Option<u64>,
    /// The sequence of that `Vouch` itself.
    pub last_vouch: Option<u64>,
    /// The `durable` of a `Poisoned` record.
    pub poisoned: Option<u64>,
    /// The `vouched` of that record.
    pub generation: Option<u64>,
    /// Whether the last good record is a `Close` that nothing follows.
    pub closed: bool,
    /// Whether all layers below were closed in good order before the last of these records was
    /// appended: there is a `Close`, or a `Vouch` of a sync after the one that the log was born with.
    pub is_settled: bool,
    /// What follows the good records.
    pub end: LogEnd,
    /// The number of unreadable records there; a blank one before others counts.
    pub unreadable: u64,
}

/// The part of a log after its good records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEnd {
    /// Nothing, or preallocated space, which reads as zeros.
    Whole,
    /// Bytes that are not a record, without a good record after them: an interrupted append.
    Torn,
    /// Blank records before later good ones, none of which is known to have been durable: what a
    /// power cut leaves when the host wrote the log's pages out of order.
    Gap,
    /// A record that was good once and is damaged now.
    Damaged,
    /// A record of an unknown kind, written by a later version.
    Unknown(u8),
}

impl LogScan {
    /// Returns the sequence of the last good record.
    #[must_use]
    pub fn last_sequence(&self) -> u64 {
        (self.first + self.good).saturating_sub(1)
    }

    /// Adds the next record, as long as all records before it were good.
    fn add(&mut self, decoded: DecodedRecord) {
        match decoded {
            DecodedRecord::Good(sequence, record) => {
                if self.good == 0 {
                    self.first = sequence;
                }
                if sequence != self.first + self.good {
                    self.end = LogEnd::Damaged;
                    return;
                }
                self.good += 1;
                self.closed = record == LogRecord::Close;
                match record {
                    LogRecord::Open { tag } => self.tag = Some(tag),
                    LogRecord::Close => self.is_settled = true,
                    LogRecord::Vouch { upto, .. } => {
                        self.is_settled |= self.vouched.is_some();
                        self.vouched = Some(upto);
                        self.last_vouch = Some(sequence);
                        self.born.get_or_insert(sequence);
                    }
                    LogRecord::Poisoned { durable, vouched } => {
                        self.poisoned = Some(durable);
                        self.generation = Some(vouched);
                    }
                    _ => {}
                }
            }
            DecodedRecord::Blank => self.end = LogEnd::Gap,
            DecodedRecord::Bad => self.end = LogEnd::Torn,
            DecodedRecord::Unknown(kind) => self.end = LogEnd::Unknown(kind),
        }
    }
}

/// Reads a whole log of the layer `uuid`.
///
/// # Errors
/// The host's errno from reading.
pub fn scan(file: &dyn Storage, uuid: &Uuid) -> io::Result<LogScan> {
    let mut scan = LogScan {
        first: 0,
        good: 0,
        highest: 0,
        tag: None,
        born: None,
        vouched: None,
        last_vouch: None,
        poisoned: None,
        generation: None,
        closed: false,
        is_settled: false,
        end: LogEnd::Whole,
        unreadable: 0,
    };
    let mut later = TrailingRecords {
        is_blank: true,
        unreadable: 0,
        records: 0,
        highest: 0,
        durable: 0,
        is_misplaced: false,
    };
    let len = file.len()?;
    for_each_record(file, 0, len / RECORD_BYTES, &mut |position, bytes| {
        let decoded = LogRecord::decode(bytes, uuid);
        if scan.end == LogEnd::Whole {
            scan.add(decoded);
        } else {
            later.add(decoded, scan.first + position);
        }
        Ok(())
    })?;
    if scan.end != LogEnd::Whole && !(scan.end == LogEnd::Gap && later.is_blank) {
        scan.unreadable = later.unreadable + 1;
    }
    if matches!(scan.end, LogEnd::Whole | LogEnd::Torn) && !len.is_multiple_of(RECORD_BYTES) {
        scan.end = LogEnd::Torn;
        scan.unreadable += 1;
    }
    scan.highest = scan.last_sequence().max(later.highest);
    scan.end = match scan.end {
        // Reserved space without records.
        LogEnd::Gap if later.is_blank => LogEnd::Whole,
        LogEnd::Gap if later.is_misplaced => LogEnd::Damaged,
        LogEnd::Gap if later.records > 0 && later.durable > scan.last_sequence() => LogEnd::Damaged,
        LogEnd::Gap if later.records == 0 => LogEnd::Torn,
        LogEnd::Torn if later.records > 0 => LogEnd::Damaged,
        end => end,
    };
    scan.closed &= scan.end == LogEnd::Whole && len.is_multiple_of(RECORD_BYTES);
    Ok(scan)
}

/// The findings after the first bad record.
struct TrailingRecords {
    /// Whether all records there were blank.
    is_blank: bool,
    /// The number of those that are neither good nor blank.
    unreadable: u64,
    records: u64,
    highest: u64,
    /// The highest sequence that one of these records says is durable.
    durable: u64,
    /// Whether one of these records has another sequence than its place gives it.
    is_misplaced: bool,
}

impl TrailingRecords {
    /// Adds the next record, which is where the one with the sequence `expected` belongs.
    fn add(&mut self, decoded: DecodedRecord, expected: u64) {
        self.is_blank &= decoded == DecodedRecord::Blank;
        match decoded {
            DecodedRecord::Good(sequence, record) => {
                self.records += 1;
                self.is_misplaced |= sequence != expected;
                self.highest = self.highest.max(sequence);
                if let LogRecord::Vouch { durable, .. } | LogRecord::Poisoned { durable, .. } =
                    record
                {
                    self.durable = self.durable.max(durable);
                }
            }
            DecodedRecord::Blank => {}
            DecodedRecord::Bad | DecodedRecord::Unknown(_) => self.unreadable += 1,
        }
    }
}

/// Applies the first `count` records of a log to `map`. `block` is the block size in bytes.
///
/// # Errors
/// The host's errno; `EIO` when a record has changed since it was scanned.
pub fn replay(
    file: &dyn Storage,
    uuid: &Uuid,
    count: u64,
    block_size: u64,
    map: &mut LayerMap,
) -> io::Result<()> {
    for_each_record(file, 0, count, &mut |_, bytes| match LogRecord::decode(bytes, uuid) {
        DecodedRecord::Good(_, record) => {
            map.apply(&record, block_size);
            Ok(())
        }
        _ => Err(host::os_error(libc::EIO)),
    })
}

/// Returns how many of the records in `range`, counted from the first in the file, change the map
/// or the size.
///
/// # Errors
/// The errors of [`replay`].
pub fn count_changes(file: &dyn Storage, uuid: &Uuid, range: Range<u64>) -> io::Result<u64> {
    let mut changes = 0;
    for_each_record(file, range.start, range.end, &mut |_, bytes| {
        let decoded = LogRecord::decode(bytes, uuid);
        changes += u64::from(matches!(
            decoded,
            DecodedRecord::Good(_, LogRecord::Set { .. } | LogRecord::Size { .. })
        ));
        Ok(())
    })?;
    Ok(changes)
}

/// Calls `each` with the records from `from` to `to`, counted from the first in the file, and with
/// that count. Holes may be skipped, but `each` sees at least the first megabyte of a blank stretch.
pub(super) fn for_each_record(
    file: &dyn Storage,
    from: u64,
    to: u64,
    each: &mut dyn FnMut(u64, &[u8; RECORD_LEN]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buf = Vec::new();
    let mut at = from;
    while at < to {
        let count = usize::try_from(to - at).unwrap_or(BATCH_RECORDS).min(BATCH_RECORDS);
        buf.resize(count * RECORD_LEN, 0);
        file.read_at(&mut buf, at * RECORD_BYTES, Wait::Yes)?;
        let (records, _) = buf.as_chunks::<RECORD_LEN>();
        (at..).zip(records).try_for_each(|(position, bytes)| each(position, bytes))?;
        at += count as u64;
        // A log may be as long as the largest file of the host: skip its holes.
        if is_zero(&buf) {
            at = file.next_data(at * RECORD_BYTES).map_or(to, |next| at.max(next / RECORD_BYTES));
        }
        // Stop when the request was cancelled meanwhile.
        check_cancelled()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::overlay::host_file::HostFile;
    use crate::pool::{Cancellable, run_cancellable};

    #[test]
    fn records_after_a_huge_hole_are_found_without_reading_the_hole() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&LogRecord::Open { tag: BootTag([1; 2]) }.encode(&uuid, 1), 0).unwrap();
        let far = 7 << 40;
        let sequence = 1 + far / RECORD_BYTES;
        file.write_all_at(&LogRecord::Close.encode(&uuid, sequence), far).unwrap();
        file.set_len(15 << 40).unwrap();
        let found = scan(&HostFile::single(file), &uuid).unwrap();
        assert_eq!((found.good, found.highest, found.end), (1, sequence, LogEnd::Gap));
    }

    #[test]
    fn a_record_after_a_gap_counts_only_where_its_sequence_belongs() {
        let uuid = Uuid::from_u128(3);
        let later = |sequence| {
            let end = [[0; RECORD_LEN], LogRecord::Intent.encode(&uuid, sequence)].concat();
            scanned(&[LogRecord::Intent], &end).end
        };
        assert_eq!(later(3), LogEnd::Gap);
        for misplaced in [0, 1, 2, 4, 1 << 62] {
            assert_eq!(later(misplaced), LogEnd::Damaged, "{misplaced}");
        }
    }

    fn scanned(records: &[LogRecord], end: &[u8]) -> LogScan {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile().unwrap();
        let mut bytes: Vec<u8> =
            (1..).zip(records).flat_map(|(at, record)| record.encode(&uuid, at)).collect();
        bytes.extend(end);
        file.write_all_at(&bytes, 0).unwrap();
        scan(&HostFile::single(file), &uuid).unwrap()
    }

    #[test]
    fn unreadable_records_at_the_end_are_counted() {
        let record = [LogRecord::Intent];
        let blank = [0; RECORD_LEN];
        let bad = [9; RECORD_LEN];
        for (end, unreadable, kind) in [
            (Vec::new(), 0, LogEnd::Whole),
            ([blank, blank].concat(), 0, LogEnd::Whole),
            (bad.to_vec(), 1, LogEnd::Torn),
            (bad[..7].to_vec(), 1, LogEnd::Torn),
            ([bad, blank].concat(), 1, LogEnd::Torn),
            ([&bad, &bad[..7]].concat(), 2, LogEnd::Torn),
            ([bad, blank, bad].concat(), 2, LogEnd::Torn),
            ([blank, bad].concat(), 2, LogEnd::Torn),
        ] {
            let found = scanned(&record, &end);
            assert_eq!((found.good, found.unreadable, found.end), (1, unreadable, kind), "{end:?}");
        }
    }

    #[test]
    fn a_log_is_settled_by_a_second_vouch_or_a_close() {
        let vouch = |upto| LogRecord::Vouch { upto, durable: 1 };
        let new = [LogRecord::Open { tag: BootTag([1; 2]) }, vouch(1)];
        let with = |more: &[LogRecord]| scanned(&[&new, more].concat(), &[]).is_settled;
        assert!(!with(&[]));
        assert!(!with(&[LogRecord::Intent, LogRecord::Done]));
        assert!(with(&[LogRecord::Intent, vouch(3)]));
        assert!(with(&[LogRecord::Close, LogRecord::Open { tag: BootTag([1; 2]) }]));
    }

    struct Gone;

    impl Cancellable for Gone {
        fn is_cancelled(&self) -> bool {
            true
        }

        fn hold(&self) -> bool {
            false
        }

        fn release(&self) {}
    }

    #[test]
    fn reading_stops_when_the_request_is_cancelled() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile().unwrap();
        let records: Vec<u8> =
            (1..100_000).flat_map(|at| LogRecord::Intent.encode(&uuid, at)).collect();
        file.write_all_at(&records, 0).unwrap();
        let file = HostFile::single(file);
        assert_eq!(scan(&file, &uuid).unwrap().good, 99_999);
        let mut seen = 0;
        let stopped = run_cancellable(Gone, || {
            for_each_record(&file, 0, 99_999, &mut |_, _| {
                seen += 1;
                Ok(())
            })
        });
        assert_eq!(stopped.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(seen, BATCH_RECORDS);
    }

    #[test]
    fn only_records_that_change_the_disk_count_as_changes() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile().unwrap();
        let vouch = LogRecord::Vouch { upto: 1, durable: 1 };
        let size = LogRecord::Size { size: 512, lower_limit: 0 };
        for (at, record) in
            (0..).zip([size.clone(), vouch, LogRecord::Close, size, LogRecord::Done])
        {
            file.write_all_at(&record.encode(&uuid, at + 1), at * RECORD_BYTES).unwrap();
        }
        let file = HostFile::single(file);
        assert_eq!(count_changes(&file, &uuid, 0..5).unwrap(), 2);
        assert_eq!(count_changes(&file, &uuid, 1..5).unwrap(), 1);
        assert_eq!(count_changes(&file, &uuid, 4..5).unwrap(), 0);
    }
}
