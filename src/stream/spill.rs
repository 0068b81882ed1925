//! The unlinked file that holds what does not fit into memory: every byte at its own offset, so
//! that nothing has to be found and a disk's holes are the file's.
//!
//! Compressed, the file is made of units of 64 KiB of disk, each in a slot of its own with a
//! length before it. The units that were touched last stay open, so that a unit is not compressed
//! again at each small write.
//!
//! ```text
//!   slot 0                          slot 1 = SLOT bytes on
//!   |len|lz4 ...|      hole         |len|lz4 ............|  hole
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;

use crate::host::{self, errno};
use crate::layer::Wait;
use crate::spec::Compress;

/// Bytes of disk in a compressed unit.
pub(super) const UNIT: u64 = UNIT_LEN as u64;
const UNIT_LEN: usize = 64 << 10;
/// Bytes of file a unit may take: the unit as it is, and its length, to whole host blocks.
const SLOT: u64 = UNIT + 4096;
/// Before each unit stands its length.
const HEADER: usize = 4;
/// Units that are open: half a MiB.
const OPEN: usize = 8;

/// A unit of the disk that is being written to.
struct Unit {
    bytes: Vec<u8>,
    changed: bool,
    /// When it was last touched.
    touched: u64,
}

/// The file, and the units that are open.
pub(super) struct Spill {
    file: File,
    compress: Compress,
    open: BTreeMap<u64, Unit>,
    clock: u64,
}

impl Spill {
    /// A file in `dir` that nobody else can find.
    pub(super) fn new(dir: &Path, compress: Compress) -> io::Result<Self> {
        let file = tempfile::tempfile_in(dir)?;
        Ok(Self { file, compress, open: BTreeMap::new(), clock: 0 })
    }

    /// Stores `buf` at `offset` of the disk; `known` says whether anything of the unit at an
    /// offset is stored already.
    ///
    /// # Errors
    /// `ENOSPC` and the host's other errnos; some of it may be stored then.
    pub(super) fn write(
        &mut self,
        buf: &[u8],
        offset: u64,
        known: impl Fn(Range<u64>) -> bool,
    ) -> io::Result<()> {
        if self.compress == Compress::Off {
            return host::write_all_at(&self.file, &[IoSlice::new(buf)], offset);
        }
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let skip = usize::try_from(at % UNIT).unwrap_or(0);
            let (piece, more) = rest.split_at((UNIT_LEN - skip).min(rest.len()));
            let number = at / UNIT;
            let is_stored = known(number * UNIT..(number + 1) * UNIT);
            let unit = self.unit(number, is_stored)?;
            unit.bytes[skip..skip + piece.len()].copy_from_slice(piece);
            unit.changed = true;
            at += piece.len() as u64;
            rest = more;
        }
        Ok(())
    }

    /// Reads what was stored at `offset` of the disk.
    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.compress == Compress::Off {
            return read_exact(&self.file, buf, offset);
        }
        let mut at = offset;
        let mut done = 0;
        while done < buf.len() {
            let skip = usize::try_from(at % UNIT).unwrap_or(0);
            let len = (UNIT_LEN - skip).min(buf.len() - done);
            let piece = &mut buf[done..done + len];
            match self.unit(at / UNIT, true) {
                Ok(unit) => piece.copy_from_slice(&unit.bytes[skip..skip + len]),
                // A full host has no room for the unit that would have to be closed for it; what
                // is stored can be read, and has to be, for room to come back.
                Err(_) => piece.copy_from_slice(&self.load(at / UNIT)?[skip..skip + len]),
            }
            at += len as u64;
            done += len;
        }
        Ok(())
    }

    /// Gives back the room of `range`, of which nothing is needed any more.
    pub(super) fn discard(&mut self, range: Range<u64>) {
        let range = match self.compress {
            Compress::Off => range,
            Compress::Lz4 => {
                let units = range.start.div_ceil(UNIT)..range.end / UNIT;
                if units.is_empty() {
                    return;
                }
                self.open.retain(|number, _| !units.contains(number));
                units.start * SLOT..units.end * SLOT
            }
        };
        // Room that is not given back is only room; the file goes with the stream.
        let _ = host::punch(&self.file, range);
    }

    /// The open unit `number`.
    fn unit(&mut self, number: u64, is_stored: bool) -> io::Result<&mut Unit> {
        self.clock += 1;
        if !self.open.contains_key(&number) {
            if self.open.len() >= OPEN {
                self.close_oldest()?;
            }
            let bytes = if is_stored { self.load(number)? } else { vec![0; UNIT_LEN] };
            self.open.insert(number, Unit { bytes, changed: false, touched: 0 });
        }
        let unit = self.open.get_mut(&number).ok_or_else(|| errno(libc::EIO))?;
        unit.touched = self.clock;
        Ok(unit)
    }

    fn load(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut header = [0; HEADER];
        read_exact(&self.file, &mut header, number * SLOT)?;
        let len = u32::from_le_bytes(header) as usize;
        if len == 0 || len > UNIT_LEN {
            return Err(errno(libc::EIO));
        }
        let mut stored = vec![0; len];
        read_exact(&self.file, &mut stored, number * SLOT + HEADER as u64)?;
        if len == UNIT_LEN {
            return Ok(stored);
        }
        let bytes = lz4_flex::block::decompress(&stored, UNIT_LEN);
        bytes.ok().filter(|bytes| bytes.len() == UNIT_LEN).ok_or_else(|| errno(libc::EIO))
    }

    fn close_oldest(&mut self) -> io::Result<()> {
        let oldest = self.open.iter().min_by_key(|(_, unit)| unit.touched);
        let Some((&number, unit)) = oldest else { return Ok(()) };
        if unit.changed {
            let packed = lz4_flex::block::compress(&unit.bytes);
            let stored = if packed.len() < UNIT_LEN { &packed } else { &unit.bytes };
            let len = u32::try_from(stored.len()).map_err(|_| errno(libc::EIO))?.to_le_bytes();
            let parts = [IoSlice::new(&len), IoSlice::new(stored)];
            host::write_all_at(&self.file, &parts, number * SLOT)?;
            let end = (HEADER + stored.len()) as u64;
            // It may have been longer before.
            let _ = host::punch(&self.file, number * SLOT + end..(number + 1) * SLOT);
        }
        self.open.remove(&number);
        Ok(())
    }
}

fn read_exact(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        match host::read_at(file, &mut buf[done..], offset + done as u64, Wait::Yes)? {
            0 => return Err(errno(libc::EIO)),
            got => done += got,
        }
    }
    Ok(())
}

#[cfg(test)]
impl Spill {
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the host that the file takes.
    pub(super) fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.file.metadata().unwrap()) * 512
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_read_though_no_unit_can_be_closed() {
        let mut spill = Spill::new(&std::env::temp_dir(), Compress::Lz4).unwrap();
        for number in 0..=OPEN as u64 {
            spill.write(&[7; UNIT_LEN], number * UNIT, |_| false).unwrap();
        }
        // From now on it cannot be written, as on a full host.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&spill.file));
        spill.file = File::open(path).unwrap();
        assert!(spill.write(&[8; UNIT_LEN], 99 * UNIT, |_| false).is_err());
        let mut bytes = vec![0; UNIT_LEN];
        for number in 0..=OPEN as u64 {
            spill.read(&mut bytes, number * UNIT).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 7));
        }
    }
}
