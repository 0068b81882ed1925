//! The guard of a command that reads a stream: `cowslip __guard`, as the daemon runs it.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use cowslip::config::Programs;
use cowslip::stream::command::{PipeEnd, Pipeline};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

const COWSLIP: &str = env!("CARGO_BIN_EXE_cowslip");

/// A command that takes the end of its input for the end of the image.
const TAKER: [&str; 3] = ["sh", "-c", "cat > out; touch whole"];

/// A command and its guard, with the pipe ends that a daemon holds.
struct Scene {
    dir: TempDir,
    taker: Child,
    guard: Child,
    data: fs::File,
    control: OwnedFd,
}

fn scene() -> Scene {
    let dir = TempDir::new().unwrap();
    let (theirs, data) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (word, control) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let taker = Command::new(TAKER[0])
        .args(&TAKER[1..])
        .stdin(theirs)
        .current_dir(dir.path())
        .process_group(0)
        .spawn()
        .unwrap();
    let guard = Command::new(COWSLIP)
        .args(["__guard", &taker.id().to_string()])
        .stdin(word)
        .stdout(data.try_clone().unwrap())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    Scene { dir, taker, guard, data: data.into(), control }
}

/// Writes `bytes` into the pipe that the guard `pid` holds open. They arrive only at a command that
/// has not seen the end of its input.
fn write_through(pid: u32, bytes: &[u8]) {
    let held = fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/fd/1"));
    held.expect("the guard holds the pipe").write_all(bytes).unwrap();
}

/// Returns the guard that this process has started, as soon as its command line tells it.
fn guard_of_this_process() -> u32 {
    let find = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
        let children = tasks.flat_map(|task| fs::read_to_string(task.path().join("children")));
        let pids: Vec<u32> = children
            .flat_map(|line| line.split(' ').flat_map(str::parse).collect::<Vec<_>>())
            .collect();
        pids.into_iter().find(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| word == b"__guard")
        })
    };
    let mut found = None;
    eventually(|| {
        found = find();
        found.is_some()
    });
    found.unwrap()
}

fn eventually(mut what: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < until, "it never came");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn command_is_killed_with_its_daemon_and_never_sees_the_end_of_its_input() {
    let Scene { dir, mut taker, mut guard, mut data, control } = scene();
    data.write_all(&[1; 5000]).unwrap();
    eventually(|| fs::metadata(dir.path().join("out")).is_ok_and(|out| out.len() == 5000));
    // The kernel closes the files of a killed daemon in any order.
    drop(data);
    write_through(guard.id(), &[2; 1000]);
    eventually(|| fs::metadata(dir.path().join("out")).is_ok_and(|out| out.len() == 6000));
    drop(control);
    assert_eq!(taker.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(guard.wait().unwrap().success());
    assert!(!dir.path().join("whole").exists());
}

#[test]
fn released_guard_lets_the_command_see_the_end_of_its_input() {
    let Scene { dir, mut taker, mut guard, mut data, control } = scene();
    data.write_all(&[1; 5000]).unwrap();
    rustix::io::write(&control, b".").unwrap();
    assert!(guard.wait().unwrap().success());
    assert!(taker.try_wait().unwrap().is_none());
    drop(data);
    assert!(taker.wait().unwrap().success());
    assert!(dir.path().join("whole").exists());
}

#[test]
fn guard_ignores_sigterm() {
    let Scene { mut taker, mut guard, data, control, dir: _dir } = scene();
    let pid = guard.id();
    // Waits until the guard has set up its signals: bit 14 of SigIgn is SIGTERM.
    eventually(|| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        u64::from_str_radix(ignored, 16).unwrap() & (1 << (libc::SIGTERM - 1)) != 0
    });
    rustix::process::kill_process(Pid::from_child(&guard), Signal::TERM).unwrap();
    drop(data);
    drop(control);
    // Without its guard, the command would have seen the end of its input.
    assert_eq!(taker.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(guard.wait().unwrap().success());
}

#[test]
fn guard_rejects_invalid_process_groups() {
    for group in ["0", "1", "-1", "x"] {
        let status = Command::new(COWSLIP)
            .args(["__guard", group])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(!status.success(), "{group}");
    }
}

fn pipeline(dir: &Path) -> (std::sync::Arc<Pipeline>, OwnedFd) {
    let programs = Programs(vec![TAKER.map(Into::into).to_vec()]);
    let guard = Some(Path::new(COWSLIP));
    Pipeline::spawn_with(&programs, dir, PipeEnd::Input, Stdio::null(), guard).unwrap()
}

#[test]
fn pipeline_ends_only_after_its_guard_was_released() {
    let dir = TempDir::new().unwrap();
    let (pipeline, data) = pipeline(dir.path());
    rustix::io::write(&data, &[1; 1000]).unwrap();
    let other = data.try_clone().unwrap();
    drop(data);
    pipeline.release_guard();
    drop(other);
    pipeline.wait().unwrap();
    assert!(dir.path().join("whole").exists());
    assert_eq!(fs::read(dir.path().join("out")).unwrap(), [1; 1000]);
}

#[test]
fn unreleased_pipeline_outlives_its_pipe_and_is_killed_unfinished() {
    let dir = TempDir::new().unwrap();
    let (pipeline, data) = pipeline(dir.path());
    rustix::io::write(&data, &[1; 1000]).unwrap();
    drop(data);
    write_through(guard_of_this_process(), &[2; 1000]);
    eventually(|| fs::metadata(dir.path().join("out")).is_ok_and(|out| out.len() == 2000));
    assert!(!pipeline.has_ended(), "nothing held the pipe");
    pipeline.kill();
    assert_eq!(pipeline.failure().unwrap(), "'sh' was killed by signal 9");
    assert!(!dir.path().join("whole").exists());
}
