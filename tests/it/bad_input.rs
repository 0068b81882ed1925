//! Invalid input is rejected with one line that says what is wrong, where, and what to do, and
//! leaves nothing behind.

use std::fs;
use std::os::unix::fs::FileExt;

use std::os::unix::net::UnixListener;

use crate::common::mount::*;

/// Creates a lab with a base and without a mount.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab
}

/// Checks that `cowslip mount m WORDS` fails with `code` and a line that contains all of `parts`,
/// and leaves no files or mounts behind.
#[track_caller]
fn refuse(lab: &Lab, code: i32, words: &str, parts: &[&str]) {
    refuse_line(lab, code, &format!("mount m {words}"), parts);
}

#[track_caller]
fn refuse_line(lab: &Lab, code: i32, words: &str, parts: &[&str]) {
    let all: Vec<&str> = words.split_whitespace().collect();
    refuse_args(lab, code, &all, parts);
}

#[track_caller]
fn refuse_args(lab: &Lab, code: i32, args: &[&str], parts: &[&str]) {
    let list = || lab.sh("find . -not -path './m/*' | sort");
    let (before, mounts) = (list(), mounts_below(lab.dir()));
    let line = one_line(code, &lab.output(COWSLIP, args), &format!("{args:?}"));
    for part in parts {
        assert!(line.contains(part), "{args:?}\n{line}\nlacks {part}");
    }
    assert_eq!(list(), before, "{args:?}");
    assert_eq!(mounts_below(lab.dir()), mounts, "{args:?}");
}

#[test]
fn base_that_is_no_file_or_block_device_is_rejected() {
    let lab = lab();
    lab.sh("mkdir dir; mkfifo fifo; ln -s nowhere dangling; ln -s loop loop");
    refuse(&lab, 1, "nothing.img", &["nothing.img' does not exist"]);
    refuse(&lab, 1, "dangling", &["dangling"]);
    refuse(&lab, 1, "loop", &["loop"]);
    refuse(&lab, 1, "dir", &["dir' is a directory"]);
    refuse(&lab, 1, "fifo", &["fifo", "name a file or a block device"]);
    refuse(&lab, 1, "d=/dev/tty", &["/dev/tty"]);
    refuse(&lab, 1, "d=/dev/null", &["/dev/null", "name a file or a block device"]);
    refuse(&lab, 1, "d=/proc/version", &["/proc/version"]);
    refuse(&lab, 1, "d=/sys/kernel/uevent_seqnum", &["/sys/kernel/uevent_seqnum"]);
}

