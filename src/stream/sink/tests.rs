//! Tests of sinks with real pipes, files, devices and commands.

use std::fs::{self, File};
use std::io::{self, IoSlice, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::SeekFrom;
use tempfile::TempDir;

use super::*;
use crate::config::{
    DEFAULT_WINDOW, FinishWhen, Flow, Overwrite, Pad, Programs, SinkSpec, SpillCompression,
    StreamSpec,
};
use crate::formats::rbd::{RbdDecoder, RbdRecord};
use crate::stream::context::{StdioMode, StreamContext};
use crate::stream::fifo;

pub(in crate::stream) fn spec(dir: &Path, size: u64) -> StreamSpec {
    StreamSpec {
        size,
        dir: dir.to_owned(),
        flow: Flow::Out(SinkSpec::Measure),
        window: DEFAULT_WINDOW,
        read_window: 0,
        spill: None,
        compress: SpillCompression::Off,
        finish: FinishWhen::Explicit,
        pad: Pad::Size,
        frames: StreamFrames::Raw,
    }
}

pub(in crate::stream) fn context() -> StreamContext<'static> {
    let mountpoint = Path::new("/nonexistent/mount");
    StreamContext { mountpoint, mount_dev: None, stdio: StdioMode::Unavailable }
}

pub(in crate::stream) fn programs(words: &[&[&str]]) -> Programs {
    Programs(words.iter().map(|words| words.iter().map(Into::into).collect()).collect())
}

/// A directory to work in, and the stop signal of the sinks opened there.
struct SinkFixture {
    dir: TempDir,
    stop: Stop,
    spec: StreamSpec,
}

impl SinkFixture {
    fn new(size: u64) -> Self {
        let dir = TempDir::new().unwrap();
        let spec = spec(dir.path(), size);
        Self { dir, stop: Stop::new().unwrap(), spec }
    }

    fn rbd(size: u64) -> Self {
        let mut bench = Self::new(size);
        bench.spec.frames = StreamFrames::Rbd;
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self, target: &SinkSpec) -> Result<Box<HostSink>, StreamOpenError> {
        HostSink::open(&self.spec, target, &context(), self.stop.clone()).map(Box::new)
    }

    fn file(&self, name: &str) -> SinkSpec {
        SinkSpec::File { path: self.path(name), overwrite: Overwrite::No }
    }

    fn command(&self, words: &[&[&str]]) -> Box<HostSink> {
        self.open(&SinkSpec::Command(programs(words))).unwrap()
    }
}

fn send(sink: &mut HostSink, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let (one, two) = bytes.split_at(bytes.len() / 3);
    sink.send_data(offset, &[IoSlice::new(one), IoSlice::new(&[]), IoSlice::new(two)])
}

fn reader_of(path: PathBuf) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || fs::read(path).unwrap())
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn a_named_pipe_is_created_and_receives_the_bytes_in_order() {
    let bench = SinkFixture::new(8 << 20);
    let path = bench.path("out");
    let mut sink = bench.open(&SinkSpec::Fifo(path.clone())).unwrap();
    let made = path.metadata().unwrap();
    assert!(made.file_type().is_fifo() && made.mode() & 0o077 == 0);
    let reader = reader_of(path);
    sink.prepare().unwrap();
    let data = bytes(3 << 20);
    send(&mut sink, 0, &data).unwrap();
    sink.send_zeros(3 << 20..(3 << 20) + 5).unwrap();
    sink.send_hole((3 << 20) + 5..(5 << 20) + 1).unwrap();
    let monitor = sink.monitor();
    assert_eq!(monitor.accepted(), (5 << 20) + 1);
    // A gap is sent as a hole, before later data as well as at the end.
    send(&mut sink, 6 << 20, b"late").unwrap();
    sink.finish(8 << 20).unwrap();
    let mut expected = data;
    expected.resize(8 << 20, 0);
    expected[6 << 20..(6 << 20) + 4].copy_from_slice(b"late");
    assert!(reader.join().unwrap() == expected);
    assert_eq!((monitor.kind(), monitor.accepted()), ("fifo", 8 << 20));
}

