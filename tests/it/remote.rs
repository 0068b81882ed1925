//! Bases on servers: images behind real NBD servers, mounted, changed, lost and found again.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::mount::*;
use crate::common::random;

/// An NBD server that ends with its test.
struct Server(Running);

impl Server {
    /// Starts `program` with `words`, which must name the socket `nbd.sock`, and waits for the socket.
    fn start(lab: &Lab, program: &str, words: &str) -> Self {
        let _ = fs::remove_file(lab.path("nbd.sock"));
        let mut command = lab.command(program);
        command.args(words.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self(Running(command.spawn().unwrap()));
        wait_until("the server listens", || {
            std::os::unix::net::UnixStream::connect(lab.path("nbd.sock")).is_ok()
        });
        server
    }

    /// Serves `file` as qemu-nbd does; `words` are further options.
    fn qemu(lab: &Lab, file: &str, words: &str) -> Self {
        let socket = lab.path("nbd.sock").display().to_string();
        let words = format!("--persistent --shared=0 -k {socket} -f raw {words} {file}");
        Self::start(lab, "qemu-nbd", &words)
    }

    /// Serves `file` read-only through nbdkit with the filters in `words`.
    fn nbdkit(lab: &Lab, file: &str, filters: &str, words: &str) -> Self {
        let socket = lab.path("nbd.sock").display().to_string();
        Self::start(lab, "nbdkit", &format!("-f -r -U {socket} {filters} file {file} {words}"))
    }

    fn kill(mut self) {
        self.0.0.kill().unwrap();
        self.0.0.wait().unwrap();
    }
}

/// The address of the image at the socket of the lab.
fn address(lab: &Lab) -> String {
    format!("nbd+unix:///?socket={}", lab.path("nbd.sock").display())
}

fn runs(lab: &Lab, name: &str) -> Vec<std::ops::Range<u64>> {
    data_runs(&lab.open_ro(name))
}

#[test]
fn an_export_is_a_file_with_the_bytes_and_holes_of_the_image() {
    let mut lab = Lab::new();
    lab.base("base.img", 12 * MIB);
    let _server = Server::qemu(&lab, "base.img", "-r");
    lab.mount(&format!("vm={},mode=ro", address(&lab)));
    assert_eq!(runs(&lab, "m/vm"), runs(&lab, "base.img"));
    lab.sh("cmp base.img m/vm; cp --sparse=always m/vm copy.img; cmp base.img copy.img");
    lab.sh("qemu-img compare -f raw -F raw m/vm base.img");
    let status = lab.disk("vm");
    assert_eq!(status["base"], address(&lab));
    let remote = &status["remote"];
    let data: u64 = runs(&lab, "base.img").iter().map(|run| run.end - run.start).sum();
    let fetched = remote["fetched"].as_u64().unwrap();
    assert!(fetched >= data && fetched <= data + (1 << 20), "{remote}");
    assert_eq!((&remote["size"], &remote["failures"]), (&(12 * MIB).into(), &0.into()));
    let shown = lab.ok("status m");
    assert!(shown.contains("vm: fetched ") && shown.contains(" of 12 MiB in "), "{shown}");
}

#[test]
fn changes_stay_in_the_overlay_and_belong_to_the_image() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let server = Server::qemu(&lab, "base.img", "-r");
    let disk = format!("vm={},overlay=vm.cow", address(&lab));
    lab.mount(&disk);
    lab.open("m/vm").write_all_at(b"changed", 3 * MIB + 5).unwrap();
    let shown = lab.sh("cat m/vm | md5sum");
    lab.umount();
    lab.mount(&disk);
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    lab.umount();
    let checked = lab.ok("check vm.cow");
    assert!(checked.contains("nbd+unix:///?socket=") && checked.contains("unchanged"), "{checked}");

    // Another image at the same address.
    server.kill();
    lab.sh(
        "cp base.img other.img; printf x | dd of=other.img bs=1 seek=100 conv=notrunc status=none",
    );
    let server = Server::qemu(&lab, "other.img", "-r");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("does not fit its base") && line.contains("contents differ"), "{line}");
    server.kill();
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("nbd+unix:///?socket="), "{line}");
    let checked = lab.cowslip("check vm.cow");
    assert_eq!(checked.status.code(), Some(3), "{}", show(&checked));

    // The overlay moves to the file itself, and back to a server.
    lab.ok("rebase vm.cow --base base.img");
    lab.mount("vm=base.img,overlay=vm.cow");
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    lab.umount();
    let _server = Server::qemu(&lab, "base.img", "-r");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("base.img' is gone") || line.contains("is one of '"), "{line}");
    lab.ok(&format!("rebase vm.cow --base {}", address(&lab)));
    lab.mount(&disk);
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("exports it read-only"), "{line}");
    lab.umount();
    let line = lab.refused(1, "commit vm.cow");
    assert!(line.contains("exports it read-only"), "{line}");
}

