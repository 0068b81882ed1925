//! Output and input streams on real mounts, with common tools.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::common::mount::*;
use cowslip::formats::rbd::{RbdDecoder, RbdRecord};
use rustix::process::Signal;
use serde_json::Value;

const ZSTD: &str = "to=cmd:zstd -q -f -o o.zst";

/// Runs `cowslip` with these arguments, which may contain spaces.
fn cowslip(lab: &Lab, words: &[&str]) -> std::process::Output {
    lab.output(COWSLIP, words)
}

#[track_caller]
fn mount(lab: &Lab, disks: &[&str]) -> String {
    let words = [&["mount", "m"], disks, &["--log", "log.txt"]].concat();
    let output = cowslip(lab, &words);
    assert!(output.status.success(), "{}", show(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `cowslip run DISKS -- sh -euc LINES`.
fn run(lab: &Lab, disks: &[&str], lines: &str) -> std::process::Output {
    let words = [&["run"], disks, &["--", "sh", "-euc", lines]].concat();
    cowslip(lab, &words)
}

fn stream(lab: &Lab, name: &str) -> Value {
    lab.disk(name)["stream"].clone()
}

fn same(lab: &Lab, one: &str, other: &str) {
    lab.sh(&format!("cmp {one} {other}"));
}

fn spawn(lab: &Lab, lines: &str) -> Running {
    Running(lab.command("sh").args(["-c", lines]).stderr(Stdio::null()).spawn().unwrap())
}

fn ends_within(child: &mut Child, time: Duration) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

/// The test of the patch that introduced streams: 32 writes of 1 KiB of ones.
#[test]
fn image_has_the_historic_checksums() {
    for (pad, sum) in [
        ("pad=off", "51ae9fa5fb90e9d51c4f1b4260285c99"),
        ("pad=on", "186ac1b20f6a6154ee17b1f548b92891"),
    ] {
        for sink in ["file:out", "cmd:sh -c 'cat > out'", "fifo:p"] {
            let lab = Lab::new();
            mount(&lab, &[&format!("o=stream:128k,window=128k,{pad},to={sink}")]);
            let mut reader = (sink == "fifo:p").then(|| spawn(&lab, "exec cat p > out"));
            let file = lab.open("m/o");
            for at in 0..32 {
                file.write_all_at(&[1; 1024], at * 1024).unwrap();
            }
            assert_eq!(read(&file, 0, 32 << 10), [1; 32 << 10]);
            assert_eq!(read(&file, 32 << 10, 4096), [0; 4096]);
            drop(file);
            lab.ok("finish m/o");
            if let Some(reader) = &mut reader {
                assert!(ends_within(&mut reader.0, WAIT_TIMEOUT));
            }
            assert_eq!(lab.sh("md5sum < out"), format!("{sum}  -\n"), "{sink} {pad}");
        }
    }
}

#[test]
fn plain_tools_write_the_same_image_to_a_stream_and_a_file() {
    let lab = Lab::new();
    lab.sh("truncate -s 64M src; dd if=/dev/urandom of=src bs=1M count=9 seek=3 conv=notrunc status=none
            dd if=/dev/urandom of=src bs=64k count=30 seek=800 conv=notrunc status=none");
    let tools = [
        ("dd if=src of=X bs=64k conv=notrunc status=none", "window=0"),
        ("dd if=src of=X bs=1M conv=notrunc,sparse oflag=direct status=none", "window=1M"),
        ("qemu-img convert -n -f raw -O raw src X", "window=0,read-window=64M"),
        ("qemu-img convert -n -W -m 16 -f raw -O raw src X", "window=0,spill=64M"),
        ("cp --sparse=always src X", "window=64K"),
    ];
    for (tool, keys) in tools {
        for sink in ["to=file:out,overwrite", ZSTD] {
            let disk = format!("o=stream:64M,{keys},{sink}");
            let output = run(&lab, &[&disk], &tool.replace('X', "\"$COWSLIP_MNT/o\""));
            assert!(output.status.success(), "{tool} {disk}: {}", show(&output));
            if sink == ZSTD {
                lab.sh("zstd -q -d -f o.zst -o out; rm o.zst");
            }
            same(&lab, "src", "out");
        }
        lab.sh("rm out");
    }
}

#[test]
fn file_system_created_on_a_stream_passes_fsck() {
    for sink in ["to=file:out", "to=fifo:p", ZSTD] {
        let lab = Lab::new();
        lab.sh("mkdir tree; cp -a /etc/. tree/ 2>/dev/null || true
                head -c 20M /dev/urandom > tree/big");
        mount(&lab, &[&format!("o=stream:256M,spill=128M,{sink}")]);
        let mut reader = (sink == "to=fifo:p").then(|| spawn(&lab, "exec cat p > out"));
        lab.sh("parted -s m/o mklabel gpt mkpart a ext4 1MiB 100%");
        let device = lab.loop_device("m/o", "-P --offset 1048576 --sizelimit 250MiB");
        lab.sh(&format!(
            "mkfs.ext4 -q {device}; mkdir t; mount {device} t; cp -a tree/. t/; umount t
             losetup -d {device}"
        ));
        lab.ok("finish m/o");
        if let Some(reader) = &mut reader {
            assert!(ends_within(&mut reader.0, WAIT_TIMEOUT));
        }
        if sink == ZSTD {
            lab.sh("zstd -q -d o.zst -o out");
        }
        lab.sh("parted -s out print | grep -q ext4");
        let device = lab.loop_device("out", "-r --offset 1048576 --sizelimit 250MiB");
        lab.sh(&format!(
            "e2fsck -fn {device}; mount -o ro {device} t; diff -r --no-dereference tree t | grep -v lost+found && exit 1
             umount t; losetup -d {device}"
        ));
    }
}

#[test]
fn holes_of_a_stream_stay_holes_in_a_file() {
    let lab = Lab::new();
    lab.sh("truncate -s 64G src");
    let source = File::options().write(true).open(lab.path("src")).unwrap();
    for at in [0, 5 * GIB + 12 * KIB, 40 * GIB, 64 * GIB - 64 * KIB] {
        source.write_all_at(&noise(64 * KIB, at), at).unwrap();
    }
    let output = run(
        &lab,
        &["o=stream:64G,window=64M,to=file:out"],
        "qemu-img convert -n -f raw -O raw src $COWSLIP_MNT/o",
    );
    assert!(output.status.success(), "{}", show(&output));
    let runs = |name: &str| data_runs(&File::open(lab.path(name)).unwrap());
    assert_eq!(runs("src"), runs("out"));
    assert_eq!(checksum(&lab.path("src")), checksum(&lab.path("out")));
    assert!(allocated(&lab.path("out")) < MIB);
}

#[test]
fn late_write_fails_the_stream_for_ever_but_no_other_disk() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=1M,to=file:out", "b=blank:1M"]);
    let file = lab.open("m/o");
    file.write_all_at(&noise(MIB, 1), 0).unwrap();
    file.write_all_at(&noise(MIB, 2), 4 * MIB).unwrap();
    // A stream that fails before its sink has accepted a byte leaves no file.
    wait_until("something is sent", || stream(&lab, "o")["accepted"].as_u64().unwrap() > 0);
    file.write_all_at(&[7; 10], MIB).unwrap_err();
    assert_eq!(errno_of(file.write_all_at(&[7; 10], 5 * MIB)), libc::EIO);
    assert_eq!(errno_of(file.sync_all()), libc::EIO);
    lab.sh("sh -c 'exec 3>m/o' 2>/dev/null && exit 1; true");
    drop(file);
    lab.open("m/b").write_all_at(&[1; 512], 0).unwrap();
    assert_eq!(lab.cowslip("status m").status.code(), Some(3));
    let disk = lab.disk("o");
    assert_eq!((&disk["state"], &disk["stream"]["state"]), (&"failed".into(), &"failed".into()));
    assert_eq!(disk["stream"]["needed"]["window"], 4 * MIB);
    let log = lab.log();
    let lines = log.lines().filter(|line| line.contains("the stream failed")).count();
    assert_eq!(lines, 1, "{log}");
    let said =
        format!("a write at {MIB} came after the frontier {}: so far it needs window=4M", 4 * MIB);
    assert!(log.contains(&said), "{log}");
    assert!(lab.refused(1, "finish m/o").contains("came after the frontier"));
    let line = lab.refused(1, "umount m");
    assert!(line.contains("o: the stream failed"), "{line}");
    assert!(!lab.path("out").exists() && lab.path("out.part").exists());
}

#[test]
fn measure_reports_the_smallest_sufficient_window_and_spill() {
    let lab = Lab::new();
    let work = "dd if=/dev/urandom of=$COWSLIP_MNT/o bs=64k count=16 conv=notrunc status=none
                dd if=/dev/urandom of=$COWSLIP_MNT/o bs=64k count=4 seek=40 conv=notrunc status=none
                dd if=/dev/urandom of=$COWSLIP_MNT/o bs=64k count=1 seek=2 conv=notrunc status=none";
    let works = |keys: &str| {
        run(&lab, &[&format!("o=stream:8M,{keys},to=file:out,overwrite")], work).status.success()
    };
    mount(&lab, &["o=stream:8M,window=128K,to=measure:"]);
    lab.sh(&work.replace("$COWSLIP_MNT", "m"));
    let line = lab.ok("finish m/o");
    let (window, spill) = ((44 - 2) * 64, (16 - 4 + 4) * 64);
    assert_eq!(
        line,
        format!("o: needs window={window}K (without spill), or spill=1M (with window=128K)\n")
    );
    assert_eq!(spill, 1024);
    lab.umount();
    // `run` prints the same line.
    let output = run(&lab, &["o=stream:8M,window=128K,to=measure:"], work);
    assert_eq!(String::from_utf8_lossy(&output.stderr), format!("cowslip: {line}"));
    assert!(works(&format!("window={window}K")));
    assert!(!works(&format!("window={}", window * 1024 - 1)));
    assert!(works(&format!("window=128K,spill={spill}K")));
    assert!(works(&format!("window=128K,spill={spill}K,spill-compress")));
    assert!(!works(&format!("window=128K,spill={}", spill * 1024 - 1)));
}

#[test]
fn finish_waits_for_writers_and_can_be_repeated() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:1M,to=file:out"]);
    let mut writer = spawn(&lab, "exec 3<>m/o; exec sleep 60");
    wait_until("the writer is there", || lab.disk("o")["openers"] == 1);
    let line = lab.refused(1, "finish --timeout 300ms m/o");
    assert!(line.contains("o is open for writing: ") && line.contains("(pid "), "{line}");
    assert!(line.ends_with("close it there, then finish again"), "{line}");
    assert!(!lab.path("out").exists());
    writer.0.kill().unwrap();
    writer.0.wait().unwrap();
    let said = lab.ok("finish m/o");
    assert_eq!(lab.ok("finish m/o"), said);
    assert_eq!(fs::metadata(lab.path("out")).unwrap().len(), MIB);
    assert_eq!(errno_of(lab.open("m/o").write_all_at(&[1], 0)), libc::EIO);
    assert!(lab.refused(1, "abort m/o").contains("finished already"));
    assert!(!lab.path("out.part").exists());
}

#[test]
fn incomplete_image_is_never_taken_for_a_complete_one() {
    let lab = Lab::new();
    let sink = "o=stream:32M,window=1M,to=cmd:sh -c 'echo $$ > pid; cat > out; touch whole'";
    // The producer fails.
    let output = run(&lab, &[sink], "head -c 8M /dev/urandom > $COWSLIP_MNT/o; exit 7");
    assert_eq!(output.status.code(), Some(7), "{}", show(&output));
    // The producer is killed.
    let output = run(&lab, &[sink], "head -c 8M /dev/urandom > $COWSLIP_MNT/o; kill -9 $$");
    assert_eq!(output.status.code(), Some(137), "{}", show(&output));
    // No command finishes the stream.
    mount(&lab, &[sink]);
    lab.sh("head -c 8M /dev/urandom > m/o");
    let line = lab.refused(1, "umount m");
    assert!(line.contains("cowslip finish comes before umount"), "{line}");
    // The daemon is killed.
    mount(&lab, &[sink]);
    lab.sh("head -c 8M /dev/urandom > m/o");
    let sink_pid = fs::read_to_string(lab.path("pid")).unwrap().trim().parse().unwrap();
    assert!(is_alive(sink_pid));
    lab.kill();
    wait_until("the sink has ended", || !is_alive(sink_pid));
    lab.ok("umount m");
    assert!(!lab.path("whole").exists());
    // A complete image, for comparison.
    let output = run(&lab, &[sink], "head -c 8M /dev/urandom > $COWSLIP_MNT/o");
    assert!(output.status.success() && lab.path("whole").exists());
    assert_eq!(fs::metadata(lab.path("out")).unwrap().len(), 32 * MIB);
}

#[test]
fn run_exits_with_125_if_the_sink_fails() {
    let lab = Lab::new();
    for (sink, why) in [
        (
            "cmd:sh -c 'cat >/dev/null; echo no room >&2; exit 4'",
            "'sh' exited with status 4: no room",
        ),
        ("cmd:cat | false", "'false' exited with status 1"),
    ] {
        let disk = format!("o=stream:1M,to={sink}");
        // The stream may have failed before this write.
        let output = run(&lab, &[&disk], "echo x > $COWSLIP_MNT/o || true");
        assert_eq!(output.status.code(), Some(125), "{}", show(&output));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(why), "{said}");
    }
    // The exit code is COMMAND's own; the sink's failure is reported as well.
    let lines = "while echo x > $COWSLIP_MNT/o; do sleep 0.05; done; exit 9";
    let output = run(&lab, &["o=stream:1M,to=cmd:sh -c 'echo worn >&2; exit 4'"], lines);
    assert_eq!(output.status.code(), Some(9), "{}", show(&output));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("'sh' exited with status 4: worn"), "{said}");
}

#[test]
fn stdout_gets_nothing_but_the_stream() {
    let lab = Lab::new();
    let output = run(&lab, &["o=stream:64K,to=stdout"], "echo noise; printf data > $COWSLIP_MNT/o");
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!((output.stdout.len(), &output.stdout[..5]), (64 << 10, &b"data\0"[..]));
    assert_eq!(output.stderr, b"noise\n");
}

#[test]
fn stream_can_finish_with_its_last_writer_or_at_umount() {
    let lab = Lab::new();
    mount(&lab, &["c=stream:64K,to=file:c,finish=close", "u=stream:64K,to=file:u,finish=umount"]);
    lab.sh("echo c > m/c; echo u > m/u");
    wait_until("the stream ends with its writer", || stream(&lab, "c")["state"] == "finished");
    assert!(lab.path("c").exists() && !lab.path("u").exists());
    let said = lab.umount();
    assert!(said.contains("u: finished, 64 KiB in file:"), "{said}");
    assert_eq!(fs::metadata(lab.path("u")).unwrap().len(), 64 * KIB);
    // Also when the daemon ends by a signal.
    mount(&lab, &["u=stream:64K,to=file:s,finish=umount"]);
    lab.sh("echo u > m/u");
    let pid = lab.pid();
    signal(pid, Signal::TERM).unwrap();
    wait_until("the daemon ends", || !is_alive(pid));
    assert!(lab.path("s").exists());
}

#[test]
fn stalled_sink_blocks_only_its_writers() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    // The spill is for requests that overtake others: 64 MiB are in flight.
    mount(&lab, &["o=stream:8G,window=16M,spill=64M,to=cmd:sleep 1000", "base.img"]);
    let pid = lab.pid();
    let mut fio = spawn(
        &lab,
        "exec fio --name=a --filename=m/o --rw=write --bs=256k --iodepth=256 --ioengine=libaio \
         --direct=1 --size=1G --allow_file_create=0 --thread >/dev/null",
    );
    wait_until("the sink is stalled", || {
        stream(&lab, "o")["window"]["used"].as_u64().unwrap() > 15 * MIB
    });
    wait_held_up(fio.pid(), libc::SYS_io_getevents, 1);
    let mut dd = spawn(&lab, "exec dd if=/dev/urandom of=m/o bs=1M oflag=direct conv=notrunc");
    wait_held_up(dd.pid(), libc::SYS_write, 1);
    // Other disks are served: far more requests than the kernel's limit of background requests.
    lab.sh("dd if=m/base.img of=/dev/null bs=64k iflag=direct status=none; stat m/o m/base.img");
    lab.sh("fio --name=b --filename=m/base.img --rw=randread --bs=4k --iodepth=64 \
            --ioengine=libaio --direct=1 --size=16M --io_size=16M >/dev/null");
    assert_eq!(lab.disk("o")["state"], "ok");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    // The rest is the memory of the program itself, which is built without optimisation in tests.
    assert!(peak * KIB < (16 + 16 + 16) * MIB, "{peak} kB");
    // Killed writers exit.
    dd.0.kill().unwrap();
    assert!(ends_within(&mut dd.0, WAIT_TIMEOUT), "dd is not released");
    fio.0.kill().unwrap();
    assert!(ends_within(&mut fio.0, WAIT_TIMEOUT), "fio is not released");
    wait_until("they are gone", || lab.disk("o")["openers"] == 0);
    let line = lab.refused(1, "finish --timeout 500ms m/o");
    assert!(line.contains("the sink still works"), "{line}");
    assert_eq!(lab.ok("abort m/o"), "o: aborted\n");
}

