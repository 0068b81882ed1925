//! A model of a server with a round trip and a bandwidth, readers that wait for what they read, and
//! what the plan costs them in requests, bytes and waits. Times are those of the model, in
//! microseconds, so every run is the same.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use proptest::prelude::*;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// The targets are set for this link.
const ROUND_TRIP: u64 = 20_000;
const BYTES_PER_MICRO: u64 = 100;
const IN_FLIGHT: usize = 16;
/// The time in which a reader takes what is there.
const HIT: u64 = 20;

fn limits(image_size: u64) -> PlanLimits {
    let requests = RequestLimits { alignment: 1, max_len: 32 << 20, max_in_flight: 16 };
    PlanLimits::new(image_size, 256 * KIB, 16 * MIB, requests)
}

/// The blocks of an image.
struct Blocks(Vec<Block>);

#[derive(Clone, Copy, PartialEq)]
enum Block {
    Missing,
    Coming,
    There,
}

impl Blocks {
    fn new(image_size: u64) -> Self {
        Self(vec![Block::Missing; usize::try_from(image_size.div_ceil(BLOCK_SIZE)).unwrap()])
    }

    fn of(range: &Range<u64>) -> Range<usize> {
        let block = |at: u64| usize::try_from(at).unwrap();
        block(range.start / BLOCK_SIZE)..block(range.end.div_ceil(BLOCK_SIZE))
    }

    fn missing(&self, range: &Range<u64>, image_size: u64) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for at in Self::of(range).filter(|at| self.0[*at] == Block::Missing) {
            let start = at as u64 * BLOCK_SIZE;
            let end = (start + BLOCK_SIZE).min(image_size);
            match found.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => found.push(start..end),
            }
        }
        found
    }

    fn set(&mut self, range: &Range<u64>, to: Block) {
        self.0[Self::of(range)].fill(to);
    }

    fn are_there(&self, range: &Range<u64>) -> bool {
        self.0[Self::of(range)].iter().all(|block| *block == Block::There)
    }
}

#[derive(Debug, Default, PartialEq)]
struct Cost {
    requests: u64,
    demand: u64,
    bytes: u64,
    /// The reads that had to wait.
    waits: u64,
    time: u64,
}

/// One who reads one range after the other.
type Reader = VecDeque<Range<u64>>;

/// Runs `readers` until they have read everything, and returns what it cost.
fn simulate(image_size: u64, mut readers: Vec<Reader>) -> Cost {
    let mut planner = Planner::new(limits(image_size));
    let mut blocks = Blocks::new(image_size);
    let mut cost = Cost::default();
    let mut queues = [VecDeque::new(), VecDeque::new()];
    let (mut in_flight, mut link_free) = (0, 0);
    // Events: the arrival of a range, or a reader's turn.
    let mut events = BinaryHeap::new();
    let mut waiting: Vec<(usize, Range<u64>)> = Vec::new();
    for reader in 0..readers.len() {
        events.push(Reverse((0, Some(reader), 0, 0)));
    }
    while let Some(Reverse((now, reader, start, end))) = events.pop() {
        cost.time = now;
        if let Some(reader) = reader {
            let Some(read) = readers[reader].pop_front() else { continue };
            let fetches = planner.on_read(&read, |range| blocks.missing(&range, image_size));
            cost.demand += fetches.demand.len() as u64;
            for (queue, ranges) in queues.iter_mut().zip([fetches.demand, fetches.ahead]) {
                for range in ranges {
                    blocks.set(&range, Block::Coming);
                    queue.push_back(range);
                }
            }
            if blocks.are_there(&read) {
                events.push(Reverse((now + HIT, Some(reader), 0, 0)));
            } else {
                cost.waits += 1;
                waiting.push((reader, read));
            }
        } else {
            in_flight -= 1;
            blocks.set(&(start..end), Block::There);
            let (woken, still): (Vec<_>, Vec<_>) =
                waiting.drain(..).partition(|(_, read)| blocks.are_there(read));
            waiting = still;
            for (reader, _) in woken {
                events.push(Reverse((now + HIT, Some(reader), 0, 0)));
            }
        }
        while in_flight < IN_FLIGHT
            && let Some(range) = queues[0].pop_front().or_else(|| queues[1].pop_front())
        {
            in_flight += 1;
            cost.requests += 1;
            cost.bytes += range.end - range.start;
            let first_byte = link_free.max(now + ROUND_TRIP);
            link_free = first_byte + (range.end - range.start) / BYTES_PER_MICRO;
            events.push(Reverse((link_free, None, range.start, range.end)));
        }
    }
    assert!(waiting.is_empty(), "a read waits for ever");
    cost
}

/// All of `range` in reads of `len` bytes.
fn sequential(range: Range<u64>, len: u64) -> Reader {
    range
        .clone()
        .step_by(usize::try_from(len).unwrap())
        .map(|at| at..(at + len).min(range.end))
        .collect()
}

