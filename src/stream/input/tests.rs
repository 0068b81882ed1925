//! Tests of input streams with sources in memory that deliver on demand.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // All of it is small.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{LazyLock, OnceLock, Weak, mpsc};
use std::time::Instant;

use proptest::prelude::*;

use super::read_buffer::CHUNK_SIZE;
use super::state::{READ_AHEAD, SKIP_LIMIT};
use super::*;
use crate::stream::parked::MAX_PER_STREAM;

const MIB: u64 = 1 << 20;
/// A generous timeout for events that should be immediate; only failing tests wait this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// The content of the sources: no two blocks are equal, except that every fourth MiB is zeros.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = vec![0; 48 << 20];
    for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
        if (number * 8) >> 20 & 3 != 3 {
            let value = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    bytes
});

fn bytes(range: Range<u64>) -> &'static [u8] {
    &BYTES[range.start as usize..range.end as usize]
}

/// A source in memory that delivers as many bytes as it was granted.
struct MemorySource {
    shared: Arc<MemorySourceState>,
    stop: Stop,
    at: u64,
    pieces: u64,
}

struct MemorySourceState {
    /// The number of bytes that may be delivered.
    granted: Mutex<u64>,
    poked: Condvar,
    /// The end of the source.
    len: u64,
    verdict: Result<(), String>,
    taken: AtomicU64,
    /// The calls at the end: 1 for each `finish`, 16 for each `close`.
    gone: AtomicU32,
    input: OnceLock<Weak<Input>>,
    most_held: AtomicU64,
}

impl Source for MemorySource {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(input) = self.shared.input.get().and_then(Weak::upgrade) {
            self.shared.most_held.fetch_max(input.memory_used(), Ordering::SeqCst);
        }
        let mut granted = self.shared.granted.lock();
        while *granted <= self.at && self.at < self.shared.len {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            self.shared.poked.wait_for(&mut granted, Duration::from_millis(2));
        }
        // Pieces of varying length, small and large.
        self.pieces = self.pieces.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        let wanted = 1 + (self.pieces >> 40) % (1 << (4 + (self.pieces >> 33) % 15));
        let end = (*granted).min(self.shared.len).min(self.at + wanted);
        let len = buf.len().min((end - self.at) as usize);
        buf[..len].copy_from_slice(bytes(self.at..self.at + len as u64));
        self.at += len as u64;
        self.shared.taken.store(self.at, Ordering::SeqCst);
        Ok(len)
    }

    fn finish(self: Box<Self>) -> Result<(), String> {
        self.shared.gone.fetch_add(1, Ordering::SeqCst);
        self.shared.verdict.clone()
    }

    fn close(self: Box<Self>) {
        self.shared.gone.fetch_add(16, Ordering::SeqCst);
    }
}

/// A stream with a [`MemorySource`], closed at the end of the test.
struct TestStream {
    input: Arc<Input>,
    shared: Arc<MemorySourceState>,
    stop: Stop,
}

struct TestPlan {
    size: u64,
    len: u64,
    read_window: u64,
    spool: Spool,
    granted: u64,
    verdict: Result<(), String>,
}

impl TestPlan {
    /// A disk of `size` bytes whose source delivers everything at once.
    fn of(size: u64) -> Self {
        let granted = u64::MAX;
        Self { size, len: size, read_window: 0, spool: Spool::Off, granted, verdict: Ok(()) }
    }

    fn spooled(size: u64) -> Self {
        Self { spool: Spool::On, ..Self::of(size) }
    }

    fn start(self) -> TestStream {
        let file = (self.spool == Spool::On).then(|| SpoolFile::create().unwrap());
        self.start_in(file)
    }

