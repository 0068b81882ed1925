//! Users other than the mounting one on a mount that admits them: they cannot read what is not
//! theirs, make the mount do anything, or exhaust its memory, threads and time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::common::mount::*;
use serde_json::Value;

/// The id of a user without any rights.
const STRANGER: u32 = 65534;

/// Runs `work` in a thread that has the file system rights of the user `uid`.
fn as_user<T: Send>(uid: u32, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let user = move || {
            // SAFETY: both calls take plain numbers and affect only this thread, which ends here.
            unsafe {
                libc::setfsgid(uid);
                libc::setfsuid(uid);
            }
            work()
        };
        scope.spawn(user).join().unwrap()
    })
}

/// Mounts `words` with access for all users.
fn lab(words: &str) -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.sh("chmod 755 .; printf '#!/bin/sh\nexec cat >/dev/null\n' >xyzzy; chmod 700 xyzzy");
    lab.mount(&format!("{words} -o allow_other"));
    lab
}

fn open_both(lab: &Lab, name: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(lab.path(name))
}

/// Returns the number in the line `key` of `/proc/PID/status`.
fn of_daemon(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn map_must_be_read_in_order_and_needs_little_memory_per_reader() {
    let lab = lab("d=blank:64M,block=512,perm=0644");
    let disk = lab.open("m/d");
    for sector in 0..30_000 {
        disk.write_all_at(&[7; 512], sector * 1024).unwrap();
    }
    let pid = lab.pid();
    let before = of_daemon(pid, "VmRSS");
    let files: Vec<File> = as_user(STRANGER, || {
        let open = |_| File::open(lab.path("m/.cowslip/d/map")).unwrap();
        (0..64).map(open).collect()
    });
    for file in &files {
        assert_eq!(errno_of(file.read_at(&mut [0], 1 << 40)), libc::ESPIPE);
        assert_eq!(file.read_at(&mut [0; 100], 0).unwrap(), 100);
        assert_eq!(errno_of(file.read_at(&mut [0], 0)), libc::ESPIPE);
        assert_eq!(errno_of(file.read_at(&mut [0], 101)), libc::ESPIPE);
    }
    let grown = of_daemon(pid, "VmRSS").saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB for 64 readers of a map of 60,000 extents");
    drop(files);
    let mut text = String::new();
    // In pieces of various lengths.
    let mut map_file = lab.open_ro("m/.cowslip/d/map");
    for len in (1..100_000).step_by(997).cycle() {
        let mut piece = vec![0; len];
        match map_file.read(&mut piece).unwrap() {
            0 => break,
            len => text += str::from_utf8(&piece[..len]).unwrap(),
        }
    }
    let map: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(map.len(), 60_000);
    drop((map_file, disk));
}

#[test]
fn endless_map_readers_do_not_block_writes() {
    let lab = lab("d=base.img,block=512,perm=0644");
    let disk = lab.open("m/d");
    for sector in 0..15_000 {
        disk.write_all_at(&[7; 512], sector * 1024).unwrap();
    }
    let path = lab.path("m/.cowslip/d/map");
    thread::scope(|scope| {
        let reader = || {
            as_user(STRANGER, || {
                for _ in 0..4 {
                    let mut file = File::open(&path).unwrap();
                    let _ = file.read_at(&mut [0], 1 << 40);
                    io::copy(&mut file, &mut io::sink()).unwrap();
                }
            });
        };
        let readers: Vec<_> = (0..24).map(|_| scope.spawn(reader)).collect();
        while readers.iter().any(|reader| !reader.is_finished()) {
            // A part of a block of the base, which is written by the disk's own threads.
            let at = 15 * MIB + noise(8, of_daemon(lab.pid(), "VmRSS"))[0] as u64 * 512;
            disk.write_all_at(&[1; 10], at + 3).unwrap();
        }
    });
    drop(disk);
}

#[test]
fn number_of_open_control_files_per_user_is_limited() {
    let lab = lab("d=base.img,perm=0644");
    let many: Vec<File> = as_user(STRANGER, || {
        let mut open = Vec::new();
        loop {
            match File::open(lab.path("m/.cowslip/d/map")) {
                Ok(file) => open.push(file),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
                    return open;
                }
            }
            assert!(open.len() < 3000, "there is no end");
        }
    });
    // Directories count as well. Other users are not affected, and disks can still be opened.
    as_user(STRANGER, || {
        assert_eq!(errno_of(fs::read_dir(lab.path("m/.cowslip")).map(|_| ())), libc::EMFILE);
        File::open(lab.path("m/d")).unwrap();
    });
    lab.sh("cat m/.cowslip/d/status m/.cowslip/status >/dev/null; ls m >/dev/null");
    as_user(STRANGER - 1, || File::open(lab.path("m/.cowslip/d/status")).unwrap());
    drop(many);
    wait_until("they are closed", || {
        as_user(STRANGER, || File::open(lab.path("m/.cowslip/d/map")).is_ok())
    });
}

