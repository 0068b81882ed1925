//! Reads through the whole engine, and changes, against a server in memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::base::RemoteBase;
use super::cache::Cache;
use super::samples::identity_of;
use super::testing::{MemoryServer, SharedServer, address, pattern};
use super::transport::RequestLimits;
use super::{RemoteDisk, RemoteImage};
use crate::arrival::Arrival;
use crate::base::testing::UnreachableBelow;
use crate::config::RemoteSpec;
use crate::extents::ExtentKind;
use crate::identity::Identity;
use crate::layer::{Layer, Wait, WritableLayer};

const MIB: u64 = 1 << 20;

fn base(server: MemoryServer) -> (SharedServer, Arc<RemoteBase>) {
    let server = Arc::new(server);
    let cache =
        Arc::new(Cache::temporary(super::transport::Transport::size(&*server), 1 << 30).unwrap());
    let spec = RemoteSpec { ahead: 4 * MIB, ..RemoteSpec::new(address()) };
    let identity = identity_of(&*server).unwrap();
    server.reads.lock().clear();
    let base = RemoteBase::new(&spec, identity, server.clone(), cache, None).unwrap();
    (server, Arc::new(base))
}

/// Reads all of `range`, zeros included.
fn read(layer: &dyn Layer, range: Range<u64>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; usize::try_from(range.end - range.start).unwrap()];
    let mut done = 0;
    while done < bytes.len() {
        let extent = layer.read_at(&mut bytes[done..], range.start + done as u64, Wait::Yes)?;
        let len = usize::try_from(extent.len()).unwrap();
        if extent.kind != ExtentKind::Data {
            bytes[done..done + len].fill(0);
        }
        done += len;
    }
    Ok(bytes)
}

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

#[test]
fn a_read_that_may_not_wait_leaves_its_arrival() {
    let bytes = pattern(3 << 20);
    let (server, base) =
        base(MemoryServer::new(bytes.clone()).with_delay(Duration::from_millis(50)));
    let mut buf = vec![0; 10_000];
    let begun = Instant::now();
    let error = base.read_at(&mut buf, MIB + 77, Wait::No).unwrap_err();
    assert!(begun.elapsed() < Duration::from_millis(40));
    assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    Arrival::take_expected().unwrap().wait().unwrap();
    let extent = base.read_at(&mut buf, MIB + 77, Wait::No).unwrap();
    assert_eq!(extent.range, MIB + 77..MIB + 10_077);
    assert_eq!(buf, bytes[span(&extent.range)]);
    assert_eq!(server.reads.lock().len(), 1);
}

#[test]
fn the_server_is_told_which_requests_somebody_waits_for() {
    let (server, base) =
        base(MemoryServer::new(pattern(8 << 20)).with_delay(Duration::from_millis(20)));
    // Sequential, so that some is read ahead.
    for at in 0..48 {
        read(&*base, at * (MIB / 16)..(at + 1) * (MIB / 16)).unwrap();
    }
    let reads: Vec<_> = server.reads.lock().iter().map(|range| range.start).collect();
    let hurried = server.hurried.lock().clone();
    assert!(hurried.contains(&0) && hurried.iter().all(|start| reads.contains(start)));
    // What nobody has come to is not waited for.
    let last = *reads.iter().max().unwrap();
    assert!(last >= 3 * MIB && !hurried.contains(&last), "{reads:?} {hurried:?}");
}

#[test]
fn many_readers_of_one_place_are_one_request() {
    let (server, base) =
        base(MemoryServer::new(pattern(1 << 20)).with_delay(Duration::from_millis(30)));
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| read(&*base, 4096..12_288).unwrap());
        }
    });
    assert_eq!(server.reads.lock().len(), 1);
}

