//! The daemon as a process on its host: limits, signals, file descriptors and namespaces.

use std::fs::{self, OpenOptions};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::thread;
use std::time::Duration;

use crate::common::mount::{
    COWSLIP, KIB, Lab, MIB, Running, daemons_of, errno_of, is_alive, mounts_below, noise, one_line,
    put, read, show, signal, wait_until,
};
use rustix::process::Signal;

/// Runs `cowslip WORDS` with the resource limit `limit`, an option of prlimit(1).
fn limited(lab: &Lab, limit: &str, words: &str) -> Output {
    let words: Vec<&str> = [limit, COWSLIP].into_iter().chain(words.split(' ')).collect();
    lab.output("prlimit", &words)
}

/// Starts `cowslip WORDS` without waiting for it.
fn start(lab: &Lab, words: &str) -> Running {
    let mut command = lab.command(COWSLIP);
    command.args(words.split(' ')).stdout(Stdio::null()).stderr(Stdio::null());
    Running(command.spawn().unwrap())
}

fn end_of(running: &mut Running) -> ExitStatus {
    let mut status = None;
    wait_until("the command ends", || {
        status = running.0.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Checks that an interrupted start has left neither a mount nor temporary files in the lab.
#[track_caller]
fn assert_nothing_is_left(lab: &Lab, when: &str) {
    assert_eq!(mounts_below(lab.dir()), Vec::<std::path::PathBuf>::new(), "{when}");
    for entry in fs::read_dir(lab.dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(!name.starts_with(".cowslip-"), "{when}: {name}");
    }
}

/// Mounts a stream whose command runs the shell lines `lines`, and returns the output of the lines.
/// The command then reads all its input.
fn told_by_a_command(lab: &Lab, before: &str, lines: &str, mode: &str) -> String {
    put(&lab.path("ask"), format!("{lines} > out.new; mv out.new out; cat > /dev/null").as_bytes());
    lab.sh(&format!("{before}\n$COWSLIP mount {mode} m s=stream:64K,to=cmd:'sh ask'"));
    wait_until("the command says something", || lab.path("out").exists());
    fs::read_to_string(lab.path("out")).unwrap()
}

#[test]
fn write_past_the_file_size_limit_fails_with_efbig_only() {
    let mut lab = Lab::new();
    lab.base("base", 4 * MIB);
    let words = "mount m d=base,overlay=o.cow e=base --log log.txt";
    let mounted = limited(&lab, "--fsize=8388608", words);
    assert!(mounted.status.success(), "{}", show(&mounted));
    let open = |name| OpenOptions::new().read(true).write(true).open(lab.path(name)).unwrap();
    let (d, e) = (open("m/d"), open("m/e"));
    e.write_all_at(b"changed", 0).unwrap();
    d.set_len(20 * MIB).unwrap();
    let bytes = noise(MIB, 2);
    d.write_all_at(&bytes, 7 * MIB).unwrap();
    assert_eq!(errno_of(d.write_all_at(&bytes, 8 * MIB)), libc::EFBIG);
    // The overlay is not latched, and other disks are not affected.
    d.write_all_at(b"below", 6 * MIB).unwrap();
    d.sync_all().unwrap();
    assert_eq!(read(&e, 0, 7), b"changed");
    assert_eq!(read(&d, 7 * MIB, MIB), bytes);
    assert_eq!(lab.disk("d")["state"], "ok");
    drop((d, e));
    lab.umount();
    lab.mount("d=base,overlay=o.cow");
    let d = fs::File::open(lab.path("m/d")).unwrap();
    assert_eq!(read(&d, 7 * MIB, MIB), bytes);
    assert_eq!(read(&d, 6 * MIB, 5), b"below");
    drop(d);
}

#[test]
fn mount_survives_a_log_file_at_its_size_limit() {
    let lab = Lab::new();
    put(&lab.path("base"), &noise(64 * KIB, 1));
    put(&lab.path("log.txt"), &vec![b'\n'; MIB as usize]);
    let mounted = limited(&lab, "--fsize=1048576", "mount m d=base --log log.txt");
    assert!(mounted.status.success(), "{}", show(&mounted));
    assert!(lab.ok("log m").contains("mounted at"));
    assert_eq!(lab.path("log.txt").metadata().unwrap().len(), MIB);
}

#[test]
fn overlay_above_the_file_size_limit_is_rejected() {
    let mut lab = Lab::new();
    lab.base("base", 4 * MIB);
    let refused = limited(&lab, "--fsize=1048576", "mount m d=base,overlay=o.cow");
    let line = one_line(1, &refused, "a limit below the disk's size");
    assert!(line.contains("raise the limit (ulimit -f)"), "{line}");
    assert!(!lab.path("o.cow").exists());
    // A temporary overlay needs no file of that size.
    let mounted = limited(&lab, "--fsize=1048576", "mount m d=base --log log.txt");
    assert!(mounted.status.success(), "{}", show(&mounted));
}

#[test]
fn started_programs_inherit_no_ignored_signals() {
    let lab = Lab::new();
    // An ignored signal would show in the mask of every child process.
    let mask = "sed -n 's/^SigIgn:\\s*//p' /proc/self/status";
    let here = lab.sh(mask);
    let words = ["run", "b=blank:1M", "--", "sed", "-n", "s/^SigIgn:\\s*//p", "/proc/self/status"];
    let output = lab.output(COWSLIP, &words);
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), here);
}

#[test]
fn open_files_of_the_caller_are_closed_in_daemon_and_commands() {
    let lab = Lab::new();
    let open = told_by_a_command(&lab, "exec 9> lock; flock 9", "ls /proc/$$/fd", "");
    let numbers: Vec<&str> = open.split_whitespace().collect();
    assert!(numbers.contains(&"0") && !numbers.contains(&"9"), "{open}");
    // The caller has exited, so the lock is free: daemon, guard and command do not have the file.
    lab.sh("flock -n lock true");
    let daemons = daemons_of(lab.dir());
    assert!(daemons.len() >= 2, "daemon and guard: {daemons:?}");
    for pid in daemons {
        for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            assert_ne!(target, lab.path("lock"), "{pid}");
        }
    }
}