#[test]
fn umount_abandons_a_stalled_sink() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=0,finish=umount,to=cmd:sleep 1000"]);
    lab.sh("head -c 512k /dev/urandom > m/o");
    let line = lab.refused(1, "umount --timeout 500ms m");
    assert!(line.contains("the stream is given up: its sink had "), "{line}");
}

#[test]
fn closed_sink_is_a_sticky_error_with_its_accepted_bytes() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=0,to=fifo:p"]);
    assert!(fs::metadata(lab.path("p")).unwrap().file_type().is_fifo());
    let mut reader = spawn(&lab, "exec head -c 100000 p > got");
    let file = lab.open("m/o");
    let bytes = noise(MIB, 3);
    let mut at = 0;
    while file.write_all_at(&bytes, at).is_ok() {
        at += MIB;
        assert!(at < 64 * MIB, "nobody noticed");
    }
    assert!(ends_within(&mut reader.0, WAIT_TIMEOUT));
    wait_until("the failure is told", || lab.disk("o")["state"] == "failed");
    assert_eq!(errno_of(file.sync_all()), libc::EIO);
    let taken = stream(&lab, "o")["accepted"].as_u64().unwrap();
    assert!((100_000..4 * MIB).contains(&taken), "{taken}");
    assert_eq!(fs::read(lab.path("got")).unwrap(), bytes[..100_000]);
    drop(file);
    lab.refused(1, "umount m");
}

