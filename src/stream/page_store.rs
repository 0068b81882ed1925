//! The data of an output stream that has not been sent, or is kept for reading back: in pages of
//! memory up to a limit, and beyond it in an unlinked file.
//!
//! Only the window knows which bytes of a page are valid
//! ([`WrittenRuns`](super::runs::WrittenRuns)). A page is either in memory or in the file, and
//! stays there until it is dropped. Pages being sent are shared with the sink, not copied: a write
//! into such a page makes a copy of it first.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::spill::{self, SpillFile};
use crate::config::SpillCompression;
use crate::host::os_error;

/// Bytes in a page: the smallest unit that file systems write.
pub const PAGE_SIZE: u64 = PAGE_LEN as u64;
/// The page size as a `usize`, to index memory.
pub const PAGE_LEN: usize = 4096;
/// Pages in one entry of [`SpilledPages`]: 16 MiB of disk.
const GROUP_PAGES: u64 = GROUP_LEN as u64;
const GROUP_LEN: usize = 4096;

/// A page of memory.
pub type Page = [u8; PAGE_LEN];

/// Bytes on their way to the sink.
#[derive(Clone, Debug)]
pub enum PageBytes {
    /// A range of a page in memory.
    Memory(Arc<Page>, Range<usize>),
    /// Bytes read from the file.
    Spilled(Vec<u8>),
}

impl PageBytes {
    /// Returns the bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Memory(page, range) => &page[range.clone()],
            Self::Spilled(bytes) => bytes,
        }
    }
}

/// The set of pages that are in the file: one bit a page, for groups that contain any.
#[derive(Default)]
struct SpilledPages(BTreeMap<u64, Box<[u64; GROUP_LEN / 64]>>);

impl SpilledPages {
    fn bit_of(page: u64) -> (u64, usize, u64) {
        let within = page % GROUP_PAGES;
        (page / GROUP_PAGES, usize::try_from(within / 64).unwrap_or(0), 1 << (within % 64))
    }

    fn contains(&self, page: u64) -> bool {
        let (group, word, bit) = Self::bit_of(page);
        self.0.get(&group).is_some_and(|words| words[word] & bit != 0)
    }

    fn insert(&mut self, page: u64) {
        let (group, word, bit) = Self::bit_of(page);
        self.0.entry(group).or_insert_with(|| Box::new([0; GROUP_LEN / 64]))[word] |= bit;
    }

    /// Removes the pages of `range`.
    fn remove_range(&mut self, range: Range<u64>) {
        let groups: Vec<u64> = self
            .0
            .range(range.start / GROUP_PAGES..range.end.div_ceil(GROUP_PAGES))
            .map(|(at, _)| *at)
            .collect();
        for group in groups {
            let start = range.start.max(group * GROUP_PAGES);
            let end = range.end.min((group + 1) * GROUP_PAGES);
            if end - start < GROUP_PAGES
                && let Some(words) = self.0.get_mut(&group)
            {
                for page in start..end {
                    let (_, word, bit) = Self::bit_of(page);
                    words[word] &= !bit;
                }
                if words.iter().any(|word| *word != 0) {
                    continue;
                }
            }
            self.0.remove(&group);
        }
    }
}

/// The data of a stream.
pub struct PageStore {
    pages: BTreeMap<u64, Arc<Page>>,
    /// Pages for reuse. Left to the allocator, far more memory would be kept, because different
    /// threads write, send and free the pages.
    free_pages: Vec<Arc<Page>>,
    /// The most pages held in memory.
    max_pages: usize,
    spill: Option<SpillFile>,
    spilled: SpilledPages,
    dir: PathBuf,
    compress: SpillCompression,
}

impl PageStore {
    /// Creates an empty store that uses up to `memory` bytes and puts the rest into a file in
    /// `dir`.
    #[must_use]
    pub fn new(memory: u64, dir: PathBuf, compress: SpillCompression) -> Self {
        Self {
            pages: BTreeMap::new(),
            free_pages: Vec::new(),
            max_pages: usize::try_from(memory / PAGE_SIZE).unwrap_or(usize::MAX),
            spill: None,
            spilled: SpilledPages::default(),
            dir,
            compress,
        }
    }

    /// Returns the bytes of memory in use.
    #[must_use]
    pub fn memory(&self) -> u64 {
        self.pages.len() as u64 * PAGE_SIZE
    }