#[test]
fn foreground_mount_keeps_open_files_but_its_commands_do_not() {
    let lab = Lab::new();
    put(&lab.path("ask"), b"ls /proc/$$/fd > out.new; mv out.new out; cat > /dev/null");
    let line = "exec 9> lock; flock 9; exec $COWSLIP mount -f m s=stream:64K,to=cmd:'sh ask'";
    let mut command = lab.command("sh");
    command.args(["-c", line]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut mount = Running(command.spawn().unwrap());
    wait_until("the command says something", || lab.path("out").exists());
    let open = fs::read_to_string(lab.path("out")).unwrap();
    assert!(!open.split_whitespace().any(|number| number == "9"), "{open}");
    wait_until("it is mounted", || !mounts_below(lab.dir()).is_empty());
    // `flock FILE cowslip mount -f ...` holds the lock as long as the mount exists.
    lab.sh("! flock -n lock true");
    let cwd = || fs::read_link(format!("/proc/{}/cwd", mount.pid())).unwrap();
    wait_until("it leaves its caller's directory", || cwd() == Path::new("/"));
    signal(mount.pid(), Signal::TERM).unwrap();
    end_of(&mut mount);
}

#[test]
fn stream_commands_have_umask_and_limits_of_the_caller() {
    let lab = Lab::new();
    // Where the hard limit of the core size is 0, the caller's limit stays 0.
    let before = "umask 027; ulimit -Sn 300; ulimit -St 500; (ulimit -Sc 7) 2>/dev/null && ulimit -Sc 7; \
                  ulimit -Sc > core; export NOTIFY_SOCKET=/nowhere";
    let lines = "(umask; ulimit -Sn; ulimit -St; ulimit -Sc; echo ${NOTIFY_SOCKET-none})";
    let told = told_by_a_command(&lab, before, lines, "");
    let core = lab.sh("cat core");
    assert_eq!(told, format!("0027\n300\n500\n{core}none\n"));
    let pid = lab.pid();
    let proc = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    assert!(proc("status").contains("Umask:\t0077\n"), "{}", proc("status"));
    let limits = proc("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let cpu = limits.lines().find(|line| line.starts_with("Max cpu time")).unwrap();
    assert_eq!(cpu.split_whitespace().nth(3), Some("unlimited"), "{cpu}");
    lab.umount();
    lab.sh(
        "umask 027; $COWSLIP mount m s=stream:64K,to=file:made; echo x > m/s; $COWSLIP finish m/s",
    );
    assert_eq!(lab.sh("stat -c %a made").trim(), "640");
}

#[test]
fn daemon_is_not_dumpable() {
    let mut lab = Lab::new();
    lab.base("base", MIB);
    // The files of a process in /proc belong to its group if the process is dumpable, otherwise to
    // root's group (proc(5), `/proc/PID`).
    lab.sh("setpriv --regid 65534 --clear-groups $COWSLIP mount m d=base");
    let daemon = fs::metadata(format!("/proc/{}/status", daemons_of(lab.dir())[0])).unwrap();
    assert_eq!(daemon.gid(), 0);
    let mut other = lab.command("setpriv");
    other.args(["--regid", "65534", "--clear-groups", "cat"]).stdin(Stdio::piped());
    let mut other = Running(other.spawn().unwrap());
    let is_its_own = |pid: u32| fs::metadata(format!("/proc/{pid}/status")).unwrap().gid() == 65534;
    wait_until("cat runs", || is_its_own(other.0.id()));
    drop(other.0.stdin.take());
    // FUSE answers only processes of the mount's own group, and a umount without an answer does not
    // know which daemon to wait for.
    lab.sh("setpriv --regid 65534 --clear-groups $COWSLIP umount m");
}

#[test]
fn mountpoint_of_run_is_private_with_any_umask() {
    let lab = Lab::new();
    lab.sh("mkdir t");
    let mode = lab.sh("umask 0; TMPDIR=$PWD/t $COWSLIP run b=blank:1M -- unshare -m \
                       sh -c 'umount -l $COWSLIP_MNT; stat -c %a $COWSLIP_MNT'");
    assert_eq!(mode.trim(), "700");
}

#[test]
fn signal_during_a_start_leaves_no_dead_mount_and_no_partial_overlay() {
    let mut lab = Lab::new();
    lab.base("base", 16 * MIB);
    lab.sh("$COWSLIP mount m --store st d=base,overlay=st; $COWSLIP umount m");
    let signals = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT];
    let mut undone = 0;
    for round in 0..45u64 {
        let overlay = format!("new{round}.cow");
        let words = format!("mount -f m a=base,overlay={overlay} --store st --log log.txt");
        let mut mount = start(&lab, &words);
        thread::sleep(Duration::from_micros(500 * round));
        signal(mount.pid(), signals[round as usize % 3]).unwrap();
        let status = end_of(&mut mount);
        let when = format!("round {round}: {status}");
        assert_nothing_is_left(&lab, &when);
        assert!(status.code() == Some(0) || status.signal().is_some(), "{when}");
        undone += u32::from(!lab.path(&overlay).exists());
        if lab.path(&overlay).exists() {
            lab.ok(&format!("check {overlay}"));
        }
    }
    assert!(undone > 0, "no signal came during a start");
    lab.ok("check st");
    lab.mount("--store st");
}

#[test]
fn killed_mount_command_leaves_no_daemon_or_a_working_mount() {
    let mut lab = Lab::new();
    lab.base("base", 16 * MIB);
    for round in 0..30u64 {
        let overlay = format!("new{round}.cow");
        let words = format!("mount m a=base,overlay={overlay} --log log.txt");
        let mut mount = start(&lab, &words);
        thread::sleep(Duration::from_micros(700 * round));
        let with = if round % 2 == 0 { Signal::KILL } else { Signal::TERM };
        signal(mount.pid(), with).unwrap();
        let status = end_of(&mut mount);
        if with == Signal::TERM && status.signal().is_some() {
            // The command has waited until everything was undone.
            assert_nothing_is_left(&lab, &format!("round {round}: {status}"));
        }
        // Either the daemon notices the death of its command, or it already serves the mount.
        let is_over =
            || daemons_of(lab.dir()).is_empty() || lab.cowslip("status m").status.success();
        wait_until("the daemon serves or ends", is_over);
        if !daemons_of(lab.dir()).is_empty() && lab.cowslip("status m").status.success() {
            lab.cowslip("umount m");
        }
        wait_until("no daemon is left", || daemons_of(lab.dir()).is_empty());
        assert_nothing_is_left(&lab, &format!("round {round}: {status}"));
    }
}

#[test]
fn run_ended_during_its_start_leaves_neither_mount_nor_directory() {
    let mut lab = Lab::new();
    lab.base("base", 16 * MIB);
    lab.sh("mkdir t");
    for round in 0..30u64 {
        let mut command = lab.command(COWSLIP);
        command.env("TMPDIR", lab.path("t")).args(["run", "base", "--", "sleep", "100"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut run = Running(command.spawn().unwrap());
        thread::sleep(Duration::from_micros(700 * round));
        let (with, number) = match round % 2 {
            0 => (Signal::TERM, 15),
            _ => (Signal::QUIT, 3),
        };
        signal(run.pid(), with).unwrap();
        let status = end_of(&mut run);
        let when = format!("round {round}: {status}");
        // Before it handled the signal, the process was killed by it.
        let was_ended = status.code() == Some(128 + number) || status.signal() == Some(number);
        assert!(was_ended, "{when}");
        wait_until("its daemon ends", || daemons_of(lab.dir()).is_empty());
        assert_eq!(mounts_below(lab.dir()), Vec::<std::path::PathBuf>::new(), "{when}");
        let left = fs::read_dir(lab.path("t")).unwrap().count();
        assert_eq!(left, 0, "{when}");
    }
}

#[test]
fn signal_at_readiness_ends_a_mount_cleanly() {
    let lab = Lab::new();
    for round in 0..6 {
        let abstract_name = format!("cowslip-test-{}-{round}", std::process::id());
        let path = lab.path(&format!("notify{round}"));
        let (socket, name) = match round % 2 {
            0 => (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            _ => {
                let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
                (UnixDatagram::bind_addr(&address).unwrap(), format!("@{abstract_name}").into())
            }
        };
        socket.set_read_timeout(Some(crate::common::mount::WAIT_TIMEOUT)).unwrap();
        let mut command = lab.command(COWSLIP);
        command.args(["mount", "-f", "m", "b=blank:1M"]).env("NOTIFY_SOCKET", name);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut mount = Running(command.spawn().unwrap());
        let mut word = [0; 100];
        let len = socket.recv(&mut word).unwrap();
        signal(mount.pid(), Signal::TERM).unwrap();
        assert_eq!(&word[..len], b"READY=1\n");
        let len = socket.recv(&mut word).unwrap();
        assert_eq!(&word[..len], b"STOPPING=1\n");
        assert_eq!(end_of(&mut mount).code(), Some(0));
        assert_nothing_is_left(&lab, &format!("round {round}"));
    }
}

#[test]
fn failed_notification_of_the_service_manager_is_logged() {
    let lab = Lab::new();
    let mut command = lab.command(COWSLIP);
    command.args(["mount", "-f", "m", "b=blank:1M", "--log", "log.txt"]);
    let mut mount = Running(command.env("NOTIFY_SOCKET", "@nobody-listens").spawn().unwrap());
    wait_until("it is logged", || {
        lab.log().contains("cannot tell $NOTIFY_SOCKET '@nobody-listens'")
    });
    signal(mount.pid(), Signal::TERM).unwrap();
    assert_eq!(end_of(&mut mount).code(), Some(0));
}

#[test]
fn mount_that_reaches_a_limit_leaves_neither_mount_nor_overlay() {
    let mut lab = Lab::new();
    lab.base("base", 4 * MIB);
    let overlays: Vec<String> = (0..4).map(|number| format!("o{number}.cow")).collect();
    let disks: Vec<String> =
        overlays.iter().enumerate().map(|(at, dir)| format!("d{at}=base,overlay={dir}")).collect();
    let words = format!("mount m --store st {} --log log.txt", disks.join(" "));
    let mut refusals = 0;
    for files in (8..80).step_by(3) {
        let output = limited(&lab, &format!("--nofile={files}"), &words);
        if output.status.success() {
            lab.umount();
            lab.sh("rm -r o?.cow st");
            continue;
        }
        refusals += 1;
        let line = one_line(1, &output, &format!("{files} descriptors"));
        assert!(!line.contains("died"), "{line}");
        assert_nothing_is_left(&lab, &line);
        let left: Vec<_> = overlays.iter().filter(|dir| lab.path(dir).exists()).collect();
        assert!(left.is_empty(), "{files} descriptors: {left:?}: {line}");
        lab.sh("rm -rf st");
    }
    assert!(refusals > 0);
    let words = "mount m d=base,overlay=o.cow --log log.txt";
    let line = one_line(1, &limited(&lab, "--nofile=17", words), "17 descriptors");
    assert!(line.contains("17 open files are too few") && line.contains("ulimit -n"), "{line}");
    // It says the same number, and more than there are, wherever the limit was met.
    let needed = |line: &str| -> u64 {
        line.split("needs ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    let second = one_line(1, &limited(&lab, "--nofile=24", words), "24 descriptors");
    assert!(needed(&line) > 24 && needed(&line) == needed(&second), "{line}\n{second}");
}

#[test]
fn mount_outlives_the_cpu_time_of_its_caller() {
    let mut lab = Lab::new();
    lab.base("base", MIB);
    let mounted = limited(&lab, "--cpu=1:100", "mount m d=base,overlay=o.cow --log log.txt");
    assert!(mounted.status.success(), "{}", show(&mounted));
    let pid = lab.pid();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let cpu = limits.lines().find(|line| line.starts_with("Max cpu time")).unwrap();
    // The signal comes before the kill, so that there is time for a good end.
    assert_eq!(cpu.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["90", "100"]);
    lab.open("m/d").write_all_at(b"changed", 0).unwrap();
    signal(pid, Signal::XCPU).unwrap();
    wait_until("the daemon ends", || !is_alive(pid));
    assert_eq!(mounts_below(lab.dir()).len(), 0);
    let log = fs::read_to_string(lab.path("log.txt")).unwrap();
    assert!(log.contains("SIGXCPU (its CPU time is used up: ulimit -t): leaving"), "{log}");
    assert!(lab.ok("check o.cow").contains("clean"));
}

#[test]
fn umount_detaches_the_mount_found_first_although_its_path_changes() {
    let lab = Lab::new();
    lab.sh(
        "mkdir -p x/m y/m; mount -t tmpfs tmpfs y/m; $COWSLIP mount x/m b=blank:1M --log log.txt",
    );
    let file = fs::File::open(lab.path("x/m/b")).unwrap();
    let mut umount = start(&lab, "umount x/m --timeout 50s");
    // umount has resolved the mount and now waits for the open file.
    let sleeps = || {
        let at = fs::read_to_string(format!("/proc/{}/wchan", umount.pid())).unwrap_or_default();
        at.contains("nanosleep")
    };
    wait_until("it waits for who has the file open", sleeps);
    lab.sh("mv x away; ln -s y x");
    drop(file);
    assert_eq!(end_of(&mut umount).code(), Some(0));
    assert_eq!(mounts_below(lab.dir()), [lab.path("y/m")]);
    lab.sh("umount y/m");
}

#[test]
fn mount_in_another_namespace_is_reported_and_not_awaited() {
    let lab = Lab::new();
    put(&lab.path("base"), &noise(64 * KIB, 1));
    lab.mount("d=base,overlay=o.cow");
    let daemon = lab.pid();
    let mut other = lab.command("unshare");
    let other = Running(other.args(["-m", "sleep", "1000"]).spawn().unwrap());
    let comm = || fs::read_to_string(format!("/proc/{}/comm", other.pid())).unwrap_or_default();
    wait_until("it has its namespace", || comm() == "sleep\n");
    let line = lab.refused(1, "umount m");
    assert!(line.contains(&format!("sleep (pid {})", other.pid())), "{line}");
    assert!(line.contains(&format!("nsenter -t {} -m umount", other.pid())), "{line}");
    let line = lab.refused(1, "check o.cow");
    assert!(line.contains("nothing is mounted there any more"), "{line}");
    drop(other);
    wait_until("the daemon ends", || !crate::common::mount::is_alive(daemon));
    lab.ok("check o.cow");
    let output = lab.output(COWSLIP, &["run", "base", "--", "sh", "-c", "unshare -m sleep 1000 &"]);
    let line = one_line(125, &output, "run");
    let (_, after) = line.split_once("sleep (pid ").unwrap();
    let pid: u32 = after.split(')').next().unwrap().parse().unwrap();
    signal(pid, Signal::KILL).unwrap();
    wait_until("the daemon ends", || daemons_of(lab.dir()).is_empty());
}

#[test]
fn warnings_of_a_daemon_go_to_the_system_log() {
    let lab = Lab::new();
    put(&lab.path("base"), &noise(64 * KIB, 1));
    lab.sh("$COWSLIP mount m d=base,overlay=o.cow; $COWSLIP umount m; echo changed >> base");
    let listener = UnixDatagram::bind(lab.path("devlog")).unwrap();
    listener.set_read_timeout(Some(crate::common::mount::WAIT_TIMEOUT)).unwrap();
    // A private /dev, in which the listener is /dev/log: the host's log is not used.
    let mount = "mkdir dev; mount -t tmpfs tmpfs dev; cp -a /dev/null /dev/zero /dev/fuse dev
        touch dev/log; mount --bind devlog dev/log; mount --rbind dev /dev
        $COWSLIP mount m d=base,overlay=o.cow,size=64K --force $1; $COWSLIP log m; $COWSLIP umount m";
    let output = lab.output("unshare", &["-m", "sh", "-euc", mount, "sh", "-onoatime"]);
    assert!(output.status.success(), "{}", show(&output));
    let mut line = [0; 8192];
    let len = listener.recv(&mut line).unwrap();
    let line = String::from_utf8_lossy(&line[..len]).into_owned();
    assert!(line.starts_with("<28>") && line.contains(" cowslip["), "{line}");
    assert!(line.ends_with("used all the same (--force)"), "{line}");
    // The system log gets no other levels, and nothing from a daemon with its own log file.
    listener.set_nonblocking(true).unwrap();
    assert!(listener.recv(&mut [0; 8192]).is_err());
    let output = lab.output(
        "unshare",
        &["-m", "sh", "-euc", &mount.replace("mkdir dev;", ""), "sh", "--log=log.txt"],
    );
    assert!(output.status.success(), "{}", show(&output));
    assert!(lab.log().contains("used all the same (--force)"), "{}", lab.log());
    assert!(listener.recv(&mut [0; 8192]).is_err());
}

#[test]
fn caller_in_a_removed_directory_can_mount_absolute_paths() {
    let lab = Lab::new();
    put(&lab.path("base"), &noise(64 * KIB, 1));
    let at = lab.dir().display().to_string();
    lab.sh(&format!("mkdir gone; cd gone; rmdir ../gone; $COWSLIP mount {at}/m d={at}/base"));
    lab.umount();
    let script = format!("mkdir gone; cd gone; rmdir ../gone; exec $COWSLIP mount {at}/m d=base");
    let output = lab.output("sh", &["-euc", &script]);
    let line = one_line(1, &output, "a relative path");
    assert!(line.contains("gone (deleted)/base' does not exist"), "{line}");
}

#[test]
fn a_daemon_that_runs_out_of_memory_while_it_starts_leaves_no_mount() {
    let mut lab = Lab::new();
    lab.base("base", 4 * MIB);
    lab.sh("mkdir t");
    for mib in (20..100).step_by(10) {
        let limit = format!("--as={}", mib * MIB);
        if limited(&lab, &limit, "mount m d=base").status.success() {
            lab.cowslip("umount m");
        }
        wait_until("no daemon is left", || daemons_of(lab.dir()).is_empty());
        // One that died after it served is its user's to clear away.
        let _ = lab.cowslip("umount m");
        assert_nothing_is_left(&lab, &limit);
    }
}

#[test]
fn a_command_of_run_gets_the_signals_that_are_its_users() {
    let lab = Lab::new();
    put(
        &lab.path("sh"),
        b"trap 'echo got > got' USR1; touch ready; while ! [ -e got ]; do sleep 0.1; done",
    );
    let mut command = lab.command(COWSLIP);
    command.args(["run", "d=blank:1M", "--", "sh", "sh"]);
    let mut run = Running(command.spawn().unwrap());
    wait_until("the command runs", || lab.path("ready").exists());
    signal(run.pid(), Signal::USR1).unwrap();
    assert_eq!(end_of(&mut run).code(), Some(0));
    assert!(lab.path("got").exists());
}