#[test]
fn random_changes_over_an_export_are_those_of_a_file() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let _server = Server::qemu(&lab, "base.img", "-r");
    random::model(&lab, "base.img", &format!("d={},overlay=o", address(&lab)));
}

#[test]
fn qcow2_images_are_read_over_the_network() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.sh("qemu-img convert -c -f raw -O qcow2 base.img packed.qcow2
            qemu-img convert -f raw -O qcow2 base.img plain.qcow2
            qemu-img create -q -f qcow2 -b base.img -F raw backed.qcow2");
    for image in ["packed", "plain"] {
        let server = Server::qemu(&lab, &format!("{image}.qcow2"), "-r");
        // The image's own bytes are served, so that its format is this side's to read.
        let line = lab.refused(1, &format!("mount m vm={},mode=ro", address(&lab)));
        assert!(line.contains("looks like a qcow2 image: add ,format=qcow2"), "{line}");
        lab.mount(&format!("vm={},format=qcow2,overlay={image}.cow", address(&lab)));
        lab.sh("cmp base.img m/vm");
        assert!(runs(&lab, "m/vm").iter().map(|run| run.end - run.start).sum::<u64>() < 7 * MIB);
        lab.open("m/vm").write_all_at(b"changed", MIB).unwrap();
        lab.umount();
        lab.mount(&format!("vm={},format=qcow2,overlay={image}.cow", address(&lab)));
        assert_eq!(read(&lab.open_ro("m/vm"), MIB, 7), b"changed");
        lab.umount();
        server.kill();
    }
    let _server = Server::qemu(&lab, "backed.qcow2", "-r");
    let line = lab.refused(1, &format!("mount m vm={},format=qcow2,mode=ro", address(&lab)));
    assert!(line.contains("base.img"), "{line}");
}

#[test]
fn an_outage_is_waited_for_and_heals() {
    let mut lab = Lab::new();
    lab.base("base.img", 32 * MIB);
    let server = Server::qemu(&lab, "base.img", "-r");
    lab.mount(&format!("vm={},mode=ro", address(&lab)));
    let image = fs::read(lab.path("base.img")).unwrap();
    let file = lab.open_ro("m/vm");
    assert_eq!(read(&file, 0, 4096), image[..4096]);
    server.kill();
    // What is cached is there without a server.
    assert_eq!(read(&lab.open_ro("m/vm"), 0, 4096), image[..4096]);
    let is_read = AtomicBool::new(false);
    let server = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let at = 11 * MIB as usize;
            assert_eq!(read(&file, at as u64, 65_536), image[at..at + 65_536]);
            is_read.store(true, Ordering::SeqCst);
        });
        wait_until("the status tells of the outage", || {
            lab.disk("vm")["remote"]["waiting"].as_u64().is_some_and(|secs| secs >= 1)
        });
        assert!(!is_read.load(Ordering::SeqCst));
        let server = Server::qemu(&lab, "base.img", "-r");
        reader.join().unwrap();
        server
    });
    lab.sh("cmp base.img m/vm");
    assert_eq!(lab.disk("vm")["remote"]["failures"], 0);
    drop(file);

    // One that is longer than io_timeout fails what waits, and nothing that comes after it.
    lab.umount();
    lab.mount(&format!("-o io_timeout=2 vm={},mode=ro", address(&lab)));
    let file = lab.open_ro("m/vm");
    server.kill();
    let at = 11 * MIB;
    let mut buf = [0; 4096];
    assert_eq!(errno_of(file.read_at(&mut buf, at)), libc::EIO);
    let _server = Server::qemu(&lab, "base.img", "-r");
    wait_until("it heals", || file.read_at(&mut buf, at).is_ok());
    assert_eq!(buf, image[at as usize..at as usize + 4096]);
}