#[test]
fn exited_sink_fails_the_stream_before_anything_is_sent() {
    let lab = Lab::new();
    for (sink, why) in [
        ("to=cmd:false", "'false' exited with status 1"),
        ("to=cmd:sh -c 'echo full >&2; exit 7' | cat", "'sh' exited with status 7: full"),
        ("to=cmd:cat | false", "'false' exited with status 1"),
        // These commands succeed, but stop reading too early.
        ("to=cmd:true", "'true' stopped reading after 0 bytes"),
        ("to=cmd:head -c 3", "'head' stopped reading after "),
        ("frames=rbd,to=cmd:true", "'true' stopped reading after "),
        ("to=fifo:p", "the reader of fifo:"),
    ] {
        mount(&lab, &[&format!("o=stream:64M,{sink}")]);
        if sink.contains("fifo") {
            let mut reader = spawn(&lab, "exec 3<p");
            assert!(ends_within(&mut reader.0, WAIT_TIMEOUT));
        }
        let file = lab.open("m/o");
        if sink.contains("head") {
            // Past the window, so that a part of the data is sent.
            let _ = file.write_all_at(&[1; 4096], 0);
            let _ = file.write_all_at(&[1; 4096], 32 * MIB);
        }
        wait_until("the stream fails", || lab.disk("o")["state"] == "failed");
        let told = stream(&lab, "o").to_string() + &lab.disk("o").to_string();
        assert!(told.contains(why), "{sink}: {told}");
        assert_eq!(errno_of(file.sync_all()), libc::EIO, "{sink}");
        assert_eq!(errno_of(file.write_all_at(&[0; 4096], MIB)), libc::EIO, "{sink}");
        assert_eq!(errno_of(fallocate(&file, PUNCH, 0..MIB)), libc::EIO, "{sink}");
        drop(file);
        lab.refused(1, "umount m");
    }
    // A sink that exits after the last byte has read everything.
    mount(&lab, &["o=stream:64K,window=0,to=cmd:head -c 65536"]);
    lab.open("m/o").write_all_at(&noise(65536, 1), 0).unwrap();
    lab.ok("finish m/o");
    lab.umount();
}

