//! A cache that outlives its process: the map on disk, and the comparison of what was found there.
//!
//! Nothing is ever synced. A record is appended once its bytes are written, and after a crash the disk
//! may have the one without the other; so bytes that were found at the start are compared with their
//! checksum before their first use. What does not match is dropped and fetched again.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, IoSlice, Seek, Write};
use std::ops::Range;

use parking_lot::Mutex;

use super::Cache;
use super::dir::{ImageDir, MAP_FILE, NEW_MAP_FILE};
use super::record::{GROUP_BLOCKS, HEADER_LEN, ImageId, MapText, RECORD_LEN, Record, Run, follow};
use super::units::{UNIT_BLOCKS, Units, mask_of, runs};
use crate::confined;
use crate::host::{self, os_error};
use crate::layer::Wait;
use crate::remote::BLOCK_SIZE;

/// The fewest records that a map may have, however small the cache is.
const MIN_RECORDS: usize = 1 << 16;
/// The bytes of a cache for which its map may have a record. With smaller pieces on average, the
/// records of the oldest ones are given up.
const BYTES_PER_RECORD: u64 = 8 << 10;
/// Records that a map may have besides twice those that counted when it was written last.
const SPARE_RECORDS: usize = 4096;

/// The part of a cache that is on disk besides its bytes.
pub(super) struct Persistent {
    image: ImageId,
    map: Mutex<MapFile>,
    /// What the map said when it was opened, in ascending order.
    found: Vec<Run>,
    max_records: usize,
    pub(super) dir: ImageDir,
}

struct MapFile {
    file: File,
    /// The number of records in the file.
    records: usize,
    /// The number of records at which the map is written anew.
    limit: usize,
    /// Whether the map was removed for good.
    is_discarded: bool,
}

impl Persistent {
    /// Opens the map in `dir`, or begins a new one and empties `data`. Adds what it says to `units`.
    ///
    /// # Errors
    /// The host's errno; [`io::ErrorKind::InvalidInput`] for something that is no regular file.
    pub(super) fn open(
        dir: ImageDir,
        image: ImageId,
        cap: u64,
        data: &File,
        units: &Units,
    ) -> io::Result<Self> {
        let most = usize::try_from(cap / BYTES_PER_RECORD).unwrap_or(usize::MAX);
        let max_records = most.max(MIN_RECORDS);
        confined::remove_file(dir.files(), NEW_MAP_FILE)?;
        let (file, is_new) = dir.open_or_create(MAP_FILE)?;
        let text = match is_new {
            true => None,
            false => image.read_map(BufReader::new(&file), max_records)?,
        };
        let MapText { records, damaged } = match text {
            Some(text) => text,
            None => {
                data.set_len(0)?;
                file.set_len(0)?;
                host::write_all_at(&file, &[IoSlice::new(&image.header())], 0)?;
                MapText { records: Vec::new(), damaged: 0 }
            }
        };
        let count = records.len() + damaged;
        // A part of a record at the end, and what is past the limit.
        file.set_len((HEADER_LEN + count * RECORD_LEN) as u64)?;
        let mut found = follow(&records);
        drop(records);
        found.sort_unstable_by_key(|(at, _)| *at);
        // In the order in which they were stored, so that the oldest ones are evicted first.
        for (_, run) in &found {
            units.insert(run.unit(), run.mask(), run.mask());
        }
        let mut found: Vec<Run> = found.into_iter().map(|(_, run)| run).collect();
        found.sort_unstable_by_key(|run| run.block);
        found.shrink_to_fit();
        let limit = (2 * found.len() + SPARE_RECORDS).min(max_records);
        let map = Mutex::new(MapFile { file, records: count, limit, is_discarded: false });
        let opened = Self { image, map, found, max_records, dir };
        opened.release_unknown(data)?;
        opened.append(&[], units);
        Ok(opened)
    }

    /// Punches out of `data` what no record describes, which nobody would ever evict.
    fn release_unknown(&self, data: &File) -> io::Result<()> {
        data.set_len(data.metadata()?.len().min(self.image.size))?;
        let mut at = 0;
        let mut known = self.found.iter().map(|run| run.range(self.image.size)).peekable();
        while let Ok(Some(start)) = host::next_data(data, at) {
            while known.next_if(|run| run.end <= start).is_some() {}
            at = match known.peek() {
                Some(run) if run.start <= start => run.end,
                next => {
                    let end = next.map_or(self.image.size, |run| run.start);
                    host::punch_hole(data, start..end.max(start + 1))?;
                    end
                }
            };
            if at >= self.image.size {
                break;
            }
        }
        Ok(())
    }