#[test]
fn another_image_after_an_outage_is_noticed() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.file_with_holes("other.img", 8 * MIB);
    put(&lab.path("other.img"), &noise(8 * MIB, 99));
    let server = Server::qemu(&lab, "base.img", "-r");
    lab.mount(&format!("vm={},overlay=vm.cow", address(&lab)));
    lab.open("m/vm").write_all_at(&[7; 4096], 6 * MIB).unwrap();
    server.kill();
    let _server = Server::qemu(&lab, "other.img", "-r");
    let file = lab.open_ro("m/vm");
    assert_eq!(errno_of(file.read_at(&mut [0; 4096], MIB)), libc::EIO);
    assert_eq!(errno_of(file.read_at(&mut [0; 4096], 3 * MIB)), libc::EIO);
    // What the overlay has is still there.
    assert_eq!(read(&file, 6 * MIB, 4096), [7; 4096]);
    let log = lab.log();
    assert_eq!(log.matches("the image is another one by now").count(), 1, "{log}");
}

#[test]
fn another_image_after_an_outage_is_not_written_to() {
    let lab = Lab::new();
    for (name, seed) in [("base.img", 98), ("other.img", 99)] {
        put(&lab.path(name), &noise(8 * MIB, seed));
    }
    let server = Server::qemu(&lab, "base.img", "");
    lab.mount(&format!("vm={},mode=rw", address(&lab)));
    let file = lab.open("m/vm");
    file.write_all_at(&[7; 4096], 0).unwrap();
    file.sync_all().unwrap();
    server.kill();
    // The same image, with what was written to it, is no other.
    let server = Server::qemu(&lab, "base.img", "");
    file.write_all_at(&[8; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    server.kill();
    let _server = Server::qemu(&lab, "other.img", "");
    assert_eq!(errno_of(file.write_all_at(&[9; 4096], 6 * MIB)), libc::EIO);
    assert!(file.sync_all().is_err());
    assert!(fs::read(lab.path("other.img")).unwrap() == noise(8 * MIB, 99));
    assert_eq!(read(&lab.open_ro("base.img"), 0, 8192), [[7; 4096], [8; 4096]].concat());
    let log = lab.log();
    assert_eq!(log.matches("the image is another one by now").count(), 1, "{log}");
    drop(file);
    let line = lab.refused(1, "umount m");
    assert!(line.contains("vm: could not be made durable"), "{line}");
}

#[test]
fn a_large_export_is_mounted_in_few_round_trips() {
    let lab = Lab::new();
    lab.sh("truncate -s 256G base.img; printf x | dd of=base.img seek=200000000000 oflag=seek_bytes conv=notrunc status=none");
    // 50 ms for each question about extents: one after the other, the 512 would take 26 s.
    let _server = Server::nbdkit(&lab, "base.img", "--filter=delay", "delay-extents=50ms");
    let begun = Instant::now();
    for mode in ["ro", "cow"] {
        lab.mount(&format!("vm={},mode={mode}", address(&lab)));
        let file = lab.open_ro("m/vm");
        let data = seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap();
        assert!((199_000_000_000..=200_000_000_000).contains(&data), "{data}");
        drop(file);
        lab.umount();
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn many_reads_wait_at_a_time() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    put(&lab.path("base.img"), &noise(64 * MIB, 3));
    lab.watch("base.img");
    // Half a second a request: one after the other, or eight at a time, would take much longer.
    let filters = "--filter=delay --filter=noextents";
    let _server = Server::nbdkit(&lab, "base.img", filters, "rdelay=500ms");
    lab.mount(&format!("vm={},mode=ro", address(&lab)));
    let image = fs::read(lab.path("base.img")).unwrap();
    let begun = Instant::now();
    thread::scope(|scope| {
        for reader in 0..48_u64 {
            let (lab, image) = (&lab, &image);
            scope.spawn(move || {
                use std::os::unix::fs::OpenOptionsExt;
                let mut options = File::options();
                let file = options.read(true).custom_flags(libc::O_DIRECT);
                let file = file.open(lab.path("m/vm")).unwrap();
                let at = (reader * 37 % 48) * 1_300_000 / 4096 * 4096;
                let mut buf = Aligned::of(&[0; 4096]);
                file.read_exact_at(buf.bytes_mut(), at).unwrap();
                assert_eq!(buf.bytes(), &image[at as usize..at as usize + 4096]);
            });
        }
    });
    let took = begun.elapsed();
    assert!(took < Duration::from_millis(500 * 48 / 8), "{took:?}");
    let threads = threads_of(lab.pid()).len();
    assert!(threads < 40, "{threads} threads");
}

#[test]
fn a_command_can_be_the_server() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let path = lab.path("base.img").display().to_string();
    let source = format!("vm=nbd+exec:qemu-nbd -r -f raw {path}");
    let output = lab.output(COWSLIP, &["mount", "m", &source, "--log", "log.txt"]);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh("cmp base.img m/vm");
    let servers = || {
        let daemons = daemons_of(lab.dir());
        daemons.into_iter().filter(|pid| *pid != lab.pid()).collect::<Vec<_>>()
    };
    assert_eq!(servers().len(), 1);
    // A server that dies is started again.
    signal(servers()[0], rustix::process::Signal::KILL).unwrap();
    wait_until("it is gone", || {
        !is_alive(servers().first().copied().unwrap_or(1)) || servers().is_empty()
    });
    let image = fs::read(lab.path("base.img")).unwrap();
    assert_eq!(read(&lab.open_ro("m/vm"), 0, 4096), image[..4096]);
    lab.umount();
    assert_eq!(servers(), [] as [u32; 0]);

    for (command, why) in
        [("false", "exit"), ("sh -c 'echo no such pool >&2; exit 3'", "no such pool")]
    {
        let source = format!("vm=nbd+exec:{command}");
        let line = one_line(1, &lab.output(COWSLIP, &["mount", "m", &source]), command);
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn a_command_is_started_by_the_user_alone() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    let path = lab.path("base.img").display().to_string();
    let command = format!("nbd+exec:qemu-nbd -r -f raw {path}");
    let output = |words: &[&str]| lab.output(COWSLIP, words);
    let disk = format!("vm={command},overlay=vm.cow");
    assert!(output(&["mount", "m", &disk]).status.success());
    lab.umount();
    // Neither a look at the overlay nor a store starts what is written there.
    let checked = lab.cowslip("check vm.cow");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.code() == Some(3) && said.contains("started only by a mount"), "{said}");
    let line = one_line(1, &output(&["commit", "vm.cow"]), "commit");
    assert!(line.contains("mount it with that command, and name the mounted disk"), "{line}");
    let line = one_line(
        1,
        &output(&["mount", "m", &format!("vm={command},overlay=s"), "--store", "s"]),
        "",
    );
    assert!(line.contains("would be started by every mount of the store"), "{line}");
    let mounted = output(&["mount", "m", &format!("vm={command}"), "--store", "s2"]);
    assert!(mounted.status.success(), "{}", show(&mounted));
    let line = one_line(1, &output(&["keep", "m/vm", "s2"]), "keep");
    assert!(line.contains("would be started by every mount of the store"), "{line}");
    lab.umount();
}

#[test]
fn what_was_fetched_stays_for_the_next_mount() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let _server = Server::qemu(&lab, "base.img", "-r");
    let disk = format!("vm={},mode=ro,read-cache=kept", address(&lab));
    let fetched = || lab.disk("vm")["remote"]["fetched"].as_u64().unwrap();
    lab.mount(&disk);
    lab.sh("cmp base.img m/vm");
    assert!(fetched() > 2 * MIB);
    lab.umount();
    lab.mount(&disk);
    lab.sh("cmp base.img m/vm");
    assert!(fetched() < 64 << 10, "{}", fetched());
    // A second mount at the same time has a place of its own.
    lab.sh(&format!("mkdir n; $COWSLIP mount n '{disk}'; cmp base.img n/vm; $COWSLIP umount n"));
    lab.umount();
    // What was damaged meanwhile is fetched again.
    lab.sh("for file in kept/*/data; do printf XXXX | dd of=$file bs=1 seek=5000 conv=notrunc status=none; done");
    lab.mount(&disk);
    lab.sh("cmp base.img m/vm");
    lab.umount();
    // A directory of another user is no place for it.
    lab.sh("chown 12345 kept");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("kept'"), "{line}");
}

