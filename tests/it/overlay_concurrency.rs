//! Many threads on one overlay, on real files: no thread's bytes are lost, whatever the others do
//! in the same block.
//!
//! ```text
//!   block    |  a  b  c  d  |  a  b  c  d  |   threads a..d own disjoint bytes of every block
//!   others       punch, zero, write whole blocks next to them; sync and maintain all the time
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use crate::common::library::{TestBase, read_through};
use crate::common::sim::Chance;
use cowslip::layer::{Layer, Wait, WritableLayer};
use cowslip::overlay::FORMAT_VERSION;
use cowslip::overlay::Overlay;
use cowslip::overlay::keep::temporary;
use cowslip::overlay::layer_cache::LayerCache;
use cowslip::overlay::persist::{self, NewOverlay, OpenedOverlay, OverlayPath};
use cowslip::overlay::record::LayerMap;
use cowslip::overlay::stack::{BaseRecord, LayerRecord, Stack};
use uuid::Uuid;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;
const SIZE: u64 = BLOCK * BLOCKS;

/// A persistent overlay in a directory of its own, over a base without a zero byte.
struct Lab {
    base: TestBase,
    disk: OpenedOverlay,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layer = LayerRecord { uuid: Uuid::new_v4(), block: BLOCK as u32, parent: None };
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            kind: cowslip::config::OverlayKind::Blocks,
            base: BaseRecord::Blank { size: SIZE },
            layers: vec![layer],
            snapshots: Vec::new(),
        };
        let path = dir.path().join("vm.cow");
        let new = NewOverlay { stack, map: &LayerMap::new(SIZE, SIZE), limit: None };
        let disk = persist::create(OverlayPath { dir: &path, layers: None }, new).unwrap();
        Self { base: TestBase::solid(SIZE), disk, dir }
    }

    fn overlay(&self) -> &Overlay {
        &self.disk.overlay
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0; len];
        read_through(&[self.overlay(), &self.base], &mut buf, offset, Wait::Yes).unwrap();
        buf
    }

    fn write(&self, buf: &[u8], offset: u64) {
        self.overlay().write_at(buf, offset, &self.base, Wait::Yes).unwrap();
    }

    fn zero(&self, range: std::ops::Range<u64>) {
        self.overlay().zero(range, &self.base, Wait::Yes).unwrap();
    }

    /// Runs `work` on `threads` threads that start together, while two more threads sync and
    /// maintain the overlay.
    fn storm(&self, threads: u64, work: impl Fn(u64) + Sync) {
        let (done, barrier) = (AtomicBool::new(false), Barrier::new(threads as usize));
        thread::scope(|scope| {
            for upkeep in [Overlay::maintain, |overlay: &Overlay| overlay.sync()] {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        upkeep(self.overlay()).unwrap();
                        thread::yield_now();
                    }
                });
            }
            let workers: Vec<_> = (0..threads)
                .map(|number| {
                    let (work, barrier) = (&work, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        work(number);
                    })
                })
                .collect();
            // Joined before any result is unwrapped, so that the background threads end in any
            // case.
            let ended: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
            done.store(true, Ordering::Relaxed);
            ended.into_iter().for_each(|end| end.unwrap());
        });
    }

    /// Closes the overlay, opens it again, and returns all bytes.
    fn reopened(self) -> Vec<u8> {
        self.overlay().close().unwrap();
        let path = self.dir.path().join("vm.cow");
        drop(self.disk);
        let disk = persist::lock_overlay(OverlayPath { dir: &path, layers: None })
            .unwrap()
            .open(None, &LayerCache::default())
            .unwrap();
        let mut bytes = vec![0; SIZE as usize];
        read_through(&[&disk.overlay, &self.base], &mut bytes, 0, Wait::Yes).unwrap();
        bytes
    }
}

#[test]
fn concurrent_first_writes_in_a_block_lose_no_bytes() {
    const THREADS: u64 = 8;
    for _ in 0..20 {
        let lab = Lab::new();
        let piece = BLOCK / THREADS;
        lab.storm(THREADS, |me| {
            for block in 0..BLOCKS {
                // All threads write to the same block at about the same time; unaligned ranges
                // share sectors.
                let from = block * BLOCK + me * piece + 3;
                lab.write(&vec![me as u8 * 2 + 200; piece as usize - 5], from);
                let seen = lab.read(from, piece as usize - 5);
                assert!(seen.iter().all(|byte| *byte == me as u8 * 2 + 200), "lost at {from}");
            }
        });
        let mut expected = lab.base.shown(SIZE);
        for block in 0..BLOCKS {
            for me in 0..THREADS {
                let from = (block * BLOCK + me * piece + 3) as usize;
                expected[from..from + piece as usize - 5].fill(me as u8 * 2 + 200);
            }
        }
        assert!(lab.read(0, SIZE as usize) == expected);
        assert!(lab.reopened() == expected, "another mount sees other bytes");
    }
}