#[test]
fn failed_source_is_reported_before_its_last_bytes_are_read() {
    let lab = Lab::new();
    // Four MiB are read ahead; the rest waits in the pipe.
    mount(&lab, &["in=stream:64M,from=cmd:sh -c 'head -c 4500K /dev/zero; echo worn >&2; exit 5'"]);
    wait_until("the failure is told", || lab.disk("in")["state"] == "failed");
    let told = stream(&lab, "in").to_string();
    assert!(told.contains("'sh' exited with status 5: worn"), "{told}");
    // The bytes that the source delivered can still be read.
    let file = lab.open_ro("m/in");
    assert_eq!(read(&file, 4400 * KIB, 4096), [0; 4096]);
    assert_eq!(errno_of(file.read_exact_at(&mut [0; 4096], 5 * MIB)), libc::EIO);
    drop(file);
    lab.refused(1, "umount m");
    // Also without any reader.
    mount(&lab, &["in=stream:64M,from=cmd:sh -c 'head -c 4500K /dev/zero; exit 5'"]);
    wait_until("the failure is told", || lab.disk("in")["state"] == "failed");
    lab.refused(1, "umount m");
}

#[test]
fn zeros_and_holes_use_no_window_and_truncation_keeps_the_size() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:1G,window=0,spill=64K,to=file:out"]);
    let file = lab.open("m/o");
    fallocate(&file, PUNCH, 0..GIB).unwrap();
    fallocate(&file, ZERO_KEEP, 0..GIB).unwrap();
    file.write_all_at(&vec![0; 4 << 20], 512 * MIB).unwrap();
    assert_eq!(stream(&lab, "o")["frontier"], 0);
    file.write_all_at(&noise(64 * KIB, 1), 100 * MIB).unwrap();
    file.write_all_at(&noise(64 * KIB, 2), 200 * MIB).unwrap();
    assert_eq!(stream(&lab, "o")["frontier"], 100 * MIB + 64 * KIB);
    // Data of this range has been sent already.
    assert_eq!(errno_of(fallocate(&file, PUNCH, 100 * MIB..101 * MIB)), libc::EOPNOTSUPP);
    fallocate(&file, PUNCH, 0..100 * MIB).unwrap();
    file.write_all_at(&noise(4096, 3), 300 * MIB).unwrap();
    assert_eq!(errno_of(file.set_len(0)), libc::EIO);
    file.set_len(250 * MIB).unwrap();
    assert_eq!(file.metadata().unwrap().len(), GIB);
    assert_eq!(read(&file, 300 * MIB, 4096), [0; 4096]);
    assert_eq!(errno_of(file.write_all_at(&[1], GIB)), libc::ENOSPC);
    drop(file);
    lab.ok("finish m/o");
    let out = File::open(lab.path("out")).unwrap();
    assert_eq!(read(&out, 200 * MIB, 64 * KIB), noise(64 * KIB, 2));
    assert_eq!(read(&out, 300 * MIB, 4096), [0; 4096]);
    assert_eq!(out.metadata().unwrap().len(), GIB);
}