#[test]
fn an_export_that_is_mounted_rw_takes_writes_and_holes() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 16 * MIB);
    let _server = Server::qemu(&lab, "base.img", "--discard=unmap");
    let said = lab.mount(&format!("vm={},mode=rw", address(&lab)));
    assert!(said.contains(&format!("writes go straight to '{}'", address(&lab))), "{said}");
    lab.sh("cmp base.img m/vm");
    let file = lab.open("m/vm");
    file.write_all_at(&noise(100_000, 8), 3 * MIB + 11).unwrap();
    fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        5 * MIB..7 * MIB,
    )
    .unwrap();
    assert_eq!(errno_of(file.set_len(MIB)), libc::EINVAL);
    file.sync_all().unwrap();
    assert_eq!(read(&lab.open_ro("base.img"), 3 * MIB + 11, 100_000), noise(100_000, 8));
    assert_eq!(read(&lab.open_ro("base.img"), 5 * MIB, 4096), [0; 4096]);
    assert_eq!(
        seek(&file, rustix::fs::SeekFrom::Data(5 * MIB)).unwrap(),
        seek(&lab.open_ro("base.img"), rustix::fs::SeekFrom::Data(5 * MIB)).unwrap()
    );
    drop(file);
    lab.sh("mkfs.ext4 -q -F m/vm; e2fsck -fn m/vm");
    lab.umount();
    lab.sh("e2fsck -fn base.img");
}

