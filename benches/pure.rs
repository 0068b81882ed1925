//! The pure parts of every request: the block map, the description of a range, and the records of
//! the log. No files and no mount; those are measured by `contrib/bench/run`.

use std::convert::Infallible;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::ops::Range;

use cowslip::extents::{Extent, ExtentKind, describe};
use cowslip::overlay::blocks::{BlockMap, CHUNK_BLOCKS};
use cowslip::overlay::record::LogRecord;
use cowslip::overlay::state::{BlockIndex, BlockState};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use uuid::Uuid;

/// Number of chunks in the measured maps: 16 GiB of disk.
const CHUNKS: u64 = 64;
/// Number of blocks in a disk of 16 TiB.
const HUGE: u64 = 1 << 32;
/// Number of extents in a described range.
const EXTENTS: u64 = 1024;

fn blocks(range: Range<u64>) -> Range<BlockIndex> {
    BlockIndex(range.start)..BlockIndex(range.end)
}

/// Creates the finest mixture: every other block is Data.
fn alternating(chunks: u64) -> BlockMap {
    let mut map = BlockMap::new();
    for block in (0..chunks * CHUNK_BLOCKS).step_by(2) {
        map.set(blocks(block..block + 1), BlockState::Data);
    }
    map
}

/// Returns block numbers spread over the whole map, the same ones in every run.
fn scattered() -> impl FnMut() -> u64 {
    let mut at = 0;
    move || {
        // An odd step visits every block of a power of two.
        at = (at + 0x9E37_79B9) % (CHUNKS * CHUNK_BLOCKS);
        at
    }
}

fn map(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("map");
    let mut written = alternating(CHUNKS);
    let mut next = scattered();
    group.bench_function("set one block", |bencher| {
        bencher.iter(|| {
            let block = next();
            written.set(blocks(block..block + 1), BlockState::Data);
        });
    });
    group.bench_function("set 16 TiB over 64 mixed chunks", |bencher| {
        let change = |mut map: BlockMap| {
            map.set(blocks(0..HUGE), BlockState::Zero);
            map
        };
        let mixed = alternating(CHUNKS);
        bencher.iter_batched(|| mixed.clone(), change, BatchSize::LargeInput);
    });

    let mixed = alternating(CHUNKS);
    group.bench_function("run_at in a mixed chunk", |bencher| {
        bencher.iter(|| mixed.run_at(blocks(black_box(next())..HUGE)));
    });
    let empty = BlockMap::new();
    group.bench_function("run_at across 16 TiB of nothing", |bencher| {
        bencher.iter(|| empty.run_at(blocks(black_box(0)..HUGE)));
    });
    group.throughput(Throughput::Elements(CHUNK_BLOCKS));
    group.bench_function("runs of a mixed chunk", |bencher| {
        bencher.iter(|| mixed.runs(blocks(black_box(0)..CHUNK_BLOCKS)).count());
    });
    group.finish();
}

fn extents(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("extents");
    group.throughput(Throughput::Elements(EXTENTS));
    let answer = |rest: Range<u64>| {
        let kind = match rest.start / 4096 % 2 {
            0 => ExtentKind::Data,
            _ => ExtentKind::Hole,
        };
        Ok::<_, Infallible>(Extent::new(rest.start..rest.start + 4096, kind))
    };
    group.bench_function("describe alternating blocks", |bencher| {
        bencher.iter(|| describe(black_box(0)..EXTENTS * 4096, NonZeroUsize::MAX, answer));
    });
    group.finish();
}

fn record(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("record");
    let uuid = Uuid::from_u128(7);
    let set = LogRecord::Set { range: blocks(3..4), state: BlockState::Data };
    let bytes = set.encode(&uuid, 1);
    group.bench_function("encode", |bencher| {
        bencher.iter(|| black_box(&set).encode(&uuid, black_box(1)));
    });
    group.bench_function("decode", |bencher| {
        bencher.iter(|| LogRecord::decode(black_box(&bytes), &uuid));
    });
    group.finish();
}

criterion_group!(benches, map, extents, record);
criterion_main!(benches);
