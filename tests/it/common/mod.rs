//! Helpers shared by the test programs.

pub(crate) mod library;
pub(crate) mod model;
pub mod mount;
pub(crate) mod qemu;
pub mod random;
pub(crate) mod sim;
pub(crate) mod state;
pub(crate) mod strace;
#[allow(dead_code, reason = "benchmarks and the library's own tests use the rest")]
#[path = "../../support/mod.rs"]
pub(crate) mod support;

use cowslip::overlay::record::RECORD_LEN;

/// Returns the number of bytes of `log` (the content of a layer's log file) that are records;
/// preallocated space follows them.
pub(crate) fn written(log: &[u8]) -> usize {
    let is_record = |place: &&[u8]| place.iter().any(|byte| *byte != 0);
    log.chunks(RECORD_LEN).rev().skip_while(|place| !is_record(place)).map(<[u8]>::len).sum()
}