#[test]
fn what_cannot_be_reached_is_one_line() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    let socket = lab.path("nbd.sock").display().to_string();
    let server = Server::start(
        &lab,
        "qemu-nbd",
        &format!("--persistent -k {socket} -f raw -x vm -r base.img"),
    );
    for (source, why) in [
        (format!("nbd+unix:///other?socket={socket}"), "other"),
        ("nbd+unix:///?socket=/nonexistent".to_owned(), "/nonexistent"),
        ("nbd://127.0.0.1:1/vm".to_owned(), "127.0.0.1"),
        ("nbd://no-such-host.invalid/vm".to_owned(), "no-such-host.invalid"),
        (format!("nbd+unix:///vm?socket={socket},partition=1"), "no partition table"),
    ] {
        let line = lab.refused(1, &format!("mount m vm={source},mode=ro"));
        assert!(line.contains(why), "{line}");
    }
    let line = lab.refused(1, &format!("mount m vm=nbd+unix:///vm?socket={socket},mode=rw"));
    assert!(line.contains("read-only") || line.contains("cannot be written"), "{line}");
    lab.mount(&format!("vm=nbd+unix:///vm?socket={socket},mode=ro"));
    lab.umount();
    drop(server);
}

#[test]
fn disks_of_one_image_share_what_is_fetched() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let _server = Server::qemu(&lab, "base.img", "-r");
    let address = address(&lab);
    lab.mount(&format!("a={address},overlay=a.cow b={address} c={address},mode=ro"));
    lab.sh("cmp base.img m/a; cmp base.img m/b; cmp base.img m/c");
    let fetched = |name: &str| lab.disk(name)["remote"]["fetched"].as_u64().unwrap();
    assert_eq!(fetched("a"), fetched("b"));
    assert!(fetched("c") < 9 * MIB);
}

#[test]
fn a_server_that_hangs_delays_no_disk_of_another_one() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    let _server = Server::qemu(&lab, "base.img", "-r");
    lab.mount("local=base.img,mode=ro");
    // It takes connections, and says nothing.
    let hanging = std::os::unix::net::UnixListener::bind(lab.path("hang.sock")).unwrap();
    let source = format!("a=nbd+unix:///?socket={}", lab.path("hang.sock").display());
    let mut command = lab.command(COWSLIP);
    command.args(["add", "m", &source]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut waits = Running(command.spawn().unwrap());
    let (connection, _) = hanging.accept().unwrap();
    lab.ok(&format!("add m b={},mode=ro", address(&lab)));
    assert!(waits.0.try_wait().unwrap().is_none(), "the server was not waited for");
    lab.sh("cmp base.img m/b");
    drop(hanging);
    drop(connection);
    assert!(!waits.0.wait().unwrap().success());
    lab.umount();
}

/// Changes the disk `m/vm` of 8 MiB here and there, and returns its bytes.
fn change(lab: &Lab) -> Vec<u8> {
    let file = lab.open("m/vm");
    file.write_all_at(&noise(100_000, 21), 11).unwrap();
    file.write_all_at(&noise(3 << 20, 22), 3 * MIB).unwrap();
    fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        MIB..2 * MIB,
    )
    .unwrap();
    file.sync_all().unwrap();
    read(&file, 0, 8 << 20)
}

