//! The log of a layer: recovery, replay, and a layer opened from what it says.
#![no_main]

use std::sync::Arc;

use cowslip::layer::{Layer, Wait};
use cowslip::overlay::Overlay;
use cowslip::overlay::log;
use cowslip::overlay::record::{RECORD_LEN, Tag};
use cowslip::overlay::recover::{self, Files};
use cowslip_fuzz::{Memory, MemoryHome, walk};
use libfuzzer_sys::fuzz_target;
use uuid::Uuid;

/// The layer of the seeds.
const LAYER: Uuid = Uuid::from_u128(0xc0);

/// Puts the checksums of all records right: a mutation would never do that.
fn seal(bytes: &mut [u8]) {
    for record in bytes.as_chunks_mut::<RECORD_LEN>().0 {
        if record != &[0; RECORD_LEN] {
            let sum = crc32c::crc32c_append(crc32c::crc32c(LAYER.as_bytes()), &record[4..]);
            record[..4].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

fn files(log: Arc<Memory>, home: Arc<MemoryHome>, block: u32) -> Files {
    let data: Arc<Memory> = Arc::default();
    Files { data, log, home, uuid: LAYER, block }
}

fuzz_target!(|input: &[u8]| {
    // The first byte chooses what is known from outside.
    let Some((&choice, bytes)) = input.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if choice & 1 == 0 {
        seal(&mut bytes);
    }
    let block = 512 << (choice >> 1 & 7);
    let tag = Tag([u64::from(choice >> 4), 0]);
    let home = Arc::new(MemoryHome::default());
    let found = files(Memory::new(bytes), Arc::clone(&home), block);
    let Ok((image, _, _)) = recover::open(&found, tag) else { return };
    // A log that was written anew says the same.
    if let Some(new) = home.0.lock().take() {
        let again = log::scan(&*new, &LAYER).unwrap();
        assert_eq!(again.end, log::End::Whole);
        let again = files(new, Arc::default(), block);
        let trusted = recover::examine(&again, tag).unwrap();
        let loaded = recover::load(&again, &trusted).unwrap();
        assert!(image.records().eq(loaded.records()));
    }
    if let Ok((overlay, _)) = Overlay::open(&found, tag, None) {
        let _ = overlay.usage();
        let _ = overlay.extent_at(0..u64::MAX, Wait::Yes);
        walk(&overlay);
    }
});