#[test]
fn reads_do_not_advance_the_frontier() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=1M,read-window=1M,to=file:out"]);
    let file = lab.open("m/o");
    file.write_all_at(&noise(4 * MIB, 1), 0).unwrap();
    let before = stream(&lab, "o");
    assert_eq!(before["frontier"], 3 * MIB);
    let device = lab.loop_device("m/o", "-r");
    lab.sh(&format!(
        "blkid {device} || true; tail -c 65536 {device} >/dev/null; losetup -d {device}"
    ));
    let mut rest = Vec::new();
    let mut reader = File::open(lab.path("m/o")).unwrap();
    reader.seek(std::io::SeekFrom::Start(2 * MIB)).unwrap();
    reader.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() as u64, 62 * MIB);
    assert_eq!(rest[..2 << 20], noise(4 * MIB, 1)[2 << 20..]);
    let mut byte = [0];
    assert_eq!(errno_of(reader.read_at(&mut byte, 2 * MIB - 1)), libc::EIO);
    let after = stream(&lab, "o");
    assert_eq!((&after["state"], &after["frontier"]), (&"open".into(), &before["frontier"]));
    drop((file, reader));
    lab.ok("finish m/o");
}

#[test]
fn seek_and_map_report_the_written_ranges() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=0,to=file:out"]);
    let file = lab.open("m/o");
    file.write_all_at(&noise(8192, 1), 4096).unwrap();
    file.write_all_at(&noise(4096, 2), 32 * MIB).unwrap();
    assert_eq!(data_runs(&file), [4096..12288, 32 * MIB..32 * MIB + 4096]);
    assert!(lab.ok("map m/o").contains("hole"));
    assert_eq!(allocated(&lab.path("m/o")), 12288);
    drop(file);
    lab.ok("finish m/o");
}

/// Applies the records of an rbd diff to a file.
fn apply(diff: &Path, to: &File) {
    let mut decoder = RbdDecoder::new(File::open(diff).unwrap()).unwrap();
    loop {
        match decoder.next_record().unwrap() {
            RbdRecord::Size(size) => to.set_len(size).unwrap(),
            RbdRecord::Data(range) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                decoder.input().read_exact(&mut bytes).unwrap();
                to.write_all_at(&bytes, range.start).unwrap();
            }
            RbdRecord::Zeros(range) => fallocate(to, PUNCH, range).unwrap(),
            RbdRecord::Since(name) => panic!("it has all, and not the changes since {name}"),
            RbdRecord::End => return,
        }
    }
}

