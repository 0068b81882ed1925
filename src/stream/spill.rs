//! The unlinked file for data that does not fit into memory, in segments. Every byte is at its own
//! offset of the disk, so no index is needed, and holes of the disk are holes of the file.
//!
//! A compressed file consists of units of 64 KiB of disk, each in its own cell, preceded by its
//! length. The most recently used units stay open, so that small writes do not compress a unit
//! again and again.
//!
//! ```text
//!   cell 0                          cell 1, CELL_SIZE bytes later
//!   |len|lz4 ...|      hole         |len|lz4 ............|  hole
//! ```

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;

use super::segments::SegmentedFile;
use crate::config::SpillCompression;
use crate::host::os_error;

/// Bytes of disk in a compressed unit.
pub(super) const UNIT_SIZE: u64 = UNIT_LEN as u64;
const UNIT_LEN: usize = 64 << 10;
/// Bytes of file reserved for a unit: an uncompressed unit and its length, in whole host blocks.
const CELL_SIZE: u64 = UNIT_SIZE + 4096;
/// Bytes of the length in front of each unit.
const HEADER_LEN: usize = 4;
/// The most open units: 512 KiB of memory.
const MAX_OPEN_UNITS: usize = 8;

/// An open unit of the disk.
struct SpillUnit {
    bytes: Vec<u8>,
    is_dirty: bool,
    /// The value of the clock at the last use.
    last_used: u64,
}

/// The file and its open units.
pub(super) struct SpillFile {
    file: SegmentedFile,
    compress: SpillCompression,
    open_units: BTreeMap<u64, SpillUnit>,
    clock: u64,
}