#[test]
fn bytes_survive_concurrent_writes_and_zeros_next_to_them() {
    const THREADS: u64 = 6;
    let lab = Lab::new();
    // Owner `me` has the range `me * 600 + 50 .. + 500` of every block. Each thread writes and
    // zeroes its own bytes and knows their expected values.
    let owned: Vec<Vec<u8>> = {
        let owned = parking_lot::Mutex::new(vec![Vec::new(); THREADS as usize]);
        lab.storm(THREADS, |me| {
            let mut chance = Chance(me + 1);
            let place = |block: u64| block * BLOCK + me * 600 + 50;
            let mut mine: Vec<u8> =
                (0..BLOCKS).flat_map(|block| lab.read(place(block), 500)).collect();
            for round in 0..4000u64 {
                let block = chance.next() % BLOCKS;
                let from = chance.below(400);
                let len = 1 + chance.below(100);
                let at = place(block) + from as u64;
                let model = &mut mine[block as usize * 500 + from..][..len];
                if chance.below(3) == 0 {
                    lab.zero(at..at + len as u64);
                    model.fill(0);
                } else {
                    let fill = round as u8 | 1;
                    lab.write(&vec![fill; len], at);
                    model.fill(fill);
                }
                let model = &mine[block as usize * 500..][..500];
                assert!(lab.read(place(block), 500) == model, "owner {me}, block {block}");
            }
            owned.lock()[me as usize] = mine;
        });
        owned.into_inner()
    };
    let found = lab.reopened();
    for (me, mine) in owned.iter().enumerate() {
        for block in 0..BLOCKS as usize {
            let at = block * BLOCK as usize + me * 600 + 50;
            assert!(found[at..at + 500] == mine[block * 500..][..500], "owner {me}, block {block}");
        }
    }
}

#[test]
fn concurrent_writes_and_punches_of_whole_blocks_do_not_mix() {
    const THREADS: u64 = 6;
    let lab = Lab::new();
    lab.write(&vec![255; SIZE as usize], 0);
    lab.storm(THREADS, |me| {
        let mut chance = Chance(me + 77);
        for _ in 0..2000 {
            let block = chance.next() % BLOCKS;
            let blocks = 1 + chance.next() % 3;
            let range = block * BLOCK..((block + blocks) * BLOCK).min(SIZE);
            if chance.below(3) == 0 {
                lab.zero(range);
            } else {
                let len = (range.end - range.start) as usize;
                lab.write(&vec![me as u8 + 1; len], range.start);
            }
            // After everything was written once, the base must never be visible again.
            let seen = lab.read(block * BLOCK, BLOCK as usize);
            let is_known = |byte: &u8| *byte <= THREADS as u8 || *byte == 255;
            assert!(seen.iter().all(is_known), "block {block} shows what nobody wrote");
        }
    });
    let now = lab.read(0, SIZE as usize);
    for (at, sector) in now.chunks(512).enumerate() {
        assert!(sector.iter().all(|byte| *byte == sector[0]), "sector {at} is two writes at once");
    }
    assert!(lab.reopened() == now);
}

#[test]
fn concurrent_aligned_and_unaligned_writes_leave_whole_values() {
    let lab = Lab::new();
    // Thread 0 writes whole blocks, 1 zeroes them, 2 and 3 write bytes 1000..1200 and 2000..2200.
    lab.storm(4, |me| {
        let mut chance = Chance(me);
        for round in 0..4000u64 {
            let block = chance.next() % 4 * BLOCK;
            let value = (round % 50) as u8 * 4 + me as u8 + 8;
            match me {
                0 => lab.write(&[value; BLOCK as usize], block),
                1 => lab.zero(block..block + BLOCK),
                _ => lab.write(&[value; 200], block + (me - 1) * 1000),
            }
        }
    });
    for block in 0..4 {
        let seen = lab.read(block * BLOCK, BLOCK as usize);
        let from_whole = |byte: u8| byte.is_multiple_of(4);
        for (at, byte) in seen.iter().enumerate() {
            let legal = match at {
                1000..1200 => from_whole(*byte) || byte % 4 == 2,
                2000..2200 => from_whole(*byte) || byte % 4 == 3,
                _ => from_whole(*byte),
            };
            assert!(legal, "byte {at} of block {block} is {byte}");
        }
        let rest = [&seen[..1000], &seen[1200..2000], &seen[2200..]].concat();
        assert!(rest.iter().all(|byte| *byte == rest[0]), "block {block} is two writes at once");
    }
}