#[test]
fn rbd_records_allow_late_rewrites() {
    let lab = Lab::new();
    lab.sh("mkdir tree; head -c 3M /dev/urandom > tree/f");
    let make = "mke2fs -q -t ext4 -d tree -U 0b7a6f3e-0000-4000-8000-000000000001 \
                -E hash_seed=0b7a6f3e-0000-4000-8000-000000000002";
    for window in ["0", "1M"] {
        let disk = format!(
            "o=stream:64M,window={window},read-window=64M,frames=rbd,overwrite,to=file:o.diff"
        );
        let output = run(&lab, &[&disk], &format!("{make} $COWSLIP_MNT/o; cp $COWSLIP_MNT/o seen"));
        assert!(output.status.success(), "{}", show(&output));
        let out = File::create_new(lab.path("out")).unwrap();
        apply(&lab.path("o.diff"), &out);
        same(&lab, "seen", "out");
        lab.sh("e2fsck -fn out; rm out");
    }
}

#[test]
fn file_that_took_the_name_of_the_part_does_not_get_the_name_of_the_stream() {
    let lab = Lab::new();
    lab.sh("echo old > old");
    for target in ["out", "old"] {
        lab.mount(&format!("o=stream:8M,to=file:{target},overwrite"));
        lab.sh("head -c 8M /dev/urandom > m/o");
        lab.sh(&format!("mv {target}.part moved; echo evil > {target}.part"));
        let line = lab.refused(1, "finish m/o");
        assert!(line.contains(&format!("{target}.part' was replaced by another file")), "{line}");
        assert_eq!(lab.sh(&format!("cat {target}.part; rm {target}.part")), "evil\n");
        // Who did not see that is told again.
        let line = lab.refused(1, "umount m");
        assert!(line.contains("o: the stream failed"), "{line}");
    }
    assert!(!lab.path("out").exists());
    assert_eq!(lab.sh("cat old"), "old\n");
}

#[test]
fn gaps_of_a_stream_become_zeros_on_a_block_device() {
    let lab = Lab::new();
    lab.sh("head -c 16M /dev/urandom > disk");
    let device = lab.loop_device("disk", "");
    let output = run(
        &lab,
        &[&format!("o=stream:8M,to=file:{device}")],
        "printf data | dd of=$COWSLIP_MNT/o bs=1 seek=1000000 conv=notrunc status=none",
    );
    assert!(output.status.success(), "{}", show(&output));
    lab.sh(&format!("blockdev --flushbufs {device}; losetup -d {device}"));
    let disk = File::open(lab.path("disk")).unwrap();
    let mut model = vec![0; 8 << 20];
    model[1_000_000..1_000_004].copy_from_slice(b"data");
    assert!(read(&disk, 0, 8 * MIB) == model);
    assert!(read(&disk, 8 * MIB, 8 * MIB).iter().any(|byte| *byte != 0), "past the stream");
}

#[test]
fn concurrent_writers_give_the_image_they_wrote() {
    let lab = Lab::new();
    mount(&lab, &["o=stream:64M,window=4M,spill=64M,to=cmd:sh -c 'cat > out'"]);
    let bytes = noise(64 * MIB, 9);
    std::thread::scope(|scope| {
        for worker in 0..4u64 {
            let (lab, bytes) = (&lab, &bytes);
            scope.spawn(move || {
                let file = lab.open("m/o");
                let mut at = worker * 16 * MIB;
                let mut step = 1;
                while at < (worker + 1) * 16 * MIB {
                    let end = (at + step * 7919 % 300_000 + 1).min((worker + 1) * 16 * MIB);
                    file.write_all_at(&bytes[at as usize..end as usize], at).unwrap();
                    (at, step) = (end, step + 1);
                }
            });
        }
    });
    lab.ok("finish m/o");
    assert!(fs::read(lab.path("out")).unwrap() == bytes);
}

#[test]
fn invalid_streams_are_rejected_in_one_line() {
    let lab = Lab::new();
    lab.sh("echo mine > there; mkdir dir");
    for (disk, code, why) in [
        ("o=stream:1M", 2, "needs to=SINK or from=SOURCE"),
        ("stream:1M,to=stdout", 2, "write NAME=stream:SIZE"),
        ("o=stream:1M,to=fiel:x", 2, "did you mean 'file'?"),
        ("o=stream:1M,to=cmd:zstd > x", 2, "cowslip runs no shell; write to=cmd:sh -c '...'"),
        ("o=stream:1M,to=stdout,mode=ro", 2, "'mode' is not for streams"),
        ("o=blank:1M,window=1M", 2, "'window' is only for streams"),
        ("o=stream:1M,to=stdout", 1, "to=stdout needs -f or run"),
        ("o=stream:1M,to=file:there", 1, "exists: add overwrite"),
        ("o=stream:1M,to=file:dir", 1, "directory"),
        ("o=stream:1M,to=fifo:there", 1, "needs a named pipe"),
        ("o=stream:1M,to=file:m/x", 1, "m/x"),
        ("o=stream:1M,to=cmd:no-such-program", 1, "cannot run 'no-such-program'"),
        ("o=stream:1M,from=file:none", 1, "none"),
    ] {
        let output = cowslip(&lab, &["mount", "m", disk]);
        let line = one_line(code, &output, disk);
        assert!(line.contains(why), "{line}");
    }
    assert_eq!(fs::read(lab.path("there")).unwrap(), b"mine\n");
    assert!(!lab.path("there.part").exists());
    let mut lab = lab;
    lab.base("base.img", MIB);
    lab.mount("base.img");
    assert!(lab.refused(1, "finish m/base.img").contains("is no output stream"));
    assert!(lab.refused(1, "abort m/base.img").contains("is no stream"));
}