#[test]
fn base_of_another_format_is_rejected_with_a_remedy() {
    let lab = lab();
    lab.sh("
        for format in qcow2 vmdk vhdx vdi; do qemu-img create -q -f $format a.$format 10M; done
        printf 'LUKS\\272\\276\\000\\001' > a.luks; truncate -s 1M a.luks
    ");
    for format in ["qcow2", "vmdk", "vhdx", "vdi"] {
        let hint = format!("add ,format={format}");
        let raw = "format=raw";
        refuse(&lab, 1, &format!("a.{format}"), &[&hint, raw, &format!("a.{format}")]);
        refuse(&lab, 1, &format!("a.{format},mode=rw"), &[raw]);
        lab.mount(&format!("d=a.{format},format=raw"));
        lab.sh(&format!("cmp m/d a.{format}"));
        lab.umount();
    }
    refuse(&lab, 1, "a.luks", &["luks", "cryptsetup", "format=raw"]);
    refuse(&lab, 1, "a.vdi,format=vhdx", &["a.vdi", "as a vhdx image"]);
    refuse(&lab, 1, "a.vdi,format=E01", &["a.vdi", "ewfmount"]);
    refuse(&lab, 2, "a.vdi,format=vdx", &["vdx"]);
}

#[test]
fn base_or_overlay_in_the_mount_itself_is_rejected() {
    let lab = lab();
    lab.sh("cp base.img m/inside.img; truncate -s 32M m/loop.img");
    refuse(&lab, 1, "m/inside.img -o nonempty", &["inside.img", "lies in the mount"]);
    refuse(&lab, 1, "base.img,overlay=m/ov -o nonempty", &["ov", "lies in the mount"]);
    refuse(&lab, 1, "--store m/st -o nonempty", &["st", "lies in the mount"]);
    lab.sh("ln -s m/inside.img link.img; mkdir bind");
    refuse(&lab, 1, "link.img -o nonempty", &["link.img", "lies in the mount"]);
    let device = lab.loop_device("m/loop.img", "");
    refuse(&lab, 1, &format!("{device} -o nonempty"), &["loop", "lies in the mount"]);
    lab.sh(&format!("mkfs.ext4 -q {device}; mkdir on; mount {device} on; cp base.img on"));
    refuse(&lab, 1, "on/base.img -o nonempty", &["on/base.img", "lies in the mount"]);
    refuse(&lab, 1, "base.img,overlay=on/ov -o nonempty", &["on/ov", "lies in the mount"]);
    lab.sh(&format!("umount on; losetup -d {device}"));
}

#[test]
fn invalid_mountpoint_is_rejected() {
    let lab = lab();
    lab.sh("mkdir full; touch full/x; touch file");
    fs::write(lab.path("a.toml"), "mountpoint=\"file\"\n[[disk]]\nsource=\"base.img\"\n").unwrap();
    refuse_line(&lab, 1, "mount nowhere base.img", &["nowhere' does not exist"]);
    refuse_line(&lab, 2, "mount file x=base.img", &["MOUNTPOINT comes first"]);
    refuse_line(&lab, 1, "mount --config a.toml", &["file' is not a directory"]);
    refuse_line(&lab, 1, "mount full base.img", &["full' is not empty", "nonempty"]);
    lab.ok("mount full base.img -o nonempty");
    lab.sh("cmp full/base.img base.img; [ ! -e full/x ]");
    lab.ok("umount full");
    lab.sh("[ -e full/x ]");
}

#[test]
fn mountpoint_in_use_is_rejected() {
    let lab = lab();
    lab.mount("d=base.img");
    refuse(&lab, 1, "d=base.img", &["already a cowslip mount"]);
    refuse(&lab, 1, "d=base.img -o nonempty", &["already a cowslip mount"]);
}

#[test]
fn dead_mount_of_another_program_is_left_alone() {
    let lab = lab();
    let mut command = lab.command("nbdfuse");
    command.args(["m", "--command", "nbdkit", "-s", "memory", "1M"]);
    let mut other = Running(command.spawn().unwrap());
    wait_until("nbdfuse has mounted", || lab.path("m/nbd").exists());
    other.0.kill().unwrap();
    other.0.wait().unwrap();
    let is_dead =
        || fs::metadata(lab.path("m")).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
    wait_until("its mount is dead", is_dead);
    let line = lab.refused(1, "mount m base.img");
    assert!(line.contains("dead") && line.contains("umount -l"), "{line}");
    lab.sh("umount -l m");
}

#[test]
fn invalid_and_duplicate_names_are_rejected() {
    let lab = lab();
    refuse(&lab, 2, "d=base.img d=base.img", &["two disks", "NAME=SOURCE"]);
    refuse(&lab, 2, "base.img d/../base.img", &["two disks"]);
    for name in [".", "..", ".cowslip", "log", "ctl", "status", "a\nb", "a\x07b", &"n".repeat(256)]
    {
        let disk = format!("{name}=base.img");
        refuse_args(&lab, 2, &["mount", "m", &disk], &["cannot be a disk's name"]);
    }
    fs::write(
        lab.path("a.toml"),
        "mountpoint=\"m\"\n[[disk]]\nname=\"a/b\"\nsource=\"base.img\"\n",
    )
    .unwrap();
    refuse_line(&lab, 2, "mount --config a.toml", &["a.toml", "a/b"]);
}

#[test]
fn invalid_sizes_are_rejected() {
    let lab = lab();
    for size in [
        "10MB",
        "-1",
        "-1M",
        "99999999999999999999",
        "16E",
        "20000000T",
        "1.5G",
        "",
        "1X",
        "0x10",
        "1 G",
    ] {
        let disk = format!("d=blank:{size}");
        refuse_args(&lab, 2, &["mount", "m", &disk], &[]);
    }
    refuse(&lab, 2, "d=blank:10MB", &["10MB", "10M"]);
    for key in [
        "size=10MB",
        "limit=-1",
        "size=18446744073709551616",
        "block=100",
        "block=3K",
        "block=4M",
        "block=0",
        "block=256",
    ] {
        refuse(&lab, 2, &format!("base.img,{key}"), &[key.split_once('=').unwrap().0]);
    }
}

#[test]
fn unknown_keys_and_options_are_rejected_with_a_suggestion() {
    let lab = lab();
    refuse(&lab, 2, "base.img,overly=x", &["overly", "overlay"]);
    refuse(&lab, 2, "base.img,mode=cwo", &["cwo", "cow"]);
    refuse(&lab, 2, "base.img,perm=999", &["999"]);
    refuse(&lab, 2, "base.img,uid=-1", &["uid"]);
    refuse(&lab, 2, "base.img -o allow_othr", &["allow_othr", "allow_other"]);
    refuse(&lab, 2, "base.img -o out.zst", &["out.zst", "quote the disk"]);
    refuse(&lab, 2, "base.img -o io_timeout=0", &["io_timeout"]);
    refuse(&lab, 2, "base.img --cash none", &["--cash"]);
    refuse(&lab, 2, "base.img --cache some", &["some"]);
    refuse(&lab, 2, "base.img,mode=ro,overlay=x", &["overlay", "mode=ro"]);
    refuse(&lab, 2, "", &["nothing to mount"]);
    refuse_line(&lab, 2, "mount base.img m", &["MOUNTPOINT comes first: cowslip mount m base.img"]);
    refuse_line(&lab, 2, "", &["no command"]);
    refuse_line(&lab, 2, "mont m base.img", &["mount"]);
}

#[test]
fn commas_in_paths_must_be_doubled() {
    let lab = lab();
    lab.sh("cp base.img a,b.img; cp base.img a=b.img");
    refuse(&lab, 2, "a,b.img", &["a,,b.img"]);
    lab.mount("a,,b.img ./a=b.img");
    lab.sh("cmp m/a,b.img base.img; cmp m/a=b.img base.img");
}

#[test]
fn config_error_is_reported_with_its_line() {
    let lab = lab();
    for (text, parts) in [
        ("mountpoint = \"m\"\nmuntpoint = 1\n", &["line 2", "muntpoint"][..]),
        ("mountpoint = \n", &["a.toml"]),
        ("[[disk]]\nsource = \"base.img\"\nmode = \"rx\"\n", &["rx"]),
        ("[[disk]]\nsource = 5\n", &["source"]),
    ] {
        fs::write(lab.path("a.toml"), text).unwrap();
        refuse_line(&lab, 2, "mount m --config a.toml", parts);
    }
    refuse_line(&lab, 1, "mount m --config nowhere.toml", &["nowhere.toml"]);
}

/// Creates an overlay `ov` over `base.img` with one changed block.
fn with_overlay() -> Lab {
    let lab = lab();
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(b"changed", 4096).unwrap();
    lab.umount();
    lab
}

/// Replaces text in the overlay's `stack` and updates the checksum.
fn edit_stack(lab: &Lab, from: &str, to: &str) {
    let path = lab.path("ov/stack");
    let text = fs::read_to_string(&path).unwrap();
    let (_, body) = text.split_once('\n').unwrap();
    assert!(body.contains(from), "{body}");
    let body = body.replace(from, to);
    let crc = crc32c::crc32c(body.as_bytes());
    fs::write(&path, format!("checksum = \"crc32c:{crc:08x}\"\n{body}")).unwrap();
}

#[test]
fn overlay_of_another_base_or_version_is_rejected() {
    let mut lab = with_overlay();
    lab.base("other.img", 4 * MIB);
    lab.sh("mkdir full; touch full/x; touch file");
    refuse(&lab, 1, "d=other.img,overlay=ov", &["ov", "base.img"]);
    refuse(&lab, 1, "d=blank:4M,overlay=ov", &["ov"]);
    refuse(&lab, 1, "d=base.img,overlay=ov,block=64K", &["ov", "block"]);
    refuse(&lab, 1, "d=base.img,overlay=full", &["full", "not an overlay"]);
    refuse(&lab, 1, "d=base.img,overlay=file", &["file"]);
    refuse(&lab, 1, "d=base.img,overlay=no/where", &["no/where"]);
    refuse(&lab, 1, "d=base.img,overlay=base.img", &["base.img"]);
    edit_stack(&lab, "version = 1", "version = 9");
    refuse(&lab, 1, "d=base.img,overlay=ov", &["version 9", "newer cowslip"]);
    edit_stack(&lab, "version = 9", "version = 1");
    lab.mount("d=base.img,overlay=ov");
}

#[test]
fn invalid_stack_or_log_is_rejected() {
    let lab = with_overlay();
    let good = fs::read(lab.path("ov/stack")).unwrap();
    for (from, to) in [
        ("block = 4096", "block = 12"),
        ("block = 4096", "block = -1"),
        ("perm", "prem"),
        ("uuid = \"", "uuid = \"x"),
    ] {
        edit_stack(&lab, from, to);
        refuse(&lab, 1, "d=base.img,overlay=ov", &["ov"]);
        fs::write(lab.path("ov/stack"), &good).unwrap();
    }
    for bytes in [&b""[..], b"\xff\xfe\n\n", &good[..good.len() / 2]] {
        fs::write(lab.path("ov/stack"), bytes).unwrap();
        refuse(&lab, 1, "d=base.img,overlay=ov", &["ov", "damaged"]);
    }
    fs::write(lab.path("ov/stack"), &good).unwrap();
    let log = layer_dir(&lab.path("ov")).join("log");
    let records = fs::read(&log).unwrap();
    for length in [0, 16] {
        fs::write(&log, &records[..length]).unwrap();
        refuse(&lab, 1, "d=base.img,overlay=ov", &["ov"]);
    }
    fs::write(&log, &records).unwrap();
    lab.mount("d=base.img,overlay=ov");
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 7), b"changed");
}

