//! A laboratory for tests on real mounts: one temporary directory, and everything a test sets up
//! in it goes again with it, also when the test panics.
//!
//! ```text
//!   /var/tmp/cowslip-test-XXXXXX/     the directory every command starts in
//!     m/                              the mountpoint
//!     base.img ...                    what the test makes
//! ```
//!
//! The real `cowslip` program is driven, as a user does; `$COWSLIP` names it in shell lines.
//! Tests need root, `/dev/fuse` and loop devices, and say so when those are missing.

// Every test program compiles all of this and uses its part.
#![allow(dead_code, unreachable_pub)]
// Sizes are small here, and a test may panic.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// The program under test.
pub const COWSLIP: &str = env!("CARGO_BIN_EXE_cowslip");
/// Where the laboratories are: on a real file system, which `/tmp` need not be.
const ROOM: &str = "/var/tmp";
/// Longer than anything here takes; a command that hangs is a failure and not a stuck test.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The variable that tells whose process it is.
const MARK: &str = "COWSLIP_TEST_LAB";
/// How often something that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(5);

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// A laboratory.
pub struct Lab {
    /// `None` only while it is dropped.
    dir: Option<tempfile::TempDir>,
    bases: Vec<(PathBuf, u32)>,
}

/// A child that does not outlive its test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do. What hangs in the kernel
        // ends when its daemon does: it is not waited for.
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

/// Ends threads that look at it, also when their test panics.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until `is_so`, and panics with `what` when it never comes to be.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(LOOK);
    }
}

/// Sends `signal` to the process `pid`.
pub fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Stops the process `pid`: when this returns, none of its threads does anything any more. (A
/// SIGSTOP that was sent is not yet obeyed.)
#[track_caller]
pub fn stop(pid: u32) {
    signal(pid, Signal::STOP).unwrap();
    wait_until("the process stops", || is_stopped(pid));
}

/// Whether all threads of a process are stopped.
pub fn is_stopped(pid: u32) -> bool {
    threads_of(pid).iter().all(|thread| {
        let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        matches!(state, Some('t' | 'T'))
    })
}

/// Waits until `count` threads of the process `pid` are held up in the system call `call`.
#[track_caller]
pub fn wait_held_up(pid: u32, call: libc::c_long, count: usize) {
    let held_up = || -> Vec<PathBuf> {
        let call = format!("{call} ");
        let is_in = |thread: &PathBuf| {
            fs::read_to_string(thread.join("syscall")).is_ok_and(|line| line.starts_with(&call))
        };
        threads_of(pid).into_iter().filter(is_in).collect()
    };
    wait_until("threads are held up", || {
        let first = held_up();
        // Who is only passing through is gone by then, as a rule.
        thread::sleep(Duration::from_millis(50));
        let again = held_up();
        first.iter().filter(|thread| again.contains(thread)).count() >= count
    });
}

/// The directories of its threads in `/proc`; any of them may be gone when it is looked at.
pub fn threads_of(pid: u32) -> Vec<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    threads.flatten().map(|thread| thread.path()).collect()
}

/// Bytes that differ everywhere and that no other `seed` gives.
pub fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len as usize + 8);
    while (bytes.len() as u64) < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len as usize);
    bytes
}