    /// Notes that `run` (blocks of `unit`) was stored as `bytes`.
    pub(super) fn note_stored(&self, start: u64, bytes: &[u8], units: &Units) {
        let end = start + bytes.len() as u64;
        let (mut at, mut rest) = (start, bytes);
        let mut records = Vec::new();
        while at < end {
            let group = GROUP_BLOCKS * BLOCK_SIZE;
            let next = (at - at % group + group).min(end);
            let (part, after) = rest.split_at(usize::try_from(next - at).unwrap_or(0));
            let blocks = (next - at).div_ceil(BLOCK_SIZE);
            records.push(Record::Stored(Run {
                block: at / BLOCK_SIZE,
                blocks: u16::try_from(blocks).unwrap_or(0),
                crc: self.image.checksum(at, part),
            }));
            (at, rest) = (next, after);
        }
        self.append(&records, units);
    }

    /// Notes that `unit` was punched out.
    pub(super) fn note_evicted(&self, unit: u64, units: &Units) {
        self.append(&[Record::Evicted { unit }], units);
    }

    /// Removes the map, durably: without one nothing that is in the data counts.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn discard(&self) -> io::Result<()> {
        let mut map = self.map.lock();
        map.is_discarded = true;
        confined::remove_file(self.dir.files(), MAP_FILE)?;
        self.dir.files().sync_all()
    }

    /// Appends `records`, in one write. Best effort: what is not noted is fetched again next time.
    fn append(&self, records: &[Record], units: &Units) {
        let mut map = self.map.lock();
        if map.is_discarded {
            return;
        }
        if map.records + records.len() > map.limit {
            self.rewrite(&mut map, units);
        }
        let bytes: Vec<u8> = records.iter().flat_map(|record| self.image.encode(record)).collect();
        let end = (HEADER_LEN + map.records * RECORD_LEN) as u64;
        match host::write_all_at(&map.file, &[IoSlice::new(&bytes)], end) {
            Ok(()) => map.records += records.len(),
            Err(error) => log::debug!("the map of a read cache is behind: {error}"),
        }
    }

    /// Writes the map anew, with the records that still count. Where that fails, an empty one goes on
    /// once the old one is too long.
    fn rewrite(&self, map: &mut MapFile, units: &Units) {
        match self.write_new_map(&map.file, units) {
            Ok((file, records)) => {
                let limit = (2 * records + SPARE_RECORDS).min(self.max_records);
                *map = MapFile { file, records, limit, is_discarded: false };
            }
            Err(error) if map.limit < self.max_records => {
                log::debug!("the map of a read cache is not written anew: {error}");
                map.limit = (2 * map.limit).min(self.max_records);
            }
            Err(error) => {
                log::debug!("the map of a read cache begins anew: {error}");
                if map.file.set_len(HEADER_LEN as u64).is_ok() {
                    map.records = 0;
                }
            }
        }
    }

    fn write_new_map(&self, old: &File, units: &Units) -> io::Result<(File, usize)> {
        (&mut &*old).rewind()?;
        let text = self.image.read_map(BufReader::new(old), self.max_records)?;
        let records = text.ok_or_else(|| os_error(libc::EIO))?.records;
        let mut kept = follow(&records);
        drop(records);
        kept.retain(|(_, run)| run.mask() & !units.present(run.unit()) == 0);
        kept.sort_unstable_by_key(|(at, _)| *at);
        // Half of the room is for what comes.
        let skip = kept.len().saturating_sub(self.max_records / 2);
        let file = confined::recreate_file(self.dir.files(), NEW_MAP_FILE)?;
        let mut out = BufWriter::new(&file);
        out.write_all(&self.image.header())?;
        for (_, run) in &kept[skip..] {
            out.write_all(&self.image.encode(&Record::Stored(*run)))?;
        }
        out.flush()?;
        drop(out);
        rustix::fs::renameat(self.dir.files(), NEW_MAP_FILE, self.dir.files(), MAP_FILE)?;
        Ok((file, kept.len() - skip))
    }

    /// Returns the runs of `unit` that were found when the map was opened.
    fn found_in(&self, unit: u64) -> &[Run] {
        let start = self.found.partition_point(|run| run.block < unit * UNIT_BLOCKS);
        let rest = &self.found[start..];
        &rest[..rest.partition_point(|run| run.unit() == unit)]
    }
}

