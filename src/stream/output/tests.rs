//! Tests of output streams with sinks in memory that can be stalled.

use std::io::IoSlice;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::config::{Flow, SinkSpec, SpillCompression, StreamFrames};
use crate::stream::parked::MAX_PER_STREAM;

/// The content of a memory sink, and whether it accepts more.
struct MemorySinkState {
    monitor: Monitor,
    bytes: Mutex<Vec<u8>>,
    open: Condvar,
    held_up: AtomicBool,
    whole: AtomicBool,
    broken: AtomicBool,
    on_event: Mutex<Option<SinkCallback>>,
}

impl MemorySinkState {
    fn new() -> Self {
        Self {
            monitor: Monitor::new("fifo", "memory", None),
            bytes: Mutex::default(),
            open: Condvar::new(),
            held_up: AtomicBool::default(),
            whole: AtomicBool::default(),
            broken: AtomicBool::default(),
            on_event: Mutex::default(),
        }
    }
}

struct MemorySink {
    shared: Arc<MemorySinkState>,
    rewrites: bool,
    stop: Stop,
}

impl MemorySink {
    fn put(&self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut bytes = self.shared.bytes.lock();
        while self.shared.held_up.load(Ordering::SeqCst) {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            self.shared.open.wait_for(&mut bytes, Duration::from_millis(5));
        }
        if self.shared.broken.load(Ordering::SeqCst) {
            return Err(os_error(libc::EPIPE));
        }
        let mut at = offset as usize;
        assert!(self.rewrites || at == bytes.len(), "out of order");
        for part in parts {
            let end = at + part.len();
            let len = bytes.len().max(end);
            bytes.resize(len, 0);
            bytes[at..end].copy_from_slice(part);
            at = end;
        }
        let accepted = &self.shared.monitor.counters().accepted;
        accepted.fetch_max(at as u64, Ordering::SeqCst);
        Ok(())
    }
}