impl Lab {
    pub fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "the tests of real mounts must run as root");
        for device in ["/dev/fuse", "/dev/loop-control"] {
            assert!(Path::new(device).exists(), "no {device}: the tests of real mounts need it");
        }
        let dir = tempfile::Builder::new().prefix("cowslip-test-").tempdir_in(ROOM);
        let lab = Self { dir: Some(dir.unwrap()), bases: Vec::new() };
        fs::create_dir(lab.path("m")).unwrap();
        lab
    }

    pub fn dir(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    /// A path inside; an absolute one stays what it is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// A file to read and write.
    pub fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap()
    }

    pub fn open_ro(&self, name: &str) -> File {
        File::open(self.path(name)).unwrap()
    }

    pub fn open_with(&self, name: &str, flags: i32) -> File {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        options.open(self.path(name)).unwrap()
    }

    /// A base of `size` bytes with data at its beginning, in its middle and at its very end, and
    /// holes between. [`end`](Self::end) checks that nobody has written to it.
    pub fn base(&mut self, name: &str, size: u64) {
        let file = File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        let third = size / 3 / 4096 * 4096;
        for (start, len) in [(0, third / 2), (third, third / 4), (size - size.min(5000), 5000)] {
            let len = len.min(size - start);
            file.write_all_at(&noise(len, start + 1), start).unwrap();
        }
        self.watch(name);
    }

    /// Has [`end`](Self::end) check that `name` is still what it is now.
    pub fn watch(&mut self, name: &str) {
        let path = self.path(name);
        let crc = checksum(&path);
        self.bases.push((path, crc));
    }

    /// Runs a command that starts in the laboratory.
    #[track_caller]
    pub fn output(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(args);
        // To files, not pipes: what hangs in the kernel would keep a pipe open for ever.
        let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
        let mut child = Running(command.spawn().unwrap());
        let mut status = None;
        let deadline = Instant::now() + PATIENCE;
        while status.is_none() {
            assert!(Instant::now() < deadline, "{program} {args:?} hangs");
            thread::sleep(Duration::from_millis(1));
            status = child.0.try_wait().unwrap();
        }
        let collect = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        Output { status: status.unwrap(), stdout: collect(&mut out), stderr: collect(&mut err) }
    }

    /// A command that starts in the laboratory and can be told from other tests' by its
    /// environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir()).env("COWSLIP", COWSLIP).env(MARK, self.dir());
        command.env("LC_ALL", "C").env_remove("TMPDIR").stdin(Stdio::null());
        command
    }

    /// Runs lines of shell, which must succeed, and gives their stdout.
    #[track_caller]
    pub fn sh(&self, lines: &str) -> String {
        let output = self.output("sh", &["-euc", lines]);
        assert!(output.status.success(), "{lines}\n{}", show(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `cowslip` with words that hold no spaces.
    pub fn cowslip(&self, words: &str) -> Output {
        let words: Vec<&str> = words.split_whitespace().collect();
        self.output(COWSLIP, &words)
    }

    /// Runs `cowslip`, which must succeed, and gives its stdout.
    #[track_caller]
    pub fn ok(&self, words: &str) -> String {
        let output = self.cowslip(words);
        assert!(output.status.success(), "cowslip {words}\n{}", show(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `cowslip`, which must fail with `code` and one line on stderr, and gives that line.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &str) -> String {
        one_line(code, &self.cowslip(words), words)
    }

    /// `cowslip mount m WORDS`, and what it said.
    #[track_caller]
    pub fn mount(&self, words: &str) -> String {
        self.ok(&format!("mount m {words} --log log.txt"))
    }

    /// `cowslip umount m`, and what it said.
    #[track_caller]
    pub fn umount(&self) -> String {
        self.ok("umount m")
    }

    /// The status of the mount at `m`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let output = self.cowslip("status m --json");
        // 3 says that a disk has failed: that is an answer, too.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", show(&output));
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        all["mounts"][0].clone()
    }

    /// The status of one disk of the mount at `m`.
    #[track_caller]
    pub fn disk(&self, name: &str) -> Value {
        let status = self.status();
        let disks = status["disks"].as_array().unwrap().iter();
        let found = disks.clone().find(|disk| disk["name"] == name);
        found.unwrap_or_else(|| panic!("no disk {name} in {status}")).clone()
    }

    /// The process that serves `m`.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.status()["pid"].as_u64().unwrap() as u32
    }

    /// Kills the daemon of `m` with -9 and waits for its end.
    #[track_caller]
    pub fn kill(&self) {
        let pid = self.pid();
        signal(pid, Signal::KILL).unwrap();
        wait_until("the killed daemon ends", || !is_alive(pid));
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log.txt")).unwrap_or_default()
    }

    /// A loop device over a file of the laboratory; `options` are losetup's.
    #[track_caller]
    pub fn loop_device(&self, file: &str, options: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Without devtmpfs nobody makes the node of a new device.
            self.sh(
                "d=$(losetup -f); [ -b $d ] || mknod $d b 7 ${d#/dev/loop} 2>/dev/null || [ -b $d ]",
            );
            let output = self.output("sh", &["-c", &format!("losetup -f --show {options} {file}")]);
            if output.status.success() {
                return String::from_utf8_lossy(&output.stdout).trim().to_owned();
            }
            // Another test may have been faster.
            assert!(Instant::now() < deadline, "losetup {file}: {}", show(&output));
            thread::sleep(LOOK);
        }
    }

    /// A file system of its own at `dir`, on a loop device over a new file.
    #[track_caller]
    pub fn host(&self, dir: &str, fs: &str, size: u64) -> String {
        let file = format!("{dir}.fs");
        File::create(self.path(&file)).unwrap().set_len(size).unwrap();
        let device = self.loop_device(&file, "");
        self.sh(&format!("mkfs.{fs} -q {device}; mkdir {dir}; mount {device} {dir}"));
        device
    }

    /// The end of a test: unmounts, and checks that nothing is left and no base has changed.
    #[track_caller]
    pub fn end(mut self) {
        let mountpoint = self.path("m");
        if mounts_below(&mountpoint).contains(&mountpoint) {
            self.umount();
        }
        for (path, crc) in std::mem::take(&mut self.bases) {
            assert_eq!(checksum(&path), crc, "'{}' has changed", path.display());
        }
        assert_eq!(daemons_of(self.dir()), Vec::<u32>::new(), "daemons are left");
    }
}

impl Drop for Lab {
    /// The last resort; in a test that passes there is little to do here.
    fn drop(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        // A guard kills the commands of its daemon once that is dead, if it may live to do so.
        for pid in daemons_of(dir.path()).into_iter().filter(|pid| !is_guard(*pid)) {
            // Dead, a daemon lets go of whoever waits for it, also when it was stopped.
            let _ = signal(pid, Signal::KILL);
        }
        for _ in 0..3 {
            for mountpoint in mounts_below(dir.path()).iter().rev() {
                let _ = unmount(mountpoint.as_path(), UnmountFlags::DETACH);
            }
            for device in loops_over(dir.path()) {
                let _ = Command::new("losetup").args(["-d", &device]).status();
            }
        }
        let left = mounts_below(dir.path());
        if !left.is_empty() {
            // Removing the directory would reach through the mounts.
            eprintln!("left behind: {left:?}");
            let _ = dir.keep();
        }
    }
}

fn is_guard(pid: u32) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).any(|word| word == b"__guard")
}