#[test]
fn only_the_mounting_user_and_root_can_open_control_files_for_requests() {
    // The disk itself belongs to the stranger.
    let lab = lab(&format!("d=base.img,perm=0666,uid={STRANGER},gid={STRANGER}"));
    as_user(STRANGER, || {
        open_both(&lab, "m/d").unwrap();
        for name in ["m/.cowslip/d/ctl", "m/.cowslip/ctl"] {
            assert_eq!(errno_of(open_both(&lab, name)), libc::EACCES, "{name}");
            let writer = OpenOptions::new().write(true).open(lab.path(name));
            assert_eq!(errno_of(writer), libc::EACCES, "{name}");
        }
    });
    assert_eq!(lab.sh("stat -c %a:%u m/.cowslip/d/ctl"), "600:0\n");
    lab.ok("snapshot m/d one");
}

#[test]
fn status_and_log_hide_the_disks_of_others() {
    let lab = lab(
        "a=base.img,overlay=ov,perm=0644 b=base.img,perm=0600 s=stream:1M,to=cmd:./xyzzy,perm=0644",
    );
    let here = lab.dir().to_str().unwrap().to_owned();
    as_user(STRANGER, || {
        let text = |name: &str| fs::read_to_string(lab.path(&format!("m/.cowslip/{name}")));
        for name in ["status", "log", "b/status", "b/map"] {
            assert_eq!(errno_of(text(name)), libc::EACCES, "{name}");
        }
        let mount = lab.path("m").to_str().unwrap().to_owned();
        for name in ["a/status", "s/status"] {
            let told = text(name).unwrap();
            assert!(told.contains("\"state\":\"ok\""), "{told}");
            let told = told.replace(&mount, "");
            assert!(!told.contains(&here) && !told.contains("xyzzy"), "{told}");
            assert!(!told.contains("\"uuid\":\""), "{told}");
        }
    });
    // The output of the commands.
    lab.sh("cp $COWSLIP program; chmod 755 program");
    let stranger = |words: &str| {
        lab.sh(&format!("setpriv --reuid {STRANGER} --clear-groups ./program {words}"))
    };
    let one = stranger("status m");
    // The mounts of other tests are listed too, and an unhealthy one changes the exit code.
    let all = stranger("status >all || test $? = 3; cat all");
    let heading = format!("{here}/m  (");
    let of_all = all.split("\n\n").find(|mount| mount.trim_start().starts_with(&heading));
    for told in [one.as_str(), of_all.unwrap_or_else(|| panic!("{all}"))] {
        assert!(told.contains("you may look at 2 of its 3 disks"), "{told}");
        assert!(told.contains("\n  a  ") && !told.contains("\n  b  "), "{told}");
    }
    assert!(stranger("status m/a").contains("\n  a  "));
    lab.sh(&format!(
        "! setpriv --reuid {STRANGER} --clear-groups ./program status m/b 2>why
        grep 'does not let you ask' why"
    ));
    let all = lab.sh("cat m/.cowslip/status");
    assert!(all.contains("xyzzy") && all.contains(&format!("{here}/ov")), "{all}");
}

#[test]
fn threads_and_memory_of_requests_are_limited() {
    let lab = lab("d=base.img");
    let pid = lab.pid();
    let ask = |ctl: &mut File| ctl.write(b"{\"op\":\"snapshots\"}");
    for _ in 0..400 {
        let mut ctl = lab.open("m/.cowslip/d/ctl");
        ask(&mut ctl).unwrap();
        io::copy(&mut ctl, &mut io::sink()).unwrap();
    }
    let threads = of_daemon(pid, "Threads");
    assert!(threads < 100, "{threads} threads for one request at a time");
    // Replies that nobody reads.
    let mut ctl = lab.open("m/.cowslip/d/ctl");
    let mut asked = 0;
    let refused = loop {
        match ask(&mut ctl) {
            Ok(_) => asked += 1,
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => break error.raw_os_error(),
        }
        assert!(asked < 20_000, "answers pile up without end");
    };
    assert_eq!(refused, Some(libc::ENOBUFS));
    io::copy(&mut ctl, &mut io::sink()).unwrap();
    ask(&mut ctl).unwrap();
    drop(ctl);
    // A request longer than the maximum.
    let mut ctl = lab.open("m/.cowslip/d/ctl");
    assert_eq!(errno_of(ctl.write(&[b' '; 100_000])), libc::EMSGSIZE);
    drop(ctl);
}