    fn start_in(self, spool: Option<SpoolFile>) -> TestStream {
        let shared = Arc::new(MemorySourceState {
            granted: Mutex::new(self.granted),
            poked: Condvar::new(),
            len: self.len,
            verdict: self.verdict,
            taken: 0.into(),
            gone: 0.into(),
            input: OnceLock::new(),
            most_held: 0.into(),
        });
        let stop = Stop::new().unwrap();
        let of_feed = Arc::clone(&shared);
        let feed = MemorySource { shared: of_feed, stop: stop.clone(), at: 0, pieces: self.size };
        let window = self.read_window;
        let input =
            Input::start_with("d", self.size, window, spool, Box::new(feed), stop.clone()).unwrap();
        shared.input.set(Arc::downgrade(&input)).unwrap();
        TestStream { input, shared, stop }
    }
}

impl Drop for TestStream {
    fn drop(&mut self) {
        let _ = self.input.close();
    }
}

type ReadAnswer = io::Result<Vec<u8>>;

impl TestStream {
    fn ask(&self, range: Range<u64>, client: u32) -> mpsc::Receiver<ReadAnswer> {
        let (tell, told) = mpsc::channel();
        let input = Arc::clone(&self.input);
        let reply = move |answer| {
            // This call would hang if a lock were held.
            let _ = input.memory_used();
            tell.send(answer).unwrap();
        };
        let len = (range.end - range.start) as usize;
        self.input.read(range.start, len, client, Box::new(reply));
        told
    }

    fn read(&self, range: Range<u64>) -> ReadAnswer {
        self.ask(range, 0).recv_timeout(PATIENCE).expect("no answer")
    }

    fn right(&self, range: Range<u64>) {
        let read = self.read(range.clone()).unwrap();
        assert!(read == bytes(range.clone()), "other bytes at {range:?}");
    }

    fn eio(&self, range: Range<u64>) {
        assert_errno(self.read(range), libc::EIO);
    }

    fn poke(&self, granted: u64) {
        *self.shared.granted.lock() = granted;
        self.shared.poked.notify_all();
    }

