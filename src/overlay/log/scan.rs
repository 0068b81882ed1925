//! Reading a log: what of it is good, what ends that, and what it adds up to.

use std::io;
use std::ops::Range;

use uuid::Uuid;

use super::{BATCH, RECORD_BYTES};
use crate::host;
use crate::layer::Wait;
use crate::overlay::data::Storage;
use crate::overlay::record::{Decoded, Image, RECORD_LEN, Record, Tag};
use crate::pool::check_wanted;

/// What reading a log from end to end found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The sequence of the first record.
    pub first: u64,
    /// Records that are good from the start on.
    pub good: u64,
    /// The highest sequence seen anywhere: never to be used again.
    pub highest: u64,
    /// The tag of the last good `Open`.
    pub tag: Option<Tag>,
    /// The `upto` of the last good `Vouch`.
    pub vouched: Option<u64>,
    /// `durable` of a `Poisoned` record.
    pub poisoned: Option<u64>,
    /// `vouched` of it.
    pub generation: Option<u64>,
    /// The last good record is `Close`, and nothing follows.
    pub closed: bool,
    /// What ends the good part.
    pub end: End,
}

/// What comes after the good records of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing, or space reserved for more, which reads as zeros.
    Whole,
    /// Bytes that are no record, and no good record after them: an append that was cut short.
    Torn,
    /// Never-written places before later records, none of them known to have been durable: what
    /// a power cut leaves when the host wrote the log's pages out of order.
    Gap,
    /// A record that was good once and is not any more.
    Damaged,
    /// A record kind of a later version.
    Unknown(u8),
}

impl Scan {
    /// The sequence of the last good record.
    #[must_use]
    pub fn last(&self) -> u64 {
        (self.first + self.good).saturating_sub(1)
    }
}

impl Scan {
    /// Takes in the next record while all before were good.
    fn take(&mut self, decoded: Decoded) {
        match decoded {
            Decoded::Good(sequence, record) => {
                if self.good == 0 {
                    self.first = sequence;
                }
                if sequence != self.first + self.good {
                    self.end = End::Damaged;
                    return;
                }
                self.good += 1;
                self.closed = record == Record::Close;
                match record {
                    Record::Open { tag } => self.tag = Some(tag),
                    Record::Vouch { upto, .. } => self.vouched = Some(upto),
                    Record::Poisoned { durable, vouched } => {
                        self.poisoned = Some(durable);
                        self.generation = Some(vouched);
                    }
                    _ => {}
                }
            }
            Decoded::Blank => self.end = End::Gap,
            Decoded::Bad => self.end = End::Torn,
            Decoded::Unknown(kind) => self.end = End::Unknown(kind),
        }
    }
}

/// Reads a whole log of the layer `uuid`.
///
/// # Errors
/// The host's errno from reading.
pub fn scan(file: &dyn Storage, uuid: &Uuid) -> io::Result<Scan> {
    let mut scan = Scan {
        first: 0,
        good: 0,
        highest: 0,
        tag: None,
        vouched: None,
        poisoned: None,
        generation: None,
        closed: false,
        end: End::Whole,
    };
    let mut later = Later { is_blank: true, records: 0, highest: 0, durable: 0 };
    let len = file.len()?;
    for_each_record(file, 0, len / RECORD_BYTES, &mut |bytes| {
        let decoded = Record::decode(bytes, uuid);
        if scan.end == End::Whole {
            scan.take(decoded);
        } else {
            later.take(decoded);
        }
        Ok(())
    })?;
    if scan.end == End::Whole && !len.is_multiple_of(RECORD_BYTES) {
        scan.end = End::Torn;
    }
    scan.highest = scan.last().max(later.highest);
    scan.end = match scan.end {
        // Space reserved for records that never came.
        End::Gap if later.is_blank => End::Whole,
        End::Gap if later.records > 0 && later.durable > scan.last() => End::Damaged,
        End::Gap if later.records == 0 => End::Torn,
        End::Torn if later.records > 0 => End::Damaged,
        end => end,
    };
    scan.closed &= scan.end == End::Whole && len.is_multiple_of(RECORD_BYTES);
    Ok(scan)
}

/// What is learnt from what is behind the first bad record.
struct Later {
    /// There was nothing but blank places.
    is_blank: bool,
    records: u64,
    highest: u64,
    /// The highest sequence that one of them knew to be durable.
    durable: u64,
}

impl Later {
    fn take(&mut self, decoded: Decoded) {
        self.is_blank &= decoded == Decoded::Blank;
        if let Decoded::Good(sequence, record) = decoded {
            self.records += 1;
            self.highest = self.highest.max(sequence);
            if let Record::Vouch { durable, .. } | Record::Poisoned { durable, .. } = record {
                self.durable = self.durable.max(durable);
            }
        }
    }
}