/// Everything mounted at `dir` or below, in the order of mounting.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.starts_with(dir)).collect()
}

/// Loop devices whose file lies below `dir`.
fn loops_over(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(file.trim()).starts_with(dir) {
            found.push(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// Processes of the program under test that the laboratory at `dir` has started.
pub fn daemons_of(dir: &Path) -> Vec<u32> {
    let mark = format!("{MARK}={}\0", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let is_ours =
            fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == Path::new(COWSLIP));
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let is_marked = String::from_utf8_lossy(&environment).contains(&mark);
        if is_ours && is_alive(pid) && is_marked {
            found.push(pid);
        }
    }
    found
}

/// Whether a process is there and not merely waiting to be reaped.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    // The first thread may be dead while others still hold the files and their locks.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads > 1 || state.is_some_and(|state| !"ZX".contains(state))
}

pub fn show(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// The line of a refusal with exit code `code`.
#[track_caller]
pub fn one_line(code: i32, output: &Output, what: &str) -> String {
    assert_eq!(output.status.code(), Some(code), "{what}\n{}", show(output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "{what}\n{text}");
    let line = text.trim_end().to_owned();
    assert!(line.starts_with("cowslip: "), "{what}\n{line}");
    line
}

/// The checksum of a whole file; holes cost nothing.
pub fn checksum(path: &Path) -> u32 {
    let file = File::open(path).unwrap();
    let mut crc = crc32c::crc32c(&file.metadata().unwrap().len().to_le_bytes());
    for range in data_runs(&file) {
        let bytes = read(&file, range.start, range.end - range.start);
        // Zeros count as a hole does: where they are stored is not what is compared.
        for (index, piece) in bytes.chunks(512).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                crc = crc32c::crc32c_append(crc, &(range.start + index as u64 * 512).to_le_bytes());
                crc = crc32c::crc32c_append(crc, piece);
            }
        }
    }
    crc
}

/// `len` bytes at `offset`, all of which are there.
#[track_caller]
pub fn read(file: &File, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xEE; len as usize];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// The runs of data that SEEK_DATA and SEEK_HOLE tell of.
pub fn data_runs(file: &File) -> Vec<Range<u64>> {
    let mut found = Vec::new();
    let mut at = 0;
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => {
                let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
                assert!(start >= at && end > start, "{at}: {start}..{end}");
                found.push(start..end);
                at = end;
            }
            Err(rustix::io::Errno::NXIO) => return found,
            Err(error) => panic!("SEEK_DATA at {at}: {error}"),
        }
    }
}

/// Bytes of the host that a file takes.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// The data file of the overlay at `dir`.
pub fn data_file(dir: &Path) -> PathBuf {
    layer_dir(dir).join("data")
}

/// The directory of the only layer of the overlay at `dir`.
pub fn layer_dir(dir: &Path) -> PathBuf {
    let mut entries = fs::read_dir(dir.join("layers")).unwrap();
    entries.next().unwrap().unwrap().path()
}

pub const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
pub const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE;
pub const ZERO_KEEP: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

pub fn fallocate(file: &File, flags: FallocateFlags, range: Range<u64>) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, flags, range.start, range.end - range.start)?)
}

pub fn seek(file: &File, whence: SeekFrom) -> Result<u64, i32> {
    rustix::fs::seek(file, whence).map_err(rustix::io::Errno::raw_os_error)
}

/// The errno of a result that must be an error.
#[track_caller]
pub fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// Copies with copy_file_range alone, until `len` bytes have gone over or the source ends.
pub fn copy_range(from: &File, at: u64, to: &File, offset: u64, len: u64) -> io::Result<u64> {
    let (mut source, mut target, mut done) = (at, offset, 0);
    while done < len {
        let want = (len - done) as usize;
        let got =
            rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), want)?;
        if got == 0 {
            break;
        }
        done += got as u64;
    }
    Ok(done)
}

/// Writes `text` to a file of the laboratory.
pub fn put(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// A buffer as O_DIRECT wants it.
pub struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    pub fn of(bytes: &[u8]) -> Self {
        let mut room = vec![0; bytes.len() + 4096];
        let at = room.as_ptr().align_offset(4096);
        room[at..at + bytes.len()].copy_from_slice(bytes);
        Self(room, at, bytes.len())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0[self.1..self.1 + self.2]
    }
}
