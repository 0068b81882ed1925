//! A test environment for real mounts. Each [`Lab`] is one temporary directory; everything that a
//! test sets up in the directory is removed with the lab, even when the test panics.
//!
//! ```text
//!   /var/tmp/cowslip-test-XXXXXX/     working directory of every command
//!     m/                              the mountpoint
//!     base.img ...                    files that the test creates
//! ```
//!
//! Tests run the real `cowslip` program, as a user does; shell lines refer to the program as
//! `$COWSLIP`. The tests need root, `/dev/fuse` and loop devices, and fail with a message when one
//! of these is missing.

// Every test program compiles this whole module but uses only a part of it.
#![allow(dead_code, unreachable_pub)]
// Sizes are small, and a test may panic.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// Path of the program under test.
pub const COWSLIP: &str = env!("CARGO_BIN_EXE_cowslip");
/// Parent directory of all labs. `/tmp` may be a tmpfs; the tests need a real file system.
const LABS_DIR: &str = "/var/tmp";
/// Maximum time that a killed daemon takes to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum duration of any single wait. Every command finishes sooner, so that a hang fails the
/// test instead of blocking the run.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// Environment variable that records which lab started a process.
const LAB_VARIABLE: &str = "COWSLIP_TEST_LAB";
/// Interval between two checks of an awaited condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// A temporary directory for one test, with its mounts, loop devices and processes.
pub struct Lab {
    /// Is `None` only during `drop`.
    dir: Option<tempfile::TempDir>,
    bases: Vec<(PathBuf, u32)>,
}

/// A child process that is killed when its test ends.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The child may have exited already, which is fine. A child that hangs in the kernel exits
        // only with its daemon, so nothing waits for the child here.
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

/// Sets a stop flag on drop, so that threads which poll the flag end even when their test panics.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until `is_so` returns true. Panics with `what` after [`WAIT_TIMEOUT`].
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(POLL_INTERVAL);
    }
}

/// Sends `signal` to the process `pid`.
pub fn signal(pid: u32, signal: Signal) -> io::Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Stops the process `pid` and waits until all its threads are stopped. (The kernel delivers
/// SIGSTOP asynchronously.)
#[track_caller]
pub fn stop(pid: u32) {
    signal(pid, Signal::STOP).unwrap();
    wait_until("the process stops", || is_stopped(pid));
}

/// Whether all threads of the process `pid` are stopped.
pub fn is_stopped(pid: u32) -> bool {
    threads_of(pid).iter().all(|thread| {
        let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
        matches!(state, Some('t' | 'T'))
    })
}

/// Waits until `count` threads of the process `pid` block in the system call number `call`.
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
        // A thread that only passes through the call has usually left it by then.
        thread::sleep(Duration::from_millis(50));
        let again = held_up();
        first.iter().filter(|thread| again.contains(thread)).count() >= count
    });
}

/// Returns the `/proc` directories of the threads of `pid`. Any of these threads may exit before
/// the caller reads its directory.
pub fn threads_of(pid: u32) -> Vec<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    threads.flatten().map(|thread| thread.path()).collect()
}