#[test]
fn prepare_waits_for_a_reader_of_a_named_pipe_until_stopped() {
    let bench = SinkFixture::new(1 << 20);
    let mut sink = bench.open(&SinkSpec::Fifo(bench.path("out"))).unwrap();
    let waiting = thread::spawn(move || (sink.prepare(), sink));
    thread::sleep(Duration::from_millis(120));
    assert!(!waiting.is_finished());
    bench.stop.stop();
    let (prepared, mut sink) = waiting.join().unwrap();
    assert_eq!(prepared.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    assert_eq!(send(&mut sink, 0, b"x").unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    sink.abort();
}

#[test]
fn a_send_waits_for_a_stalled_reader_until_stopped_and_the_count_is_exact() {
    let bench = SinkFixture::new(64 << 20);
    let path = bench.path("out");
    let mut sink = bench.open(&SinkSpec::Fifo(path.clone())).unwrap();
    let opening = thread::spawn(move || File::open(path).unwrap());
    sink.prepare().unwrap();
    let mut reader = opening.join().unwrap();
    let monitor = sink.monitor();
    let data = bytes(8 << 20);
    let sent = data.clone();
    let waiting = thread::spawn(move || {
        let sent = send(&mut sink, 0, &sent);
        (sent, sink)
    });
    thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished());
    bench.stop.stop();
    let (sent, sink) = waiting.join().unwrap();
    assert_eq!(sent.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    drop(sink);
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert!(!got.is_empty() && got.len() < data.len() && got == data[..got.len()]);
    assert_eq!(monitor.accepted(), got.len() as u64);
}

#[test]
fn writing_a_gap_of_terabytes_can_be_stopped() {
    let bench = SinkFixture::new(1 << 44);
    let null = SinkSpec::File { path: "/dev/null".into(), overwrite: Overwrite::No };
    let mut sink = bench.open(&null).unwrap();
    let monitor = sink.monitor();
    let sending = thread::spawn(move || sink.send_hole(0..1 << 44));
    while monitor.accepted() < 1 << 30 {
        assert!(!sending.is_finished());
        thread::sleep(Duration::from_millis(1));
    }
    bench.stop.stop();
    assert_eq!(sending.join().unwrap().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    assert_eq!(monitor.kind(), "device");
}

#[test]
fn the_loss_of_the_reader_is_a_permanent_error_with_an_explanation() {
    let bench = SinkFixture::new(1 << 30);
    let path = bench.path("out");
    let mut sink = bench.open(&SinkSpec::Fifo(path.clone())).unwrap();
    let reader = thread::spawn(move || {
        let mut got = [0; 100];
        File::open(path).unwrap().read_exact(&mut got).unwrap();
    });
    let error = (0..).find_map(|turn| send(&mut sink, turn * 65536, &[1; 65536]).err()).unwrap();
    reader.join().unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    let accepted = sink.monitor().accepted();
    let said = format!(
        "the reader of fifo:{} has gone after {accepted} bytes",
        bench.path("out").display()
    );
    assert_eq!(sink.explain(&error), said);
    assert_eq!(
        sink.send_hole(accepted..accepted + 1).unwrap_err().raw_os_error(),
        Some(libc::EPIPE)
    );
    assert_eq!(sink.finish(1 << 30).unwrap_err(), said);
}

#[test]
fn to_fifo_refuses_a_regular_file() {
    let bench = SinkFixture::new(4096);
    let path = bench.path("file");
    fs::write(&path, "kept").unwrap();
    let error = bench.open(&SinkSpec::Fifo(path.clone())).unwrap_err().to_string();
    assert!(error.contains("is a regular file: fifo: needs a named pipe"), "{error}");
    assert_eq!(fs::read(path).unwrap(), b"kept");
}

#[test]
fn a_file_gets_its_name_only_at_the_end_and_keeps_its_holes() {
    let bench = SinkFixture::new(64 << 20);
    let (path, part) = (bench.path("o.img"), bench.path("o.img.part"));
    let mut sink = bench.open(&bench.file("o.img")).unwrap();
    send(&mut sink, 0, &[1; 4096]).unwrap();
    sink.send_hole(4096..32 << 20).unwrap();
    sink.send_zeros(32 << 20..33 << 20).unwrap();
    assert_eq!(sink.monitor().accepted(), 33 << 20);
    assert!(part.exists() && !path.exists());
    assert_eq!(sink.monitor().describe(), format!("file:{}", path.display()));
    sink.finish(64 << 20).unwrap();
    assert!(!part.exists());
    let file = File::open(&path).unwrap();
    let seek = |to| rustix::fs::seek(&file, to).unwrap();
    assert_eq!(seek(SeekFrom::Hole(0)), 4096);
    assert_eq!(seek(SeekFrom::Data(4096)), 32 << 20);
    assert_eq!(seek(SeekFrom::Hole(32 << 20)), 33 << 20);
    assert_eq!(rustix::fs::seek(&file, SeekFrom::Data(33 << 20)), Err(rustix::io::Errno::NXIO));
    let mut expected = vec![0; 64 << 20];
    expected[..4096].fill(1);
    assert!(fs::read(&path).unwrap() == expected);
}

#[test]
fn an_aborted_file_stays_as_part_and_is_replaced_by_the_next_stream() {
    let bench = SinkFixture::new(8192);
    let mut sink = bench.open(&bench.file("o")).unwrap();
    send(&mut sink, 0, &[1; 8192]).unwrap();
    sink.abort();
    assert_eq!(fs::read(bench.path("o.part")).unwrap(), [1; 8192]);
    assert!(!bench.path("o").exists());
    let mut sink = bench.open(&bench.file("o")).unwrap();
    sink.send_hole(0..4096).unwrap();
    send(&mut sink, 4096, &[2; 10]).unwrap();
    sink.finish(8192).unwrap();
    let mut expected = [0; 8192];
    expected[4096..4106].fill(2);
    assert_eq!(fs::read(bench.path("o")).unwrap(), expected);
}

#[test]
fn a_stream_aborted_before_its_first_byte_leaves_no_part() {
    let bench = SinkFixture::new(8192);
    bench.open(&bench.file("o")).unwrap().abort();
    assert!(!bench.path("o").exists() && !bench.path("o.part").exists());
}

#[test]
fn a_file_aborted_during_finish_does_not_get_its_name() {
    let bench = SinkFixture::new(4096);
    let mut sink = bench.open(&bench.file("o")).unwrap();
    send(&mut sink, 0, &[1; 4096]).unwrap();
    bench.stop.stop();
    assert!(sink.finish(4096).unwrap_err().contains("stopped"));
    assert!(!bench.path("o").exists() && bench.path("o.part").exists());
}

#[test]
fn two_streams_cannot_write_the_same_file() {
    let bench = SinkFixture::new(4096);
    let mut first = bench.open(&bench.file("o")).unwrap();
    send(&mut first, 0, &[1; 4096]).unwrap();
    let error = bench.open(&bench.file("o")).unwrap_err().to_string();
    assert!(error.ends_with("is being written by another stream: name another file"), "{error}");
    first.finish(4096).unwrap();
    assert_eq!(fs::read(bench.path("o")).unwrap(), [1; 4096]);
}

#[test]
fn an_existing_file_is_replaced_only_on_request_and_only_at_the_end() {
    let bench = SinkFixture::new(4096);
    let path = bench.path("o");
    fs::write(&path, "old").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let error = bench.open(&bench.file("o")).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("'{}' exists: add overwrite to replace it, or name another file", path.display())
    );
    assert!(!bench.path("o.part").exists());
    std::os::unix::fs::symlink("o", bench.path("link")).unwrap();
    let target = SinkSpec::File { path: bench.path("link"), overwrite: Overwrite::Yes };
    let mut sink = bench.open(&target).unwrap();
    send(&mut sink, 0, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"old");
    sink.finish(3).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o640);
    assert!(bench.path("link").is_symlink());
}

#[test]
fn a_file_created_by_someone_else_meanwhile_is_not_replaced() {
    let bench = SinkFixture::new(4096);
    let sink = bench.open(&bench.file("o")).unwrap();
    fs::write(bench.path("o"), "theirs").unwrap();
    let said = sink.finish(4096).unwrap_err();
    assert!(said.contains("was made by somebody else meanwhile"), "{said}");
    assert_eq!(fs::read(bench.path("o")).unwrap(), b"theirs");
    assert_eq!(bench.path("o.part").metadata().unwrap().len(), 4096);
}

#[test]
fn to_file_refuses_other_types_and_paths_in_the_mount() {
    let bench = SinkFixture::new(4096);
    let error = |path: &Path| {
        let target = SinkSpec::File { path: path.to_owned(), overwrite: Overwrite::Yes };
        bench.open(&target).unwrap_err().to_string()
    };
    assert!(error(bench.dir.path()).ends_with("is a directory: name a file"));
    fifo::create_missing(&bench.path("pipe")).unwrap();
    assert!(error(&bench.path("pipe")).ends_with("is a named pipe: use to=fifo:"));
    let absent = bench.path("absent/o");
    let line = format!("cannot write '{}.part': No such file or directory", absent.display());
    assert_eq!(error(&absent), line);
    assert!(error(Path::new("/nonexistent/mount/o")).contains("lies in the mount"));
    let inside = SinkSpec::Fifo("/nonexistent/mount/o".into());
    assert!(matches!(bench.open(&inside), Err(StreamOpenError::SelfReference(_))));
    // The name of the .part must belong to a file, too.
    fs::create_dir(bench.path("d.part")).unwrap();
    assert!(bench.open(&bench.file("d")).is_err());
    fifo::create_missing(&bench.path("p.part")).unwrap();
    assert!(bench.open(&bench.file("p")).is_err());
}

#[test]
fn a_full_device_is_explained_in_words() {
    let bench = SinkFixture::new(1 << 20);
    let full = SinkSpec::File { path: "/dev/full".into(), overwrite: Overwrite::No };
    let mut sink = bench.open(&full).unwrap();
    let error = send(&mut sink, 0, b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(sink.explain(&error), "file:/dev/full: No space left on device");
    assert_eq!(sink.monitor().accepted(), 0);
}

#[test]
fn a_command_receives_everything_and_its_status_decides_the_result() {
    let bench = SinkFixture::new(4 << 20);
    let mut sink = bench.command(&[&["cat"], &["sh", "-c", "cat > out"]]);
    assert_eq!(sink.monitor().describe(), "cmd:cat | sh -c 'cat > out'");
    send(&mut sink, 0, &bytes(3 << 20)).unwrap();
    sink.finish(4 << 20).unwrap();
    let mut expected = bytes(3 << 20);
    expected.resize(4 << 20, 0);
    assert!(fs::read(bench.path("out")).unwrap() == expected);
    let sink = bench.command(&[&["sh", "-c", "cat >/dev/null; echo 'disk full' >&2; exit 2"]]);
    assert_eq!(sink.finish(10).unwrap_err(), "'sh' exited with status 2: disk full");
}

#[test]
fn a_command_that_stops_reading_is_reported() {
    let bench = SinkFixture::new(1 << 30);
    let many = |sink: &mut HostSink| {
        (0..).find_map(|turn| send(sink, turn * 65536, &[1; 65536]).err()).unwrap()
    };
    let mut sink = bench.command(&[&["head", "-c", "5"]]);
    let error = many(&mut sink);
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    let accepted = sink.monitor().accepted();
    assert_eq!(sink.explain(&error), format!("'head' stopped reading after {accepted} bytes"));
    let mut sink = bench.command(&[&["sh", "-c", "exec <&-; sleep 0.1; echo why >&2; exit 1"]]);
    let error = many(&mut sink);
    assert_eq!(sink.explain(&error), "'sh' exited with status 1: why");
    assert!(sink.finish(1 << 30).is_err());
}

#[test]
fn an_aborted_command_never_sees_the_end_of_its_input() {
    for abort in [Sink::abort, drop::<Box<HostSink>>] {
        let bench = SinkFixture::new(1 << 20);
        let mut sink = bench.command(&[&["sh", "-c", "cat > out; touch whole"]]);
        send(&mut sink, 0, &[1; 4096]).unwrap();
        let monitor = sink.monitor();
        abort(sink);
        assert_eq!(monitor.failure().unwrap(), "'sh' was killed by signal 9");
        thread::sleep(Duration::from_millis(50));
        assert!(!bench.path("whole").exists());
    }
}

#[test]
fn stop_ends_a_finish_that_waits_for_a_command_and_kills_the_command() {
    let bench = SinkFixture::new(0);
    let sink = bench.command(&[&["sleep", "1000"]]);
    let monitor = sink.monitor();
    let finishing = thread::spawn(move || sink.finish(0));
    thread::sleep(Duration::from_millis(50));
    assert!(!finishing.is_finished());
    bench.stop.stop();
    assert!(finishing.join().unwrap().unwrap_err().contains("was stopped"));
    assert_eq!(monitor.failure().unwrap(), "'sleep' was killed by signal 9");
}

#[test]
fn records_describe_everything_and_late_rewrites_do_not_change_the_count() {
    let bench = SinkFixture::rbd(1 << 20);
    let mut sink = bench.open(&bench.file("o.rbd")).unwrap();
    assert!(sink.can_rewrite());
    let monitor = sink.monitor();
    send(&mut sink, 0, b"abc").unwrap();
    sink.send_hole(3..1000).unwrap();
    sink.send_zeros(1000..2000).unwrap();
    assert_eq!(monitor.accepted(), 2000);
    send(&mut sink, 1, b"XY").unwrap();
    assert_eq!(monitor.accepted(), 2000);
    sink.finish(5000).unwrap();
    assert_eq!(monitor.accepted(), 5000);
    let file = fs::read(bench.path("o.rbd")).unwrap();
    let mut decoder = RbdDecoder::new(&file[..]).unwrap();
    let mut data = [0; 3];
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Size(1 << 20));
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Data(0..3));
    decoder.input().read_exact(&mut data).unwrap();
    assert_eq!(&data, b"abc");
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Zeros(3..1000));
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Zeros(1000..2000));
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Data(1..3));
    decoder.input().read_exact(&mut data[..2]).unwrap();
    assert_eq!(&data, b"XYc");
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::Zeros(2000..5000));
    assert_eq!(decoder.next_record().unwrap(), RbdRecord::End);
    assert!(decoder.input().is_empty());
}

