//! Images with a bmap, through the whole engine, against a server in memory.

// A bmap may have one range.
#![allow(clippy::single_range_in_vec_init)]

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use crate::config::RemoteSpec;
use crate::extents::ExtentKind;
use crate::formats::bmap::{Bmap, BmapRange};
use crate::layer::{Layer, Wait, read_exact};
use crate::remote::base::RemoteBase;
use crate::remote::bmap::SumStatus;
use crate::remote::cache::{Cache, Urgency};
use crate::remote::samples::identity_of;
use crate::remote::testing::{MemoryServer, SharedServer, address, pattern};
use crate::remote::transport::Transport;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// Returns an image with data in `mapped` alone, and its bmap.
fn image(size: u64, mapped: &[Range<u64>]) -> (Vec<u8>, Bmap) {
    let all = pattern(usize::try_from(size).unwrap());
    let mut bytes = vec![0; all.len()];
    let mut ranges = Vec::new();
    for range in mapped {
        let data = &all[span(range)];
        bytes[span(range)].copy_from_slice(data);
        ranges.push(BmapRange { bytes: range.clone(), sum: Some(Sha256::digest(data).into()) });
    }
    (bytes, Bmap { image_size: size, block_size: 4096, ranges, digest: [0; 32] })
}

fn base_with(server: MemoryServer, bmap: &Bmap, cache: Cache) -> (SharedServer, Arc<RemoteBase>) {
    let server = Arc::new(server);
    let spec = RemoteSpec { ahead: MIB, ..RemoteSpec::new(address()) };
    let identity = identity_of(&*server).unwrap();
    server.reads.lock().clear();
    let transport = Arc::clone(&server) as Arc<dyn Transport>;
    let base = RemoteBase::new(&spec, identity, transport, Arc::new(cache), Some(bmap)).unwrap();
    (server, Arc::new(base))
}

fn base(bytes: Vec<u8>, bmap: &Bmap) -> (SharedServer, Arc<RemoteBase>) {
    let cache = Cache::temporary(bmap.image_size, 1 << 30).unwrap();
    base_with(MemoryServer::new(bytes), bmap, cache)
}

fn read(base: &RemoteBase, range: Range<u64>) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; usize::try_from(range.end - range.start).unwrap()];
    read_exact(base, &mut bytes, range.start)?;
    Ok(bytes)
}

