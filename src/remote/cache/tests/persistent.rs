//! Caches that are opened again, after a clean end, after damage of every kind, and beside others.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::*;
use crate::remote::cache::record::{HEADER_LEN, RECORD_LEN};

const SIZE: u64 = (2 << 20) + 4500;
const CAP: u64 = 1 << 30;

fn room() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").unwrap()
}

fn open(dir: &Path, cap: u64) -> Cache {
    Cache::open_limited(dir, b"image", SIZE, cap).unwrap()
}

/// The directories of the images in `dir`.
fn images(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_dir()).collect()
}

fn file_of(dir: &Path, name: &str) -> PathBuf {
    let images = images(dir);
    assert_eq!(images.len(), 1);
    images[0].join(name)
}

fn store(cache: &Cache, range: Range<u64>) {
    cache.store(range.start, bytes_of(1, range), Urgency::Demand);
}

/// Reads all of the image that is there; returns how many bytes that was.
fn read_all(cache: &Cache) -> u64 {
    let blocks = (0..SIZE).step_by(4096);
    let read = |at: u64| checked_read(cache, 1, at..(at + 4096).min(SIZE), Wait::Yes).unwrap();
    blocks.map(|at| read(at) as u64).sum()
}

#[derive(Clone, Debug)]
enum PersistentOp {
    Store(u64, u64),
    Read(u64, u64),
    Reopen,
    FlipData(u64),
    CutData(u64),
    FlipMap(u64),
    CutMap(u64),
    /// Bytes that never reached the disk.
    Lose(u64, u64),
    OldMap,
}

