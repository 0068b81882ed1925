//! The log of a layer: recovery, replay, and a layer opened from the log.
#![no_main]

use std::sync::Arc;

use cowslip::layer::{Layer, Wait};
use cowslip::overlay::Overlay;
use cowslip::overlay::record_log;
use cowslip::overlay::record::{BootTag, RECORD_LEN};
use cowslip::overlay::recover::{self, LayerFiles};
use cowslip_fuzz::{Memory, MemoryLogDir, walk};
use libfuzzer_sys::fuzz_target;
use uuid::Uuid;

/// UUID of the layer in the seeds.
const LAYER: Uuid = Uuid::from_u128(0xc0);

/// Recomputes the checksums of all records, which a mutation would never get right.
fn seal(bytes: &mut [u8]) {
    for record in bytes.as_chunks_mut::<RECORD_LEN>().0 {
        if record != &[0; RECORD_LEN] {
            let sum = crc32c::crc32c_append(crc32c::crc32c(LAYER.as_bytes()), &record[4..]);
            record[..4].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fn files(log: Arc<Memory>, log_dir: Arc<MemoryLogDir>, block_size: u32) -> LayerFiles {
    let data: Arc<Memory> = Arc::default();
    LayerFiles { data, log, log_dir, uuid: LAYER, block_size }
}

fuzz_target!(|input: &[u8]| {
    // The first byte selects whether checksums are recomputed, the block size and the boot tag.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if choice & 1 == 0 {
        seal(&mut bytes);
    }
    let block_size = 512 << (choice >> 1 & 7);
    let tag = BootTag([u64::from(choice >> 4), 0]);
    let log_dir = Arc::new(MemoryLogDir::default());
    let old = Memory::new(bytes);
    let found = files(Arc::clone(&old), Arc::clone(&log_dir), block_size);
    let Ok((image, _, _)) = recover::open_log(&found, tag) else { return };
    // A log that is continued or rewritten gives the same state.
    let new = log_dir.0.lock().take().unwrap_or(old);
    let again = record_log::scan(&*new, &LAYER).unwrap();
    assert_eq!(again.end, record_log::LogEnd::Whole);
    let again = files(new, Arc::default(), block_size);
    let trusted = recover::examine(&again, tag).unwrap();
    let loaded = recover::load_map(&again, &trusted).unwrap();
    assert!(image.records().eq(loaded.records()));
    if let Ok((overlay, _)) = Overlay::open(&found, tag, None, &[]) {
        let _ = overlay.usage();
        let _ = overlay.extent_at(0..u64::MAX, Wait::Yes);
        walk(&overlay);
    }
});
