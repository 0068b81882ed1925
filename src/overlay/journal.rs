//! Syncs of few changes at the price of one write to the device.
//!
//! A sync takes two writes in turn: the data, for which the host also has to record new blocks, and
//! then the log. For a client that syncs after every small write, that is most of its time. So the
//! bytes of a few blocks, and the log's records about them, go into one entry of the layer's
//! `journal`, whose space is already allocated on the device:
//!
//! ```text
//!   | entry 0 | entry 1 | entry 2 |  old entries, of other generations  |
//!   `- header 512: records, indexes -+- the blocks' bytes -+
//! ```
//!
//! The file holds 256 KiB; once it is full, a whole sync follows.
//!
//! After a power cut, an entry counts if it belongs to the generation of the log: the newest
//! sequence that a whole sync has made durable there. So the next whole sync makes all entries void
//! at once, and they are overwritten. As long as there are entries, every sync is another entry or
//! a whole sync: a block's bytes in an entry must not come back over newer ones.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::host_file::Create;
use super::record::{DecodedRecord, LogRecord, RECORD_LEN};
use super::record_log::LogDir;
use super::state::BlockIndex;
use super::storage::Storage;
use crate::checksum;
use crate::layer::Wait;

/// The length of the journal file in bytes: 256 KiB.
const JOURNAL_LEN: u64 = 256 << 10;
/// The most blocks in an entry.
const MAX_ENTRY_BLOCKS: usize = 8;
/// The most bytes of blocks in an entry: 64 KiB, which a device writes about as quickly as one
/// block.
const MAX_ENTRY_BYTES: u64 = 64 << 10;
/// The most records in an entry.
const MAX_ENTRY_RECORDS: usize = 10;
/// The length of an entry's header in bytes: one sector.
const HEADER_LEN: usize = 512;
/// The number of eligible syncs before the file is created, because a few syncs are no pattern yet.
const SYNCS_BEFORE_JOURNAL: u32 = 8;
const MAGIC: [u8; 4] = *b"cslj";

/// The header of an entry: its first 512 bytes.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct EntryHeader {
    /// CRC-32C of everything that follows, including the blocks' bytes, seeded with the layer's
    /// uuid.
    checksum: U32,
    magic: [u8; 4],
    generation: U64,
    /// The sequence of the first record; in an entry without records, that of the next record to
    /// come.
    first: U64,
    /// The entry's number in its generation, from 0.
    number: U32,
    /// The block size in bytes.
    block_size: U32,
    record_count: U32,
    block_count: U32,
    indexes: [U64; MAX_ENTRY_BLOCKS],
    records: [[u8; RECORD_LEN]; MAX_ENTRY_RECORDS],
    reserved: [u8; HEADER_LEN - 40 - 8 * MAX_ENTRY_BLOCKS - RECORD_LEN * MAX_ENTRY_RECORDS],
}

/// The changes of one sync.
#[derive(Clone, Debug, PartialEq, Eq)]
struct JournalEntry {
    /// The log's records, in order.
    records: Vec<LogRecord>,
    /// The contents of blocks, each `block_size` bytes.
    blocks: Vec<(BlockIndex, Vec<u8>)>,
}

/// The combined contents of the good entries of a journal.
#[derive(Debug, Default)]
pub struct JournalContents {
    /// The records that follow those in the log.
    pub records: Vec<LogRecord>,
    /// The newest contents of each block.
    pub blocks: BTreeMap<BlockIndex, Vec<u8>>,
    /// The sequence after the last record.
    pub end: u64,
}

/// Reads the entries that follow `generation`, a sequence in the log of the layer `uuid`.
///
/// # Errors
/// The host's errno.
pub fn read(
    file: &dyn Storage,
    uuid: &Uuid,
    block_size: u32,
    generation: u64,
) -> io::Result<JournalContents> {
    let mut found = JournalContents { end: generation + 1, ..JournalContents::default() };
    let mut number = 0;
    let mut at = 0;
    loop {
        let next = Place { generation, number, first: found.end };
        let Some((entry, len)) = read_entry(file, uuid, block_size, next, at)? else { break };
        found.end += entry.records.len() as u64;
        found.records.extend(entry.records);
        found.blocks.extend(entry.blocks);
        number += 1;
        at += len;
    }
    Ok(found)
}