fn persistent_op() -> impl Strategy<Value = PersistentOp> {
    use PersistentOp::*;
    let range = (0..SIZE, 1..SIZE / 2);
    prop_oneof![
        6 => range.clone().prop_map(|(at, len)| Store(at, len)),
        4 => range.clone().prop_map(|(at, len)| Read(at, len)),
        2 => Just(Reopen),
        1 => (0..SIZE).prop_map(FlipData),
        1 => (0..SIZE).prop_map(CutData),
        1 => any::<u64>().prop_map(FlipMap),
        1 => any::<u64>().prop_map(CutMap),
        1 => range.prop_map(|(at, len)| Lose(at, len)),
        1 => Just(OldMap),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever happens to the files while nobody has them open: no wrong byte, and without damage and
    /// eviction nothing is lost.
    #[test]
    fn what_is_found_after_reopening_is_right(
        is_limited: bool,
        ops in prop::collection::vec(persistent_op(), 1..30),
    ) {
        use PersistentOp::*;
        let room = room();
        let cap = if is_limited { 768 << 10 } else { CAP };
        let mut opened = Some(open(room.path(), cap));
        let mut is_damaged = false;
        let mut old_map = fs::read(file_of(room.path(), "map")).unwrap();
        for op in ops {
            let is_offline = !matches!(op, Store(..) | Read(..));
            let before = opened.as_ref().unwrap().counters().present_bytes;
            let cache = if is_offline { drop(opened.take()); None } else { opened.take() };
            let path = |name| file_of(room.path(), name);
            let open_file = |name| File::options().read(true).write(true).open(path(name)).unwrap();
            let flip = |file: File, at: u64| {
                let mut byte = [0];
                if file.read_at(&mut byte, at).unwrap() == 1 {
                    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
                }
            };
            let cut = |file: File, len: u64| {
                let found = file.metadata().unwrap().len();
                file.set_len(len.min(found)).unwrap();
            };
            match op {
                Reopen => {}
                FlipData(at) => flip(open_file("data"), at),
                CutData(len) => cut(open_file("data"), len),
                FlipMap(at) => {
                    let len = open_file("map").metadata().unwrap().len();
                    flip(open_file("map"), at % len);
                }
                CutMap(len) => {
                    let found = open_file("map").metadata().unwrap().len();
                    cut(open_file("map"), len % (found + 1));
                }
                Lose(at, len) => {
                    let data = open_file("data");
                    let end = (at + len).min(data.metadata().unwrap().len());
                    if at < end {
                        host::punch_hole(&data, at..end).unwrap();
                    }
                }
                OldMap => fs::write(path("map"), &old_map).unwrap(),
                Store(at, len) => store(cache.as_ref().unwrap(), at..(at + len).min(SIZE)),
                Read(at, len) => {
                    let cache = cache.as_ref().unwrap();
                    checked_read(cache, 1, at..at + len, Wait::Yes).unwrap();
                }
            }
            opened = cache;
            if is_offline {
                is_damaged |= !matches!(op, Reopen);
                old_map = fs::read(path("map")).unwrap();
                let cache = opened.insert(open(room.path(), cap));
                if !is_damaged {
                    prop_assert_eq!(cache.counters().present_bytes, before);
                }
            }
            prop_assert!(opened.as_ref().unwrap().counters().present_bytes <= cap);
        }
        let cache = opened.unwrap();
        let present = cache.counters().present_bytes;
        let read = read_all(&cache);
        prop_assert!(read <= present);
        if !is_damaged {
            prop_assert_eq!(cache.counters().dropped_bytes, 0);
            prop_assert_eq!(read.next_multiple_of(4096), present);
        }
        // What was dropped can be fetched again.
        store(&cache, 0..SIZE);
        if !is_limited {
            prop_assert_eq!(read_all(&cache), SIZE);
            drop(cache);
            prop_assert_eq!(read_all(&open(room.path(), cap)), SIZE);
        }
    }
}

#[test]
fn bad_bytes_are_dropped_and_fetched_again() {
    let room = room();
    let cache = open(room.path(), CAP);
    store(&cache, 0..SIZE);
    drop(cache);
    let data = File::options().write(true).open(file_of(room.path(), "data")).unwrap();
    data.write_all_at(&[bytes_of(1, 70_000..70_001)[0] ^ 1], 70_000).unwrap();
    let cache = open(room.path(), CAP);
    assert_eq!(cache.missing(&(0..SIZE)), []);
    // 64 KiB are compared at once.
    let bad = 64 << 10..128 << 10;
    assert_eq!(checked_read(&cache, 1, bad.clone(), Wait::Yes).unwrap(), 0);
    assert_eq!(cache.missing(&(0..SIZE)), std::slice::from_ref(&bad));
    assert_eq!(cache.counters().dropped_bytes, 64 << 10);
    store(&cache, bad);
    assert_eq!(read_all(&cache), SIZE);
    drop(cache);
    assert_eq!(read_all(&open(room.path(), CAP)), SIZE);
}

#[test]
fn the_cache_of_one_image_is_nothing_to_another() {
    let room = room();
    drop(open(room.path(), CAP));
    let first = images(room.path()).remove(0);
    let other = Cache::open_limited(room.path(), b"other", SIZE, CAP).unwrap();
    other.store(0, bytes_of(2, 0..SIZE), Urgency::Demand);
    drop(other);
    let second = images(room.path()).into_iter().find(|path| *path != first).unwrap();
    for name in ["data", "map"] {
        fs::copy(second.join(name), first.join(name)).unwrap();
    }
    assert_eq!(read_all(&open(room.path(), CAP)), 0);
    // Not even when the map says that it is of this image.
    let cache = open(room.path(), CAP);
    let header = fs::read(first.join("map")).unwrap()[..HEADER_LEN].to_vec();
    drop(cache);
    let records = fs::read(second.join("map")).unwrap()[HEADER_LEN..].to_vec();
    fs::write(first.join("map"), [header, records].concat()).unwrap();
    fs::copy(second.join("data"), first.join("data")).unwrap();
    assert_eq!(read_all(&open(room.path(), CAP)), 0);
    // The same identity with another size is another image.
    drop(Cache::open_limited(room.path(), b"image", SIZE - 1, CAP).unwrap());
    assert_eq!(images(room.path()).len(), 3);
}

#[test]
fn what_no_record_describes_gives_its_room_back() {
    let room = room();
    let cache = open(room.path(), CAP);
    store(&cache, 0..1 << 20);
    drop(cache);
    let map = file_of(room.path(), "map");
    let keep = (HEADER_LEN + 2 * RECORD_LEN) as u64;
    File::options().write(true).open(map).unwrap().set_len(keep).unwrap();
    let cache = open(room.path(), CAP);
    assert_eq!(cache.counters().present_bytes, 128 << 10);
    let allocated = file_of(room.path(), "data").metadata().unwrap().blocks() * 512;
    assert!(allocated <= 160 << 10, "{allocated}");
    assert_eq!(read_all(&cache), 128 << 10);
}

#[test]
fn the_map_stays_short_while_units_come_and_go() {
    let room = room();
    let cache = open(room.path(), 512 << 10);
    for round in 0..6000u64 {
        let at = round * 7 % 500 * BLOCK_SIZE;
        store(&cache, at..at + BLOCK_SIZE);
    }
    let len = file_of(room.path(), "map").metadata().unwrap().len();
    assert!(len < (HEADER_LEN + 3 * 4096 * RECORD_LEN) as u64, "{len}");
    let present = cache.counters().present_bytes;
    let evicted = cache.counters().evicted_bytes;
    assert!(evicted > 4 << 20 && present > 256 << 10, "{evicted}, {present}");
    drop(cache);
    let cache = open(room.path(), 512 << 10);
    assert_eq!(cache.counters().present_bytes, present);
    assert_eq!((read_all(&cache), cache.counters().dropped_bytes), (present, 0));
}

#[test]
fn a_cache_in_use_is_left_to_its_user() {
    let room = room();
    let first = open(room.path(), CAP);
    store(&first, 0..SIZE);
    let second = open(room.path(), CAP);
    assert!(first.is_persistent() && !second.is_persistent());
    assert_eq!(read_all(&second), 0);
    assert_eq!(read_all(&first), SIZE);
    drop(first);
    let third = open(room.path(), CAP);
    assert!(third.is_persistent());
    assert_eq!(read_all(&third), SIZE);
}

#[test]
fn the_limit_holds_for_all_images_and_the_oldest_unused_one_goes_first() {
    const PART: u64 = 1 << 20;
    let room = room();
    let cap = 4 * PART + PART / 4;
    let open = |name: &[u8]| Cache::open_limited(room.path(), name, 2 * PART, cap).unwrap();
    let fill = |cache: &Cache| cache.store(0, bytes_of(1, 0..PART), Urgency::Demand);
    for name in [b"a", b"b", b"c"] {
        fill(&open(name));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // The use of `a` makes `b` the oldest.
    drop(open(b"a"));
    let live = open(b"live");
    fill(&live);
    assert_eq!(images(room.path()).len(), 4);
    live.store(PART, bytes_of(1, PART..2 * PART), Urgency::Demand);
    assert_eq!(images(room.path()).len(), 3);
    assert_eq!(live.counters().present_bytes, 2 * PART);
    let present = |name| open(name).counters().present_bytes;
    assert_eq!([present(b"a"), present(b"c")], [PART; 2]);
    assert_eq!(present(b"b"), 0);
}

#[test]
fn images_in_use_share_the_limit() {
    const PART: u64 = 1 << 20;
    let room = room();
    let open = |name: &[u8]| Cache::open_limited(room.path(), name, 8 * PART, 4 * PART).unwrap();
    let fill = |cache: &Cache| cache.store(0, bytes_of(1, 0..8 * PART), Urgency::Demand);
    let first = open(b"first");
    fill(&first);
    assert!(first.counters().present_bytes > 3 * PART);
    let second = open(b"second");
    fill(&second);
    first.maintain();
    let used = [&first, &second].map(|cache| cache.counters().present_bytes);
    assert!(used[0] <= 2 * PART + PART / 2 && used[1] >= PART && used[1] <= 2 * PART, "{used:?}");
    assert!(used[0] + used[1] <= 4 * PART, "{used:?}");
}

#[test]
fn only_what_is_a_caches_own_is_removed() {
    const PART: u64 = 1 << 20;
    let room = room();
    let open = |name: &[u8]| Cache::open_limited(room.path(), name, 2 * PART, PART).unwrap();
    open(b"old").store(0, bytes_of(1, 0..PART), Urgency::Demand);
    let old = images(room.path()).remove(0);
    fs::write(old.join("letter"), "mine").unwrap();
    fs::create_dir(room.path().join("photos")).unwrap();
    fs::write(room.path().join("photos/data"), vec![1; 2 << 20]).unwrap();
    open(b"new").store(0, bytes_of(1, 0..PART), Urgency::Demand);
    assert!(old.join("data").exists() && old.join("letter").exists());
    assert!(room.path().join("photos/data").exists());
    fs::remove_file(old.join("letter")).unwrap();
    let new = open(b"new");
    new.store(PART, bytes_of(1, PART..2 * PART), Urgency::Demand);
    assert!(!old.exists() && room.path().join("photos/data").exists());
}

#[test]
fn what_others_put_in_the_place_of_a_cache_is_refused() {
    let refusal = |prepare: &dyn Fn(&Path)| {
        let room = room();
        let dir = room.path().join("cache");
        drop(open(&dir, CAP));
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(file_of(&dir, "map")).unwrap().mode() & 0o777, 0o600);
        prepare(&dir);
        let error = Cache::open(&dir, b"image", SIZE, CAP).err().unwrap().to_string();
        assert!(!error.contains('\n') && error.contains(dir.to_str().unwrap()), "{error}");
        error
    };
    let instead = |name: &'static str, make: &dyn Fn(&Path)| {
        refusal(&|dir| {
            let path = file_of(dir, name);
            fs::remove_file(&path).unwrap();
            make(&path);
        })
    };
    for name in ["data", "map"] {
        let error = instead(name, &|path| symlink("/etc/passwd", path).unwrap());
        assert!(error.contains("a symbolic link"), "{error}");
        let error = instead(name, &|path| drop(run("mkfifo", &[path])));
        assert!(error.contains("a named pipe"), "{error}");
        let error = instead(name, &|path| fs::create_dir(path).unwrap());
        assert!(error.contains("a directory"), "{error}");
        let error = instead(name, &|path| {
            fs::write(path, "").unwrap();
            std::os::unix::fs::chown(path, Some(12345), None).unwrap();
        });
        assert!(error.contains("uid 12345"), "{error}");
    }
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let error = refusal(&|dir| mode(dir, 0o777));
    assert!(error.contains("cannot be trusted"), "{error}");
    let error = refusal(&|dir| mode(&images(dir)[0], 0o777));
    assert!(error.contains("cannot be trusted"), "{error}");
    let error = refusal(&|dir| fs::remove_file(dir.join("read-cache")).unwrap());
    assert!(error.contains("no read cache and not empty"), "{error}");
    let error = refusal(&|dir| fs::write(dir.join("read-cache"), "version = 2\n").unwrap());
    assert!(error.contains("another version"), "{error}");
    let error = refusal(&|dir| {
        fs::remove_dir_all(&images(dir)[0]).unwrap();
        fs::remove_file(dir.join("read-cache")).unwrap();
        fs::remove_dir(dir).unwrap();
        fs::write(dir, "").unwrap();
    });
    assert!(error.contains("Not a directory"), "{error}");
}

