//! Programs that become the server.

use std::fs;
use std::path::Path;

use super::super::*;
use crate::remote::nbd::testing::*;

fn open_exec(line: &str) -> Result<NbdClient, NbdOpenError> {
    NbdClient::open(&target(&format!("nbd+exec:{line}")), options())
}

fn is_gone(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    stat.map_or(true, |stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}

#[test]
fn nbdkit_and_qemu_nbd_are_started_and_ended() {
    let image = Image::new();
    let path = image.path();
    let pid = image.dir.path().join("pid");
    for line in [
        format!("nbdkit -r -f -P {} file {}", pid.display(), path.display()),
        format!(
            "qemu-nbd -r -f raw --persistent --shared=4 --pid-file={} {}",
            pid.display(),
            path.display()
        ),
    ] {
        let client = open_exec(&line).unwrap();
        assert!(read_all(&client, 65_536) == image.bytes);
        assert!(client.knows_extents());
        let server = fs::read_to_string(&pid).unwrap();
        assert!(!is_gone(&server));
        drop(client);
        assert!(is_gone(&server), "{line}");
    }
}

#[test]
fn a_program_that_cannot_be_run_or_fails_says_why() {
    let why = |line: &str| open_exec(line).err().unwrap().to_string();
    let missing = why("no-such-program x");
    assert!(
        missing.starts_with(
            "nbd+exec:no-such-program ...: 'no-such-program' exited with status 127: "
        ),
        "{missing}"
    );
    assert!(missing.contains("not found"), "{missing}");
    let failed = why("sh -c 'echo first >&2; echo the last words >&2; exit 3'");
    assert_eq!(failed, "nbd+exec:sh ...: 'sh' exited with status 3: the last words");
    assert_eq!(why("sh -c 'kill -9 $$'"), "nbd+exec:sh ...: 'sh' was killed by signal 9");
}

#[test]
fn a_program_that_dies_is_started_again() {
    let image = Image::new();
    let pid = image.dir.path().join("pid");
    let line = format!("nbdkit -r -f -P {} file {}", pid.display(), image.path().display());
    let client = open_exec(&line).unwrap();
    let first = fs::read_to_string(&pid).unwrap();
    for _ in 0..2 {
        let server = fs::read_to_string(&pid).unwrap();
        let number = rustix::process::Pid::from_raw(server.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(number, rustix::process::Signal::KILL).unwrap();
        assert!(read_all(&client, 65_536) == image.bytes);
    }
    assert!(is_gone(&first));
    assert_ne!(fs::read_to_string(&pid).unwrap(), first);
}

#[test]
fn the_program_gets_one_socket_and_nothing_else() {
    let dir = tempfile::TempDir::new().unwrap();
    let out = dir.path().join("out");
    let script = format!(
        "(echo $LISTEN_FDS $((LISTEN_PID == $$)) ${{LISTEN_FDNAMES-none}} $(readlink /proc/self/fd/0) $(readlink /proc/self/fd/3); ls -l /proc/self/fd | grep -c socket:) > {}; exit 1",
        out.display()
    );
    assert!(open_exec(&format!("sh -c '{}'", script.replace('\'', "'\\''"))).is_err());
    let found = fs::read_to_string(out).unwrap();
    assert!(found.starts_with("1 1 none /dev/null socket:["), "{found}");
    assert_eq!(found.lines().nth(1).unwrap().trim(), "1", "{found}");
}

#[test]
fn programs_started_by_the_program_end_with_the_client() {
    let image = Image::new();
    let pid = image.dir.path().join("pid");
    let script = format!(
        "sleep 1000 & echo $! > {}; exec nbdkit -r -f file {}",
        pid.display(),
        image.path().display()
    );
    let client = open_exec(&format!("sh -c '{script}'")).unwrap();
    let child = fs::read_to_string(&pid).unwrap();
    assert!(!is_gone(&child));
    drop(client);
    eventually(|| is_gone(&child));
}

#[test]
fn the_socket_has_no_name_once_the_program_runs() {
    let image = Image::new();
    let line = format!("nbdkit -r -f file {}", image.path().display());
    let _client = open_exec(&line).unwrap();
    let names = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    let left: Vec<_> = names
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("cowslip-nbd-"))
        .filter(|entry| Path::new(&entry.path()).join("socket").exists())
        .collect();
    // Another test may be between its two steps.
    eventually(|| left.iter().all(|entry| !entry.path().exists()));
}

/// Not a test: the process that `a_killed_daemon_takes_the_program_with_it` kills.
#[test]
#[ignore = "only as a process of another test"]
fn process_to_be_killed() {
    let line = std::env::var("COWSLIP_TEST_EXEC").unwrap();
    let client = open_exec(&line).unwrap();
    println!("ready");
    thread::sleep(LONG);
    drop(client);
}

#[test]
fn a_killed_daemon_takes_the_program_with_it() {
    let image = Image::new();
    let pid = image.dir.path().join("pid");
    // It would not notice the end by itself.
    let line = format!("nbdkit -r -f -P {} file {}", pid.display(), image.path().display());
    let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--nocapture", "--exact"])
        .arg("remote::nbd::client::tests::exec::process_to_be_killed")
        .env("COWSLIP_TEST_EXEC", line)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(daemon.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().ends_with("ready")), "it did not start");
    let server = fs::read_to_string(&pid).unwrap();
    assert!(!is_gone(&server));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    eventually(|| is_gone(&server));
}