#[test]
fn input_stream_is_read_in_order_with_a_read_window() {
    let lab = Lab::new();
    let bytes = noise(20 * MIB, 5);
    put(&lab.path("src"), &bytes);
    lab.sh("zstd -q src -o src.zst");
    mount(&lab, &["i=stream:20M,read-window=4M,from=cmd:zstd -dc src.zst"]);
    let file = File::open(lab.path("m/i")).unwrap();
    assert!(read(&file, 0, 10 * MIB) == bytes[..10 << 20]);
    assert!(read(&file, 6 * MIB, MIB) == bytes[6 << 20..7 << 20]);
    let mut buf = [0; 512];
    assert_eq!(errno_of(file.read_at(&mut buf, 6 * MIB - 512)), libc::EIO);
    assert!(read(&file, 10 * MIB, 10 * MIB) == bytes[10 << 20..]);
    wait_until("the source ends well", || stream(&lab, "i")["state"] == "finished");
    assert!(lab.log().contains("read-window="), "{}", lab.log());
    assert_eq!(errno_of(File::options().write(true).open(lab.path("m/i"))), libc::EROFS);
    drop(file);
}

#[test]
fn spooled_input_can_be_read_anywhere_and_has_holes() {
    let lab = Lab::new();
    let mut bytes = vec![0; 16 << 20];
    bytes[..1 << 20].copy_from_slice(&noise(MIB, 6));
    bytes[12 << 20..13 << 20].copy_from_slice(&noise(MIB, 7));
    put(&lab.path("src"), &bytes);
    let disk = "i=stream:16M,spool,from=fifo:p";
    mount(&lab, &[disk]);
    let file = File::open(lab.path("m/i")).unwrap();
    let mut writer = File::options().write(true).open(lab.path("p")).unwrap();
    writer.write_all(&bytes[..4 << 20]).unwrap();
    assert!(read(&file, MIB - 512, 1024) == bytes[(1 << 20) - 512..(1 << 20) + 512]);
    // A read past the bytes received so far waits.
    std::thread::scope(|scope| {
        let ahead = scope.spawn(|| read(&file, 12 * MIB, MIB));
        wait_held_up(std::process::id(), libc::SYS_pread64, 1);
        assert!(!ahead.is_finished());
        writer.write_all(&bytes[4 << 20..]).unwrap();
        assert!(ahead.join().unwrap() == bytes[12 << 20..13 << 20]);
    });
    drop(writer);
    wait_until("all has arrived", || stream(&lab, "i")["state"] == "finished");
    assert_eq!(data_runs(&file), [0..MIB, 12 * MIB..13 * MIB]);
    same(&lab, "src", "m/i");
    drop(file);
}

#[test]
fn input_that_ends_early_or_fails_is_an_error_instead_of_zeros() {
    let lab = Lab::new();
    put(&lab.path("src"), &noise(4 * MIB, 8));
    for (source, why) in [
        ("cmd:head -c 3M src", "ended after 3145728 bytes"),
        (
            "cmd:sh -c 'head -c 3M src; echo broken >&2; exit 3'",
            "'sh' exited with status 3: broken",
        ),
        ("file:src", ""),
    ] {
        for spool in ["", ",spool"] {
            mount(&lab, &[&format!("i=stream:4M,from={source}{spool}")]);
            let copied = lab.output("sh", &["-c", "cat m/i > got"]);
            if why.is_empty() {
                assert!(copied.status.success());
                same(&lab, "src", "got");
                lab.umount();
                continue;
            }
            assert!(!copied.status.success());
            let got = fs::read(lab.path("got")).unwrap();
            assert!(got.len() <= 3 << 20 && fs::read(lab.path("src")).unwrap().starts_with(&got));
            wait_until("status tells", || {
                lab.disk("i")["error"].as_str().is_some_and(|error| error.contains(why))
            });
            let line = lab.refused(1, "umount m");
            assert!(line.contains(why), "{line}");
        }
    }
}

#[test]
fn killed_reader_of_a_stalled_input_exits() {
    let lab = Lab::new();
    mount(&lab, &["i=stream:4M,from=cmd:sleep 1000"]);
    let mut reader = spawn(&lab, "exec cat m/i");
    wait_held_up(reader.pid(), libc::SYS_read, 1);
    reader.0.kill().unwrap();
    assert!(ends_within(&mut reader.0, WAIT_TIMEOUT), "cat is not released");
}

#[test]
fn run_whose_sink_stalls_at_the_end_can_be_stopped() {
    let lab = Lab::new();
    lab.sh("mkfifo pipe");
    let mut command = lab.command(COWSLIP);
    let lines = "echo $$ $COWSLIP_MNT > started; mv started done";
    command.args(["run", "o=stream:1M,to=fifo:pipe", "--", "sh", "-euc", lines]);
    let mut run = Running(command.spawn().unwrap());
    wait_until("the command is there", || lab.path("done").exists());
    let done = fs::read_to_string(lab.path("done")).unwrap();
    let (pid, mountpoint) = done.trim().split_once(' ').unwrap();
    wait_until("the command has ended", || !is_alive(pid.parse().unwrap()));
    let status = Path::new(mountpoint).join(".cowslip/o/status");
    wait_until("the stream is being finished", || {
        fs::read_to_string(&status).is_ok_and(|status| status.contains("\"finishing\""))
    });
    signal(run.pid(), Signal::TERM).unwrap();
    wait_until("run ends", || run.0.try_wait().unwrap().is_some());
    assert_eq!(run.0.wait().unwrap().code(), Some(143));
    wait_until("its daemon ends", || daemons_of(lab.dir()).is_empty());
}