#[test]
fn a_map_of_any_length_is_read_within_bounds() {
    let room = room();
    let cache = open(room.path(), CAP);
    store(&cache, 0..64 << 10);
    drop(cache);
    // Sparse, and far longer than any map may be.
    let map = file_of(room.path(), "map");
    File::options().write(true).open(&map).unwrap().set_len(1 << 40).unwrap();
    let cache = open(room.path(), CAP);
    assert_eq!(cache.counters().present_bytes, 64 << 10);
    assert!(fs::metadata(&map).unwrap().len() < 8 << 20);
    assert_eq!(read_all(&cache), 64 << 10);
}

#[test]
fn threads_find_only_right_bytes_in_a_damaged_cache() {
    const SIZE: u64 = 16 << 20;
    let room = room();
    let open = || Cache::open_limited(room.path(), b"image", SIZE, 12 << 20).unwrap();
    let cache = open();
    for at in (0..SIZE).step_by(1 << 20) {
        cache.store(at, bytes_of(1, at..at + (1 << 20)), Urgency::Ahead);
    }
    drop(cache);
    let data = File::options().write(true).open(file_of(room.path(), "data")).unwrap();
    for at in (100_000..SIZE).step_by(300_000) {
        data.write_all_at(b"not what was fetched", at).unwrap();
    }
    let cache = open();
    let found = store_and_read_at_once(&cache, 1, SIZE, 150);
    let counters = cache.counters();
    assert!(found > 1 << 20 && counters.dropped_bytes > 0, "{counters:?}");
    assert!(counters.present_bytes <= 12 << 20 && counters.evicted_bytes > 0, "{counters:?}");
}

