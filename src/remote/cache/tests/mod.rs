//! The cache against a plain byte array, with threads, and on a full host.

mod persistent;

use std::sync::atomic::AtomicUsize;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::host::testing::{LoopDevice, Mounted, run};

/// The bytes of an image: different in every word, and in every image.
fn bytes_of(image: u64, range: Range<u64>) -> Vec<u8> {
    let words = range.start / 8..range.end.div_ceil(8);
    let word = |at: u64| (at + 1).wrapping_add(image << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(byte_len(&words) * 8);
    words.for_each(|at| bytes.extend_from_slice(&word(at).to_le_bytes()));
    bytes.drain(..(range.start % 8) as usize);
    bytes.truncate(byte_len(&range));
    bytes
}

fn small_cache(size: u64, cap: u64) -> Cache {
    Cache::new(tempfile::tempfile_in("/var/tmp").unwrap(), Units::new(), size, cap)
}

/// Reads `range` and checks every byte that is found; returns how many were.
fn checked_read(cache: &Cache, image: u64, range: Range<u64>, wait: Wait) -> io::Result<usize> {
    let mut buf = vec![0xee; byte_len(&range)];
    let found = cache.read_at(&mut buf, range.start, wait)?;
    let expected = bytes_of(image, range.start..range.start + found as u64);
    assert!(buf[..found] == expected, "wrong bytes in {range:?}, {found} found");
    Ok(found)
}

#[derive(Clone, Debug)]
enum Op {
    Store(u64, u64),
    Read(u64, u64),
    Missing(u64, u64),
    Lend(u64, u64),
}

fn ops(size: u64) -> impl Strategy<Value = Vec<Op>> {
    let range = (0..size, 1..size / 3);
    let op = prop_oneof![
        range.clone().prop_map(|(at, len)| Op::Store(at, len)),
        range.clone().prop_map(|(at, len)| Op::Read(at, len)),
        range.clone().prop_map(|(at, len)| Op::Missing(at, len)),
        range.prop_map(|(at, len)| Op::Lend(at, len)),
    ];
    prop::collection::vec(op, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Without evictions, exactly the whole blocks that were stored are there; with them, never a
    /// wrong byte, and never more than the limit.
    #[test]
    fn what_is_found_is_what_was_stored(
        size in 1u64..3 << 20,
        is_limited: bool,
        ops in ops(3 << 20),
    ) {
        let cap = if is_limited { 1 << 20 } else { 1 << 30 };
        let cache = small_cache(size, cap);
        let mut is_there = vec![false; usize::try_from(size.div_ceil(BLOCK_SIZE)).unwrap()];
        for op in ops {
            match op {
                Op::Store(at, len) if at < size => {
                    let end = (at + len).min(size);
                    cache.store(at, bytes_of(1, at..end), Urgency::Demand);
                    let last = if end == size { end.div_ceil(BLOCK_SIZE) } else { end / BLOCK_SIZE };
                    for block in at.div_ceil(BLOCK_SIZE)..last {
                        is_there[usize::try_from(block).unwrap()] = true;
                    }
                    prop_assert!(cache.counters().present_bytes <= cap);
                }
                Op::Read(at, len) => {
                    let found = checked_read(&cache, 1, at..at + len, Wait::Yes).unwrap();
                    let blocks = is_there.iter().skip(usize::try_from(at / BLOCK_SIZE).unwrap());
                    let end = blocks.take_while(|there| **there).count() as u64 + at / BLOCK_SIZE;
                    let most = (end * BLOCK_SIZE).min(size).min(at + len).saturating_sub(at);
                    if is_limited {
                        prop_assert!(found as u64 <= most);
                    } else {
                        prop_assert_eq!(found as u64, most);
                    }
                }
                Op::Missing(at, len) => {
                    let missing = cache.missing(&(at..at + len));
                    let first = at / BLOCK_SIZE;
                    // Nothing is missing behind the end.
                    let last = if at < size { (at + len).min(size).div_ceil(BLOCK_SIZE) } else { 0 };
                    for block in first..last.max(first) {
                        let is_missing =
                            missing.iter().any(|range| range.contains(&(block * BLOCK_SIZE)));
                        let there = is_there[usize::try_from(block).unwrap()];
                        let is_right = is_missing != there || (is_limited && is_missing);
                        prop_assert!(is_right, "block {}", block);
                    }
                    for range in missing {
                        prop_assert!(range.start % BLOCK_SIZE == 0 && range.end <= size);
                        prop_assert!(range.end % BLOCK_SIZE == 0 || range.end == size);
                        prop_assert!(range.end > at && range.start < at + len);
                    }
                }
                Op::Lend(at, len) => {
                    let mut lent = Vec::new();
                    let got = cache.lend_at(at..at + len, Wait::Yes, &mut |fd, range| {
                        lent = vec![0; byte_len(&range)];
                        assert_eq!(rustix::io::pread(fd, &mut lent, range.start)?, lent.len());
                        Ok(7)
                    }).unwrap();
                    let found = checked_read(&cache, 1, at..at + len, Wait::Yes).unwrap();
                    prop_assert_eq!(got.is_some(), found > 0);
                    if let Some((range, 7)) = got {
                        prop_assert_eq!((range.start, byte_len(&range)), (at, lent.len()));
                        prop_assert!(lent.len() <= found && lent == bytes_of(1, range));
                    }
                }
                Op::Store(..) => {}
            }
        }
    }
}

/// Stores and reads at random places of an image of `size` bytes, with three threads each; every byte
/// that is found is checked. Returns how many bytes were found.
fn store_and_read_at_once(cache: &Cache, image: u64, size: u64, rounds: u64) -> usize {
    let (found, writers_done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let next = |at: u64| at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
    thread::scope(|scope| {
        for writer in 0..3u64 {
            let writers_done = &writers_done;
            scope.spawn(move || {
                let mut at = writer * 7919;
                for _ in 0..rounds {
                    at = next(at);
                    let start = (at >> 20) % (size / BLOCK_SIZE) * BLOCK_SIZE;
                    let len = (1 + (at >> 50) % 100) * BLOCK_SIZE;
                    let range = start..(start + len).min(size);
                    cache.store(start, bytes_of(image, range), Urgency::Demand);
                }
                writers_done.fetch_add(1, Ordering::Relaxed);
            });
        }
        for reader in 0..3u64 {
            let (found, writers_done) = (&found, &writers_done);
            scope.spawn(move || {
                let mut at = reader + 17;
                for round in 0u64.. {
                    if writers_done.load(Ordering::Relaxed) == 3 {
                        break;
                    }
                    at = next(at);
                    let start = (at >> 20) % size;
                    let range = start..start + 1 + (at >> 45) % 70_000;
                    let wait = if round % 3 == 0 { Wait::Yes } else { Wait::No };
                    match checked_read(cache, image, range, wait) {
                        Ok(len) => drop(found.fetch_add(len, Ordering::Relaxed)),
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EAGAIN)),
                    }
                }
            });
        }
    });
    let mut present = 0;
    cache.units.for_each(|_, unit| present += u64::from(unit.present.count_ones()) * BLOCK_SIZE);
    assert_eq!(present, cache.counters().present_bytes);
    found.into_inner()
}

#[test]
fn no_reader_sees_a_wrong_byte_while_others_store_and_evict() {
    // A quarter of the image has room, so that units come and go all the time.
    let cache = small_cache(16 << 20, 4 << 20);
    let found = store_and_read_at_once(&cache, 2, 16 << 20, 400);
    let counters = cache.counters();
    assert!(found > 1 << 20 && counters.evicted_bytes > 10 << 20, "{counters:?}");
    assert!(counters.present_bytes <= 4 << 20, "{counters:?}");
}

#[test]
fn the_number_of_units_is_limited_too() {
    let mut cache = small_cache(1 << 40, 1 << 30);
    cache.max_units = 100;
    for at in 0..1000 {
        let start = at * 7_919 * UNIT_SIZE % (1 << 40);
        cache.store(start, bytes_of(3, start..start + BLOCK_SIZE), Urgency::Demand);
        assert_eq!(checked_read(&cache, 3, start..start + 1, Wait::Yes).unwrap(), 1);
    }
    assert_eq!((cache.units.count(), cache.counters().present_bytes), (100, 100 * BLOCK_SIZE));
    // What MIN_UNITS is reckoned with.
    assert_eq!(size_of::<(u64, Unit)>(), 32);
}

#[test]
fn evicted_units_give_their_room_back() {
    use std::os::unix::fs::MetadataExt;
    let cache = small_cache(64 << 20, 2 << 20);
    for at in 0..64 {
        cache.store(at << 20, bytes_of(3, at << 20..(at + 1) << 20), Urgency::Ahead);
    }
    assert_eq!(cache.counters().present_bytes, 2 << 20);
    let allocated = cache.file.metadata().unwrap().blocks() * 512;
    assert!(allocated <= 3 << 20, "{allocated}");
    // The last ones are there.
    assert_eq!(cache.missing(&(62 << 20..64 << 20)), []);
}

#[test]
fn what_is_used_stays() {
    let cache = small_cache(64 << 20, 4 << 20);
    let first = 0..UNIT_SIZE;
    for at in 0..64 {
        cache.store(at << 20, bytes_of(3, at << 20..(at + 1) << 20), Urgency::Ahead);
        assert_eq!(checked_read(&cache, 3, first.clone(), Wait::Yes).unwrap(), 256 << 10);
    }
}

/// A file system of `size` bytes on a loop device.
struct SmallFs {
    mounted: Mounted,
    _device: LoopDevice,
    _room: tempfile::TempDir,
}

fn small_fs(size: u64) -> SmallFs {
    let room = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = room.path().join("fs.img");
    File::create(&file).unwrap().set_len(size).unwrap();
    run("mkfs.ext4", &["-q", "-F", "-m", "0", file.to_str().unwrap()]);
    let device = LoopDevice::new(&file, &[]);
    let mounted = Mounted::new(device.path(), &room.path().join("m"));
    SmallFs { mounted, _device: device, _room: room }
}

#[test]
fn on_a_full_host_reads_go_on() {
    const PART: u64 = 256 << 10;
    let fs = small_fs(72 << 20);
    let dir = fs.mounted.path();
    let cache = Cache::new(tempfile::tempfile_in(dir).unwrap(), Units::new(), 1 << 30, 512 << 20);
    let store_and_read = |part: u64| {
        let range = part * PART..(part + 1) * PART;
        cache.store(range.start, bytes_of(4, range.clone()), Urgency::Demand);
        assert_eq!(cache.missing(&range), []);
        assert_eq!(checked_read(&cache, 4, range, Wait::Yes).unwrap(), 256 << 10);
    };
    // More than there is room for: the oldest units go.
    (0..400).for_each(store_and_read);
    let counters = cache.counters();
    assert!(counters.evicted_bytes > 16 << 20 && counters.present_bytes > MIN_CAP, "{counters:?}");
    assert_eq!(counters.overflowed_bytes, 0);
    // Somebody else takes what the cache gives up.
    let other = tempfile::tempfile_in(dir).unwrap();
    let mut taken = 0;
    for part in 400..700 {
        while host::write_all_at(&other, &[io::IoSlice::new(&[1; 65536])], taken).is_ok() {
            taken += 65536;
        }
        store_and_read(part);
    }
    let full = cache.counters();
    assert!(full.overflowed_bytes > 1 << 20 && full.present_bytes <= MIN_CAP, "{full:?}");
    // There is room again.
    drop(other);
    (700..800).for_each(store_and_read);
    let counters = cache.counters();
    assert_eq!(counters.overflowed_bytes, full.overflowed_bytes);
    assert!(counters.present_bytes >= full.present_bytes + (24 << 20), "{counters:?}");
}