/// Returns `len` pseudo-random bytes, different for every `seed`.
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
        let dir = tempfile::Builder::new().prefix("cowslip-test-").tempdir_in(LABS_DIR);
        let lab = Self { dir: Some(dir.unwrap()), bases: Vec::new() };
        fs::create_dir(lab.path("m")).unwrap();
        lab
    }

    pub fn dir(&self) -> &Path {
        self.dir.as_ref().unwrap().path()
    }

    /// Returns the path of `name` inside the lab. An absolute `name` is returned unchanged.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// Opens a file for reading and writing.
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

    /// Creates a base as [`file_with_holes`](Self::file_with_holes) does, and checks at the end of
    /// the test that the base was not modified.
    pub fn base(&mut self, name: &str, size: u64) {
        self.file_with_holes(name, size);
        self.watch(name);
    }

    /// Creates a file of `size` bytes with data at the start, in the middle and at the very end, and
    /// holes between.
    pub fn file_with_holes(&self, name: &str, size: u64) {
        let file = File::create(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        let third = size / 3 / 4096 * 4096;
        for (start, len) in [(0, third / 2), (third, third / 4), (size - size.min(5000), 5000)] {
            let len = len.min(size - start);
            file.write_all_at(&noise(len, start + 1), start).unwrap();
        }
    }

    /// Checks at the end of the test that the file `name` still has its present content.
    pub fn watch(&mut self, name: &str) {
        let path = self.path(name);
        let crc = checksum(&path);
        self.bases.retain(|(known, _)| *known != path);
        self.bases.push((path, crc));
    }

    /// Runs a command in the lab's directory.
    #[track_caller]
    pub fn output(&self, program: &str, args: &[&str]) -> Output {
        let mut command = self.command(program);
        command.args(args);
        // Files instead of pipes: a child that hangs in the kernel would keep a pipe open for ever.
        let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        command.stdout(out.try_clone().unwrap()).stderr(err.try_clone().unwrap());
        let mut child = Running(command.spawn().unwrap());
        let mut status = None;
        let deadline = Instant::now() + WAIT_TIMEOUT;
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

    /// Prepares a command that runs in the lab's directory and carries the lab's mark in its
    /// environment.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir()).env("COWSLIP", COWSLIP).env(LAB_VARIABLE, self.dir());
        command.env("LC_ALL", "C").env_remove("TMPDIR").stdin(Stdio::null());
        command
    }

    /// Runs shell lines, which must succeed, and returns their stdout.
    #[track_caller]
    pub fn sh(&self, lines: &str) -> String {
        let output = self.output("sh", &["-euc", lines]);
        assert!(output.status.success(), "{lines}\n{}", show(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `cowslip WORDS`; no word may contain a space.
    pub fn cowslip(&self, words: &str) -> Output {
        let words: Vec<&str> = words.split_whitespace().collect();
        self.output(COWSLIP, &words)
    }

    /// Runs `cowslip WORDS`, which must succeed, and returns its stdout.
    #[track_caller]
    pub fn ok(&self, words: &str) -> String {
        let output = self.cowslip(words);
        assert!(output.status.success(), "cowslip {words}\n{}", show(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `cowslip WORDS`, which must fail with `code` and a single line on stderr, and returns
    /// this line.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &str) -> String {
        one_line(code, &self.cowslip(words), words)
    }

    /// Runs `cowslip mount m WORDS` and returns its stdout.
    #[track_caller]
    pub fn mount(&self, words: &str) -> String {
        self.ok(&format!("mount m {words} --log log.txt"))
    }

    /// Runs `cowslip umount m` and returns its stdout.
    #[track_caller]
    pub fn umount(&self) -> String {
        self.ok("umount m")
    }

    /// Returns the status of the mount at `m` as JSON.
    #[track_caller]
    pub fn status(&self) -> Value {
        let output = self.cowslip("status m --json");
        // Exit code 3 reports a failed disk; the status is still printed.
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", show(&output));
        let all: Value = serde_json::from_slice(&output.stdout).unwrap();
        all["mounts"][0].clone()
    }

    /// Returns the status of the disk `name` of the mount at `m` as JSON.
    #[track_caller]
    pub fn disk(&self, name: &str) -> Value {
        let status = self.status();
        let disks = status["disks"].as_array().unwrap().iter();
        let found = disks.clone().find(|disk| disk["name"] == name);
        found.unwrap_or_else(|| panic!("no disk {name} in {status}")).clone()
    }

    /// Returns the process id of the daemon that serves `m`.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.status()["pid"].as_u64().unwrap() as u32
    }

    /// Kills the daemon of `m` with SIGKILL and waits until the daemon has exited.
    #[track_caller]
    pub fn kill(&self) {
        let pid = self.pid();
        signal(pid, Signal::KILL).unwrap();
        wait_until("the killed daemon ends", || !is_alive(pid));
    }

    /// Returns the daemon's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log.txt")).unwrap_or_default()
    }

    /// Creates a loop device over a file of the lab; `options` are passed to losetup.
    #[track_caller]
    pub fn loop_device(&self, file: &str, options: &str) -> String {
        let deadline = Instant::now() + WAIT_TIMEOUT;
        loop {
            // Without devtmpfs the node of a new device is not created automatically.
            self.sh(
                "d=$(losetup -f); [ -b $d ] || mknod $d b 7 ${d#/dev/loop} 2>/dev/null || [ -b $d ]",
            );
            let output = self.output("sh", &["-c", &format!("losetup -f --show {options} {file}")]);
            if output.status.success() {
                return String::from_utf8_lossy(&output.stdout).trim().to_owned();
            }
            // Another test may have taken the device first.
            assert!(Instant::now() < deadline, "losetup {file}: {}", show(&output));
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Creates a file system of type `fs` on a loop device over a new file, mounts the file system
    /// at `dir` and returns the loop device.
    #[track_caller]
    pub fn host(&self, dir: &str, fs: &str, size: u64) -> String {
        let file = format!("{dir}.fs");
        File::create(self.path(&file)).unwrap().set_len(size).unwrap();
        let device = self.loop_device(&file, "");
        self.sh(&format!("mkfs.{fs} -q {device}; mkdir {dir}; mount {device} {dir}"));
        device
    }

    /// Unmounts `m`, and checks that no daemon is left and no base was modified.
    fn check_end(&mut self) {
        let mountpoint = self.path("m");
        if mounts_below(&mountpoint).contains(&mountpoint) {
            self.umount();
        }
        for (path, crc) in std::mem::take(&mut self.bases) {
            assert_eq!(checksum(&path), crc, "'{}' has changed", path.display());
        }
        let dir = self.dir();
        // A daemon that was killed right before may need a moment.
        let deadline = Instant::now() + EXIT_TIMEOUT;
        while !daemons_of(dir).is_empty() && Instant::now() < deadline {
            thread::sleep(POLL_INTERVAL);
        }
        assert_eq!(daemons_of(dir), Vec::<u32>::new(), "daemons are left");
    }

    /// Removes everything that the test has left: processes, mounts, loop devices, files.
    fn clean_up(&mut self) {
        let Some(dir) = self.dir.take() else { return };
        // A guard kills its daemon's commands after the daemon has died, so guards are not killed
        // here.
        for pid in daemons_of(dir.path()).into_iter().filter(|pid| !is_guard(*pid)) {
            // SIGKILL also ends a stopped daemon, and releases every process that waits for the
            // daemon.
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
            // Removing the directory would delete files inside these mounts.
            eprintln!("left behind: {left:?}");
            let _ = dir.keep();
        }
    }
}

impl Drop for Lab {
    /// Ends the test: a test that did not fail yet fails here if it left something behind that a
    /// good end does not leave.
    fn drop(&mut self) {
        let ended = match thread::panicking() {
            true => Ok(()),
            false => panic::catch_unwind(AssertUnwindSafe(|| self.check_end())),
        };
        self.clean_up();
        if let Err(failure) = ended {
            panic::resume_unwind(failure);
        }
    }
}

fn is_guard(pid: u32) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.split(|byte| *byte == 0).any(|word| word == b"__guard")
}

/// Returns all mountpoints at or below `dir`, in the order of mounting.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let points = points.map(|point| PathBuf::from(point.replace("\\040", " ")));
    points.filter(|point| point.starts_with(dir)).collect()
}

/// Returns the loop devices whose backing file lies below `dir`.
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

/// Returns the processes of the program under test that the lab at `dir` has started.
pub fn daemons_of(dir: &Path) -> Vec<u32> {
    let mark = format!("{LAB_VARIABLE}={}\0", dir.display());
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

/// Whether the process `pid` exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    // The main thread may be dead while others still hold the files and their locks.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    threads > 1 || state.is_some_and(|state| !"ZX".contains(state))
}

pub fn show(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Checks that `output` has exit code `code` and a single line on stderr, and returns this line.
#[track_caller]
pub fn one_line(code: i32, output: &Output, what: &str) -> String {
    assert_eq!(output.status.code(), Some(code), "{what}\n{}", show(output));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "{what}\n{text}");
    let line = text.trim_end().to_owned();
    assert!(line.starts_with("cowslip: "), "{what}\n{line}");
    line
}

/// Returns the CRC32C of a file's size and data. Holes are skipped, so large sparse files are
/// cheap.
pub fn checksum(path: &Path) -> u32 {
    let file = File::open(path).unwrap();
    let mut crc = crc32c::crc32c(&file.metadata().unwrap().len().to_le_bytes());
    for range in data_runs(&file) {
        let bytes = read(&file, range.start, range.end - range.start);
        // Stored zeros count as a hole: the allocation of zeros is not compared.
        for (index, piece) in bytes.chunks(512).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                crc = crc32c::crc32c_append(crc, &(range.start + index as u64 * 512).to_le_bytes());
                crc = crc32c::crc32c_append(crc, piece);
            }
        }
    }
    crc
}

/// Reads `len` bytes at `offset`; all of them must lie inside the file.
#[track_caller]
pub fn read(file: &File, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xEE; len as usize];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Returns the data ranges that SEEK_DATA and SEEK_HOLE report.
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

/// Returns the number of bytes that the host has allocated for a file.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Returns the path of the data file of the overlay at `dir`, which must have one layer.
pub fn data_file(dir: &Path) -> PathBuf {
    layer_dir(dir).join("data")
}

/// Returns the directory of the only layer of the overlay at `dir`.
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

/// Returns the errno of a result that must be an error.
#[track_caller]
pub fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// Copies `len` bytes with copy_file_range alone, or fewer when the source ends earlier. Returns
/// the number of bytes copied.
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

/// Creates or replaces the file at `path` with `bytes`.
pub fn put(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// A buffer aligned to 4096 bytes, as O_DIRECT requires.
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