/// What places an entry after those before it.
#[derive(Clone, Copy)]
struct Place {
    generation: u64,
    number: u32,
    /// The sequence of its first record.
    first: u64,
}

fn read_entry(
    file: &dyn Storage,
    uuid: &Uuid,
    block_size: u32,
    next: Place,
    at: u64,
) -> io::Result<Option<(JournalEntry, u64)>> {
    if at + HEADER_LEN as u64 > JOURNAL_LEN {
        return Ok(None);
    }
    let mut head = [0; HEADER_LEN];
    file.read_at(&mut head, at, Wait::Yes)?;
    let Ok(header) = EntryHeader::read_from_bytes(&head) else { return Ok(None) };
    let (records, blocks) = (header.record_count.get() as usize, header.block_count.get() as usize);
    let fits = records <= MAX_ENTRY_RECORDS && blocks <= MAX_ENTRY_BLOCKS;
    let is_next = header.generation == next.generation
        && header.number == next.number
        && header.first == next.first;
    if header.magic != MAGIC || header.block_size != block_size || !fits || !is_next {
        return Ok(None);
    }
    let len = blocks as u64 * u64::from(block_size);
    if len > MAX_ENTRY_BYTES || at + HEADER_LEN as u64 + len > JOURNAL_LEN {
        return Ok(None);
    }
    let mut bytes = vec![0; blocks * block_size as usize];
    file.read_at(&mut bytes, at + HEADER_LEN as u64, Wait::Yes)?;
    if header.checksum != checksum(uuid, &head[4..], &bytes) {
        return Ok(None);
    }
    let mut decoded = Vec::new();
    for (sequence, record) in (next.first..).zip(&header.records[..records]) {
        match LogRecord::decode(record, uuid) {
            DecodedRecord::Good(found, record) if found == sequence => decoded.push(record),
            _ => return Ok(None),
        }
    }
    let indexes = header.indexes[..blocks].iter().map(|index| BlockIndex(index.get()));
    let pieces = bytes.chunks(block_size as usize).map(<[u8]>::to_vec);
    let entry = JournalEntry { records: decoded, blocks: indexes.zip(pieces).collect() };
    Ok(Some((entry, HEADER_LEN as u64 + len)))
}

fn checksum(uuid: &Uuid, head: &[u8], blocks: &[u8]) -> u32 {
    let seed = checksum::crc32c(uuid.as_bytes());
    checksum::crc32c_append(checksum::crc32c_append(seed, head), blocks)
}

/// Frees the space of a journal whose entries belong to an older log. Best effort, because nothing
/// in that journal counts any more.
pub fn clear(log_dir: &dyn LogDir) {
    if let Ok(Some(file)) = log_dir.journal(Create::Never) {
        let _ = file.truncate(0);
    }
}

/// The journal of a layer that is open for writing.
#[derive(Default)]
pub(super) struct Journal {
    state: Mutex<JournalState>,
}

#[derive(Default)]
struct JournalState {
    file: Option<Arc<dyn Storage>>,
    /// The number of syncs that could have been an entry.
    eligible_syncs: u32,
    /// Whether writing has failed; no entries are written any more.
    is_broken: bool,
    /// The number of entries of this generation.
    entry_count: u32,
    /// The offset in bytes of the next entry.
    end: u64,
    /// The sequence after the last record in an entry.
    next_sequence: u64,
}

/// The contents of an entry to be written.
pub(super) struct NewEntry<'a> {
    pub(super) uuid: &'a Uuid,
    pub(super) block_size: u32,
    /// The newest sequence that a whole sync has made durable.
    pub(super) generation: u64,
    /// The records from [`Journal::next_sequence`] on, encoded as in the log.
    pub(super) records: &'a [[u8; RECORD_LEN]],
    pub(super) blocks: &'a [BlockIndex],
    /// The blocks' contents, one after the other.
    pub(super) bytes: &'a [u8],
}