    /// Stores `buf` at `offset`.
    ///
    /// # Errors
    /// The host's errno, as `ENOSPC` if neither memory nor the file has room. A part of `buf` may
    /// be stored then.
    pub fn write(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let (page, skip) = split_offset(at);
            let (piece, more) = rest.split_at((PAGE_LEN - skip).min(rest.len()));
            if let Some(there) = self.pages.get_mut(&page) {
                Arc::make_mut(there)[skip..skip + piece.len()].copy_from_slice(piece);
            } else if self.pages.len() < self.max_pages && !self.spilled.contains(page) {
                // Old bytes of a reused page are never seen: only written ranges are read.
                let mut fresh = self.free_pages.pop().unwrap_or_else(|| Arc::new([0; PAGE_LEN]));
                Arc::make_mut(&mut fresh)[skip..skip + piece.len()].copy_from_slice(piece);
                self.pages.insert(page, fresh);
            } else {
                // Consecutive pages go to the file in one write.
                let end = at + rest.len() as u64;
                let mut last = page + 1;
                while last * PAGE_SIZE < end && !self.pages.contains_key(&last) {
                    last += 1;
                }
                let len = usize::try_from((last * PAGE_SIZE).min(end) - at).unwrap_or(rest.len());
                self.write_spilled(at, &rest[..len])?;
                at += len as u64;
                rest = &rest[len..];
                continue;
            }
            at += piece.len() as u64;
            rest = more;
        }
        Ok(())
    }

    fn write_spilled(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let file = match &mut self.spill {
            Some(file) => file,
            none => none.insert(SpillFile::new(&self.dir, self.compress)?),
        };
        let filed = &self.spilled;
        let known = |range: Range<u64>| {
            (range.start / PAGE_SIZE..range.end / PAGE_SIZE).any(|p| filed.contains(p))
        };
        file.write(buf, offset, known)?;
        for page in offset / PAGE_SIZE..(offset + buf.len() as u64).div_ceil(PAGE_SIZE) {
            self.spilled.insert(page);
        }
        Ok(())
    }

    /// Fills `buf` with the bytes at `offset`, all of which must have been stored.
    ///
    /// # Errors
    /// The host's errno from the file.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        for part in self.parts(offset..offset + buf.len() as u64)? {
            let bytes = part.bytes();
            buf[done..done + bytes.len()].copy_from_slice(bytes);
            done += bytes.len();
        }
        Ok(())
    }

    /// Returns the bytes of `range` in order; all of them must have been stored.
    ///
    /// # Errors
    /// The host's errno from the file.
    pub fn parts(&mut self, range: Range<u64>) -> io::Result<Vec<PageBytes>> {
        let mut parts = Vec::with_capacity(
            usize::try_from(range.end / PAGE_SIZE - range.start / PAGE_SIZE).unwrap_or(0) + 1,
        );
        let mut at = range.start;
        while at < range.end {
            let (page, skip) = split_offset(at);
            if let Some(there) = self.pages.get(&page) {
                let end = ((page + 1) * PAGE_SIZE).min(range.end);
                let stop = skip + usize::try_from(end - at).unwrap_or(0);
                parts.push(PageBytes::Memory(Arc::clone(there), skip..stop));
                at = end;
                continue;
            }
            let mut last = page + 1;
            while last * PAGE_SIZE < range.end && !self.pages.contains_key(&last) {
                last += 1;
            }
            let end = (last * PAGE_SIZE).min(range.end);
            let mut bytes = vec![0; usize::try_from(end - at).map_err(|_| os_error(libc::EIO))?];
            self.spill.as_mut().ok_or_else(|| os_error(libc::EIO))?.read(&mut bytes, at)?;
            parts.push(PageBytes::Spilled(bytes));
            at = end;
        }
        Ok(parts)
    }

    /// Drops everything before `offset`, except the page that contains it. `from` is the offset up
    /// to which earlier calls have dropped.
    pub fn drop_before(&mut self, from: u64, offset: u64) {
        // Begin at a whole unit of the file: the bytes before `from` in it are no longer needed
        // either.
        self.drop_pages(from / spill::UNIT_SIZE * spill::UNIT_SIZE / PAGE_SIZE..offset / PAGE_SIZE);
    }

    /// Drops the pages that are entirely inside `range`.
    pub fn drop_within(&mut self, range: Range<u64>) {
        self.drop_pages(range.start.div_ceil(PAGE_SIZE)..range.end / PAGE_SIZE);
    }

    fn drop_pages(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let gone: Vec<u64> = self.pages.range(pages.clone()).map(|(page, _)| *page).collect();
        for page in gone {
            // A page still being sent is freed when it has been sent.
            let page = self.pages.remove(&page).filter(|page| Arc::strong_count(page) == 1);
            self.free_pages.extend(page);
        }
        if let Some(file) = &mut self.spill
            && !self.spilled.0.is_empty()
        {
            self.spilled.remove_range(pages.clone());
            file.discard(pages.start * PAGE_SIZE..pages.end * PAGE_SIZE);
        }
    }
}