#[test]
fn raw_bytes_that_were_sent_cannot_be_sent_again() {
    let bench = SinkFixture::new(4096);
    let mut sink = bench.open(&SinkSpec::Measure).unwrap();
    assert!(!sink.can_rewrite());
    send(&mut sink, 0, b"abc").unwrap();
    assert_eq!(send(&mut sink, 2, b"x").unwrap_err().raw_os_error(), Some(libc::EINVAL));
    // The write was refused as a whole, not half done.
    send(&mut sink, 3, b"x").unwrap();
    assert_eq!((sink.monitor().kind(), sink.monitor().accepted()), ("measure", 4));
    sink.finish(4096).unwrap();
}

#[test]
fn standard_output_may_be_a_pipe_or_a_socket_and_keeps_its_flags() {
    let stop = Stop::new().unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let outputs = [
        (writer, File::from(reader)),
        (ours.into(), File::from(std::os::fd::OwnedFd::from(theirs))),
    ];
    for (stdout, mut reader) in outputs {
        let wire = open::open_as_stdout(stdout.as_fd(), &stop).unwrap();
        let flags = rustix::fs::fcntl_getfl(&stdout).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        drop(stdout);
        let reading = thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got
        });
        let data = bytes(3 << 20);
        wire.write_all(&[IoSlice::new(&data)], |_| {}).unwrap();
        wire.write_zeros(70_000, |_| {}).unwrap();
        drop(wire);
        let got = reading.join().unwrap();
        assert!(got[..3 << 20] == data && got[3 << 20..] == vec![0; 70_000]);
    }
}