#[test]
fn unknown_or_oversized_files_of_a_layer_need_little_memory_and_time() {
    let lab = with_overlay();
    lab.sh(
        "cd ov/layers/*; for i in 1048576 1000000000 4294967296 18446744073709551615 +2 03 0; do
             truncate -s 1M data.$i
         done
         truncate -s 1M data.1048575; truncate -s 15T log",
    );
    // With less memory than a list of all segments would need, and in less time than reading the
    // whole log would take.
    lab.sh("ulimit -v 2000000; $COWSLIP check ov; $COWSLIP mount m d=base.img,overlay=ov");
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 7), b"changed");
    lab.open("m/d").write_all_at(b"more", 8192).unwrap();
    lab.umount();
    lab.mount("d=base.img,overlay=ov");
    assert_eq!(read(&lab.open_ro("m/d"), 8192, 4), b"more");
}

#[test]
fn overlay_in_use_is_rejected_with_its_user() {
    let lab = lab();
    lab.mount("d=base.img,overlay=ov");
    let pid = format!("pid {}", lab.pid());
    lab.sh("mkdir other; ln -s ov link");
    let m = lab.path("m").to_str().unwrap().to_owned();
    for overlay in ["ov", "link", "./ov", "link/../ov"] {
        let words = format!("mount other d=base.img,overlay={overlay}");
        refuse_line(&lab, 1, &words, &["in use", &pid, &m]);
    }
    lab.umount();
    refuse(&lab, 1, "a=base.img,overlay=ov b=base.img,overlay=ov", &["ov"]);
}