#[test]
fn many_requests_are_in_flight_without_threads() {
    let server = MemoryServer::new(pattern(64 << 20)).with_delay(Duration::from_millis(100));
    let (server, base) = base(server);
    static DONE: AtomicUsize = AtomicUsize::new(0);
    let begun = Instant::now();
    let mut buf = [0; 4096];
    for at in 0..16 {
        assert!(base.read_at(&mut buf, at * 4 * MIB + 4096, Wait::No).is_err());
        let count = |outcome: Result<(), i32>| {
            outcome.unwrap();
            DONE.fetch_add(1, Ordering::SeqCst);
        };
        Arrival::take_expected().unwrap().then(Box::new(count));
    }
    while DONE.load(Ordering::SeqCst) < 16 {
        thread::sleep(Duration::from_millis(1));
        assert!(begun.elapsed() < Duration::from_secs(20));
    }
    assert!(server.reads.lock().len() >= 16);
    assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
}

#[test]
fn a_bad_place_fails_its_own_reads_and_no_others() {
    let bytes = pattern(4 << 20);
    let (server, base) = base(MemoryServer::new(bytes.clone()));
    server.failing.lock().push((MIB + 8192..MIB + 8193, libc::EIO));
    let error = read(&*base, MIB + 8000..MIB + 9000).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    for range in [MIB..MIB + 8192, MIB + 12_288..MIB + 40_000, 0..MIB, 2 * MIB..4 * MIB] {
        assert!(read(&*base, range.clone()).unwrap() == bytes[span(&range)], "{range:?}");
    }
    server.failing.lock().clear();
    assert_eq!(
        read(&*base, MIB + 8000..MIB + 9000).unwrap(),
        bytes[span(&(MIB + 8000..MIB + 9000))]
    );
}

#[test]
fn an_outage_fails_reads_until_it_ends() {
    let bytes = pattern(1 << 20);
    let (server, base) = base(MemoryServer::new(bytes.clone()));
    server.failing.lock().push((0..MIB, libc::ETIMEDOUT));
    for _ in 0..3 {
        let error = read(&*base, 0..4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    server.failing.lock().clear();
    assert_eq!(read(&*base, 0..4096).unwrap(), bytes[..4096]);
}

#[test]
fn holes_are_told_once_and_not_read() {
    let mut bytes = pattern(8 << 20);
    bytes[2 << 20..6 << 20].fill(0);
    let server = MemoryServer::new(bytes.clone()).with_hole(2 * MIB..6 * MIB);
    let (server, base) = base(server);
    assert_eq!(base.extent_at(3 * MIB..4 * MIB, Wait::Yes).unwrap().kind, ExtentKind::Hole);
    assert_eq!(base.extent_at(0..8 * MIB, Wait::Yes).unwrap().range, 0..2 * MIB);
    assert_eq!(read(&*base, 0..8 * MIB).unwrap(), bytes);
    assert!(server.reads.lock().iter().all(|read| read.end <= 2 * MIB || read.start >= 6 * MIB));
    assert!(*server.extent_questions.lock() <= 2);
    assert_eq!(base.extent_at(9 * MIB..10 * MIB, Wait::No).unwrap().kind, ExtentKind::Hole);
}

#[test]
fn the_identity_is_that_of_the_file_behind() {
    for size in [0_usize, 1, 70_000, 3 << 20] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), pattern(size)).unwrap();
        let limits = RequestLimits { alignment: 4096, max_len: 64 << 10, max_in_flight: 4 };
        let (_, base) = base(MemoryServer::new(pattern(size)).with_limits(limits));
        let identity = RemoteImage::cached(base).identity().unwrap();
        let of_file = Identity::of(file.as_file()).unwrap();
        assert_eq!((identity.size, &identity.hash), (of_file.size, &of_file.hash));
        assert_eq!(of_file.differences(&identity), None);
    }
}

/// A read or a change of a part of an image.
#[derive(Clone, Debug)]
enum Op {
    Read(Range<u64>),
    Extent(Range<u64>),
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Punch(Range<u64>),
}