#[test]
fn a_commit_writes_the_changes_into_the_export() {
    let lab = Lab::new();
    for (at, words) in ["", ",read-cache=kept", ",offset=1M,len=8M"].into_iter().enumerate() {
        let (size, start) = if at == 2 { (10 * MIB, 1 << 20) } else { (8 * MIB, 0) };
        put(&lab.path("base.img"), &noise(size, 30 + at as u64));
        let server = Server::qemu(&lab, "base.img", "--discard=unmap");
        let disk = format!("vm={},overlay=vm{at}.cow{words}", address(&lab));
        lab.mount(&disk);
        // All of it is kept on this host.
        lab.sh("cat m/vm > /dev/null");
        let wanted = change(&lab);
        let said = lab.ok("commit m/vm");
        assert!(said.contains("MiB"), "{said}");
        let on_server = fs::read(lab.path("base.img")).unwrap();
        assert!(on_server[start..start + (8 << 20)] == wanted);
        assert!(fs::read(lab.path("m/vm")).unwrap() == wanted);
        assert_eq!(lab.disk("vm")["overlay"]["changed"], 0, "{}", lab.disk("vm"));
        let again = change(&lab);
        lab.sh("cat m/vm > /dev/null");
        lab.umount();
        lab.mount(&disk);
        assert!(fs::read(lab.path("m/vm")).unwrap() == again);
        lab.umount();
        let offline = format!("commit vm{at}.cow");
        if at < 2 {
            lab.ok(&offline);
            assert!(fs::read(lab.path("base.img")).unwrap() == again);
        }
        server.kill();
    }
}

#[test]
fn a_commit_into_an_export_is_refused_where_it_would_harm() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(8 * MIB, 1));
    let server = Server::qemu(&lab, "base.img", "-r");
    lab.mount(&format!("vm={},overlay=vm.cow", address(&lab)));
    change(&lab);
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("read-only"), "{line}");
    lab.umount();
    server.kill();
    let _server = Server::qemu(&lab, "base.img", "");
    lab.mount(&format!("vm={0},overlay=vm.cow other={0},mode=ro", address(&lab)));
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("another disk of this mount"), "{line}");
    assert!(fs::read(lab.path("m/other")).unwrap() == noise(8 * MIB, 1));
    lab.ok("remove m/other");
    // It was written to by somebody else.
    put(&lab.path("base.img"), &noise(8 * MIB, 2));
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("has changed under it"), "{line}");
    lab.umount();
    assert!(fs::read(lab.path("base.img")).unwrap() == noise(8 * MIB, 2));
}

#[test]
fn a_commit_into_an_export_that_is_cut_short_can_be_finished() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(8 * MIB, 1));
    let socket = lab.path("nbd.sock").display().to_string();
    let failing = lab.path("failing").display().to_string();
    let words = format!(
        "-f -U {socket} --filter=error file base.img error-pwrite=EIO error-pwrite-rate=50% error-pwrite-file={failing}"
    );
    let server = Server::start(&lab, "nbdkit", &words);
    let disk = format!("vm={},overlay=vm.cow,read-cache=kept", address(&lab));
    lab.mount(&disk);
    lab.sh("cat m/vm > /dev/null");
    // Many runs, so that some arrive.
    for at in 0..64 {
        lab.open("m/vm").write_all_at(&noise(4096, at), at * (100 << 10)).unwrap();
    }
    let wanted = fs::read(lab.path("m/vm")).unwrap();
    fs::write(&failing, "").unwrap();
    lab.refused(1, "commit m/vm");
    assert!(fs::read(lab.path("m/vm")).unwrap() == wanted);
    lab.umount();
    server.kill();
    fs::remove_file(&failing).unwrap();
    let server = Server::start(&lab, "nbdkit", &words);
    let said = lab.mount(&disk);
    assert!(said.contains("a commit into the base was cut short"), "{said}");
    assert!(fs::read(lab.path("m/vm")).unwrap() == wanted);
    lab.ok("commit m/vm");
    assert!(fs::read(lab.path("base.img")).unwrap() == wanted);
    assert!(fs::read(lab.path("m/vm")).unwrap() == wanted);
    lab.umount();
    lab.mount(&disk);
    assert!(fs::read(lab.path("m/vm")).unwrap() == wanted);
    lab.umount();
    server.kill();
}