/// A request of io_submit(2), as linux/aio_abi.h has it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: i32,
    /// 0: `IOCB_CMD_PREAD`.
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// An answer of io_getevents(2).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

/// Begins to read `count` blocks of 4 KiB of `file` asynchronously, tells `begun` about it, and
/// returns the results.
fn read_many(file: &File, count: usize, begun: impl FnOnce()) -> Vec<i64> {
    let mut page = Aligned::of(&[0; 4096]);
    let buf = page.bytes_mut().as_mut_ptr() as u64;
    let read = |at: usize| Iocb {
        fd: file.as_raw_fd() as u32,
        buf,
        len: 4096,
        offset: (at as i64 + 16) * 4096,
        ..Iocb::default()
    };
    let mut reads: Vec<Iocb> = (0..count).map(read).collect();
    let pointers: Vec<*mut Iocb> = reads.iter_mut().map(std::ptr::from_mut).collect();
    let mut events = vec![IoEvent::default(); count];
    let mut context: libc::c_ulong = 0;
    // SAFETY: the arrays are as long as is said; `page`, into which all reads go, lives until all
    // of them have ended.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_io_setup, count, &raw mut context), 0);
        let mut submitted = 0;
        while submitted < count {
            let rest = &pointers[submitted..];
            let more = libc::syscall(libc::SYS_io_submit, context, rest.len(), rest.as_ptr());
            assert!(more > 0, "{}", io::Error::last_os_error());
            submitted += more as usize;
        }
        begun();
        let (all, forever) = (count, std::ptr::null_mut::<libc::timespec>());
        let got =
            libc::syscall(libc::SYS_io_getevents, context, all, all, events.as_mut_ptr(), forever);
        assert_eq!(got, count as i64);
        libc::syscall(libc::SYS_io_destroy, context);
    }
    events.iter().map(|event| event.result).collect()
}

#[test]
fn readers_of_a_stalled_stream_do_not_block_reads_of_other_disks() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    lab.sh("chmod 755 .; printf '#!/bin/sh\nexec sleep 1000\n' >silent; chmod 700 silent");
    lab.mount("s=stream:1G,from=cmd:./silent,spool,perm=0644 d=base.img,perm=0600 -o allow_other");
    let (tell, told) = mpsc::channel();
    let path = lab.path("m/s");
    let reader = thread::spawn(move || {
        as_user(STRANGER, || {
            let flags = libc::O_DIRECT;
            let file = OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap();
            read_many(&file, 5000, || tell.send(()).unwrap())
        })
    });
    told.recv_timeout(Duration::from_secs(30)).expect("the reads are not taken");
    // Read-ahead is asynchronous as well.
    let (tell, told) = mpsc::channel();
    let file = lab.open_ro("m/d");
    thread::spawn(move || tell.send(read(&file, 0, 64 * MIB)));
    let cold = told.recv_timeout(Duration::from_secs(30)).expect("a read hangs");
    assert!(cold == fs::read(lab.path("base.img")).unwrap());
    lab.ok("abort m/s");
    let results = reader.join().unwrap();
    let failed_as = |code: i32| results.iter().filter(|got| **got == -i64::from(code)).count();
    assert_eq!((failed_as(libc::EBUSY), failed_as(libc::EIO)), (5000 - 512, 512));
    // The source was killed, which is told.
    lab.refused(1, "umount m");
}

#[test]
fn open_directories_need_little_memory_each() {
    let name = "n".repeat(190);
    let disks: Vec<String> = (0..300).map(|at| format!("{name}{at}=blank:1M")).collect();
    let lab = lab(&disks.join(" "));
    let pid = lab.pid();
    let before = of_daemon(pid, "VmRSS");
    let open: Vec<File> = as_user(STRANGER, || {
        let open = |at: usize| File::open(lab.path(["m", "m/.cowslip"][at % 2])).unwrap();
        (0..1000).map(open).collect()
    });
    let grown = of_daemon(pid, "VmRSS").saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB for 1,000 directories of 300 disks");
    drop(open);
}