#[test]
fn base_in_use_by_a_vm_is_rejected() {
    let mut lab = Lab::new();
    lab.sh("truncate -s 4M base.img; mkfifo in");
    let mut command = lab.command("sh");
    command.args(["-c", "exec qemu-io -f raw base.img < in > out"]);
    let mut vm = Running(command.spawn().unwrap());
    let mut pipe = fs::OpenOptions::new().write(true).open(lab.path("in")).unwrap();
    use std::io::Write;
    pipe.write_all(b"write 0 512\n").unwrap();
    wait_until("qemu-io has it open", || {
        fs::read_to_string(lab.path("out")).unwrap_or_default().contains("wrote")
    });
    refuse(&lab, 1, "base.img", &["base.img", "running VM", "lock=off"]);
    refuse(&lab, 1, "base.img,mode=rw", &["base.img", "running VM"]);
    lab.mount("base.img,lock=off");
    lab.umount();
    drop(pipe);
    vm.0.wait().unwrap();
    lab.watch("base.img");
    lab.mount("base.img");
    // The reverse: a VM cannot write to a mounted base.
    let output = lab.output("qemu-io", &["-f", "raw", "-c", "write 0 512", "base.img"]);
    assert!(!output.status.success(), "{}", show(&output));
    lab.sh("qemu-io -r -f raw -c 'read 0 512' base.img");
}