#[test]
fn an_export_is_written_to_by_one_disk_alone() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let _server = Server::qemu(&lab, "base.img", "");
    let source = address(&lab);
    for other in ["mode=rw", "mode=ro", "offset=1M,len=1M,mode=rw"] {
        let line = lab.refused(1, &format!("mount m a={source},mode=rw b={source},{other}"));
        assert!(line.contains("another disk of this mount writes to it"), "{line}");
        let line = lab.refused(1, &format!("mount m a={source},mode=ro b={source},mode=rw"));
        assert!(line.contains("another disk of this mount has it as its base"), "{line}");
    }
    lab.sh("ln -s nbd.sock other.sock");
    let spelled = source.replace("nbd.sock", "other.sock");
    let line = lab.refused(1, &format!("mount m a={source},mode=rw b={spelled},mode=rw"));
    assert!(line.contains("another disk of this mount writes to it"), "{line}");
    lab.mount(&format!("a={source},mode=rw"));
    let line = lab.refused(1, &format!("add m b={source},mode=ro"));
    assert!(line.contains("writes to it"), "{line}");
    lab.ok("remove m/a");
    lab.ok(&format!("add m b={source},mode=ro"));
    lab.ok(&format!("add m c={source}"));
    lab.umount();
}

#[test]
fn zeros_that_take_long_are_done_before_they_are_answered() {
    let lab = Lab::new();
    lab.sh("truncate -s 1G base.img");
    let socket = lab.path("nbd.sock").display().to_string();
    let slow = "delay-zero=1500ms delay-trim=1500ms";
    let filters = "--filter=log --filter=delay";
    let words = format!("-f -U {socket} {filters} file base.img {slow} logfile=served.log");
    let _server = Server::start(&lab, "nbdkit", &words);
    lab.mount(&format!("-o io_timeout=2 vm={},mode=rw", address(&lab)));
    let file = lab.open("m/vm");
    let zeroed = fallocate(&file, rustix::fs::FallocateFlags::ZERO_RANGE, 0..1024 * MIB).is_ok();
    // Whatever the answer is, nothing of it happens later.
    file.write_all_at(&[7; 4096], 1000 * MIB).unwrap();
    file.sync_all().unwrap();
    assert!(zeroed);
    wait_until("the server has done all that it was asked", || {
        let log = fs::read_to_string(lab.path("served.log")).unwrap();
        let count = |word: &str| log.matches(word).count();
        let [zeros, trims] = ["Zero id=", "Trim id="].map(|word| (word, format!("...{word}")));
        [zeros, trims].iter().all(|(word, done)| count(word) == 2 * count(done))
            && count(" Zero id=") + count(" Trim id=") > 0
    });
    assert_eq!(read(&lab.open_ro("base.img"), 1000 * MIB, 4096), [7; 4096]);
    drop(file);
    lab.umount();
}

#[test]
fn an_overlay_whose_host_hangs_holds_up_no_other_disk_of_the_image() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(64 * MIB, 1));
    let _server = Server::qemu(&lab, "base.img", "--shared=8");
    lab.host("host", "ext4", 64 * MIB);
    let source = address(&lab);
    lab.mount(&format!(
        "-o io_timeout=10 a={source},overlay=host/ov,cow-on-read,fetch=64K b={source},mode=ro,fetch=64K"
    ));
    let direct = |name: &str, offset: u64| {
        let mut buffer = Aligned::of(&[0; 4096]);
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(lab.path(name))?;
        file.read_exact_at(buffer.bytes_mut(), offset).map(|()| buffer.bytes().to_vec())
    };
    // All of the way once, so that only the overlay is new.
    direct("m/a", 0).unwrap();
    direct("m/b", MIB).unwrap();
    lab.sh("fsfreeze -f host");
    let other = thread::scope(|scope| {
        let held = scope.spawn(|| direct("m/a", 8 * MIB));
        wait_held_up(std::process::id(), libc::SYS_pread64, 1);
        let other = direct("m/b", 40 * MIB);
        lab.sh("fsfreeze -u host");
        // It may have reached its deadline.
        let _ = held.join().unwrap();
        other
    });
    assert!(other.unwrap() == noise(64 * MIB, 1)[40 << 20..][..4096]);
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn a_server_that_pauses_loses_no_changes() {
    let lab = Lab::new();
    lab.sh("truncate -s 64M base.img");
    let socket = lab.path("nbd.sock").display().to_string();
    let words = format!("-f -U {socket} --filter=delay file base.img delay-write=0");
    let server = Server::start(&lab, "nbdkit", &words);
    lab.mount(&format!("-o io_timeout=6 vm={},mode=rw", address(&lab)));
    let file = lab.open("m/vm");
    file.write_all_at(&[7; 4096], 0).unwrap();
    let pid = rustix::process::Pid::from_child(&server.0.0);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(&[8; 4096], 4096));
        // More than half of the time after which it is lost.
        thread::sleep(Duration::from_millis(4200));
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        writer.join().unwrap().unwrap();
    });
    file.sync_all().unwrap();
    assert_eq!(read(&lab.open_ro("base.img"), 0, 8192), [[7; 4096], [8; 4096]].concat());
    drop(file);
    lab.umount();
}

