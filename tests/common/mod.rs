//! What several test programs share.

// Every test program compiles all of this as a module of its own and uses its part.
#![allow(dead_code, unreachable_pub)]

pub mod library;
pub mod model;
pub mod mount;
pub mod random;
pub mod sim;
pub mod state;
pub mod strace;

use cowslip::overlay::record::RECORD_LEN;

/// How many bytes of a layer's log (`log`, the file) are records: space for more lies behind them.
pub fn written(log: &[u8]) -> usize {
    let is_record = |place: &&[u8]| place.iter().any(|byte| *byte != 0);
    log.chunks(RECORD_LEN).rev().skip_while(|place| !is_record(place)).map(<[u8]>::len).sum()
}