/// Writes `bytes` through a shared mapping of the disk; the kernel writes them back after the file
/// was closed, when nobody can be told of an error any more.
fn write_mapped(lab: &Lab, name: &str, offset: u64, bytes: &[u8]) {
    let file = lab.open(name);
    // SAFETY: the mapping is new, as long as `bytes`, inside the file, and used by nobody else.
    unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            bytes.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            offset as libc::off_t,
        );
        assert_ne!(map, libc::MAP_FAILED);
        drop(file);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), map.cast(), bytes.len());
        assert_eq!(libc::munmap(map, bytes.len()), 0);
    }
}

#[test]
fn refused_write_back_fails_the_stream() {
    // A spill file that may not grow, one that cannot be created, and one without space.
    let limits = [
        ("ulimit -Sf 4096", "File too large"),
        ("mkdir t; export TMPDIR=$PWD/t", "No such file or directory"),
        ("mkdir t; mount -t tmpfs -o size=4m t t; export TMPDIR=$PWD/t", "No space left on device"),
    ];
    for (limit, why) in limits {
        let lab = Lab::new();
        lab.sh(&format!(
            "{limit}; $COWSLIP mount m o=stream:24M,window=0,spill=24M,to=file:o.img --log log.txt"
        ));
        if why.starts_with("No such") {
            lab.sh("rmdir t");
        }
        // Downwards, so that nothing that is held can leave.
        for at in (0..24).rev() {
            write_mapped(&lab, "m/o", at * MIB, &noise(MIB, at));
        }
        assert_eq!(stream(&lab, "o")["state"], "failed", "{why}");
        assert_eq!(lab.cowslip("status").status.code(), Some(3), "{why}");
        let line = lab.refused(1, "finish m/o");
        assert!(
            line.contains("that the kernel wrote back were refused") && line.contains(why),
            "{line}"
        );
        assert!(lab.log().contains(why));
        lab.refused(1, "umount m");
        assert!(!lab.path("o.img").exists(), "{why}");
    }
}

#[test]
fn refused_write_must_be_repeated_before_a_stream_is_finished() {
    // Downwards, so that nothing that is held can leave.
    let write = "for at in $(seq 23 -1 0); do
                     dd if=src of=m/o bs=1M count=1 skip=$at seek=$at conv=notrunc status=none
                 done";
    for repeats in [false, true] {
        let lab = Lab::new();
        lab.sh("mkdir t; mount -t tmpfs -o size=8m t t; head -c 24M /dev/urandom > src
             export TMPDIR=$PWD/t
             $COWSLIP mount m o=stream:24M,window=0,spill=24M,to=file:o.img --log log.txt");
        lab.sh(&format!("set +e; {write} 2> refused; grep -q 'No space left' refused"));
        if repeats {
            lab.sh(&format!("mount -o remount,size=64m t; {write}"));
            lab.ok("finish m/o");
            lab.umount();
            same(&lab, "src", "o.img");
        } else {
            let line = lab.refused(1, "finish m/o");
            assert!(line.contains("bytes are missing, the first at 0: "), "{line}");
            lab.refused(1, "umount m");
            assert!(!lab.path("o.img").exists());
        }
    }
}

#[test]
fn spill_that_may_not_grow_makes_room_like_a_full_one() {
    let lab = Lab::new();
    lab.sh("head -c 32M /dev/urandom > src
            (ulimit -Sf 1024
             $COWSLIP mount m 'o=stream:32M,window=0,spill=32M,to=cmd:sh -c \"ulimit -Sf unlimited; cat >o.img\"' --log log.txt)");
    // In order, so that what is held can leave.
    lab.sh("dd if=src of=m/o bs=256k conv=notrunc status=none");
    lab.ok("finish m/o");
    lab.umount();
    same(&lab, "src", "o.img");
}

#[test]
fn stream_of_more_than_16_tib_keeps_every_byte() {
    for compress in ["", "spill-compress,"] {
        let lab = Lab::new();
        lab.host("t", "ext4 -b 4096", 64 << 20);
        lab.sh(&format!(
            "TMPDIR=$PWD/t $COWSLIP mount m 'o=stream:20T,window=0,spill=64M,{compress}frames=rbd,to=cmd:sh -c \"cat >o.rbd\"' --log log.txt"
        ));
        let bytes = noise(8 << 20, 2);
        for at in [7_u64 << 40, (8 << 40) - (4 << 20), 17 << 40] {
            write_mapped(&lab, "m/o", at, &bytes);
            assert!(read(&lab.open("m/o"), at, 8 << 20) == bytes, "{at}");
        }
        lab.ok("finish m/o");
        lab.umount();
        let file = File::open(lab.path("o.rbd")).unwrap();
        let mut decoder = RbdDecoder::new(file).unwrap();
        let mut data = Vec::new();
        loop {
            match decoder.next_record().unwrap() {
                RbdRecord::Data(range) => {
                    let mut there = vec![0; (range.end - range.start) as usize];
                    decoder.input().read_exact(&mut there).unwrap();
                    data.extend(there);
                }
                RbdRecord::End => break,
                _ => {}
            }
        }
        assert!(data == [&*bytes, &*bytes, &*bytes].concat());
    }
}