    /// Waits until `is` returns true for the status.
    fn until(&self, is: impl Fn(&InputStatus) -> bool) -> InputStatus {
        let begun = Instant::now();
        loop {
            let status = self.input.status();
            if is(&status) {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{status:?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn gone(&self) -> u32 {
        self.shared.gone.load(Ordering::SeqCst)
    }

    fn taken(&self) -> u64 {
        self.shared.taken.load(Ordering::SeqCst)
    }
}

fn assert_errno(answer: ReadAnswer, code: i32) {
    assert_eq!(answer.unwrap_err().raw_os_error(), Some(code));
}

fn is_waiting(told: &mpsc::Receiver<ReadAnswer>) -> bool {
    matches!(told.try_recv(), Err(mpsc::TryRecvError::Empty))
}

#[test]
fn a_sequential_reader_reads_the_whole_disk_and_the_source_finishes() {
    let size = 40 * MIB + 12345;
    let stream = TestPlan::of(size).start();
    let mut at = 0;
    while at < size {
        let end = (at + 300_001).min(size);
        stream.right(at..end);
        at = end;
    }
    let status = stream.until(|status| status.state != InputState::Open);
    assert_eq!((status.state, status.arrived, status.highest), (InputState::Finished, size, size));
    assert_eq!((status.error, status.needed, stream.gone()), (None, 0, 1));
    assert_eq!(stream.input.close(), Ok(()));
    let most = stream.shared.most_held.load(Ordering::SeqCst);
    assert!(most <= MAX_HELD + 300_001, "{most} held");
}

#[test]
fn a_read_across_the_end_is_short_and_one_past_it_is_empty() {
    let stream = TestPlan::of(5000).start();
    assert_eq!(stream.read(4000..9000).unwrap(), bytes(4000..5000));
    assert_eq!(stream.read(5000..6000).unwrap(), b"");
    assert_eq!(stream.read(u64::MAX - 9..u64::MAX).unwrap(), b"");
    assert_eq!(stream.read(4500..4500).unwrap(), b"");
}

#[test]
fn the_source_of_an_empty_disk_must_be_empty() {
    let stream = TestPlan::of(0).start();
    stream.until(|status| status.state == InputState::Finished);
    let stream = TestPlan { len: 1, ..TestPlan::of(0) }.start();
    stream.until(|status| status.state == InputState::Failed);
}

#[test]
fn a_read_is_answered_when_its_last_byte_has_arrived() {
    for spool in [Spool::Off, Spool::On] {
        let stream = TestPlan { granted: 1000, spool, ..TestPlan::of(MIB) }.start();
        let told = stream.ask(500..1501, 0);
        stream.until(|status| status.arrived == 1000);
        stream.poke(1500);
        stream.until(|status| status.arrived == 1500);
        assert!(is_waiting(&told));
        stream.poke(1501);
        assert_eq!(told.recv_timeout(PATIENCE).unwrap().unwrap(), bytes(500..1501));
    }
}

#[test]
fn without_a_spool_only_the_read_ahead_is_read_without_demand() {
    let stream = TestPlan::of(40 * MIB).start();
    stream.until(|status| status.arrived == READ_AHEAD);
    stream.right(0..2 * MIB);
    stream.until(|status| status.arrived == 2 * MIB + READ_AHEAD);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(stream.taken(), 2 * MIB + READ_AHEAD);
    assert_eq!(stream.input.close(), Ok(()));
    assert_eq!((stream.gone(), stream.input.status().state), (16, InputState::Open));
}

#[test]
fn reads_behind_succeed_within_the_read_window_and_are_eio_beyond() {
    let stream = TestPlan { read_window: MIB, ..TestPlan::of(20 * MIB) }.start();
    for at in 0..10 {
        stream.right(at * MIB..(at + 1) * MIB);
    }
    stream.right(9 * MIB..9 * MIB + 10);
    stream.eio(9 * MIB - 1..9 * MIB + 10);
    assert_eq!(stream.input.status().needed, MIB + 1);
    // The refused read has changed nothing else.
    stream.right(10 * MIB..11 * MIB);
    assert_eq!(stream.input.status().state, InputState::Open);
    assert_eq!(stream.input.close(), Ok(()));
}

#[test]
fn a_small_jump_skips_bytes_without_holding_them() {
    let stream = TestPlan { read_window: 4096, ..TestPlan::of(40 * MIB) }.start();
    stream.right(15 * MIB..15 * MIB + 100);
    stream.right(15 * MIB - 3996..15 * MIB);
    stream.eio(15 * MIB - 3997..15 * MIB);
    stream.right(16 * MIB + 15 * MIB..16 * MIB + 16 * MIB);
    let most = stream.shared.most_held.load(Ordering::SeqCst);
    assert!(most <= 4096 + MAX_HELD + MIB, "{most} held");
}

#[test]
fn a_probe_of_the_end_is_eio_and_consumes_nothing() {
    let stream = TestPlan::of(40 * MIB).start();
    stream.right(0..512);
    stream.eio(40 * MIB - 4096..40 * MIB);
    stream.eio(512 + SKIP_LIMIT + 1..512 + SKIP_LIMIT + 2);
    stream.until(|status| status.arrived == 512 + READ_AHEAD || status.arrived == READ_AHEAD);
    stream.right(512..1024);
    assert!(stream.taken() <= 1024 + READ_AHEAD);
    // A jump up to the limit is allowed.
    stream.right(1024 + SKIP_LIMIT..1025 + SKIP_LIMIT);
}

#[test]
fn a_reader_may_skip_as_far_as_the_read_window_is_wide() {
    let stream = TestPlan { read_window: 20 * MIB, ..TestPlan::of(40 * MIB) }.start();
    stream.right(20 * MIB..21 * MIB);
    stream.right(MIB..2 * MIB);
    stream.eio(MIB - 1..MIB);
}

#[test]
fn parked_reads_in_any_order_keep_the_bytes_they_need() {
    let stream = TestPlan { granted: 0, ..TestPlan::of(10 * MIB) }.start();
    let ranges = [3 * MIB..4 * MIB, 0..MIB, 77..99, MIB / 2..MIB + MIB / 2, 2 * MIB..3 * MIB];
    let told = ranges.clone().map(|range| stream.ask(range, 0));
    assert!(told.iter().all(is_waiting));
    stream.poke(u64::MAX);
    for (range, told) in ranges.into_iter().zip(told) {
        assert!(told.recv_timeout(PATIENCE).unwrap().unwrap() == bytes(range));
    }
}

#[test]
fn more_reads_than_may_wait_are_refused_and_those_that_wait_are_answered() {
    let stream = TestPlan { granted: 0, ..TestPlan::of(10 * MIB) }.start();
    let told: Vec<_> = (0..MAX_PER_STREAM).map(|_| stream.ask(0..4096, 0)).collect();
    assert_errno(stream.ask(0..4096, 0).recv_timeout(PATIENCE).unwrap(), libc::EBUSY);
    assert!(told.iter().all(is_waiting));
    stream.poke(u64::MAX);
    for told in told {
        assert!(told.recv_timeout(PATIENCE).unwrap().unwrap() == bytes(0..4096));
    }
    stream.right(4096..8192);
}

#[test]
fn an_early_end_of_the_source_is_eio_and_never_zeros() {
    for spool in [Spool::Off, Spool::On] {
        let stream = TestPlan { len: 10_000, read_window: MIB, spool, ..TestPlan::of(MIB) }.start();
        let told = stream.ask(9000..10_001, 0);
        assert_errno(told.recv_timeout(PATIENCE).unwrap(), libc::EIO);
        stream.right(9000..10_000);
        stream.eio(10_000..10_001);
        stream.eio(9999..MIB);
        let status = stream.input.status();
        let why = "ended after 10000 bytes, the disk has 1048576";
        assert_eq!((status.state, status.error.as_deref()), (InputState::Failed, Some(why)));
        assert_eq!((stream.input.close(), stream.gone()), (Err(why.to_owned()), 1));
        stream.right(9000..10_000);
    }
}

#[test]
fn a_failed_command_is_reported_by_reads_of_missing_bytes_and_at_unmount() {
    for spool in [Spool::Off, Spool::On] {
        let verdict = Err("zstd: exit status 1: bad data".to_owned());
        let stream =
            TestPlan { len: 7777, spool, verdict: verdict.clone(), ..TestPlan::of(MIB) }.start();
        stream.eio(0..MIB);
        stream.right(0..7777);
        assert_eq!(stream.input.close(), verdict);
        assert_eq!(stream.input.status().error, verdict.err());
        stream.eio(7777..7778);
    }
}

#[test]
fn a_command_that_fails_after_its_last_byte_is_reported_at_unmount() {
    for spool in [Spool::Off, Spool::On] {
        let verdict = Err("checksum".to_owned());
        let stream = TestPlan { spool, verdict: verdict.clone(), ..TestPlan::of(MIB) }.start();
        stream.right(0..MIB);
        // No pause: `close` waits for the verdict.
        assert_eq!(stream.input.close(), verdict);
    }
}

#[test]
fn a_source_longer_than_the_disk_fails_the_stream() {
    for spool in [Spool::Off, Spool::On] {
        let stream = TestPlan { len: MIB + 1, spool, ..TestPlan::of(MIB) }.start();
        stream.right(0..MIB);
        let status = stream.until(|status| status.state == InputState::Failed);
        let why = "the source goes on past the disk's size, 1048576";
        assert_eq!(status.error.as_deref(), Some(why));
        assert_eq!((stream.input.close(), stream.gone()), (Err(why.to_owned()), 16));
    }
}

#[test]
fn without_a_spool_the_end_is_checked_when_everything_was_requested() {
    let stream = TestPlan { len: MIB + 1, ..TestPlan::of(MIB) }.start();
    stream.until(|status| status.arrived == MIB);
    stream.right(0..MIB - 1);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(stream.input.status().state, InputState::Open);
    stream.right(MIB - 1..MIB);
    stream.until(|status| status.state == InputState::Failed);
}

#[test]
fn a_stop_ends_the_thread_and_refuses_parked_reads() {
    for spool in [Spool::Off, Spool::On] {
        let stream = TestPlan { granted: 100, spool, ..TestPlan::of(MIB) }.start();
        let told = stream.ask(0..200, 0);
        stream.until(|status| status.arrived == 100);
        stream.stop.stop();
        assert_errno(told.recv_timeout(PATIENCE).unwrap(), libc::EIO);
        assert_eq!((stream.input.close(), stream.gone()), (Ok(()), 16));
        stream.eio(0..200);
        stream.right(0..100);
    }
}

#[test]
fn a_stop_wakes_an_idle_thread() {
    let stream = TestPlan::of(40 * MIB).start();
    stream.until(|status| status.arrived == READ_AHEAD);
    stream.stop.stop();
    let begun = Instant::now();
    while stream.gone() != 16 {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn only_reads_of_killed_clients_are_released() {
    let stream = TestPlan { granted: 0, ..TestPlan::of(MIB) }.start();
    // Process numbers that cannot exist.
    let [unknown, lives, dies] =
        [0, 1 << 30, (1 << 30) + 1].map(|client| stream.ask(0..100, client));
    stream.input.release_killed(|client| client != 1 << 30);
    assert_errno(dies.recv_timeout(PATIENCE).unwrap(), libc::EINTR);
    assert!(is_waiting(&unknown) && is_waiting(&lives));
    stream.poke(u64::MAX);
    assert_eq!(lives.recv_timeout(PATIENCE).unwrap().unwrap(), bytes(0..100));
    assert_eq!(unknown.recv_timeout(PATIENCE).unwrap().unwrap(), bytes(0..100));
}

#[test]
fn a_spool_reads_everything_without_demand_and_allows_random_access() {
    let size = 40 * MIB;
    let stream = TestPlan::spooled(size).start();
    stream.right(size - 1000..size);
    stream.until(|status| status.state == InputState::Finished);
    stream.right(0..MIB);
    stream.right(17 * MIB + 1..18 * MIB + 1);
    assert_eq!(stream.input.status().used, CHUNK_SIZE as u64);
    assert_eq!(stream.gone(), 1);
}

#[test]
fn zeros_in_a_spool_are_reported_as_holes_once_they_have_arrived() {
    let (at, end) = (3 * MIB, 4 * MIB);
    let stream = TestPlan { granted: at + 8192, ..TestPlan::spooled(8 * MIB) }.start();
    stream.until(|status| status.arrived == at + 8192);
    let extent = |range| stream.input.extent_at(range);
    assert_eq!(extent(0..8 * MIB), Extent::new(0..at, ExtentKind::Data));
    assert_eq!(extent(at..8 * MIB), Extent::new(at..at + 8192, ExtentKind::Hole));
    assert_eq!(extent(at + 8192..9 * MIB), Extent::new(at + 8192..8 * MIB, ExtentKind::Data));
    stream.poke(u64::MAX);
    stream.until(|status| status.state == InputState::Finished);
    assert_eq!(extent(at..8 * MIB), Extent::new(at..end, ExtentKind::Hole));
    assert_eq!(extent(end..7 * MIB + 5), Extent::new(end..7 * MIB, ExtentKind::Data));
    assert_eq!(extent(7 * MIB..9 * MIB), Extent::new(7 * MIB..8 * MIB, ExtentKind::Hole));
    let spooled = stream.input.status().spooled;
    assert!((6 * MIB..7 * MIB).contains(&spooled), "{spooled}");
    stream.right(2 * MIB..5 * MIB);
}

#[test]
fn without_a_spool_everything_is_reported_as_data() {
    let stream = TestPlan::of(8 * MIB).start();
    stream.right(3 * MIB..4 * MIB);
    assert_eq!(stream.input.extent_at(0..9 * MIB), Extent::new(0..8 * MIB, ExtentKind::Data));
    assert_eq!(
        stream.input.extent_at(8 * MIB..9 * MIB),
        Extent::new(8 * MIB..9 * MIB, ExtentKind::Hole)
    );
}

#[test]
fn a_full_spool_fails_the_stream_with_the_errno_of_the_host() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let file = SpoolFile::of(full, Path::new("/tmp"));
    let stream = TestPlan::spooled(MIB).start_in(Some(file));
    stream.eio(0..10);
    let status = stream.until(|status| status.state == InputState::Failed);
    let why = "the spool in /tmp: No space left on device (os error 28)";
    assert_eq!(status.error.as_deref(), Some(why));
    assert_eq!((stream.input.close(), stream.gone()), (Err(why.to_owned()), 16));
}

#[test]
fn concurrent_readers_get_the_right_bytes_or_eio() {
    let size = 24 * MIB;
    for (spool, read_window) in [(Spool::On, 0), (Spool::Off, size), (Spool::Off, 2 * MIB)] {
        let stream = TestPlan { spool, read_window, ..TestPlan::of(size) }.start();
        let asked = AtomicU64::new(0);
        thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (stream, asked) = (&stream, &asked);
                scope.spawn(move || {
                    for turn in 0..120_u64 {
                        let at = turn * size / 120 + (thread * 7919 + turn * 104_729) % MIB;
                        let range = at.min(size)..(at + 1 + (turn * 65_537) % MIB).min(size);
                        asked.fetch_max(range.end, Ordering::SeqCst);
                        match stream.read(range.clone()) {
                            Ok(read) => assert!(read == bytes(range)),
                            // Only bytes that other readers have passed may be refused.
                            Err(error) => {
                                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                                let asked = asked.load(Ordering::SeqCst);
                                let first = asked.saturating_sub(read_window);
                                assert!(spool == Spool::Off && range.start < first);
                            }
                        }
                    }
                });
            }
        });
        let most = stream.shared.most_held.load(Ordering::SeqCst);
        assert!(most <= read_window + MAX_HELD + MIB, "{most} held");
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Reads at the end of the last read, moved by `from` bytes.
    Read { from: i64, len: u64 },
    /// Reads anywhere on the disk.
    Probe { part: f64, len: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let near = -(3 << 20)..(3_i64 << 20);
    prop_oneof![
        6 => (1..MIB + 1).prop_map(|len| Op::Read { from: 0, len }),
        3 => (near, 1..MIB + 1).prop_map(|(from, len)| Op::Read { from, len }),
        1 => (0.0..1.0_f64, 1..MIB + 1).prop_map(|(part, len)| Op::Probe { part, len }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Compares reads, one after the other, with the bytes of the source and with the rules.
    #[test]
    fn every_read_is_correct_or_refused_exactly_by_the_rules(
        size in 1..48 * MIB,
        missing in prop_oneof![2 => Just(0), 1 => 1..20 * MIB],
        read_window in prop_oneof![Just(0), 1..4 * MIB, 16 * MIB..32 * MIB],
        spool in prop_oneof![Just(Spool::Off), Just(Spool::On)],
        ops in prop::collection::vec(op(), 1..50),
    ) {
        let len = size.saturating_sub(missing);
        let stream = TestPlan { len, read_window, spool, ..TestPlan::of(size) }.start();
        let mut served = 0_u64;
        for op in ops {
            let (at, len) = match op {
                Op::Read { from, len } => (served.saturating_add_signed(from), len),
                Op::Probe { part, len } => ((size as f64 * part) as u64, len),
            };
            let range = at..(at + len).min(size);
            let too_late = at < served.saturating_sub(read_window);
            let too_far = at > served + SKIP_LIMIT.max(read_window);
            let refused = spool == Spool::Off && (too_late || too_far);
            match stream.read(at..at + len) {
                Ok(read) if range.is_empty() => prop_assert!(read.is_empty()),
                Ok(read) => {
                    prop_assert!(!refused && range.end <= stream.shared.len);
                    prop_assert!(read == bytes(range.clone()));
                    served = served.max(range.end);
                }
                Err(error) => {
                    prop_assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    prop_assert!(refused || range.end > stream.shared.len);
                }
            }
            if range.end > stream.shared.len && !refused && !range.is_empty() {
                // A read past the end of the source: the bytes kept from now on are undefined here.
                break;
            }
        }
        let most = stream.shared.most_held.load(Ordering::SeqCst);
        prop_assert!(most <= read_window + MAX_HELD + MIB);
    }
}