impl Sink for MemorySink {
    fn prepare(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn watch(&mut self, on_event: SinkCallback) {
        *self.shared.on_event.lock() = Some(on_event);
    }
    fn send_data(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let parts: Vec<&[u8]> = parts.iter().map(|part| &**part).collect();
        self.put(offset, &parts)
    }
    fn send_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        self.put(range.start, &[&vec![0; (range.end - range.start) as usize]])
    }
    fn send_hole(&mut self, range: Range<u64>) -> io::Result<()> {
        self.send_zeros(range)
    }
    fn can_rewrite(&self) -> bool {
        self.rewrites
    }
    fn explain(&self, error: &io::Error) -> String {
        format!("the sink says {error}")
    }
    fn finish(self: Box<Self>, end: u64) -> Result<(), String> {
        assert_eq!(self.shared.bytes.lock().len() as u64, end);
        self.shared.whole.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn abort(self: Box<Self>) {}
}

fn spec(size: u64, window: u64, read_window: u64, spill: u64) -> StreamSpec {
    StreamSpec {
        size,
        dir: "/".into(),
        flow: Flow::Out(SinkSpec::Measure),
        window,
        read_window,
        spill: Some(spill),
        compress: SpillCompression::Off,
        finish: FinishWhen::Explicit,
        pad: Pad::Size,
        frames: StreamFrames::Raw,
    }
}

fn start(spec: &StreamSpec, rewrites: bool) -> (Arc<Output>, Arc<MemorySinkState>) {
    start_in(std::env::temp_dir(), spec, rewrites)
}

fn start_in(
    dir: PathBuf,
    spec: &StreamSpec,
    rewrites: bool,
) -> (Arc<Output>, Arc<MemorySinkState>) {
    let shared = Arc::new(MemorySinkState::new());
    let stop = Stop::new().unwrap();
    let sink = MemorySink { shared: Arc::clone(&shared), rewrites, stop: stop.clone() };
    let monitor = shared.monitor.clone();
    let output = Output::start("o", spec, Box::new(sink), monitor, stop, dir);
    (output.unwrap(), shared)
}

/// A process number that cannot exist.
const FIRST: u32 = 1 << 30;

/// Writes and waits for the reply.
fn write(output: &Output, offset: u64, buf: &[u8]) -> io::Result<()> {
    let told = write_later(output, offset, buf, 0);
    told.recv_timeout(Duration::from_secs(30)).expect("an answer")
}

fn write_later(
    output: &Output,
    offset: u64,
    buf: &[u8],
    client: u32,
) -> mpsc::Receiver<io::Result<()>> {
    let (tell, told) = mpsc::channel();
    output.write(offset, buf, client, Box::new(move |result| drop(tell.send(result))));
    told
}

fn code<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn finish(output: &Output) -> Result<String, FinishError> {
    output.finish(&|| false, DrainTimeout::Total(Duration::from_secs(30)))
}

#[test]
fn finish_pads_to_the_size_and_repeats_its_result() {
    let (output, shared) = start(&spec(1 << 20, 1 << 16, 0, 0), false);
    write(&output, 100, b"hello").unwrap();
    let line = finish(&output).unwrap();
    assert_eq!(line, "o: finished, 1 MiB in memory");
    assert_eq!(finish(&output).unwrap(), line);
    assert!(shared.whole.load(Ordering::SeqCst));
    let bytes = shared.bytes.lock();
    assert_eq!((bytes.len(), &bytes[100..105]), (1 << 20, &b"hello"[..]));
    drop(bytes);
    assert_eq!(code(write(&output, 0, b"x")), libc::EIO);
    output.sync().unwrap();
    assert!(output.abort("late").unwrap_err().contains("finished already"));
}

#[test]
fn a_stream_can_end_at_its_highest_write() {
    let mut spec = spec(1 << 20, 0, 0, 0);
    spec.pad = Pad::Highest;
    let (output, shared) = start(&spec, false);
    write(&output, 0, &[1; 3000]).unwrap();
    write(&output, 8000, &[0; 10]).unwrap();
    finish(&output).unwrap();
    assert_eq!(shared.bytes.lock().len(), 8010);
}

#[test]
fn a_change_before_the_frontier_fails_the_stream_permanently() {
    let (output, _) = start(&spec(1 << 20, 4096, 0, 0), false);
    write(&output, 0, &[1; 100]).unwrap();
    write(&output, 10_000, &[1; 100]).unwrap();
    // Zeros over unwritten bytes are no change.
    write(&output, 200, &[0; 100]).unwrap();
    assert_eq!(code(write(&output, 50, &[2; 10])), libc::EIO);
    assert_eq!(code(output.sync()), libc::EIO);
    assert_eq!(code(write(&output, 10_050, &[1; 1])), libc::EIO);
    let status = output.status();
    assert_eq!(status.state, OutputState::Failed);
    assert_eq!(status.needed, NeededSizes { window: 10_050, spill: 100 });
    let error = status.error.unwrap();
    assert!(error.contains("a write at 50 came after the frontier 6004"), "{error}");
    assert_eq!(finish(&output), Err(FinishError::Failed(error)));
}

#[test]
fn sent_bytes_can_be_read_back_only_within_the_read_window() {
    let (output, _) = start(&spec(1 << 20, 0, 5000, 0), false);
    write(&output, 0, &[1; 6000]).unwrap();
    let mut buf = [9; 100];
    output.read(&mut buf, 1000, Wait::Yes).unwrap();
    assert_eq!(buf, [1; 100]);
    assert_eq!(code(output.read(&mut buf, 999, Wait::Yes)), libc::EIO);
    output.read(&mut buf, 5950, Wait::Yes).unwrap();
    assert_eq!((buf[49], buf[50]), (1, 0));
    // Writing the same bytes again is no change, as long as they can still be compared.
    write(&output, 5000, &[1; 1000]).unwrap();
    assert_eq!(code(write(&output, 5000, &[2; 1])), libc::EIO);
}

#[test]
fn a_stalled_sink_parks_writers_and_bounds_the_memory() {
    let window = 64 << 10;
    let (output, shared) = start(&spec(1 << 30, window, 0, 0), false);
    shared.held_up.store(true, Ordering::SeqCst);
    let piece = vec![7; 1 << 20];
    let mut waiting: Vec<_> =
        (0..64u64).map(|at| write_later(&output, at << 20, &piece, 0)).collect();
    let answered = |waiting: &mut Vec<mpsc::Receiver<_>>| {
        waiting.retain(|told| told.try_recv().is_err());
        waiting.len()
    };
    let left = answered(&mut waiting);
    assert!((56..64).contains(&left), "{left} wait");
    let core = output.core.lock();
    assert!(core.window.unaccepted() <= window + BACKLOG_LIMIT, "{}", core.window.unaccepted());
    assert!(core.pages.memory() <= window + BACKLOG_LIMIT + (1 << 20));
    drop(core);
    // Reads and the status are not blocked.
    output.read(&mut [0; 10], 1 << 20, Wait::Yes).unwrap_err();
    output.read(&mut [0; 10], 900 << 20, Wait::Yes).unwrap();
    assert_eq!(output.status().state, OutputState::Open);
    shared.held_up.store(false, Ordering::SeqCst);
    shared.open.notify_all();
    for told in waiting {
        told.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
    }
    finish(&output).unwrap();
    assert!(shared.bytes.lock()[..64 << 20].iter().all(|byte| *byte == 7));
}

#[test]
fn a_stalled_sink_refuses_more_writers_than_may_wait() {
    let (output, shared) = start(&spec(1 << 40, 0, 0, 0), false);
    shared.held_up.store(true, Ordering::SeqCst);
    let piece = vec![7; 1 << 20];
    // Fills what the stream itself takes.
    let mut offsets = (0..).step_by(1 << 20);
    let mut next = || offsets.next().unwrap();
    let first = loop {
        let told = write_later(&output, next(), &piece, FIRST);
        if told.try_recv().is_err() {
            break told;
        }
    };
    let waiting: Vec<_> =
        (1..MAX_PER_STREAM).map(|_| write_later(&output, next(), &[7; 4096], FIRST)).collect();
    assert!(waiting.iter().all(|told| told.try_recv().is_err()));
    let refused = write_later(&output, next(), &[7; 4096], FIRST);
    assert_eq!(code(refused.try_recv().unwrap()), libc::EBUSY);
    // What the kernel writes back is lost if it is refused.
    let (tell, written_back) = mpsc::channel();
    output.write_back(next(), &[7; 4096], Box::new(move |result| tell.send(result).unwrap()));
    assert!(written_back.try_recv().is_err());
    shared.held_up.store(false, Ordering::SeqCst);
    shared.open.notify_all();
    for told in waiting.into_iter().chain([first, written_back]) {
        told.recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
    }
    output.abort("enough").unwrap();
}

#[test]
fn a_killed_writer_is_released_and_the_others_keep_waiting() {
    let (output, shared) = start(&spec(1 << 30, 0, 0, 0), false);
    shared.held_up.store(true, Ordering::SeqCst);
    let piece = vec![7; 1 << 20];
    let mut waiting: Vec<_> = (0..20u64)
        .map(|at| write_later(&output, at << 20, &piece, FIRST + (at as u32 & 1)))
        .collect();
    let interrupted = |result: &Option<io::Result<()>>| matches!(result, Some(Err(error)) if error.raw_os_error() == Some(libc::EINTR));
    let mut results: Vec<_> = waiting.iter().map(|_| None).collect();
    let until = Instant::now() + Duration::from_secs(60);
    while results.iter().filter(|result| interrupted(result)).count() < 6 {
        assert!(Instant::now() < until);
        // A tick does nothing while another thread has the stream's lock.
        output.tick(|client| client == FIRST);
        for (result, told) in results.iter_mut().zip(&waiting) {
            *result = result.take().or_else(|| told.try_recv().ok());
        }
    }
    for (at, result) in results.iter().enumerate() {
        assert!(!interrupted(result) || at % 2 == 0);
    }
    output.abort("enough").unwrap();
    assert_eq!(output.status().state, OutputState::Aborted);
    waiting.retain(
        |told| matches!(told.try_recv(), Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO)),
    );
    assert!(!waiting.is_empty());
    assert!(!shared.whole.load(Ordering::SeqCst));
}