#[test]
fn base_has_one_writer_or_many_readers() {
    let lab = lab();
    lab.sh("cp base.img b; mkdir n");
    lab.mount("d=b");
    refuse_line(&lab, 1, "mount n d=b,mode=rw", &["b'", "cannot be written while"]);
    lab.ok("mount n d=b");
    lab.ok("umount n");
    lab.umount();
    lab.mount("d=b,mode=rw");
    refuse_line(&lab, 1, "mount n d=b", &["b'", "being written"]);
    refuse_line(&lab, 1, "mount n d=b,mode=rw", &["b'"]);
}

#[test]
fn changed_base_is_rejected_unless_forced() {
    let lab = Lab::new();
    fs::write(lab.path("base.img"), noise(4 * MIB, 1)).unwrap();
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(b"changed", 4096).unwrap();
    lab.umount();
    lab.open("base.img").write_all_at(b"!", 100).unwrap();
    refuse(&lab, 1, "d=base.img,overlay=ov", &["ov", "base.img", "--force"]);
    lab.mount("d=base.img,overlay=ov --force");
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 7), b"changed");
    assert!(lab.log().contains("used all the same (--force)"), "{}", lab.log());
    lab.umount();
    lab.sh("truncate -s 3M base.img");
    refuse(&lab, 1, "d=base.img,overlay=ov", &["ov", "size"]);
    lab.sh("mv base.img gone.img");
    refuse(&lab, 1, "d=base.img,overlay=ov", &["base.img' does not exist"]);
}

#[test]
fn path_through_the_mountpoint_is_accepted() {
    let lab = lab();
    lab.mount("d=m/../base.img,overlay=m/../ov");
    lab.sh("cmp m/d base.img; [ -e ov/stack ]");
}

/// Runs `cowslip WORDS` as the user nobody, with `path` as PATH.
fn as_nobody(lab: &Lab, path: &str, words: &str) -> std::process::Output {
    // The build directory may be inaccessible to nobody.
    lab.sh("[ -e bin ] || { mkdir bin; cp $COWSLIP bin/cowslip; chmod 755 . bin; }");
    let line = format!(
        "exec setpriv --reuid nobody --regid nogroup --clear-groups env PATH={path} ./bin/cowslip {words}"
    );
    lab.output("sh", &["-c", &line])
}

#[test]
fn missing_fusermount3_or_permission_is_reported() {
    let lab = lab();
    lab.sh("chmod 777 m; chmod 644 base.img; mkdir empty");
    let path = lab.path("empty");
    let output = as_nobody(&lab, path.to_str().unwrap(), "mount m base.img");
    let line = one_line(1, &output, "without fusermount3");
    assert!(line.contains("fusermount3") || line.contains("/dev/fuse"), "{line}");
    lab.sh("chmod 600 base.img");
    let output = as_nobody(&lab, "/usr/bin:/bin", "mount m base.img");
    let line = one_line(1, &output, "without permission");
    assert!(line.contains("base.img"), "{line}");
    assert_eq!(mounts_below(lab.dir()).len(), 0);
}

#[test]
fn commands_outside_a_mount_are_rejected() {
    let lab = lab();
    for words in [
        "umount m",
        "umount nowhere",
        "umount base.img",
        "log m",
        "map base.img",
        "keep base.img x",
        "status m",
    ] {
        let line = lab.refused(1, words);
        assert!(line.len() > 20, "{line}");
    }
}

#[test]
fn failed_mount_closes_its_files_and_removes_new_overlays() {
    let lab = lab();
    lab.mount("old=base.img,overlay=old.cow");
    put(&lab.path("m/old"), b"kept");
    lab.umount();
    let stray = ["new=base.img,overlay=new.cow", "old=base.img,overlay=old.cow", "nowhere.img"];
    refuse(&lab, 1, &stray.join(" "), &["nowhere.img' does not exist"]);
    refuse(&lab, 1, "d=base.img,overlay=no/where.cow", &["no' is no directory: make it first"]);
    refuse(&lab, 1, "old=base.img,size=9M,overlay=old.cow", &["leave out size="]);
    assert!(lab.ok("check old.cow").contains("clean"));
    let said = lab.mount("old=base.img,overlay=old.cow");
    assert!(!said.contains("recovered"), "{said}");
    assert_eq!(read(&lab.open_ro("m/old"), 0, 4), b"kept");
    lab.umount();
}