/// A generator of numbers that need only be different (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// What the kernel asks of a file of `len` bytes at `start`: read-ahead that doubles up to 128 KiB.
fn read_file(start: u64, len: u64, reads: &mut Reader) {
    let end = (start + len).next_multiple_of(BLOCK_SIZE);
    let (mut at, mut next) = (start, 16 * KIB);
    while at < end {
        reads.push_back(at..(at + next).min(end));
        at += next;
        next = (next * 2).min(128 * KIB);
    }
}

/// What a boot asks: directories of small files, of which `percent` are read, and the metadata of
/// each. Returns the reads and the bytes that they touch.
fn boot(seed: u64, percent: u64, image_size: u64) -> (Reader, u64) {
    let mut numbers = Numbers(seed);
    let mut reads = Reader::new();
    let mut touched = Blocks::new(image_size);
    for _ in 0..60 {
        let mut at = numbers.below(image_size - 32 * MIB) / BLOCK_SIZE * BLOCK_SIZE;
        let inodes = numbers.below(image_size) / BLOCK_SIZE * BLOCK_SIZE;
        for file in 0..3 + numbers.below(25) {
            let inode = inodes + file / 16 * BLOCK_SIZE;
            // Most files are small: the mean is about 100 KiB.
            let len = KIB + numbers.below(500 * KIB) * (1 + numbers.below(8)) / 16;
            if numbers.below(100) < percent && inode < image_size - BLOCK_SIZE {
                reads.push_back(inode..inode + BLOCK_SIZE);
                read_file(at, len, &mut reads);
            }
            at += len.next_multiple_of(BLOCK_SIZE);
        }
    }
    for read in &reads {
        touched.set(read, Block::There);
    }
    let blocks = touched.0.iter().filter(|block| **block == Block::There).count();
    (reads, blocks as u64 * BLOCK_SIZE)
}

#[test]
fn the_first_block_is_one_request() {
    let cost = simulate(1 << 40, vec![]);
    assert_eq!(cost, Cost::default());
    let cost = simulate(64 * MIB, vec![sequential(MIB + 8192..MIB + 12288, MIB)]);
    assert_eq!((cost.requests, cost.bytes, cost.waits), (1, 256 * KIB, 1));
}

#[test]
fn a_sequential_reader_has_the_whole_link() {
    for len in [16 * KIB, 128 * KIB, MIB] {
        let cost = simulate(1 << 30, vec![sequential(0..1 << 30, len)]);
        assert_eq!(cost.bytes, 1 << 30);
        let ideal = (1 << 30) / BYTES_PER_MICRO;
        assert!(cost.time < ideal * 100 / 95, "{len}: {cost:?}, ideal {ideal}");
        // A request is 2 MiB once the window has grown.
        assert!(cost.requests < 700, "{len}: {cost:?}");
        assert!(cost.demand < 12, "{len}: {cost:?}");
    }
}

#[test]
fn several_sequential_readers_share_the_whole_link() {
    for count in [2, 4, 8, 16] {
        let part = (1 << 30) / count;
        let readers =
            (0..count).map(|at| sequential(at * part..(at + 1) * part, 128 * KIB)).collect();
        let cost = simulate(1 << 30, readers);
        assert_eq!(cost.bytes, 1 << 30);
        let ideal = (1 << 30) / BYTES_PER_MICRO;
        assert!(cost.time < ideal * 100 / 93, "{count}: {cost:?}, ideal {ideal}");
        assert!(cost.demand < 16 * count, "{count}: {cost:?}");
    }
}

#[test]
fn requests_out_of_order_are_one_stream() {
    // The kernel reads 1 MiB ahead in 8 requests, which its threads bring in any order.
    let mut numbers = Numbers(3);
    let mut readers = vec![Reader::new(); 4];
    for megabyte in 0..512 {
        let mut order: Vec<u64> = (0..8).collect();
        for at in 0..8 {
            order.swap(at, usize::try_from(numbers.below(8)).unwrap());
        }
        for (thread, at) in order.into_iter().enumerate() {
            let start = megabyte * MIB + at * 128 * KIB;
            readers[thread % 4].push_back(start..start + 128 * KIB);
        }
    }
    let cost = simulate(512 * MIB, readers);
    assert_eq!(cost.bytes, 512 * MIB);
    assert!(cost.time < 512 * MIB / BYTES_PER_MICRO * 100 / 90, "{cost:?}");
    assert!(cost.demand < 40 && cost.requests < 500, "{cost:?}");
}

#[test]
fn random_reads_cost_only_themselves() {
    const READS: u64 = 4000;
    for image_size in [1 << 30, 8 << 30] {
        let mut numbers = Numbers(7);
        let mut readers = vec![Reader::new(); 16];
        for read in 0..READS {
            let at = numbers.below(image_size / BLOCK_SIZE) * BLOCK_SIZE;
            readers[usize::try_from(read % 16).unwrap()].push_back(at..at + BLOCK_SIZE);
        }
        let cost = simulate(image_size, readers);
        assert!(cost.requests <= READS + 50, "{cost:?}");
        assert!(cost.bytes < READS * BLOCK_SIZE * 2 + 2 * MIB, "{cost:?}");
        let ideal = READS * ROUND_TRIP / 16;
        assert!(cost.time < ideal * 10 / 9, "{cost:?}, ideal {ideal}");
    }
}