fn ops(size: u64) -> impl Strategy<Value = Vec<Op>> {
    let range =
        move || (0..size, 1_u64..200_000).prop_map(move |(at, len)| at..(at + len).min(size));
    let op = prop_oneof![
        range().prop_map(Op::Read),
        range().prop_map(Op::Extent),
        (range(), any::<u8>()).prop_map(|(range, byte)| Op::Write(range, byte)),
        range().prop_map(Op::Zero),
        range().prop_map(Op::Punch),
    ];
    prop::collection::vec(op, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn reads_are_the_bytes_of_the_image(
        len in 1_usize..3_000_000,
        starts in prop::collection::vec((0_u64..3_000_000, 1_u64..700_000), 1..30),
        alignment in prop::sample::select(vec![1_u32, 512, 4096, 65_536]),
        hole in (0_u64..3_000_000, 0_u64..2_000_000),
    ) {
        let mut bytes = pattern(len);
        let size = len as u64;
        let hole = hole.0.min(size) / 4096 * 4096..(hole.0 + hole.1).min(size);
        bytes[span(&hole)].fill(0);
        let limits = RequestLimits { alignment, max_len: 256 << 10, max_in_flight: 3 };
        let server = MemoryServer::new(bytes.clone()).with_limits(limits);
        let (_, base) = base(server.with_hole(hole));
        for (start, len) in starts {
            let range = start.min(size)..(start + len).min(size);
            prop_assert!(read(&*base, range.clone()).unwrap() == bytes[span(&range)]);
        }
    }

    #[test]
    fn changes_are_those_of_a_file(
        ops in ops(1 << 20),
        alignment in prop::sample::select(vec![1_u32, 512, 65_536]),
    ) {
        let mut model = pattern(1 << 20);
        let limits = RequestLimits { alignment, max_len: 128 << 10, max_in_flight: 3 };
        let server = Arc::new(MemoryServer::new(model.clone()).with_limits(limits));
        let disk = RemoteDisk::new(RemoteSpec::new(address()), server.clone(), None).unwrap();
        for op in ops {
            match op {
                Op::Read(range) => {
                    prop_assert!(read(&disk, range.clone()).unwrap() == model[span(&range)]);
                }
                Op::Extent(range) => {
                    prop_assert_eq!(disk.extent_at(range, Wait::Yes).unwrap().kind, ExtentKind::Data);
                }
                Op::Write(range, byte) => {
                    model[span(&range)].fill(byte);
                    let buf = model[span(&range)].to_vec();
                    disk.write_at(&buf, range.start, &UnreachableBelow, Wait::Yes).unwrap();
                }
                Op::Zero(range) => {
                    model[span(&range)].fill(0);
                    disk.zero(range, &UnreachableBelow, Wait::Yes).unwrap();
                }
                Op::Punch(range) => {
                    model[span(&range)].fill(0);
                    disk.punch_hole(range, &UnreachableBelow, Wait::Yes).unwrap();
                }
            }
        }
        prop_assert!(*server.bytes.lock() == model);
    }
}

#[test]
fn a_failed_flush_latches_where_changes_may_be_lost() {
    let server = Arc::new(MemoryServer::new(pattern(8192)));
    let disk = RemoteDisk::new(RemoteSpec::new(address()), server.clone(), None).unwrap();
    disk.write_at(&[1; 512], 0, &UnreachableBelow, Wait::Yes).unwrap();
    disk.sync().unwrap();
    server.failing.lock().push((0..0, libc::EIO));
    // Nothing was changed since the last one.
    assert!(disk.sync().is_err() && !disk.is_latched());
    disk.write_at(&[2; 512], 0, &UnreachableBelow, Wait::Yes).unwrap();
    assert!(disk.sync().is_err());
    server.failing.lock().clear();
    assert!(disk.is_latched() && disk.sync().is_err());
    assert!(disk.write_at(&[1; 512], 0, &UnreachableBelow, Wait::Yes).is_err());
    assert_eq!(*server.flushes.lock(), 3);
}

#[test]
fn what_was_read_first_is_fetched_before_it_is_read_the_next_time() {
    let room = tempfile::tempdir().unwrap();
    let (file, bytes) = (room.path().join("trace"), pattern(32 << 20));
    // Small reads all over the image, and a sequential one.
    let mut reads: Vec<Range<u64>> =
        (0..60).map(|n| (n * 37 % 60 * 512) << 10).map(|at| at..at + 5000).collect();
    reads.extend((0..8).map(|n| 20 * MIB + n * (128 << 10)..20 * MIB + (n + 1) * (128 << 10)));
    let with_trace = |server: MemoryServer| {
        let (server, base) = base(server);
        let base = Arc::into_inner(base).unwrap().with_trace(&file).unwrap();
        (server, Arc::new(base))
    };
    let read_all = |base: &RemoteBase| {
        for range in &reads {
            assert!(read(base, range.clone()).unwrap() == bytes[span(range)]);
        }
    };
    let fetched = |server: &SharedServer| {
        server.reads.lock().iter().map(|read| read.end - read.start).sum::<u64>()
    };
    let (_, recorded) = with_trace(MemoryServer::new(bytes.clone()));
    read_all(&recorded);
    assert!(!file.exists());
    drop(recorded);
    let text = std::fs::read_to_string(&file).unwrap();
    let lens =
        text.lines().skip(1).map(|line| line.split_once(' ').unwrap().1.parse::<u64>().unwrap());
    let touched = lens.sum::<u64>();
    // Two of the small reads are in the sequential one.
    assert_eq!(touched, 58 * 8192 + MIB, "{text}");

    // Without a read all of it comes, and little else.
    let (server, ahead) = with_trace(MemoryServer::new(bytes.clone()));
    let until = Instant::now() + Duration::from_secs(20);
    while fetched(&server) < touched && Instant::now() < until {
        thread::sleep(Duration::from_millis(1));
    }
    read_all(&ahead);
    let brought = fetched(&server);
    assert!((touched..touched + touched / 10).contains(&brought), "{brought} for {touched}");
    // Nor does a reader that is faster.
    let slow = MemoryServer::new(bytes.clone()).with_delay(Duration::from_millis(5));
    let (server, ahead) = with_trace(slow);
    read_all(&ahead);
    drop(ahead);
    assert!(fetched(&server) < touched + touched / 10, "{} for {touched}", fetched(&server));
    // What the trace has not is fetched as ever.
    let (_, ahead) = with_trace(MemoryServer::new(bytes.clone()));
    assert!(read(&*ahead, 0..32 * MIB).unwrap() == bytes);
    std::fs::write(&file, "no trace").unwrap();
    let (_, other) = base(MemoryServer::new(bytes));
    let refused = Arc::into_inner(other).unwrap().with_trace(&file).err().unwrap();
    assert!(refused.contains("it is no trace"), "{refused}");
}

#[test]
fn a_trace_is_fetched_at_its_rate() {
    let room = tempfile::tempdir().unwrap();
    let file = room.path().join("trace");
    std::fs::write(&file, "cowslip trace 1\n1048576 4194304\n").unwrap();
    let server = Arc::new(MemoryServer::new(pattern(16 << 20)));
    let cache = Arc::new(Cache::temporary(16 << 20, 1 << 30).unwrap());
    let rate = 2 << 20;
    let spec = RemoteSpec { prefetch_rate: rate, ..RemoteSpec::new(address()) };
    let identity = identity_of(&*server).unwrap();
    let (start, before) = (Instant::now(), server.reads.lock().len());
    let base = RemoteBase::new(&spec, identity, server.clone(), cache, None).unwrap();
    let base = base.with_trace(&file).unwrap();
    // 4 MiB take 2 s.
    let mut done = 0;
    while done < 4 * MIB {
        done = server.reads.lock()[before..].iter().map(|read| read.end - read.start).sum();
        // One step, and what is lost to whole milliseconds.
        let elapsed = u64::try_from(start.elapsed().as_millis()).unwrap() + 1;
        let may_be = rate * elapsed / 1000 + rate / 4;
        assert!(done <= may_be, "{done} after {:?}", start.elapsed());
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(20));
    }
    drop(base);
}