impl Journal {
    /// Returns whether there are entries, which a whole sync must make void.
    pub(super) fn has_entries(&self) -> bool {
        self.state.lock().entry_count > 0
    }

    /// Returns what [`has_entries`](Self::has_entries) does, or `false` while a sync has the journal,
    /// which may take as long as the device.
    pub(super) fn has_idle_entries(&self) -> bool {
        self.state.try_lock().is_some_and(|state| state.entry_count > 0)
    }

    /// Returns the first sequence that is neither in an entry nor covered by `durable` in the log.
    pub(super) fn next_sequence(&self, durable: u64) -> u64 {
        let state = self.state.lock();
        if state.entry_count > 0 { state.next_sequence } else { durable + 1 }
    }

    /// Returns whether an entry with this number of records and blocks could be written. The first
    /// eligible syncs are declined.
    pub(super) fn accept(&self, records: u64, blocks: usize, block_size: u64) -> bool {
        let mut state = self.state.lock();
        let bytes = blocks as u64 * block_size;
        let fits = records <= MAX_ENTRY_RECORDS as u64
            && blocks <= MAX_ENTRY_BLOCKS
            && bytes <= MAX_ENTRY_BYTES;
        if !fits || state.is_broken || state.end + HEADER_LEN as u64 + bytes > JOURNAL_LEN {
            return false;
        }
        state.eligible_syncs = state.eligible_syncs.saturating_add(1);
        state.eligible_syncs > SYNCS_BEFORE_JOURNAL
    }

    /// Writes an entry durably. Returns `false` when that is impossible and a whole sync is needed.
    pub(super) fn write(&self, log_dir: &dyn LogDir, entry: &NewEntry<'_>) -> bool {
        let mut state = self.state.lock();
        let done = state.write(log_dir, entry);
        if let Err(error) = &done {
            log::warn!("syncs are slower from now on, the journal cannot be written: {error}");
            state.is_broken = true;
        }
        done.is_ok()
    }

    /// Makes the entries void, because a whole sync has finished.
    pub(super) fn void_entries(&self) {
        let mut state = self.state.lock();
        (state.entry_count, state.end) = (0, 0);
    }

    /// Frees the journal's space when the layer is closed. Best effort, because nothing in the
    /// journal counts any more.
    pub(super) fn finish(&self) {
        if let Some(file) = self.state.lock().file.take() {
            let _ = file.truncate(0);
        }
    }
}

impl JournalState {
    fn write(&mut self, log_dir: &dyn LogDir, entry: &NewEntry<'_>) -> io::Result<()> {
        let file = self.file(log_dir)?;
        let (number, next) = match self.entry_count {
            0 => (0, entry.generation + 1),
            number => (number, self.next_sequence),
        };
        let mut header = EntryHeader::new(entry, number, next);
        header.checksum = checksum(entry.uuid, &header.as_bytes()[4..], entry.bytes).into();
        file.write_at(&[IoSlice::new(header.as_bytes()), IoSlice::new(entry.bytes)], self.end)?;
        file.sync()?;
        self.entry_count = number + 1;
        self.end += (HEADER_LEN + entry.bytes.len()) as u64;
        self.next_sequence = next + entry.records.len() as u64;
        Ok(())
    }

    /// Returns the file, with all of its space written once: only then does an entry cost the host
    /// no more than writing the entry's bytes.
    fn file(&mut self, log_dir: &dyn LogDir) -> io::Result<Arc<dyn Storage>> {
        if let Some(file) = &self.file {
            return Ok(Arc::clone(file));
        }
        let file = log_dir.journal(Create::IfMissing)?;
        let file = file.ok_or_else(|| crate::host::os_error(libc::ENOENT))?;
        let zeros = vec![0; 64 << 10];
        for at in (0..JOURNAL_LEN).step_by(zeros.len()) {
            file.write_at(&[IoSlice::new(&zeros)], at)?;
        }
        file.sync()?;
        self.file = Some(Arc::clone(&file));
        Ok(file)
    }
}

