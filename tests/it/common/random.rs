//! Random operations on a mounted file and on a byte array, which must agree.

// Every test program compiles this whole module but uses only a part of it.
#![allow(dead_code, unreachable_pub)]
// Sizes are small, and a test may panic.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
// The end of the file is an empty run.
#![allow(clippy::single_range_in_vec_init)]

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};

use super::mount::*;

/// Reads all bytes of a file of the lab.
pub fn whole(lab: &Lab, name: &str) -> Vec<u8> {
    fs::read(lab.path(name)).unwrap()
}

/// A deterministic random number generator.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }

    /// Returns a range inside `size`, aligned to blocks half of the time.
    pub fn range(&mut self, size: u64) -> Range<u64> {
        let (start, len) = (self.below(size), 1 + self.below(200_000));
        let round = if self.below(2) == 0 { 4096 } else { 1 };
        let start = start / round * round;
        start..(start + len.next_multiple_of(round)).min(size)
    }
}

/// Does one random operation on `file` and `model`.
pub fn step(dice: &mut Dice, file: &File, model: &mut Vec<u8>) {
    const MOST: u64 = 6 * MIB;
    let size = model.len() as u64;
    let range = dice.range(size);
    let bytes = range.start as usize..range.end as usize;
    match dice.below(10) {
        0..4 => {
            // The write may extend the file.
            let data = noise(1 + dice.below(100_000), dice.below(u64::MAX));
            let start = range.start.min(MOST - data.len() as u64);
            file.write_all_at(&data, start).unwrap();
            let end = start as usize + data.len();
            model.resize(model.len().max(end), 0);
            model[start as usize..end].copy_from_slice(&data);
        }
        4 if !range.is_empty() => {
            fallocate(file, PUNCH, range.clone()).unwrap();
            model[bytes].fill(0);
        }
        5 if !range.is_empty() => {
            fallocate(file, ZERO_KEEP, range.clone()).unwrap();
            model[bytes].fill(0);
        }
        6 => {
            let size = dice.below(MOST);
            file.set_len(size).unwrap();
            model.resize(size as usize, 0);
        }
        7 if !range.is_empty() => fallocate(file, FallocateFlags::empty(), range).unwrap(),
        8 => file.sync_all().unwrap(),
        _ => assert_eq!(read(file, range.start, range.end - range.start), model[bytes]),
    }
}

/// Checks that `file` equals `model` and that reported holes contain only zeros.
#[track_caller]
pub fn check(file: &File, model: &[u8]) {
    let size = model.len() as u64;
    assert_eq!(file.metadata().unwrap().len(), size);
    assert!(read(file, 0, size) == model, "the bytes differ");
    let mut at = 0;
    for run in data_runs(file).into_iter().chain([size..size]) {
        let hole = &model[at as usize..run.start as usize];
        assert!(hole.iter().all(|byte| *byte == 0), "data in a hole of {at}..{}", run.start);
        at = run.end;
    }
    assert_eq!(seek(file, SeekFrom::Data(size)), Err(libc::ENXIO));
    assert_eq!(seek(file, SeekFrom::Hole(size)), Err(libc::ENXIO));
}

/// Runs random operations on the disk `words`, which is remounted between rounds after an unmount
/// or a kill.
pub fn model(lab: &Lab, base: &str, words: &str) {
    let mut model = whole(lab, base);
    let mut dice = Dice(0x1234_5678_9ABC_DEF1);
    for round in 0..6 {
        lab.mount(words);
        let file = lab.open("m/d");
        check(&file, &model);
        for _ in 0..60 {
            step(&mut dice, &file, &mut model);
        }
        check(&file, &model);
        check(&lab.open_ro("m/d"), &model);
        if round % 2 == 0 {
            lab.kill();
        } else {
            drop(file);
            lab.umount();
        }
    }
}
