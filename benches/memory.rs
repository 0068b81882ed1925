//! Memory of the block map in the worst case: every other block of 1 TiB is written. Since that
//! would be 512 GiB of data, the map is built on its own; it does not depend on the data.
//!
//! Resident memory is read from the kernel, so the result includes the allocator's overhead.

use std::fs;
use std::hint::black_box;
use std::io;
use std::time::Instant;

use cowslip::overlay::blocks::BlockMap;
use cowslip::overlay::state::{BlockIndex, BlockState};

/// Number of 4 KiB blocks in 1 TiB.
const BLOCKS: u64 = 1 << 28;

/// Returns the resident memory of this process in KiB.
fn resident() -> io::Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::other("/proc/self/status has no VmRSS"))
}

fn main() -> io::Result<()> {
    let before = resident()?;
    let start = Instant::now();
    let mut map = BlockMap::new();
    for block in (0..BLOCKS).step_by(2) {
        map.set(BlockIndex(block)..BlockIndex(block + 1), BlockState::Data);
    }
    let (took, after) = (start.elapsed().as_secs_f64(), resident()?);
    // Keeps the map alive until here.
    let written = black_box(map).data_blocks();
    println!(
        "every other block of 1 TiB: {:.1} MiB for the map, {written} blocks set in {took:.1} s",
        (after - before) / 1024.0,
    );
    Ok(())
}