#[test]
fn output_and_log_contain_no_control_characters() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    let evil = "o\u{1b}[2J\u{202e}v\n2026 forged";
    let disk = format!("d=base.img,overlay={evil}");
    let fit = |output: &std::process::Output, lines: usize| {
        let all = [&output.stdout[..], &output.stderr].concat();
        let text = String::from_utf8(all).unwrap();
        let hostile = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
        assert!(text.contains("forged") && !text.contains(hostile), "{text:?}");
        assert!(!text.lines().any(|line| line.starts_with("2026 forged")), "{text:?}");
        assert!(lines == 0 || text.lines().count() == lines, "{text:?}");
    };
    fit(&lab.output(COWSLIP, &["mount", "m", &disk, "--log", "log.txt"]), 1);
    // The overlay is in use, as its `holder` file says.
    fit(&lab.output(COWSLIP, &["check", evil]), 1);
    fit(&lab.output(COWSLIP, &["status", "m"]), 0);
    fit(&lab.output(COWSLIP, &["keep", "m/d", evil]), 1);
    lab.open("m/d").write_all_at(b"x", 0).unwrap();
    fit(&lab.output(COWSLIP, &["umount", "m"]), 1);
    fit(&lab.output(COWSLIP, &["check", evil]), 0);
    fit(&lab.output(COWSLIP, &["commit", &format!("no/{evil}")]), 1);
    fit(&lab.output(COWSLIP, &["mount", &format!("no/{evil}"), "base.img"]), 1);
    fit(&lab.output(COWSLIP, &["map", evil]), 1);
    assert!(!lab.log().contains('\u{1b}'), "{}", lab.log());
}