impl SpillFile {
    /// Creates an unnamed file in `dir`.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn new(dir: &Path, compress: SpillCompression) -> io::Result<Self> {
        let file = SegmentedFile::create(dir)?;
        Ok(Self { file, compress, open_units: BTreeMap::new(), clock: 0 })
    }

    /// Stores `buf` at `offset` of the disk. `known` returns whether anything is stored in the
    /// given range.
    ///
    /// # Errors
    /// `ENOSPC`, or another errno of the host; a part of `buf` may be stored then.
    pub(super) fn write(
        &mut self,
        buf: &[u8],
        offset: u64,
        known: impl Fn(Range<u64>) -> bool,
    ) -> io::Result<()> {
        if self.compress == SpillCompression::Off {
            return self.file.write_all_at(&[IoSlice::new(buf)], offset);
        }
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let skip = usize::try_from(at % UNIT_SIZE).unwrap_or(0);
            let (piece, more) = rest.split_at((UNIT_LEN - skip).min(rest.len()));
            let number = at / UNIT_SIZE;
            let is_stored = known(number * UNIT_SIZE..(number + 1) * UNIT_SIZE);
            let unit = self.open_unit(number, is_stored)?;
            unit.bytes[skip..skip + piece.len()].copy_from_slice(piece);
            unit.is_dirty = true;
            at += piece.len() as u64;
            rest = more;
        }
        Ok(())
    }

    /// Reads bytes stored at `offset` of the disk.
    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.compress == SpillCompression::Off {
            return read_exact(&self.file, buf, offset);
        }
        let mut at = offset;
        let mut done = 0;
        while done < buf.len() {
            let skip = usize::try_from(at % UNIT_SIZE).unwrap_or(0);
            let len = (UNIT_LEN - skip).min(buf.len() - done);
            let piece = &mut buf[done..done + len];
            match self.open_unit(at / UNIT_SIZE, true) {
                Ok(unit) => piece.copy_from_slice(&unit.bytes[skip..skip + len]),
                // A full host has no room to write back the unit that would have to be closed
                // first. Stored data must be readable even then, so that it can be sent and room
                // becomes free.
                Err(_) => piece.copy_from_slice(&self.load_unit(at / UNIT_SIZE)?[skip..skip + len]),
            }
            at += len as u64;
            done += len;
        }
        Ok(())
    }

    /// Frees the space of `range`, none of which is needed any more.
    pub(super) fn discard(&mut self, range: Range<u64>) {
        let range = match self.compress {
            SpillCompression::Off => range,
            SpillCompression::Lz4 => {
                let units = range.start.div_ceil(UNIT_SIZE)..range.end / UNIT_SIZE;
                if units.is_empty() {
                    return;
                }
                self.open_units.retain(|number, _| !units.contains(number));
                units.start * CELL_SIZE..units.end * CELL_SIZE
            }
        };
        self.file.discard(range);
    }

    /// Returns the open unit `number`, opening it if necessary.
    fn open_unit(&mut self, number: u64, is_stored: bool) -> io::Result<&mut SpillUnit> {
        self.clock += 1;
        if !self.open_units.contains_key(&number) {
            if self.open_units.len() >= MAX_OPEN_UNITS {
                self.evict_oldest()?;
            }
            let bytes = if is_stored { self.load_unit(number)? } else { vec![0; UNIT_LEN] };
            self.open_units.insert(number, SpillUnit { bytes, is_dirty: false, last_used: 0 });
        }
        let unit = self.open_units.get_mut(&number).ok_or_else(|| os_error(libc::EIO))?;
        unit.last_used = self.clock;
        Ok(unit)
    }

    fn load_unit(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut header = [0; HEADER_LEN];
        read_exact(&self.file, &mut header, number * CELL_SIZE)?;
        let len = u32::from_le_bytes(header) as usize;
        if len == 0 || len > UNIT_LEN {
            return Err(os_error(libc::EIO));
        }
        let mut stored = vec![0; len];
        read_exact(&self.file, &mut stored, number * CELL_SIZE + HEADER_LEN as u64)?;
        if len == UNIT_LEN {
            return Ok(stored);
        }
        let bytes = lz4_flex::block::decompress(&stored, UNIT_LEN);
        bytes.ok().filter(|bytes| bytes.len() == UNIT_LEN).ok_or_else(|| os_error(libc::EIO))
    }

    fn evict_oldest(&mut self) -> io::Result<()> {
        let oldest = self.open_units.iter().min_by_key(|(_, unit)| unit.last_used);
        let Some((&number, unit)) = oldest else { return Ok(()) };
        if unit.is_dirty {
            let packed = lz4_flex::block::compress(&unit.bytes);
            let stored = if packed.len() < UNIT_LEN { &packed } else { &unit.bytes };
            let len = u32::try_from(stored.len()).map_err(|_| os_error(libc::EIO))?.to_le_bytes();
            let parts = [IoSlice::new(&len), IoSlice::new(stored)];
            self.file.write_all_at(&parts, number * CELL_SIZE)?;
            let end = (HEADER_LEN + stored.len()) as u64;
            // The unit may have been longer before.
            self.file.discard(number * CELL_SIZE + end..(number + 1) * CELL_SIZE);
        }
        self.open_units.remove(&number);
        Ok(())
    }
}

fn read_exact(file: &SegmentedFile, buf: &mut [u8], offset: u64) -> io::Result<()> {
    match file.read_at(buf, offset)? {
        len if len == buf.len() => Ok(()),
        _ => Err(os_error(libc::EIO)),
    }
}

#[cfg(test)]
impl SpillFile {
    /// Returns the bytes allocated on the host.
    pub(super) fn allocated(&self) -> u64 {
        self.file.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_bytes_can_be_read_when_no_unit_can_be_written_back() {
        let mut spill = SpillFile::new(&std::env::temp_dir(), SpillCompression::Lz4).unwrap();
        for number in 0..=MAX_OPEN_UNITS as u64 {
            spill.write(&[7; UNIT_LEN], number * UNIT_SIZE, |_| false).unwrap();
        }
        // From now on the file cannot be written to, as on a full host.
        spill.file.make_read_only();
        assert!(spill.write(&[8; UNIT_LEN], 99 * UNIT_SIZE, |_| false).is_err());
        let mut bytes = vec![0; UNIT_LEN];
        for number in 0..=MAX_OPEN_UNITS as u64 {
            spill.read(&mut bytes, number * UNIT_SIZE).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 7));
        }
    }
}