/// Applies the first `count` records of a log to `image`. `block` is the block size in bytes.
///
/// # Errors
/// The host's errno; `EIO` when a record is not what it was a moment ago.
pub fn replay(
    file: &dyn Storage,
    uuid: &Uuid,
    count: u64,
    block: u64,
    image: &mut Image,
) -> io::Result<()> {
    for_each_record(file, 0, count, &mut |bytes| match Record::decode(bytes, uuid) {
        Decoded::Good(_, record) => {
            image.apply(&record, block);
            Ok(())
        }
        _ => Err(host::errno(libc::EIO)),
    })
}

/// How many of the records `range`, counted from the first in the file, change the map or the size.
///
/// # Errors
/// As [`replay`].
pub fn count_changes(file: &dyn Storage, uuid: &Uuid, range: Range<u64>) -> io::Result<u64> {
    let mut changes = 0;
    for_each_record(file, range.start, range.end, &mut |bytes| {
        let decoded = Record::decode(bytes, uuid);
        changes += u64::from(matches!(
            decoded,
            Decoded::Good(_, Record::Set { .. } | Record::Size { .. })
        ));
        Ok(())
    })?;
    Ok(changes)
}

/// Calls `each` with the records from `from` to `to`, counted from the first in the file. Of a
/// stretch of blank places it sees the first megabyte at least.
pub(super) fn for_each_record(
    file: &dyn Storage,
    from: u64,
    to: u64,
    each: &mut dyn FnMut(&[u8; RECORD_LEN]) -> io::Result<()>,
) -> io::Result<()> {
    let mut buf = Vec::new();
    let mut at = from;
    while at < to {
        let count = usize::try_from(to - at).unwrap_or(BATCH).min(BATCH);
        buf.resize(count * RECORD_LEN, 0);
        file.read_at(&mut buf, at * RECORD_BYTES, Wait::Yes)?;
        let (records, _) = buf.as_chunks::<RECORD_LEN>();
        records.iter().try_for_each(&mut *each)?;
        at += count as u64;
        // A log may be as long as the host lets a file be. Nobody has to wait for its holes...
        if buf.iter().all(|byte| *byte == 0) {
            at = file.next_data(at * RECORD_BYTES).map_or(to, |next| at.max(next / RECORD_BYTES));
        }
        // ... and whoever is gone does not wait for the rest either.
        check_wanted()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::overlay::data::HostFile;
    use crate::pool::{Request, while_wanted};

    #[test]
    fn records_behind_a_hole_of_any_length_are_found_without_reading_it() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&Record::Open { tag: Tag([1; 2]) }.encode(&uuid, 1), 0).unwrap();
        let far = 7 << 40;
        file.write_all_at(&Record::Close.encode(&uuid, 9), far).unwrap();
        file.set_len(15 << 40).unwrap();
        let found = scan(&HostFile::single(file), &uuid).unwrap();
        assert_eq!((found.good, found.highest, found.end), (1, 9, End::Gap));
    }

    struct Gone;

    impl Request for Gone {
        fn is_given_up(&self) -> bool {
            true
        }

        fn hold(&self) -> bool {
            false
        }

        fn release(&self) {}
    }

    #[test]
    fn nothing_is_read_on_for_somebody_who_is_gone() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile().unwrap();
        let records: Vec<u8> =
            (1..100_000).flat_map(|at| Record::Intent.encode(&uuid, at)).collect();
        file.write_all_at(&records, 0).unwrap();
        let file = HostFile::single(file);
        assert_eq!(scan(&file, &uuid).unwrap().good, 99_999);
        let mut seen = 0;
        let stopped = while_wanted(Gone, || {
            for_each_record(&file, 0, 99_999, &mut |_| {
                seen += 1;
                Ok(())
            })
        });
        assert_eq!(stopped.unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(seen, BATCH);
    }

    #[test]
    fn only_records_that_change_the_disk_are_changes() {
        let uuid = Uuid::from_u128(3);
        let file = tempfile::tempfile().unwrap();
        let vouch = Record::Vouch { upto: 1, durable: 1 };
        let size = Record::Size { size: 512, lower_limit: 0 };
        for (at, record) in (0..).zip([size.clone(), vouch, Record::Close, size, Record::Done]) {
            file.write_all_at(&record.encode(&uuid, at + 1), at * RECORD_BYTES).unwrap();
        }
        let file = HostFile::single(file);
        assert_eq!(count_changes(&file, &uuid, 0..5).unwrap(), 2);
        assert_eq!(count_changes(&file, &uuid, 1..5).unwrap(), 1);
        assert_eq!(count_changes(&file, &uuid, 4..5).unwrap(), 0);
    }
}