#[test]
fn pipes_and_links_in_place_of_files_are_rejected_at_once() {
    let lab = Lab::new();
    lab.sh("mkfifo fifo; mkdir dir; ln -s nothing dangling; ln -s loop loop; truncate -s 4M base
         mkdir parts; $COWSLIP send base >wire");
    let _socket = UnixListener::bind(lab.path("socket")).unwrap();
    for kind in ["fifo", "dir", "socket", "dangling", "loop"] {
        for format in ["raw", "qcow2"] {
            lab.sh(&format!("qemu-img create -q -f qcow2 -u -b {kind} -F {format} {format}.q 4M"));
        }
        let mut words = vec![
            format!("mount m d={kind}"),
            format!("mount m d={kind},mode=rw"),
            format!("mount m d={kind},format=qcow2"),
            "mount m d=raw.q,format=qcow2".to_owned(),
            "mount m d=qcow2.q,format=qcow2".to_owned(),
            format!("mount m d=base --log {kind}"),
            format!("mount m --config {kind}"),
            format!("mount m s=stream:4M,from=file:{kind}"),
            format!("mount m s=stream:4M,to=file:{kind}"),
            format!("mount m s=stream:4M,overwrite,to=file:{kind}"),
            format!("import {kind} --overlay ov"),
            "import raw.q --overlay ov".to_owned(),
            format!("recv {kind} --resume-offset"),
        ];
        if kind != "fifo" {
            words.extend([
                format!("send {kind}"),
                format!("mount m s=stream:4M,from=fifo:{kind}"),
                format!("mount m s=stream:4M,to=fifo:{kind}"),
            ]);
        }
        for words in words {
            let line = lab.refused(1, &words);
            assert!(line.contains('\''), "it names what it is about: {line}");
        }
        for line in [
            format!("$COWSLIP recv {kind} --overwrite <wire"),
            format!("$COWSLIP recv x --onto {kind} <wire"),
            format!("rm -rf parts/*; cp -a {kind} parts/x.part; $COWSLIP recv parts/x <wire"),
        ] {
            crate::common::mount::one_line(1, &lab.output("sh", &["-c", &line]), &line);
        }
        assert!(!lab.path("ov").exists() && !lab.path("nothing").exists(), "{kind}");
    }
}

#[test]
fn files_that_a_disk_uses_are_replaced_by_no_command() {
    let mut lab = lab();
    lab.watch("base.img");
    lab.mount("d=base.img");
    put(&lab.path("m/d"), b"changed");
    for words in [
        "diff m/d -o base.img --overwrite",
        "map m/d --svg base.img --overwrite",
        "add m o=stream:1M,to=file:base.img,overwrite",
        "recv base.img --overwrite",
    ] {
        let line = lab.refused(1, words);
        assert!(line.contains("base.img' is in use as the image of a disk"), "{words}: {line}");
    }
}

#[test]
fn copy_of_an_overlay_is_refused_beside_it_in_one_mount() {
    let lab = lab();
    lab.mount("d=base.img,overlay=ov");
    lab.umount();
    lab.sh("cp -a ov copy; mkdir m2");
    let line = "e: its overlay is a copy of that of 'd', and a mount shows one of them";
    refuse(&lab, 1, "d=base.img,overlay=ov e=base.img,overlay=copy", &[line]);
    lab.mount("d=base.img,overlay=ov");
    refuse_line(&lab, 1, "add m e=base.img,overlay=copy", &[line]);
    lab.ok("mount m2 e=base.img,overlay=copy");
    lab.ok("umount m2");
}

#[test]
fn log_is_none_of_the_files_that_a_disk_uses() {
    let mut lab = lab();
    lab.watch("base.img");
    lab.sh("qemu-img create -q -f qcow2 -b base.img -F raw top.q; ln base.img hard; ln -s base.img soft
         mkdir new m2; cp base.img other.img; md5sum base.img top.q >sums");
    lab.mount("d=base.img,overlay=ov");
    lab.umount();
    lab.ok("mount m --store st");
    lab.umount();
    for (disk, log, why) in [
        ("d=base.img", "base.img", "it is the image of the disk 'd'"),
        ("d=base.img", "hard", "it is the image of the disk 'd'"),
        ("d=base.img,mode=ro", "soft", "it is the image of the disk 'd'"),
        ("d=soft", "base.img", "it is the image of the disk 'd'"),
        ("d=top.q,format=qcow2", "top.q", "it is the image of the disk 'd'"),
        // One that it needs: no name of it is known before the image is read.
        ("d=top.q,format=qcow2", "base.img", "base.img' is the log of a cowslip mount"),
        ("d=base.img,overlay=ov", "ov/stack", "/ov', which holds cowslip's own files"),
        ("d=base.img,overlay=ov", "ov/layers/x", "/ov', which holds cowslip's own files"),
        ("d=base.img", "ov/x", "/ov', which holds cowslip's own files"),
        ("d=base.img,overlay=new", "new/x", "/new', which holds cowslip's own files"),
        ("--store st", "st/layers/x", "/st', which holds cowslip's own files"),
        ("--store st", "st/store", "/st', which holds cowslip's own files"),
        ("--store new", "new/x", "/new', which holds cowslip's own files"),
    ] {
        refuse(&lab, 1, &format!("{disk} --log {log}"), &[why]);
        lab.sh("md5sum --quiet -c sums");
    }
    lab.ok("check ov");
    // Several mounts may share a log; none of them, and nothing else, takes it as a disk.
    lab.ok("mount m d=base.img --log x.log");
    lab.ok("mount m2 d=base.img --log x.log");
    refuse_line(&lab, 1, "add m x.log", &["x.log' is the log of a cowslip mount"]);
    refuse_line(
        &lab,
        1,
        "diff m/d -O rbd -o x.log --overwrite",
        &["is the log of a cowslip mount"],
    );
    lab.ok("umount m2");
    // Nor is an image the log of another mount.
    refuse_line(
        &lab,
        1,
        "mount m2 d=other.img --log base.img",
        &["is in use as the image of a disk"],
    );
    lab.umount();
    lab.ok("mount m d=x.log");
}

#[test]
fn a_limit_of_processes_is_told_in_a_line() {
    let lab = lab();
    lab.sh("chmod 777 m; chmod 644 base.img");
    for limit in 1..4 {
        let before = format!("--nproc={limit}");
        let line = format!("prlimit {before} ./bin/cowslip mount m base.img");
        as_nobody(&lab, "/usr/bin:/bin", "--version");
        let setpriv = "setpriv --reuid nobody --regid nogroup --clear-groups";
        let output = lab.output("sh", &["-c", &format!("exec {setpriv} {line}")]);
        one_line(1, &output, &before);
    }
}