#[test]
fn a_full_host_costs_only_the_persistence() {
    let fs = small_fs(8 << 20);
    let dir = fs.mounted.path().join("cache");
    drop(Cache::open(&dir, b"first", SIZE, CAP).unwrap());
    let other = File::create(fs.mounted.path().join("other")).unwrap();
    let mut taken = 0;
    for len in [65536, 4096, 512] {
        while host::write_all_at(&other, &[io::IoSlice::new(&vec![1; len])], taken).is_ok() {
            taken += len as u64;
        }
    }
    let cache = Cache::open(&dir, b"second", SIZE, CAP).unwrap();
    assert!(!cache.is_persistent());
    store(&cache, 0..SIZE);
    assert_eq!(read_all(&cache), SIZE);
    drop((cache, other));
}

#[test]
fn a_directory_with_a_mark_of_another_kind_is_refused() {
    let room = room();
    drop(open(room.path(), CAP));
    let mark = room.path().join("read-cache");
    for text in ["version = 2\n".to_owned(), String::new(), "x".repeat(10_000)] {
        fs::write(&mark, text).unwrap();
        let refused = Cache::open(room.path(), b"image", SIZE, CAP);
        assert!(matches!(refused, Err(CacheError::Version(_))));
    }
}

#[test]
fn two_mounts_may_make_a_directory_at_once() {
    let room = room();
    for round in 0..40 {
        let dir = room.path().join(format!("new{round}/cache"));
        let opened = std::thread::scope(|scope| {
            let open = |image: &'static [u8]| {
                let dir = &dir;
                scope.spawn(move || Cache::open_limited(dir, image, SIZE, CAP).map(|_| ()))
            };
            [open(b"a"), open(b"b")].map(|opening| opening.join().unwrap())
        });
        for opened in opened {
            opened.unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
    }
}