#[test]
fn a_broken_sink_is_a_sticky_failure() {
    let (output, shared) = start(&spec(1 << 20, 0, 0, 0), false);
    shared.broken.store(true, Ordering::SeqCst);
    write(&output, 0, &[1; 4096]).unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while output.sync().is_ok() {
        assert!(Instant::now() < until);
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(code(write(&output, 8192, &[1; 1])), libc::EIO);
    assert!(output.status().error.unwrap().starts_with("the sink says"));
    assert_eq!(output.status().accepted, 0);
}

#[test]
fn finish_waits_for_writers_and_then_fails_as_busy() {
    let (output, _) = start(&spec(4096, 0, 0, 0), false);
    let busy = output.finish(&|| true, DrainTimeout::Total(Duration::from_millis(50)));
    assert_eq!(busy, Err(FinishError::Busy));
    assert_eq!(output.status().state, OutputState::Open);
    finish(&output).unwrap();
}

#[test]
fn a_finish_that_timed_out_can_be_repeated_and_aborted() {
    let (output, shared) = start(&spec(1 << 20, 0, 0, 0), false);
    shared.held_up.store(true, Ordering::SeqCst);
    let soon = DrainTimeout::Total(Duration::from_millis(30));
    for _ in 0..2 {
        let error = output.finish(&|| false, soon).unwrap_err();
        assert!(matches!(error, FinishError::StillFinishing(_)), "{error}");
    }
    output.abort("enough").unwrap();
    assert!(matches!(output.finish(&|| false, soon), Err(FinishError::Failed(_))));
    assert!(!shared.whole.load(Ordering::SeqCst));
}

#[test]
fn close_aborts_an_unfinished_stream_unless_it_ends_with_the_mount() {
    let (output, shared) = start(&spec(1 << 20, 0, 0, 0), false);
    write(&output, 0, &[1; 10]).unwrap();
    let line = output.close(&|| false, DrainTimeout::Unlimited).unwrap_err();
    assert!(line.contains("cowslip finish comes before umount"), "{line}");
    assert!(!shared.whole.load(Ordering::SeqCst));
    let mut spec = spec(1 << 20, 0, 0, 0);
    spec.finish = FinishWhen::Umount;
    let (output, shared) = start(&spec, false);
    write(&output, 0, &[1; 10]).unwrap();
    output.close(&|| false, DrainTimeout::Unlimited).unwrap();
    assert!(shared.whole.load(Ordering::SeqCst));
}

#[test]
fn a_truncation_of_data_counts_for_the_needed_sizes() {
    let (output, _) = start(&spec(1 << 20, 0, 0, 1 << 20), false);
    write(&output, 8192, &[1; 4096]).unwrap();
    write(&output, 65536, &[1; 4096]).unwrap();
    assert_eq!(output.status().needed, NeededSizes { window: 0, spill: 0 });
    output.truncate(0).unwrap();
    assert_eq!(output.status().needed, NeededSizes { window: 65536 + 4096 - 8192, spill: 8192 });
}

#[test]
fn zeros_and_holes_before_the_frontier_are_refused_only_where_data_has_left() {
    let (output, _) = start(&spec(1 << 20, 0, 0, 0), false);
    write(&output, 4096, &[1; 4096]).unwrap();
    output.discard(0..4096).unwrap();
    output.discard(8192..1 << 20).unwrap();
    assert_eq!(code(output.discard(0..8192)), libc::EOPNOTSUPP);
    assert_eq!(output.status().state, OutputState::Open);
    output.truncate(8192).unwrap();
    assert_eq!(code(output.truncate(8000)), libc::EIO);
    write(&output, 8192, &[1; 10]).unwrap();
}

#[test]
fn spilled_data_is_sent_in_order_from_memory_and_file() {
    for compress in [SpillCompression::Off, SpillCompression::Lz4] {
        let mut spec = spec(64 << 20, 0, 0, 48 << 20);
        spec.compress = compress;
        let (output, shared) = start(&spec, false);
        let piece = |at: u64| vec![at as u8 + 1; 1 << 20];
        for at in (0..48u64).rev() {
            write(&output, at << 20, &piece(at)).unwrap();
        }
        assert!(output.core.lock().pages.memory() <= BACKLOG_LIMIT);
        assert_eq!(output.status().frontier, 0);
        assert_eq!(output.status().needed.spill, 47 << 20);
        let mut buf = [0; 8192];
        output.read(&mut buf, (20 << 20) - 4096, Wait::Yes).unwrap();
        assert_eq!((buf[0], buf[8191]), (20, 21));
        finish(&output).unwrap();
        let bytes = shared.bytes.lock();
        for at in 0..48usize {
            assert!(bytes[at << 20..(at + 1) << 20].iter().all(|byte| *byte == at as u8 + 1));
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Discard(u64, u64),
    Read(u64, u64),
}

const SIZE: u64 = 96 << 10;

fn op() -> impl Strategy<Value = Op> {
    let bytes = (0..4u8, 1..20_000usize).prop_map(|(value, len)| vec![value; len]);
    prop_oneof![
        6 => (0..SIZE, bytes).prop_map(|(at, mut bytes)| {
            bytes.truncate((SIZE - at) as usize);
            Op::Write(at, bytes)
        }),
        1 => (0..SIZE, 1..40_000u64).prop_map(|(at, len)| Op::Discard(at, (at + len).min(SIZE))),
        2 => (0..SIZE, 1..9000u64).prop_map(|(at, len)| Op::Read(at, len.min(SIZE - at))),
    ]
}

fn run(ops: &[Op], spec: &StreamSpec, rewrites: bool) -> Result<(), TestCaseError> {
    let (output, shared) = start(spec, rewrites);
    let mut image = vec![0; SIZE as usize];
    for op in ops {
        match op {
            Op::Write(at, bytes) => match write(&output, *at, bytes) {
                Ok(()) => image[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes),
                Err(error) => {
                    prop_assert!(!rewrites, "{error}");
                    prop_assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    prop_assert_eq!(output.status().state, OutputState::Failed);
                    return Ok(());
                }
            },
            Op::Discard(start, end) => match output.discard(*start..*end) {
                Ok(()) => image[*start as usize..*end as usize].fill(0),
                Err(error) => {
                    prop_assert!(!rewrites);
                    prop_assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
                }
            },
            Op::Read(at, len) => {
                let mut buf = vec![9; *len as usize];
                let gone = output.status().frontier.saturating_sub(spec.read_window);
                match output.read(&mut buf, *at, Wait::Yes) {
                    Ok(()) => prop_assert!(image[*at as usize..].starts_with(&buf)),
                    Err(error) => {
                        prop_assert_eq!(error.raw_os_error(), Some(libc::EIO));
                        prop_assert!(*at < gone);
                    }
                }
            }
        }
    }
    prop_assert!(finish(&output).is_ok());
    prop_assert!(*shared.bytes.lock() == image, "what came out is not what was written");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn the_sink_receives_the_final_image_or_the_stream_fails(
        ops in prop::collection::vec(op(), 1..30),
        (window, read_window, spill) in (0..SIZE, 0..SIZE, 0..SIZE),
    ) {
        run(&ops, &spec(SIZE, window, read_window, spill), false)?;
    }

    #[test]
    fn frames_with_offsets_accept_writes_in_any_order(
        ops in prop::collection::vec(op(), 1..30),
        (window, read_window, spill) in (0..SIZE / 4, 0..SIZE, 0..SIZE / 4),
    ) {
        run(&ops, &spec(SIZE, window, read_window, spill), true)?;
    }
}

#[test]
fn changes_alternating_with_zeros_do_not_each_visit_the_whole_disk() {
    let mut window = Window::new(64 << 30, 32 << 30, u64::MAX);
    for at in 0..100_000u64 {
        window.set(at * 8192..at * 8192 + 4096, Some(Written::Data));
    }
    // The CPU time of this thread alone: other processes may use the CPU for long.
    let spent = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_sec;
    let begun = spent();
    for at in 0..100u64 {
        window.set(at * 8192..at * 8192 + 4096, None);
        window.set(at * 8192..at * 8192 + 4096, Some(Written::Data));
    }
    assert!(spent() - begun <= 2, "{} s for 200 changes", spent() - begun);
}

#[test]
fn a_killed_writer_does_not_complete_a_stream_that_finishes_on_close() {
    let mut spec = spec(64 << 20, 0, 0, 0);
    spec.finish = FinishWhen::Close;
    let (output, shared) = start(&spec, false);
    shared.held_up.store(true, Ordering::SeqCst);
    let mut at = 0;
    let waits = loop {
        let told = write_later(&output, at, &[1; 1 << 20], FIRST);
        at += 1 << 20;
        if told.recv_timeout(Duration::from_secs(1)).is_err() {
            break told;
        }
    };
    output.tick(|client| client == FIRST);
    assert!(waits.recv().is_err() || output.status().state == OutputState::Failed);
    output.finish_in_background();
    let error = finish(&output).unwrap_err().to_string();
    assert!(error.contains("killed"), "{error}");
    assert!(!shared.whole.load(Ordering::SeqCst));
}

#[test]
fn rewrites_of_zeros_wait_for_a_stalled_sink_too() {
    let (output, shared) = start(&spec(64 << 20, 0, 0, 0), true);
    write(&output, 0, &[1; 4096]).unwrap();
    write(&output, 1 << 20, &[1; 4096]).unwrap();
    while shared.monitor.accepted() < (1 << 20) + 4096 {
        std::thread::sleep(Duration::from_millis(1));
    }
    shared.held_up.store(true, Ordering::SeqCst);
    let mut waiting = Vec::new();
    for _ in 0..2 * BACKLOG_LIMIT / REWRITE_OVERHEAD {
        let told = write_later(&output, 0, &[0; 512], 0);
        if told.try_recv().is_err() {
            waiting.push(told);
            break;
        }
    }
    assert!(!waiting.is_empty(), "the memory of later records has no bound");
    shared.held_up.store(false, Ordering::SeqCst);
    waiting[0].recv_timeout(Duration::from_secs(30)).unwrap().unwrap();
    finish(&output).unwrap();
}

#[test]
fn data_overwritten_with_zeros_takes_no_memory() {
    let (output, shared) = start(&spec(64 << 20, 0, 0, 8 << 20), false);
    for at in 1..50u64 {
        write(&output, at << 20, &[1; 1 << 20]).unwrap();
        write(&output, at << 20, &[0; 1 << 20]).unwrap();
    }
    assert_eq!(output.status().spill.used, 0);
    assert_eq!(output.core.lock().pages.memory(), 0);
    finish(&output).unwrap();
    assert!(shared.bytes.lock().iter().all(|byte| *byte == 0));
}

/// Makes the sink report an event, once a callback is registered.
fn say(shared: &MemorySinkState, event: SinkEvent) {
    let until = Instant::now() + Duration::from_secs(30);
    while shared.on_event.lock().is_none() {
        assert!(Instant::now() < until, "nobody listens");
        std::thread::sleep(Duration::from_millis(1));
    }
    shared.on_event.lock().as_ref().unwrap()(event);
}

fn until_failed(output: &Output, why: &str) {
    let until = Instant::now() + Duration::from_secs(30);
    while output.status().state != OutputState::Failed {
        assert!(Instant::now() < until, "it is {:?}", output.status().state);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(output.status().error.as_deref(), Some(why));
    assert_eq!(output.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn a_sink_that_reports_a_failure_fails_the_stream_at_once() {
    let (output, shared) = start(&spec(1 << 20, 1 << 20, 0, 0), false);
    say(&shared, SinkEvent::Failed("it broke".to_owned()));
    until_failed(&output, "it broke");
}

#[test]
fn the_loss_of_the_reader_fails_the_stream_only_if_more_is_to_be_sent() {
    let gone = || SinkEvent::Gone("it went".to_owned());
    // The disk is longer than the data sent.
    let (output, shared) = start(&spec(8192, 0, 0, 0), false);
    write(&output, 0, &[1; 4096]).unwrap();
    say(&shared, gone());
    until_failed(&output, "it went");
    // Everything has been sent.
    let (output, shared) = start(&spec(4096, 0, 0, 0), false);
    write(&output, 0, &[1; 4096]).unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    while output.status().accepted < 4096 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(1));
    }
    say(&shared, gone());
    finish(&output).unwrap();
    // Records still need their end record.
    let (output, shared) = start(&spec(4096, 0, 0, 0), true);
    say(&shared, gone());
    until_failed(&output, "it went");
    // With pad=off the stream ends at its highest write, and another write follows.
    let highest = StreamSpec { pad: Pad::Highest, ..spec(1 << 20, 0, 0, 0) };
    let (output, shared) = start(&highest, false);
    say(&shared, gone());
    assert!(output.sync().is_ok());
    let _ = write(&output, 0, &[0; 4096]);
    until_failed(&output, "it went");
}

#[test]
fn only_writers_wait_for_a_write_that_hangs() {
    let (output, _) = start(&spec(1 << 20, 1 << 16, 0, 0), false);
    write(&output, 0, &[7; 100]).unwrap();
    // As a write holds it while the host of its spill hangs.
    let held = output.core.lock();
    let (send, results) = mpsc::channel();
    let asked = Arc::clone(&output);
    thread::spawn(move || {
        let extent = asked.extent_at(0..10, Wait::No).map(|_| ());
        let read = asked.read(&mut [0; 10], 0, Wait::No);
        send.send((asked.written(), asked.sync(), code(extent), code(read))).unwrap();
    });
    let (written, sync, extent, read) = results.recv_timeout(Duration::from_secs(30)).unwrap();
    assert_eq!((written, sync.is_ok()), (100, true));
    assert_eq!((extent, read), (libc::EAGAIN, libc::EAGAIN));
    drop(held);
    output.read(&mut [0; 10], 0, Wait::Yes).unwrap();
    output.abort("the test is over").unwrap();
    assert_eq!(code(output.sync()), libc::EIO);
}

/// A stream that holds as much as its memory takes, whose spill file cannot be created, and the
/// directory that is missing.
fn start_full() -> (Arc<Output>, Arc<MemorySinkState>, PathBuf) {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("spill");
    let (output, shared) = start_in(dir.clone(), &spec(64 << 20, 0, 0, 64 << 20), false);
    write(&output, 32 << 20, &vec![1; index(BACKLOG_LIMIT)]).unwrap();
    // The test removes it.
    let _ = home.keep();
    (output, shared, dir)
}

fn write_back(output: &Output, offset: u64, buf: &[u8]) -> io::Result<()> {
    let (tell, told) = mpsc::channel();
    output.write_back(offset, buf, Box::new(move |result| drop(tell.send(result))));
    told.recv_timeout(Duration::from_secs(30)).expect("an answer")
}

#[test]
fn a_refused_write_that_is_not_repeated_fails_the_finish() {
    let (output, shared, dir) = start_full();
    assert_eq!(code(write(&output, 40 << 20, &[2; 8192])), libc::ENOENT);
    // Other writes pay no debt, nor does a part of the same.
    write(&output, 33 << 20, &[3; 8192]).unwrap();
    output.discard((40 << 20) + 4096..64 << 20).unwrap();
    output.sync().unwrap();
    let error = finish(&output).unwrap_err();
    let why = "4096 bytes are missing, the first at 41943040: their write was refused (No such file \
               or directory), and not repeated";
    assert_eq!(error, FinishError::Failed(why.to_owned()));
    assert_eq!(finish(&output), Err(error));
    assert_eq!((output.status().state, code(output.sync())), (OutputState::Failed, libc::EIO));
    assert!(!shared.whole.load(Ordering::SeqCst));
    std::fs::remove_dir(dir.parent().unwrap()).unwrap();
}

#[test]
fn a_refused_write_that_is_repeated_or_discarded_is_no_loss() {
    type Payment = fn(&Output, &Path) -> u8;
    let payments: [Payment; 3] = [
        |output, dir| {
            std::fs::create_dir(dir).unwrap();
            write(output, 40 << 20, &[4; 8192]).unwrap();
            4
        },
        |output, _| {
            output.discard(40 << 20..(40 << 20) + 8192).unwrap();
            0
        },
        |output, _| {
            output.truncate(40 << 20).unwrap();
            0
        },
    ];
    for pay in payments {
        let (output, shared, dir) = start_full();
        assert_eq!(code(write(&output, 40 << 20, &[2; 8192])), libc::ENOENT);
        let value = pay(&output, &dir);
        finish(&output).unwrap();
        assert!(shared.bytes.lock()[40 << 20..(40 << 20) + 8192].iter().all(|byte| *byte == value));
        assert!(shared.whole.load(Ordering::SeqCst));
        std::fs::remove_dir_all(dir.parent().unwrap()).unwrap();
    }
}

#[test]
fn a_refused_write_back_fails_the_stream_at_once() {
    let (output, shared, dir) = start_full();
    assert_eq!(code(write_back(&output, 40 << 20, &[2; 4096])), libc::ENOENT);
    let why = "4096 bytes at 41943040 that the kernel wrote back were refused: No such file or \
               directory";
    until_failed(&output, why);
    assert_eq!(finish(&output), Err(FinishError::Failed(why.to_owned())));
    assert!(output.close(&|| false, DrainTimeout::Unlimited).is_err());
    assert!(!shared.whole.load(Ordering::SeqCst));
    std::fs::remove_dir(dir.parent().unwrap()).unwrap();
}

#[test]
fn the_bytes_inside_of_a_write_past_the_end_must_be_written_again() {
    let (output, _) = start(&spec(8192, 0, 0, 0), false);
    assert_eq!(code(write(&output, 8192, &[1; 10])), libc::ENOSPC);
    assert_eq!(code(write(&output, u64::MAX - 3, &[1; 10])), libc::ENOSPC);
    assert_eq!(code(write_back(&output, 8192, &[1; 10])), libc::ENOSPC);
    assert_eq!(code(write(&output, 8000, &[1; 4096])), libc::ENOSPC);
    let debt = output.core.lock().refused.debt().unwrap();
    assert!(debt.starts_with("192 bytes are missing, the first at 8000"), "{debt}");
    write(&output, 8000, &[1; 192]).unwrap();
    finish(&output).unwrap();
}

#[test]
fn a_write_that_still_waits_when_the_stream_is_finished_is_missing() {
    let (output, shared) = start(&spec(64 << 20, 0, 0, 0), false);
    shared.held_up.store(true, Ordering::SeqCst);
    let mut at = 0;
    let waiting = loop {
        let told = write_later(&output, at, &[1; 1 << 20], FIRST);
        if !output.core.lock().queue.is_empty() {
            break told;
        }
        at += 1 << 20;
    };
    let error = finish(&output).unwrap_err().to_string();
    assert_eq!(code(waiting.recv().unwrap()), libc::EIO);
    let start = format!("1048576 bytes are missing, the first at {at}: ");
    assert!(error.starts_with(&start), "{error}");
    assert!(!shared.whole.load(Ordering::SeqCst));
}

#[test]
fn too_many_refused_ranges_fail_the_stream() {
    let (output, _, dir) = start_full();
    for at in 0..=4096_u64 {
        assert_eq!(code(write(&output, (40 << 20) + at * 4096, &[2; 100])), libc::ENOENT);
    }
    assert_eq!(output.status().state, OutputState::Failed);
    std::fs::remove_dir(dir.parent().unwrap()).unwrap();
}