#[test]
fn standard_output_is_refused_in_the_background_and_fails_without_a_reader() {
    let bench = SinkFixture::new(4096);
    let error = bench.open(&SinkSpec::Stdout).unwrap_err().to_string();
    assert!(error.starts_with("to=stdout needs -f or run"), "{error}");
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let opened = open::open_as_stdout(writer.as_fd(), &bench.stop);
    let error = match opened {
        // Opening does not report this for an unnamed pipe; writing does.
        Ok(wire) => {
            let written = wire.write_all(&[IoSlice::new(b"x")], |_| {});
            assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EPIPE));
            return;
        }
        Err(error) => error.to_string(),
    };
    assert_eq!(error, "cannot use to=stdout: Broken pipe");
}

#[test]
fn many_small_parts_are_written_to_files_and_shared_pipes() {
    let bench = SinkFixture::new(1 << 20);
    let data = bytes(100_000);
    let parts: Vec<_> = data.chunks(7).map(IoSlice::new).collect();
    let mut sink = bench.open(&bench.file("o")).unwrap();
    sink.send_data(0, &parts).unwrap();
    sink.finish(100_000).unwrap();
    assert!(fs::read(bench.path("o")).unwrap() == data);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let reading = thread::spawn(move || {
        let mut got = Vec::new();
        File::from(reader).read_to_end(&mut got).unwrap();
        got
    });
    let wire =
        WireWriter::new(writer, crate::stream::stdio::FdMode::SharedBlocking, bench.stop.clone());
    wire.write_all(&parts, |_| {}).unwrap();
    wire.write_zeros(9000, |_| {}).unwrap();
    drop(wire);
    let got = reading.join().unwrap();
    assert!(got[..100_000] == data && got[100_000..] == [0; 9000]);
}
