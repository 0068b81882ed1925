//! Partition tables: MBR with logical partitions, and GPT with recomputed checksums.
#![no_main]

use std::io;

use cowslip::base::partitions::{self, TableSource};
use libfuzzer_sys::fuzz_target;

/// A disk whose first bytes and last bytes are the input, with zeros between.
struct Disk<'a> {
    bytes: &'a [u8],
    size: u64,
}

impl TableSource for Disk<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        assert!(at.checked_add(buf.len() as u64).is_some_and(|end| end <= self.size));
        let gap = self.size - self.bytes.len() as u64;
        for (byte, at) in buf.iter_mut().zip(at..) {
            let low = usize::try_from(at).ok().and_then(|at| self.bytes.get(at));
            let high = || self.bytes.get(usize::try_from(at.checked_sub(gap)?).ok()?);
            *byte = low.or_else(high).copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// Recomputes the checksums of the GPT header at `at`, which a mutation would never get right.
fn seal(bytes: &mut [u8], at: usize, sector: usize) {
    let word = |bytes: &[u8], at: usize| {
        bytes
            .get(at..at + 4)
            .map_or(0, |word| u32::from_le_bytes(word.try_into().unwrap()) as usize)
    };
    if bytes.get(at..at + 8) != Some(b"EFI PART") || bytes.len() < at + 92 {
        return;
    }
    let start = word(bytes, at + 72).saturating_mul(sector);
    let len = word(bytes, at + 80).saturating_mul(word(bytes, at + 84));
    if let Some(entries) = bytes.get(start..start.saturating_add(len)) {
        let sum = crc32fast::hash(entries).to_le_bytes();
        bytes[at + 88..at + 92].copy_from_slice(&sum);
    }
    let len = word(bytes, at + 12);
    if let Some(header) = bytes.get(at..at.saturating_add(len)).filter(|header| header.len() >= 92)
    {
        let mut header = header.to_vec();
        header[16..20].fill(0);
        let sum = crc32fast::hash(&header).to_le_bytes();
        bytes[at + 16..at + 20].copy_from_slice(&sum);
    }
}

fuzz_target!(|input: &[u8]| {
    // The first byte selects sector size and disk size.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    let sector = [None, Some(512), Some(4096), None][usize::from(choice & 3)];
    if choice & 4 == 0 {
        seal(&mut bytes, 512, 512);
        seal(&mut bytes, 4096, 4096);
    }
    let gap = [0, 512, 1 << 40, i64::MAX as u64 - (1 << 30)][usize::from(choice >> 6)];
    let size = bytes.len() as u64 + gap;
    let Ok(found) = partitions::read(&Disk { bytes: &bytes, size }, sector) else { return };
    assert!(found.iter().all(|one| one.range.start < one.range.end && one.number > 0));
    let _ = partitions::list_partitions(&found);
});