#[test]
fn what_was_kept_of_an_export_is_not_shown_after_it_was_written_to() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(8 * MIB, 1));
    let _server = Server::qemu(&lab, "base.img", "");
    let kept = format!("vm={},read-cache=kept", address(&lab));
    lab.mount(&format!("{kept},mode=ro"));
    lab.sh("cat m/vm > /dev/null");
    lab.umount();
    lab.mount(&format!("{kept},mode=rw"));
    // No sample has these bytes.
    lab.open("m/vm").write_all_at(b"new", 3_000_000).unwrap();
    lab.umount();
    lab.mount(&format!("{kept},mode=ro"));
    assert!(fs::read(lab.path("m/vm")).unwrap() == fs::read(lab.path("base.img")).unwrap());
    lab.umount();
}

#[test]
fn an_export_is_not_written_to_while_another_mount_keeps_it_in_the_same_directory() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(8 * MIB, 1));
    let _server = Server::qemu(&lab, "base.img", "--shared=8");
    let kept = format!("vm={},read-cache=kept", address(&lab));
    lab.sh("mkdir m2");
    lab.ok(&format!("mount m2 {kept},mode=ro"));
    lab.sh("cat m2/vm > /dev/null");
    let line = lab.refused(1, &format!("mount m {kept},mode=rw"));
    assert!(line.contains("kept' cannot be emptied"), "{line}");
    lab.mount(&format!("{kept},overlay=vm.cow"));
    // No sample has these bytes.
    lab.open("m/vm").write_all_at(b"new", 3_000_000).unwrap();
    let output = lab.cowslip("commit m/vm");
    assert!(show(&output).contains("another mount uses it"), "{}", show(&output));
    lab.ok("umount m2");
    lab.umount();
    for words in ["overlay=vm.cow", "mode=rw"] {
        lab.mount(&format!("{kept},{words}"));
        if words == "mode=rw" {
            // The first bytes are a sample: from now on the image is known as another one.
            lab.open("m/vm").write_all_at(b"newer", 0).unwrap();
            lab.open("m/vm").write_all_at(b"newer", 3_000_000).unwrap();
            // A mount that comes meanwhile reads the old and the new, and keeps neither.
            lab.ok(&format!("mount m2 {kept},mode=ro"));
            lab.sh("cat m2/vm > /dev/null");
            lab.open("m/vm").write_all_at(b"newest", 3_000_000).unwrap();
        } else {
            lab.ok("commit m/vm");
        }
        lab.umount();
        if words == "mode=rw" {
            lab.ok("umount m2");
        }
        lab.mount(&format!("{kept},mode=ro"));
        lab.sh("cmp m/vm base.img");
        lab.umount();
    }
}

#[test]
fn connections_that_are_opened_during_a_commit_see_the_same_image() {
    let lab = Lab::new();
    put(&lab.path("base.img"), &noise(32 * MIB, 1));
    let socket = lab.path("nbd.sock").display().to_string();
    let slow = "delay-open=300ms rdelay=1ms";
    let words = format!("-f -U {socket} --filter=delay file base.img {slow}");
    let _server = Server::start(&lab, "nbdkit", &words);
    lab.mount(&format!("vm={},overlay=vm.cow", address(&lab)));
    for round in 0..3 {
        lab.open("m/vm").write_all_at(&noise(16 * MIB, 7 + round), 0).unwrap();
        lab.ok("commit m/vm");
        thread::sleep(Duration::from_millis(700));
        lab.sh("cmp base.img m/vm");
    }
    lab.umount();
}