#[test]
fn a_boot_fetches_at_most_twice_what_it_touches() {
    let mut worst = 0.0f64;
    for percent in [20, 50, 80, 100] {
        for seed in [1, 2, 3] {
            let (reads, touched) = boot(seed, percent, 2 << 30);
            let count = reads.len() as u64;
            let cost = simulate(2 << 30, vec![reads]);
            worst = worst.max(cost.bytes as f64 / touched as f64);
            assert!(cost.waits * 10 < count * 7, "{percent}%: {count}, {cost:?}");
        }
    }
    assert!(worst <= 2.0, "{worst}");
}

#[test]
fn the_kernels_next_read_ahead_is_in_what_is_fetched() {
    let mut planner = Planner::new(limits(1 << 30));
    let blocks = Blocks::new(1 << 30);
    let mut numbers = Numbers(5);
    for _ in 0..100 {
        let at = numbers.below((1 << 29) / BLOCK_SIZE) * BLOCK_SIZE;
        planner.on_read(&(at..at + BLOCK_SIZE), |range| blocks.missing(&range, 1 << 30));
    }
    // Random reads have made the guess small, and nothing of what was asked for has come.
    let mut file = Reader::new();
    read_file(700 * MIB, 2 * MIB, &mut file);
    let (mut blocks, mut end) = (Blocks::new(1 << 30), 0);
    for (at, read) in file.iter().enumerate() {
        let fetches = planner.on_read(read, |range| blocks.missing(&range, 1 << 30));
        // The first read says nothing of a second one; the second says that there is a third.
        assert_eq!(fetches.demand.len(), usize::from(at < 2), "{at}: {read:?} {fetches:?}");
        for range in fetches.demand.iter().chain(&fetches.ahead) {
            blocks.set(range, Block::Coming);
            end = range.end;
        }
        let next = file.get(at + 1).map_or(0, |next| next.end);
        assert!(at == 0 || end >= next, "{at}: {end} {next}");
    }
}

#[test]
fn random_reads_do_not_disturb_a_sequential_reader() {
    let mut numbers = Numbers(9);
    let mut random = Reader::new();
    for _ in 0..200 {
        let at = 512 * MIB + numbers.below(512 * MIB / BLOCK_SIZE) * BLOCK_SIZE;
        random.push_back(at..at + BLOCK_SIZE);
    }
    let cost = simulate(1 << 30, vec![sequential(0..512 * MIB, 128 * KIB), random]);
    // The last window of the sequential reader is in vain.
    assert!(cost.bytes < 512 * MIB + 18 * MIB, "{cost:?}");
    assert!(cost.demand < 240, "{cost:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is read: all that a read waits for is fetched, nothing twice, nothing outside, and
    /// never more ahead than the window.
    #[test]
    fn every_plan_is_legal(
        size in 1u64..40 * MIB,
        alignment in prop::sample::select(vec![1u32, 512, 4096, 65536]),
        max_len in prop::sample::select(vec![65536u32, 1 << 20, 32 << 20]),
        reads in prop::collection::vec((any::<u32>(), 1u64..MIB, any::<bool>()), 1..200),
    ) {
        let requests = RequestLimits { alignment, max_len, max_in_flight: 1 };
        let limits = PlanLimits::new(size, 256 * KIB, 4 * MIB, requests);
        let mut planner = Planner::new(limits);
        let mut blocks = Blocks::new(size);
        let mut last = 0;
        for (at, len, is_sequential) in reads {
            let at = if is_sequential { last } else { u64::from(at) % size };
            let read = at..at + len;
            last = read.end % size;
            let fetches = planner.on_read(&read, |range| {
                assert!(range.end <= size && range.start % BLOCK_SIZE == 0);
                assert!(range.end == size || range.end % BLOCK_SIZE == 0);
                blocks.missing(&range, size)
            });
            let mut end = 0;
            let ahead: u64 = fetches.ahead.iter().map(|range| range.end - range.start).sum();
            prop_assert!(ahead <= 4 * MIB + 256 * KIB);
            for range in fetches.demand.iter().chain(&fetches.ahead) {
                prop_assert!(range.start >= end && range.start < range.end && range.end <= size);
                prop_assert_eq!(range.start % limits.alignment, 0);
                prop_assert!(range.end == size || range.end % limits.alignment == 0);
                prop_assert!(range.end - range.start <= limits.max_len);
                if limits.alignment == BLOCK_SIZE {
                    let missing = blocks.missing(range, size);
                    prop_assert_eq!(missing, vec![range.clone()]);
                }
                end = range.end;
            }
            for range in &fetches.demand {
                blocks.set(range, Block::There);
            }
            prop_assert!(blocks.are_there(&(read.start..read.end.min(size))));
            for range in &fetches.ahead {
                blocks.set(range, Block::Coming);
                // A part of what is asked for fails, and is missing again.
                if range.start % 3 == 0 {
                    blocks.set(range, Block::Missing);
                }
            }
            // What is on its way arrives.
            for block in &mut blocks.0 {
                if *block == Block::Coming {
                    *block = Block::There;
                }
            }
        }
    }
}