impl EntryHeader {
    fn new(entry: &NewEntry<'_>, number: u32, first: u64) -> Self {
        let mut header = Self::new_zeroed();
        header.magic = MAGIC;
        header.generation = entry.generation.into();
        header.first = first.into();
        header.number = number.into();
        header.block_size = entry.block_size.into();
        header.record_count = u32::try_from(entry.records.len()).unwrap_or(u32::MAX).into();
        header.block_count = u32::try_from(entry.blocks.len()).unwrap_or(u32::MAX).into();
        for (slot, index) in header.indexes.iter_mut().zip(entry.blocks) {
            *slot = index.0.into();
        }
        for (slot, record) in header.records.iter_mut().zip(entry.records) {
            *slot = *record;
        }
        header
    }

    fn new_zeroed() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

/// The blocks written since the last sync began, as long as they are few.
#[derive(Default)]
pub(super) struct DirtyBlocks {
    /// Whether there were too many blocks to list.
    has_overflowed: AtomicBool,
    blocks: Mutex<Vec<BlockIndex>>,
}

impl DirtyBlocks {
    /// Adds written blocks, before a record says so: a sync that finds the record also finds the
    /// blocks.
    pub(super) fn add(&self, blocks: &std::ops::Range<BlockIndex>) {
        if self.has_overflowed.load(Ordering::SeqCst) {
            // The sync that takes the overflow mark writes all data written before it began.
            return;
        }
        let mut list = self.blocks.lock();
        if blocks.end.0 - blocks.start.0 > MAX_ENTRY_BLOCKS as u64 {
            self.has_overflowed.store(true, Ordering::SeqCst);
            return;
        }
        for block in (blocks.start.0..blocks.end.0).map(BlockIndex) {
            if list.contains(&block) {
                continue;
            }
            if list.len() == MAX_ENTRY_BLOCKS {
                self.has_overflowed.store(true, Ordering::SeqCst);
                return;
            }
            list.push(block);
        }
    }