fn split_offset(offset: u64) -> (u64, usize) {
    (offset / PAGE_SIZE, usize::try_from(offset % PAGE_SIZE).unwrap_or(0))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 1 << 20;

    #[derive(Clone, Debug)]
    enum Op {
        Write(usize, usize, u8),
        Drop(usize, usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0..SIZE, 1..100_000usize, 1..255u8).prop_map(|(at, len, value)| {
                Op::Write(at, len.min(SIZE - at), value)
            }),
            1 => (0..SIZE, 1..200_000usize).prop_map(|(at, len)| Op::Drop(at, (at + len).min(SIZE))),
        ]
    }

    fn run(ops: Vec<Op>, memory: u64, compress: SpillCompression) {
        let mut store = PageStore::new(memory, std::env::temp_dir(), compress);
        let mut model = vec![None; SIZE];
        for (number, op) in ops.into_iter().enumerate() {
            match op {
                Op::Write(at, len, value) => {
                    let bytes: Vec<u8> =
                        (0..len).map(|i| value.wrapping_add((i * number / 7) as u8)).collect();
                    store.write(at as u64, &bytes).unwrap();
                    for (slot, byte) in model[at..].iter_mut().zip(bytes) {
                        *slot = Some(byte);
                    }
                }
                Op::Drop(start, end) => {
                    store.drop_within(start as u64..end as u64);
                    let page = PAGE_LEN;
                    let pages = start.div_ceil(page) * page..end / page * page;
                    if !pages.is_empty() {
                        model[pages].fill(None);
                    }
                }
            }
            assert!(store.memory() <= memory.max(PAGE_SIZE));
        }
        let mut at = 0;
        while at < SIZE {
            let run = model[at..].iter().take_while(|byte| byte.is_some()).count();
            let mut bytes = vec![0; run];
            store.read(at as u64, &mut bytes).unwrap();
            assert!(bytes.iter().zip(&model[at..]).all(|(byte, slot)| Some(*byte) == *slot));
            at += run.max(1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn written_bytes_are_read_back_from_memory_and_file(
            ops in prop::collection::vec(op(), 1..40),
            memory in 0..64u64,
        ) {
            run(ops, memory * PAGE_SIZE, SpillCompression::Off);
        }

        #[test]
        fn written_bytes_are_read_back_from_a_compressed_file(
            ops in prop::collection::vec(op(), 1..40),
            memory in 0..64u64,
        ) {
            run(ops, memory * PAGE_SIZE, SpillCompression::Lz4);
        }
    }

    #[test]
    fn a_write_does_not_change_bytes_being_sent() {
        let mut store = PageStore::new(1 << 20, std::env::temp_dir(), SpillCompression::Off);
        store.write(0, &[1; 4096]).unwrap();
        let parts = store.parts(0..100).unwrap();
        store.write(100, &[2; 100]).unwrap();
        assert_eq!(parts[0].bytes(), [1; 100]);
        let mut bytes = [0; 200];
        store.read(0, &mut bytes).unwrap();
        assert_eq!((bytes[99], bytes[100]), (1, 2));
    }

    #[test]
    fn a_compressed_file_takes_less_space() {
        let mut store = PageStore::new(0, "/var/tmp".into(), SpillCompression::Lz4);
        for at in 0..256u64 {
            store.write(at << 16, &[7; 1 << 16]).unwrap();
        }
        let file = store.spill.as_ref().unwrap();
        assert!(file.allocated() < 4 << 20, "{}", file.allocated());
        let mut bytes = vec![0; 1 << 16];
        store.read(17 << 16, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 7));
        store.drop_before(0, 200 << 16);
        assert!(store.spill.as_ref().unwrap().allocated() < 1 << 20);
    }

    #[test]
    fn data_beyond_16_tib_is_stored_in_files_that_any_host_can_have() {
        for compress in [SpillCompression::Off, SpillCompression::Lz4] {
            let mut store = PageStore::new(0, "/var/tmp".into(), compress);
            // Also across the borders of segments.
            let places = [(8 << 40) - 6000, (16 << 40) - 6000, 17 << 40, 3 << 50];
            for (number, at) in places.into_iter().enumerate() {
                store.write(at, &[number as u8 + 1; 20_000]).unwrap();
            }
            for (number, at) in places.into_iter().enumerate() {
                let mut bytes = [0; 20_000];
                store.read(at, &mut bytes).unwrap();
                assert!(bytes.iter().all(|byte| *byte == number as u8 + 1), "{at}");
            }
        }
    }
}