impl Drop for Persistent {
    fn drop(&mut self) {
        self.dir.touch();
    }
}

thread_local! {
    /// What is compared, one run at a time: at most a unit.
    static VERIFY_BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

impl Cache {
    /// Reads `prefix` of `unit`, which is present in part unverified, and compares it while it is in `buf`,
    /// so that it is read only once. False when it cannot be compared so, or does not match.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the host would have to wait for some of the bytes.
    pub(super) fn read_unverified(
        &self,
        buf: &mut [u8],
        unit: u64,
        prefix: &Range<u64>,
        wait: Wait,
    ) -> io::Result<bool> {
        let Some(persistent) = &self.persistent else { return Ok(false) };
        let Some(_writing) = self.units.try_lock_writes(unit, wait) else {
            return Err(os_error(libc::EAGAIN));
        };
        let blocks = mask_of(prefix);
        if self.units.present(unit) & blocks != blocks {
            return Ok(false);
        }
        let unverified = self.units.unverified(unit) & blocks;
        let is_met = |run: &&Run| run.mask() & unverified != 0;
        let runs = persistent.found_in(unit).iter().filter(is_met);
        let mut covered = 0;
        for run in runs.clone() {
            let range = run.range(self.size);
            if range.start < prefix.start || range.end > prefix.end {
                return Ok(false);
            }
            covered |= run.mask();
        }
        if unverified & !covered != 0 {
            return Ok(false);
        }
        match host::read_at(&self.file, buf, prefix.start, wait) {
            Ok(got) if got == buf.len() => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Err(error),
            _ => return Ok(false),
        }
        let is_right = |run: &Run| {
            let range = run.range(self.size);
            let within = range.start - prefix.start..range.end - prefix.start;
            let (start, end) = (usize::try_from(within.start), usize::try_from(within.end));
            let bytes = start.ok().zip(end.ok()).and_then(|(start, end)| buf.get(start..end));
            bytes.is_some_and(|bytes| persistent.image.checksum(range.start, bytes) == run.crc)
        };
        if !runs.clone().all(is_right) {
            return Ok(false);
        }
        self.units.insert(unit, covered, 0);
        Ok(true)
    }

    /// Compares the `blocks` of `unit` that were found at the start with their checksums. Those that do
    /// not match are not there any more.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the host would have to wait for some of the bytes.
    pub(super) fn verify(&self, unit: u64, blocks: u64, wait: Wait) -> io::Result<()> {
        let Some(persistent) = &self.persistent else { return Ok(()) };
        let Some(_writing) = self.units.try_lock_writes(unit, wait) else {
            return Err(os_error(libc::EAGAIN));
        };
        let unverified = self.units.unverified(unit) & blocks;
        let mut left = unverified;
        // New memory costs as much as the copy.
        let mut bytes = VERIFY_BUFFER.take();
        for run in persistent.found_in(unit).iter().filter(|run| run.mask() & unverified != 0) {
            let range = run.range(self.size);
            bytes.resize(super::byte_len(&range), 0);
            let is_right = match host::read_at(&self.file, &mut bytes, range.start, wait) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    VERIFY_BUFFER.set(bytes);
                    return Err(error);
                }
                Err(_) => false,
                Ok(len) => {
                    len == bytes.len() && persistent.image.checksum(range.start, &bytes) == run.crc
                }
            };
            if is_right {
                self.units.insert(unit, run.mask(), 0);
            } else {
                self.drop_blocks(unit, run.mask());
            }
            left &= !run.mask();
        }
        VERIFY_BUFFER.set(bytes);
        // No record says what these are.
        self.drop_blocks(unit, left);
        Ok(())
    }

    fn drop_blocks(&self, unit: u64, blocks: u64) {
        for run in runs(blocks) {
            let base = unit * UNIT_BLOCKS;
            let at = (base + run.start) * BLOCK_SIZE;
            log::debug!("the read cache does not hold what was fetched at {at}: it is dropped");
        }
        let bytes = u64::from(blocks.count_ones()) * BLOCK_SIZE;
        self.counters.dropped_bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        self.units.remove(unit, blocks);
    }
}