    /// Takes all blocks added so far; `None` when there were too many.
    pub(super) fn take(&self) -> Option<Vec<BlockIndex>> {
        let mut list = self.blocks.lock();
        let taken = std::mem::take(&mut *list);
        (!self.has_overflowed.swap(false, Ordering::SeqCst)).then_some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::super::host_file::HostFile;
    use super::super::record_log::ReplacedLog;
    use super::super::state::BlockState;
    use super::*;

    const BLOCK: u32 = 512;
    const ID: Uuid = Uuid::from_u128(5);

    /// A directory with a journal, which is a file without a name.
    struct JournalDir(Arc<HostFile>);

    impl LogDir for JournalDir {
        fn replace_log(
            &self,
            _: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
        ) -> io::Result<ReplacedLog> {
            Err(crate::host::os_error(libc::ENOSYS))
        }

        fn journal(&self, _: Create) -> io::Result<Option<Arc<dyn Storage>>> {
            Ok(Some(Arc::clone(&self.0) as Arc<dyn Storage>))
        }
    }

    fn journal_dir() -> JournalDir {
        JournalDir(Arc::new(HostFile::single(tempfile::tempfile().unwrap())))
    }

    /// Writes an entry that makes `block` Data, filled with `fill`.
    fn add(journal: &Journal, log_dir: &JournalDir, generation: u64, block: u64, fill: u8) {
        let range = BlockIndex(block)..BlockIndex(block + 1);
        let record = LogRecord::Set { range, state: BlockState::Data };
        let records = [record.encode(&ID, journal.next_sequence(generation))];
        let (blocks, bytes) = ([BlockIndex(block)], [fill; BLOCK as usize]);
        let entry = NewEntry {
            uuid: &ID,
            block_size: BLOCK,
            generation,
            records: &records,
            blocks: &blocks,
            bytes: &bytes,
        };
        assert!(journal.write(log_dir, &entry));
    }

    fn found(log_dir: &JournalDir, generation: u64) -> Vec<(u64, u8)> {
        let found = read(&*log_dir.0, &ID, BLOCK, generation).unwrap();
        assert_eq!(found.end, generation + 1 + found.records.len() as u64);
        found.blocks.into_iter().map(|(block, bytes)| (block.0, bytes[0])).collect()
    }

    #[test]
    fn the_newest_entry_of_the_logs_generation_decides_a_blocks_bytes() {
        let (journal, log_dir) = (Journal::default(), journal_dir());
        add(&journal, &log_dir, 7, 3, 1);
        add(&journal, &log_dir, 7, 4, 2);
        add(&journal, &log_dir, 7, 3, 9);
        assert_eq!(found(&log_dir, 7), [(3, 9), (4, 2)]);
        assert_eq!(found(&log_dir, 6), []);
        assert_eq!(found(&log_dir, 8), []);
        // The second and third entries are of an older generation now.
        journal.void_entries();
        add(&journal, &log_dir, 20, 5, 6);
        assert_eq!(found(&log_dir, 20), [(5, 6)]);
        assert_eq!(found(&log_dir, 7), []);
        journal.finish();
        assert_eq!(found(&log_dir, 20), []);
    }

    #[test]
    fn an_entry_with_a_changed_byte_invalidates_itself_and_all_later_entries() {
        let (journal, log_dir) = (Journal::default(), journal_dir());
        (0..3).for_each(|block| add(&journal, &log_dir, 1, block, 5));
        let len = (HEADER_LEN + BLOCK as usize) as u64;
        for at in len..2 * len {
            let mut byte = [0];
            log_dir.0.read_at(&mut byte, at, Wait::Yes).unwrap();
            log_dir.0.write_at(&[IoSlice::new(&[byte[0] ^ 4])], at).unwrap();
            assert_eq!(found(&log_dir, 1), [(0, 5)], "byte {at}");
            log_dir.0.write_at(&[IoSlice::new(&byte)], at).unwrap();
        }
        assert_eq!(found(&log_dir, 1).len(), 3);
    }

    #[test]
    fn an_entry_whose_first_record_is_not_the_next_does_not_count() {
        let record = LogRecord::Done.encode(&ID, u64::MAX);
        for (first, counts) in [(8, true), (7, false), (9, false), (u64::MAX, false)] {
            let log_dir = journal_dir();
            let entry = NewEntry {
                uuid: &ID,
                block_size: BLOCK,
                generation: 7,
                records: if counts { &[] } else { &[record] },
                blocks: &[],
                bytes: &[],
            };
            let mut header = EntryHeader::new(&entry, 0, first);
            header.checksum = checksum(&ID, &header.as_bytes()[4..], &[]).into();
            log_dir.0.write_at(&[IoSlice::new(header.as_bytes())], 0).unwrap();
            let next = Place { generation: 7, number: 0, first: 8 };
            let entry = read_entry(&*log_dir.0, &ID, BLOCK, next, 0).unwrap();
            assert_eq!(entry.is_some(), counts, "{first}");
            assert_eq!(found(&log_dir, 7), []);
        }
    }

    #[test]
    fn large_syncs_and_the_first_small_syncs_do_not_use_the_journal() {
        let journal = Journal::default();
        for _ in 0..SYNCS_BEFORE_JOURNAL {
            assert!(!journal.accept(1, 1, 4096));
        }
        assert!(journal.accept(1, 1, 4096));
        assert!(!journal.accept(MAX_ENTRY_RECORDS as u64 + 1, 1, 4096));
        assert!(!journal.accept(1, MAX_ENTRY_BLOCKS + 1, 512));
        assert!(!journal.accept(1, 2, MAX_ENTRY_BYTES));
        journal.state.lock().end = JOURNAL_LEN - 4096;
        assert!(!journal.accept(1, 1, 4096), "it does not fit any more");
    }

    #[test]
    fn dirty_blocks_are_listed_only_while_they_are_few() {
        let fresh = DirtyBlocks::default();
        let note = |from, to| fresh.add(&(BlockIndex(from)..BlockIndex(to)));
        note(3, 5);
        note(4, 6);
        assert_eq!(fresh.take().unwrap(), [3, 4, 5].map(BlockIndex));
        assert_eq!(fresh.take().unwrap(), []);
        note(0, 1 << 40);
        note(1, 2);
        assert!(fresh.take().is_none());
        (0..9).for_each(|block| note(block, block + 1));
        assert!(fresh.take().is_none());
        assert_eq!(fresh.take().unwrap(), []);
    }
}