#[test]
fn reader_sees_old_or_new_bytes_and_never_goes_back() {
    let lab = Lab::new();
    // One writer increments the value of every block; acknowledged[block] is its last completed
    // value.
    let acknowledged: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
    lab.storm(5, |me| {
        let mut chance = Chance(me);
        if me == 0 {
            for round in 1..=250u64 {
                for block in 0..BLOCKS {
                    // The first byte is the value. Zeroing in between frees the space while readers
                    // use it.
                    if round % 3 == 0 {
                        lab.zero(block * BLOCK..(block + 1) * BLOCK);
                    }
                    let from = if round % 2 == 0 { 0 } else { 100 };
                    lab.write(
                        &vec![round as u8; BLOCK as usize - from],
                        block * BLOCK + from as u64,
                    );
                    acknowledged[block as usize].store(round, Ordering::SeqCst);
                }
            }
            return;
        }
        loop {
            let block = chance.next() % BLOCKS;
            let before = acknowledged[block as usize].load(Ordering::SeqCst);
            let seen = lab.read(block * BLOCK + 512, 512);
            let after = acknowledged[block as usize].load(Ordering::SeqCst);
            let value = u64::from(seen[0]);
            let is_base = lab.base.shown(SIZE)[(block * BLOCK) as usize + 512] == seen[0];
            // Zeros: the writer is between the zeroing and the write.
            assert!(
                (before..=after + 1).contains(&value) || value == 0 || (before == 0 && is_base),
                "block {block} shows {value} between {before} and {after}"
            );
            if acknowledged[BLOCKS as usize - 1].load(Ordering::SeqCst) == 250 {
                return;
            }
        }
    });
}

#[test]
fn shrinking_a_disk_does_not_conflict_with_freeing_space_after_a_recovery() {
    // After a recovery all blocks other than Data wait to be punched. Blocks freed by a shrink at
    // that time must not be punched before its record is vouched.
    let lab = Lab::new();
    lab.write(&vec![9; SIZE as usize], 0);
    lab.overlay().sync().unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                lab.overlay().sync().unwrap();
            }
        });
        for round in 0..1000u64 {
            let size = SIZE - (round % 50 + 1) * 1000;
            lab.overlay().set_size(size).unwrap();
            lab.overlay().set_size(SIZE).unwrap();
            assert!(lab.read(size, (SIZE - size) as usize).iter().all(|byte| *byte == 0));
            lab.write(&vec![9; (SIZE - size) as usize], size);
            assert!(lab.read(0, SIZE as usize).iter().all(|byte| *byte == 9));
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(lab.reopened().iter().all(|byte| *byte == 9));
}

#[test]
fn temporary_overlay_keeps_writes_while_space_is_freed() {
    let base = TestBase::solid(SIZE);
    let overlay = temporary(&std::env::temp_dir(), BLOCK as u32, SIZE, SIZE, None).unwrap();
    let overlay = Arc::new(overlay);
    thread::scope(|scope| {
        for me in 0..4u64 {
            let (overlay, base) = (&overlay, &base);
            scope.spawn(move || {
                for round in 0..3000u64 {
                    // Each thread has its own blocks, interleaved with those of the others.
                    let at = (round * 4 % BLOCKS + me) * BLOCK;
                    overlay.write_at(&[round as u8 | 1; 700], at + 100, base, Wait::Yes).unwrap();
                    if round % 5 == 0 {
                        overlay.sync().unwrap();
                    }
                    let mut buf = [0; 700];
                    let extent = overlay.read_at(&mut buf, at + 100, Wait::Yes).unwrap();
                    assert_eq!(extent.range, at + 100..at + 800);
                    assert_eq!(buf, [round as u8 | 1; 700]);
                    overlay.zero(at..at + BLOCK, base, Wait::Yes).unwrap();
                }
            });
        }
    });
    overlay.sync().unwrap();
    assert_eq!(overlay.usage().data, 0);
}