fn sums(base: &RemoteBase) -> SumStatus {
    base.status().sums.unwrap()
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn holes_are_those_of_the_bmap_and_cost_no_request() {
    let mapped = [64 * KIB..128 * KIB, 128 * KIB..132 * KIB, 3 * MIB..3 * MIB + 100];
    let (bytes, bmap) = image(3 * MIB + 100, &mapped);
    let (server, base) = base(bytes.clone(), &bmap);
    let (mut at, mut found) = (0, Vec::new());
    while at < base.size() {
        let extent = base.extent_at(at..base.size(), Wait::No).unwrap();
        at = extent.range.end;
        found.push((extent.range, extent.kind));
    }
    let (data, hole) = (ExtentKind::Data, ExtentKind::Hole);
    let want = [
        (0..64 * KIB, hole),
        (64 * KIB..132 * KIB, data),
        (132 * KIB..3 * MIB, hole),
        (3 * MIB..3 * MIB + 100, data),
    ];
    assert_eq!(found, want);
    assert_eq!(read(&base, 0..64 * KIB).unwrap(), bytes[..64 << 10]);
    assert_eq!(read(&base, 200 * KIB..3 * MIB).unwrap(), bytes[200 << 10..3 << 20]);
    assert!(server.reads.lock().is_empty());
    assert_eq!(*server.extent_questions.lock(), 0);
    assert_eq!(read(&base, 0..base.size()).unwrap(), bytes);
    let asked: u64 = server.reads.lock().iter().map(|read| read.end - read.start).sum();
    assert_eq!(asked, 68 * KIB + 100);
    assert_eq!(sums(&base), SumStatus { verified: 3, ranges: 3, mismatch: None });
}

#[test]
fn a_short_range_that_does_not_match_is_never_answered() {
    let mapped = [0..200 * KIB, MIB..MIB + 256 * KIB, 2 * MIB..3 * MIB];
    let (mut bytes, bmap) = image(4 * MIB, &mapped);
    bytes[(1 << 20) + (250 << 10)] ^= 1;
    let (server, base) = base(bytes.clone(), &bmap);
    assert_eq!(read(&base, 8192..12_288).unwrap(), bytes[8192..12_288]);
    // Its bytes far from the wrong one are not answered either.
    for range in [MIB..MIB + 4096, 0..4096, 2 * MIB..2 * MIB + 1, 3 * MIB..4 * MIB] {
        let error = read(&base, range).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    let lent = base.lend_at(0..4096, Wait::Yes, &mut |_, _| panic!("bytes were lent"));
    assert_eq!(lent.unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(sums(&base).mismatch, Some(MIB..MIB + 256 * KIB));
    // Holes are still told, for who looks at what lies above.
    assert_eq!(base.extent_at(3 * MIB..4 * MIB, Wait::No).unwrap().kind, ExtentKind::Hole);
    assert!(!base.cache().missing(&(MIB..MIB + 4096)).is_empty());
    assert!(server.reads.lock().iter().all(|read| read.end <= MIB + 256 * KIB));
}

#[test]
fn a_long_range_is_compared_once_all_of_it_is_there() {
    let (mut bytes, bmap) = image(8 * MIB, &[0..3 * MIB, 4 * MIB..8 * MIB - 4096]);
    bytes[7 << 20] ^= 1;
    let (_, base) = base(bytes.clone(), &bmap);
    // Backwards, so that the first byte comes last.
    for at in (0..3).rev() {
        assert_eq!(sums(&base).verified, 0);
        assert_eq!(read(&base, at * MIB..(at + 1) * MIB).unwrap().len(), 1 << 20);
    }
    wait_until("it is compared", || sums(&base).verified == 1);
    // Too far from its end for the read-ahead to bring that.
    read(&base, 4 * MIB..6 * MIB).unwrap();
    // Fails from the moment when all of it is compared.
    let _ = read(&base, 6 * MIB..8 * MIB);
    wait_until("it is compared", || sums(&base).mismatch.is_some());
    assert_eq!(sums(&base).mismatch, Some(4 * MIB..8 * MIB - 4096));
    assert_eq!(read(&base, 0..4096).unwrap_err().raw_os_error(), Some(libc::EIO));
    // The next mount fetches it anew, and the other one not.
    let missing = base.cache().missing(&(0..8 * MIB));
    assert!(missing.first().is_some_and(|first| first.start >= 3 * MIB), "{missing:?}");
    assert!(base.cache().first_missing(&(7 * MIB..8 * MIB)) == Some(7 * MIB));
}

#[test]
fn what_an_earlier_mount_has_kept_is_compared_again() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (bytes, bmap) = image(4 * MIB, &[0..3 * MIB]);
    let open = || Cache::open(dir.path(), b"x", 4 * MIB, 1 << 30).unwrap();
    let (_, first) = base_with(MemoryServer::new(bytes.clone()), &bmap, open());
    read(&first, 0..4 * MIB).unwrap();
    wait_until("it is compared", || sums(&first).verified == 1);
    let counters = first.cache().counters();
    drop(first);
    // The thread may have been holding it.
    wait_until("the cache is closed", || open().is_persistent());
    let (server, again) = base_with(MemoryServer::new(bytes.clone()), &bmap, open());
    wait_until("it is compared", || sums(&again).verified == 1);
    assert!(server.reads.lock().is_empty());
    assert_eq!(again.cache().counters().hits, 0, "{counters:?}");
    drop(again);
    // Of another bmap: it does not match, and is fetched anew the next time.
    let (_, mut other) = image(4 * MIB, &[0..3 * MIB]);
    other.ranges[0].sum = Some([7; 32]);
    wait_until("the cache is closed", || open().is_persistent());
    let (_, wrong) = base_with(MemoryServer::new(bytes), &other, open());
    wait_until("it is compared", || sums(&wrong).mismatch.is_some());
    drop(wrong);
    wait_until("the cache is closed", || open().is_persistent());
    assert_eq!(open().missing(&(0..4 * MIB)), [0..4 * MIB]);
}

#[test]
fn what_was_given_up_before_its_range_was_whole_is_compared_when_it_is_whole_again() {
    let (bytes, bmap) = image(5 * MIB, &[0..4 * MIB]);
    let (_, base) = base(bytes.clone(), &bmap);
    read(&base, 0..3 * MIB).unwrap();
    base.cache().forget(&(MIB..2 * MIB));
    read(&base, 3 * MIB..4 * MIB).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(sums(&base).verified, 0);
    read(&base, MIB..2 * MIB).unwrap();
    wait_until("it is compared", || sums(&base).verified == 1);
    // What is fetched again later counts only once it was compared again.
    base.cache().forget(&(2 * MIB..4 * MIB));
    read(&base, 2 * MIB..2 * MIB + 4096).unwrap();
    wait_until("it is looked at", || sums(&base).verified == 0);
    assert_eq!(read(&base, 0..5 * MIB).unwrap(), bytes);
    wait_until("it is compared", || sums(&base).verified == 1);
}

#[test]
fn a_long_request_ends_where_a_short_range_does() {
    let mapped: Vec<_> = (0..15).map(|at| at * 200 * KIB..(at + 1) * 200 * KIB).collect();
    let (bytes, bmap) = image(3000 * KIB, &mapped);
    let (server, base) = base(bytes.clone(), &bmap);
    assert_eq!(read(&base, 0..3000 * KIB).unwrap(), bytes);
    let reads = server.reads.lock();
    assert!(reads.iter().all(|read| read.end.is_multiple_of(200 * KIB)), "{reads:?}");
    assert_eq!(sums(&base).verified, 15);
}

#[test]
fn the_beginning_that_came_at_the_opening_is_compared_too() {
    let (bytes, bmap) = image(MIB, &[0..32 * KIB, 40 * KIB..MIB]);
    let (_, good) = base(bytes.clone(), &bmap);
    good.keep_head(bytes[..64 << 10].to_vec()).unwrap();
    assert!(good.cache().missing(&(0..64 * KIB)).is_empty());
    assert_eq!(sums(&good).verified, 1);
    let (_, bad) = base(bytes.clone(), &bmap);
    let mut head = bytes[..64 << 10].to_vec();
    head[7] ^= 1;
    assert_eq!(bad.keep_head(head).unwrap_err().raw_os_error(), Some(libc::EIO));
    // A part of a range that is to be whole is not kept.
    let (bytes, bmap) = image(MIB, &[0..32 * KIB, 40 * KIB..200 * KIB]);
    let (_, cut) = base(bytes.clone(), &bmap);
    cut.keep_head(bytes[..64 << 10].to_vec()).unwrap();
    assert!(cut.cache().missing(&(0..40 * KIB)).is_empty());
    assert!(!cut.cache().missing(&(40 * KIB..44 * KIB)).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn reads_are_right_and_no_request_cuts_a_short_range(
        layout in prop::collection::vec((0_u64..80, 1_u64..120), 1..30),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 1_u64..200_000), 1..30),
        evicted in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        tail in 1_u64..4096,
    ) {
        let (mut at, mut mapped) = (0, Vec::new());
        for (gap, len) in layout {
            mapped.push(at + gap * 4096..at + (gap + len) * 4096);
            at += (gap + len) * 4096;
        }
        mapped.push(at..at + tail);
        let size = at + tail;
        let (bytes, bmap) = image(size, &mapped);
        let (server, base) = base(bytes.clone(), &bmap);
        let mut evicted = evicted.into_iter();
        for (place, len) in reads {
            let start = place.index(bytes.len()) as u64;
            let range = start..(start + len).min(size);
            prop_assert_eq!(read(&base, range.clone()).unwrap(), &bytes[span(&range)]);
            if let Some(place) = evicted.next() {
                let at = place.index(bytes.len()) as u64;
                base.cache().forget(&(at..at + 1));
            }
        }
        base.cache().forget(&(0..size));
        prop_assert_eq!(read(&base, 0..size).unwrap(), bytes);
        for read in server.reads.lock().iter() {
            for range in mapped.iter().filter(|range| range.end - range.start <= 256 * KIB) {
                for end in [read.start, read.end] {
                    prop_assert!(end <= range.start || end >= range.end, "{:?} {:?}", read, range);
                }
            }
        }
        wait_until("all is compared", || sums(&base).verified == mapped.len() as u64);
    }
}

#[test]
fn bytes_of_the_host_that_does_not_keep_them_are_forgotten_too() {
    let cache = Cache::temporary(MIB, 1 << 30).unwrap();
    cache.store(0, vec![1; 1 << 20], Urgency::Demand);
    cache.forget(&(300 * KIB..300 * KIB + 1));
    assert_eq!(cache.missing(&(0..MIB)), [256 * KIB..512 * KIB]);
    assert_eq!(cache.first_missing(&(0..MIB)), Some(256 * KIB));
    assert_eq!(cache.first_missing(&(512 * KIB..MIB)), None);
    assert_eq!(cache.first_missing(&(7..7)), None);
}
