//! Bases in formats that QEMU reads: images made by the real qemu-img, read by a `qemu-nbd` that is
//! locked in; and images whose names lead where they must not.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::common::mount::*;
use crate::common::qemu::{assert_same_as_qemu, runs};
use crate::common::random;

/// The process ids of the qemu-nbd that serve the mount at `m`.
fn programs(lab: &Lab) -> Vec<u32> {
    let daemon = lab.pid().to_string();
    let is_program = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses, the state, the parent.
        let (name, rest) = stat.rsplit_once(") ").unwrap_or_default();
        name.ends_with("(qemu-nbd") && rest.split(' ').nth(1) == Some(&daemon) && is_alive(*pid)
    };
    let names = fs::read_dir("/proc").unwrap().flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(is_program).collect()
}

#[test]
fn images_of_every_format_are_read_as_qemu_reads_them() {
    let mut lab = Lab::new();
    lab.base("base.img", 24 * MIB);
    let formats = [
        ("sparse", "vmdk", "subformat=monolithicSparse"),
        ("stream", "vmdk", "subformat=streamOptimized"),
        ("vhdx", "vhdx", "subformat=dynamic,block_size=1M"),
        ("vhdxfixed", "vhdx", "subformat=fixed"),
        ("vpc", "vpc", "subformat=dynamic"),
        ("vpcfixed", "vpc", "subformat=fixed"),
        ("vdi", "vdi", "static=off"),
        ("qed", "qed", "cluster_size=4096"),
        ("parallels", "parallels", "cluster_size=64K"),
        ("qcow", "qcow", "encryption=off"),
    ];
    for (name, format, options) in formats {
        let image = format!("{name}.{format}");
        lab.sh(&format!("qemu-img convert -f raw -O {format} -o {options} base.img {image}"));
        lab.watch(&image);
        lab.mount(&format!("d={image},format={format},mode=ro"));
        assert_same_as_qemu(&lab, "d", format, &image);
        assert_eq!(lab.disk("d")["format"], format);
        // The start of the disk, whatever size the format rounds it to.
        lab.sh(&format!("cmp -n {} base.img m/d", 24 * MIB));
        assert_eq!(programs(&lab).len(), 1);
        let served = programs(&lab)[0];
        lab.umount();
        assert!(!is_alive(served), "{name}");
        let line = lab.refused(1, &format!("mount m {image}"));
        assert!(line.contains(&format!("add ,format={format}")) || name == "vpcfixed", "{line}");
    }
}

/// Writes `d.dmg` with stored, zero, ignored and compressed blocks, and `d.raw`, what it holds.
const MAKE_DMG: &str = r#"
import base64, os, struct, zlib
part = 64 << 10
stored, packed = os.urandom(part), b"compressed " * 5957 + b"12345"
assert len(packed) == part - 4 or True
packed = packed.ljust(part, b"x")
small = zlib.compress(packed)
chunks, data = [], b""
def chunk(kind, at, count, bytes):
    global data
    chunks.append(struct.pack(">IIQQQQ", kind, 0, at, count, len(data), len(bytes)))
    data += bytes
n = part // 512
chunk(1, 0, n, stored)
chunk(0, n, n, b"")
chunk(0x80000005, 2 * n, n, small)
chunk(2, 3 * n, n, b"")
chunk(1, 4 * n, n, stored)
chunks.append(struct.pack(">IIQQQQ", 0xffffffff, 0, 5 * n, 0, len(data), 0))
mish = struct.pack(">IIQQQII", 0x6d697368, 1, 0, 5 * n, 0, 8, 0) + bytes(24) + bytes(136)
mish += struct.pack(">I", len(chunks)) + b"".join(chunks)
xml = b"<plist><dict><key>resource-fork</key><dict><key>blkx</key><array><dict><key>Data</key><data>\n"
xml += base64.b64encode(mish) + b"\n</data></dict></array></dict></dict></plist>"
koly = bytearray(512)
koly[0:12] = struct.pack(">4sII", b"koly", 4, 512)
koly[0x18:0x28] = struct.pack(">QQ", 0, len(data))
koly[0xd8:0xe8] = struct.pack(">QQ", len(data), len(xml))
koly[0x1ec:0x1f4] = struct.pack(">Q", 5 * n)
open("d.dmg", "wb").write(data + xml + bytes(koly))
open("d.raw", "wb").write(stored + bytes(part) + packed + bytes(part) + stored)
"#;

#[test]
fn a_dmg_image_is_read_as_qemu_reads_it() {
    let lab = Lab::new();
    fs::write(lab.path("make.py"), MAKE_DMG).unwrap();
    lab.sh("python3 make.py");
    lab.mount("d=d.dmg,format=dmg");
    lab.sh("cmp m/d d.raw");
    assert_same_as_qemu(&lab, "d", "dmg", "d.dmg");
    lab.umount();
    let line = lab.refused(1, "mount m d=d.dmg,format=dmg,mode=rw");
    assert!(line.contains("is a dmg image, which is only read") && line.contains("copy"), "{line}");
}

#[test]
fn changes_stay_in_the_overlay_and_belong_to_the_image() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    lab.watch("vm.vmdk");
    lab.mount("vm=vm.vmdk,format=vmdk,overlay=ov");
    let file = lab.open("m/vm");
    file.write_all_at(b"written", 3 * MIB - 3).unwrap();
    file.write_all_at(&noise(100_000, 5), 5 * MIB).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("vmdk image, which is only read"), "{line}");
    let changed = lab.sh("cat m/vm | md5sum");
    // What was changed goes back through QEMU.
    lab.ok("diff m/vm -o changes.qcow2");
    lab.umount();
    assert!(lab.sh("qemu-img info changes.qcow2").contains("backing file format: vmdk"));
    lab.sh("cp vm.vmdk copy.vmdk
        qemu-img rebase -u -f qcow2 -b copy.vmdk -F vmdk changes.qcow2
        qemu-img commit -q changes.qcow2
        qemu-img convert -f vmdk -O raw copy.vmdk copy.raw");
    assert_eq!(lab.sh("cat copy.raw | md5sum"), changed);

    lab.mount("vm=vm.vmdk,format=vmdk,overlay=ov");
    assert_eq!(lab.sh("cat m/vm | md5sum"), changed);
    lab.umount();
    assert!(lab.ok("check ov").contains("vm.vmdk, vmdk, "));
    for (spec, what) in [
        ("vm=vm.vmdk,format=raw,overlay=ov", "as vmdk, not of"),
        ("vm=vm.vmdk,format=vmdk,mode=rw", "is a vmdk image, which is only read"),
        ("vm=vm.vmdk,format=vmdk,mode=ro,passthrough", "not a raw file"),
        ("vm=vm.vmdk,format=vmdk,overlay=new,reflink", "vmdk"),
        ("vm=vm.vmdk,format=vmdk,direct", "raw"),
    ] {
        let output = lab.cowslip(&format!("mount m {spec}"));
        let code = output.status.code().unwrap();
        let line = one_line(code, &output, spec);
        assert!(matches!(code, 1 | 2) && line.contains(what), "{line}");
    }
    let line = lab.refused(1, "commit ov");
    assert!(line.contains("vmdk image, which is only read"), "{line}");

    // A copy is the same image at another place; a changed one is not.
    lab.sh("cp vm.vmdk moved.vmdk; qemu-img convert -f raw -O vmdk base.img other.vmdk
        qemu-io -f vmdk -c 'write -P 7 1M 4M' other.vmdk");
    let line = lab.refused(1, "rebase ov --base other.vmdk");
    assert!(line.contains("is not the base"), "{line}");
    lab.ok("rebase ov --base moved.vmdk");
    lab.mount("vm=moved.vmdk,format=vmdk,overlay=ov");
    assert_eq!(lab.sh("cat m/vm | md5sum"), changed);
    lab.umount();
    lab.sh("qemu-io -f vmdk -c 'write -P 7 1M 4K' moved.vmdk");
    let line = lab.refused(1, "mount m vm=moved.vmdk,format=vmdk,overlay=ov");
    assert!(line.contains("does not fit its base"), "{line}");
}

#[test]
fn random_changes_over_an_image_are_those_of_a_file() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    random::model(&lab, "base.img", "d=vm.vmdk,format=vmdk,overlay=o");
}

#[test]
fn a_store_starts_the_program_again() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vhdx base.img vm.vhdx");
    lab.mount("vm=vm.vhdx,format=vhdx,overlay=st --store st");
    lab.ok("snapshot m/vm one");
    lab.open("m/vm").write_all_at(b"kept", 4 * MIB).unwrap();
    let want = lab.sh("cat m/vm | md5sum");
    lab.umount();
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/vm | md5sum"), want);
    lab.sh("cmp m/.cowslip/vm/snapshots/one base.img");
    lab.sh("cp --reflink=always m/vm m/clone 2>/dev/null || cp m/vm m/clone");
    assert_eq!(programs(&lab).len(), 1);
    assert_eq!(lab.disk("vm")["format"], "vhdx");
    lab.umount();
}

#[test]
fn a_disk_needs_no_program_once_it_is_hydrated() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    lab.mount("vm=vm.vmdk,format=vmdk,overlay=ov");
    lab.ok("hydrate m/vm");
    lab.sh("cmp m/vm base.img");
    lab.umount();
    lab.mount("vm=blank:8M,overlay=ov");
    lab.sh("cmp m/vm base.img");
    assert!(programs(&lab).is_empty());
    assert!(lab.disk("vm").get("format").is_none());
    lab.umount();
}

#[test]
fn disks_of_one_image_share_one_program() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("parted -s base.img mklabel gpt mkpart a 1MiB 3MiB mkpart b 4MiB 7MiB");
    lab.watch("base.img");
    lab.sh("qemu-img convert -f raw -O vdi base.img vm.vdi; cp vm.vdi other.vdi");
    lab.mount(
        "a=vm.vdi,format=vdi b=vm.vdi,format=vdi,mode=ro p=vm.vdi,format=vdi,partition=2,overlay=ov \
         w=vm.vdi,format=vdi,partitions c=other.vdi,format=vdi",
    );
    assert_eq!(programs(&lab).len(), 2);
    lab.sh("cmp m/a base.img; cmp m/b base.img; cmp m/c base.img
        tail -c +4194305 base.img | cmp -n 3145728 - m/p; cmp m/w.p2 m/p");
    for name in ["a", "b", "w", "p"] {
        lab.ok(&format!("remove m/{name}"));
    }
    assert_eq!(programs(&lab).len(), 1);
    lab.ok("add m again=vm.vdi,format=vdi");
    lab.sh("cmp m/again base.img");
    assert_eq!(programs(&lab).len(), 2);
    lab.umount();
}

#[test]
fn a_device_with_an_image_is_read() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    let device = lab.loop_device("vm.vmdk", "");
    lab.mount(&format!("d={device},format=vmdk,mode=ro"));
    lab.sh("cmp m/d base.img");
    assert_eq!(runs(&lab, "-f raw m/d"), runs(&lab, "-f vmdk vm.vmdk"));
    lab.umount();
}

#[test]
fn what_an_image_names_is_read_only_where_it_is_allowed() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("mkdir a b
        qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat base.img a/flat.vmdk
        qemu-img convert -f raw -O vmdk -o subformat=twoGbMaxExtentFlat base.img a/many.vmdk
        qemu-img convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse base.img a/split.vmdk
        cp base.img b/raw.img
        qemu-img create -q -f qed -b ../b/raw.img -F raw a/back.qed
        qemu-img convert -f raw -O vmdk base.img b/below.vmdk
        qemu-img create -q -f vmdk -b ../b/below.vmdk -F vmdk a/back.vmdk");
    let dir = lab.dir().canonicalize().unwrap();
    let dir = dir.display();
    for (image, format, named) in [
        ("a/flat.vmdk", "vmdk", "a/flat-flat.vmdk"),
        ("a/many.vmdk", "vmdk", "a/many-f001.vmdk"),
        ("a/split.vmdk", "vmdk", "a/split-s001.vmdk"),
        ("a/back.qed", "qed", "a/../b/raw.img"),
        ("a/back.vmdk", "vmdk", "a/../b/below.vmdk"),
    ] {
        let line = lab.refused(1, &format!("mount m d={image},format={format}"));
        let in_dir = named.rsplit_once('/').unwrap().0;
        assert!(line.contains(&format!("needs '{dir}/{named}'")), "{line}");
        assert!(line.contains(&format!("--allow-backing '{dir}/{in_dir}'")), "{line}");
        // Another directory is no help; the right one is.
        let line = lab.refused(1, &format!("mount m d={image},format={format} --allow-backing m"));
        assert!(line.contains("--allow-backing"), "{line}");
        let allowed = if named.contains("/../") { "b" } else { "a" };
        lab.mount(&format!("d={image},format={format},overlay=ov --allow-backing {allowed}"));
        assert_same_as_qemu(&lab, "d", format, image);
        lab.umount();
        // What it needs is recorded, as the backing file of a qcow2 image is.
        let real = fs::canonicalize(lab.path(named)).unwrap();
        let said = lab.ok("check ov");
        assert!(said.contains(&real.display().to_string()), "{said}");
        let saved = fs::read(&real).unwrap();
        fs::write(&real, [&saved[..], b"more"].concat()).unwrap();
        let again =
            format!("mount m d={image},format={format},overlay=ov --allow-backing {allowed}");
        let line = lab.refused(1, &again);
        assert!(line.contains("its backing file") || line.contains("needs"), "{line}");
        fs::write(&real, saved).unwrap();
        lab.sh("rm -r ov");
    }
    // A configuration allows it as well.
    fs::write(
        lab.path("c.toml"),
        "allow-backing = [\"a\"]\n[[disk]]\nname = \"d\"\nsource = \"a/flat.vmdk\"\nformat = \"vmdk\"\n",
    )
    .unwrap();
    lab.mount("--config c.toml");
    lab.sh("cmp m/d base.img");
    lab.umount();
}

/// A descriptor of VMDK that shows `sectors` sectors of the file `named`.
fn descriptor(named: &str, sectors: u64) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
         RW {sectors} FLAT \"{named}\" 0\n"
    )
}

#[test]
fn an_image_that_names_secrets_gets_none() {
    let lab = Lab::new();
    lab.sh("mkdir images private; chmod 700 private; ln -s ../private images/link");
    let secret = lab.path("private/secret");
    fs::write(&secret, noise(4096, 1)).unwrap();
    fs::write(lab.path("images/beside"), noise(4096, 2)).unwrap();
    let absolute = secret.display().to_string();
    let names = [
        absolute.as_str(),
        "/etc/shadow",
        "../private/secret",
        "link/secret",
        "/proc/self/environ",
        "/proc/1/environ",
        "/dev/mem",
        "/proc/self/fd/3",
    ];
    for name in names {
        fs::write(lab.path("images/d.vmdk"), descriptor(name, 8)).unwrap();
        for allowed in ["", " --allow-backing images"] {
            let line = lab.refused(1, &format!("mount m d=images/d.vmdk,format=vmdk{allowed}"));
            assert!(line.contains("images/d.vmdk"), "{line}");
        }
    }
    // Protocols, and images that are described instead of named.
    for (number, name) in [
        "nbd://127.0.0.1:1/x",
        "nbd:unix:/run/x",
        "json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}",
        "fat:/etc",
        "blkdebug::/etc/shadow",
        "ssh://127.0.0.1/etc/shadow",
        "https://127.0.0.1/x",
        "host_device:/dev/sda",
    ]
    .into_iter()
    .enumerate()
    {
        let image = format!("images/{number}.qed");
        let words = ["create", "-q", "-u", "-f", "qed", "-b", name, "-F", "raw", &image, "1M"];
        let made = lab.output("qemu-img", &words);
        assert!(made.status.success(), "{name}: {}", show(&made));
        for allowed in ["", " --allow-backing images"] {
            let line = lab.refused(1, &format!("mount m d={image},format=qed{allowed}"));
            assert!(line.contains(&image), "{line}");
        }
    }
    let names = fs::read_dir(lab.path("images")).unwrap().count();
    assert_eq!(names, 2 + 1 + 8);
}

#[test]
fn images_that_never_end_are_refused_in_time() {
    let lab = Lab::new();
    // An image that is its own backing file, and a chain of two.
    lab.sh("qemu-img create -q -u -f qed -b own.qed -F qed x.qed 1M; mv x.qed own.qed
        qemu-img create -q -u -f qed -b two.qed -F qed one.qed 1M
        qemu-img create -q -u -f qed -b one.qed -F qed two.qed 1M");
    for name in ["own.qed", "one.qed"] {
        let began = Instant::now();
        let line = lab.refused(1, &format!("mount m d={name},format=qed --allow-backing ."));
        assert!(line.contains(name), "{line}");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    }
}

#[test]
fn damaged_images_are_refused_in_one_line() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 4 * MIB);
    for format in ["vmdk", "vhdx", "vpc", "vdi", "qed", "parallels", "qcow"] {
        let image = format!("d.{format}");
        lab.sh(&format!("qemu-img convert -f raw -O {format} base.img {image}"));
        let good = fs::read(lab.path(&image)).unwrap();
        for (what, bytes) in [
            ("empty", Vec::new()),
            ("cut", good[..20].to_vec()),
            ("another file", noise(1 << 20, 3)),
            ("a header of ones", [&[0xff; 4096][..], &good[4096..]].concat()),
        ] {
            fs::write(lab.path(&image), bytes).unwrap();
            let output = lab.cowslip(&format!("mount m d={image},format={format},mode=ro"));
            // A dynamic VHD has its header at the end as well.
            if output.status.success() {
                assert_eq!((format, what), ("vpc", "a header of ones"));
                lab.umount();
                continue;
            }
            let line = one_line(1, &output, what);
            assert!(
                line.contains(&format!("d.{format}' cannot be read as a {format} image: ")),
                "{line}"
            );
        }
    }
}

#[test]
fn a_program_that_dies_is_started_again() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    lab.mount("d=vm.vmdk,format=vmdk,mode=ro --cache none -o io_timeout=5");
    let read_all = || lab.sh("cmp m/d base.img");
    for _ in 0..3 {
        let first = programs(&lab);
        signal(first[0], Signal::KILL).unwrap();
        read_all();
        assert_ne!(programs(&lab), first);
    }
    assert!(lab.log().contains("was lost"), "{}", lab.log());
    // It goes with the daemon, however that ends.
    let last = programs(&lab)[0];
    lab.kill();
    wait_until("the program ends", || !is_alive(last));
    lab.cowslip("umount m");
}

#[test]
fn a_program_that_hangs_is_ended() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    lab.mount("d=vm.vmdk,format=vmdk,mode=ro --cache none -o io_timeout=2");
    let hung = programs(&lab)[0];
    signal(hung, Signal::STOP).unwrap();
    let file = lab.open_ro("m/d");
    assert_eq!(errno_of(file.read_at(&mut [0; 4096], 0)), libc::EIO);
    wait_until("another program is there", || file.read_at(&mut [0; 4096], 0).is_ok());
    assert!(!is_alive(hung));
    lab.sh("cmp m/d base.img");
    drop(file);
    lab.umount();
}

#[test]
fn an_image_that_is_changed_below_the_mount_is_not_read_any_more() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    lab.mount("d=vm.vmdk,format=vmdk,mode=ro --cache none -o io_timeout=2");
    // A new name is no other file.
    lab.sh("mv vm.vmdk moved.vmdk; echo garbage > vm.vmdk");
    signal(programs(&lab)[0], Signal::KILL).unwrap();
    lab.sh("cmp m/d base.img");
    lab.sh("truncate -s 70000 moved.vmdk");
    signal(programs(&lab)[0], Signal::KILL).unwrap();
    let file = lab.open_ro("m/d");
    let failed = errno_of(file.read_at(&mut [0; 4096], 3 * MIB));
    assert_eq!(failed, libc::EIO);
    let log = lab.log();
    assert!(log.contains("vm.vmdk"), "{log}");
    drop(file);
    lab.umount();
}

#[test]
fn the_program_has_the_image_and_nothing_else() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk; echo x > held");
    // Neither open files nor the environment of who mounts are for it.
    let held = lab.path("held").display().to_string();
    let script = "exec 9<\"$1\"; SECRET=word exec \"$COWSLIP\" mount m d=vm.vmdk,format=vmdk";
    let mounted = lab.output("sh", &["-c", script, "sh", &held]);
    assert!(mounted.status.success(), "{}", show(&mounted));
    let program = programs(&lab)[0];
    let proc = |name: &str| format!("/proc/{program}/{name}");
    let image = fs::metadata(lab.path("vm.vmdk")).unwrap();
    for entry in fs::read_dir(proc("fd")).unwrap().flatten() {
        let Ok(found) = fs::metadata(entry.path()) else { continue };
        let is_image = (found.dev(), found.ino()) == (image.dev(), image.ino());
        let to = fs::read_link(entry.path()).unwrap().display().to_string();
        let is_own = ["socket:", "pipe:", "anon_inode:", "/dev/null"].iter();
        assert!(is_image || is_own.clone().any(|start| to.starts_with(start)), "{to}");
    }
    let environment = String::from_utf8(fs::read(proc("environ")).unwrap()).unwrap();
    let mut names: Vec<_> = environment
        .split('\0')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, _)| name)
        .filter(|name| !matches!(*name, "PWD" | "OLDPWD" | "SHLVL" | "_"))
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["LC_ALL", "LISTEN_FDS", "LISTEN_PID", "MALLOC_ARENA_MAX", "PATH"]);
    let status = fs::read_to_string(proc("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
    // CAP_DAC_READ_SEARCH alone.
    assert_eq!(field("CapPrm:"), "0000000000000004");
    let limits = fs::read_to_string(proc("limits")).unwrap();
    for (limit, most) in [
        ("Max file size", 0u64),
        ("Max data size", 1 << 30),
        ("Max address space", 3 << 29),
        ("Max stack size", 2 << 20),
        ("Max open files", 1100),
    ] {
        let line = limits.lines().find(|line| line.starts_with(limit)).unwrap();
        let most = most.to_string();
        let found: Vec<_> = line[limit.len()..].split_whitespace().take(2).collect();
        assert_eq!(found, [most.as_str(), most.as_str()], "{line}");
    }
    lab.umount();
}

#[test]
fn other_users_mount_their_images_too() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("chmod 755 .; mkdir u; mknod fuse c 10 229; chmod 666 fuse
        qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat base.img u/vm.vmdk
        mkdir u/m; chown -R nobody u; chmod 600 u/vm*");
    // Where users may open /dev/fuse, whatever the host allows.
    let script = "mount --bind fuse /dev/fuse; cd u
        as() { setpriv --reuid=nobody --regid=nogroup --clear-groups \"$@\"; }
        as \"$COWSLIP\" mount m d=vm.vmdk,format=vmdk,mode=ro --allow-backing .
        trap 'umount -l m' EXIT
        as cmp -n 4194304 m/d vm-flat.vmdk";
    let output = lab.output("unshare", &["-m", "sh", "-euc", script]);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh("cmp base.img u/vm-flat.vmdk");
}

#[test]
fn many_readers_at_a_time_get_the_right_bytes() {
    let lab = Lab::new();
    fs::write(lab.path("base.img"), noise(32 * MIB, 9)).unwrap();
    lab.sh("qemu-img convert -c -f raw -O vmdk -o subformat=streamOptimized base.img vm.vmdk");
    lab.mount("d=vm.vmdk,format=vmdk,mode=ro --cache none");
    let want = fs::read(lab.path("base.img")).unwrap();
    thread::scope(|scope| {
        for seed in 0..16_u64 {
            let (lab, want) = (&lab, &want);
            scope.spawn(move || {
                let file = lab.open_ro("m/d");
                for step in 0..60_u64 {
                    let at = (seed * 7919 + step * 104_729 * 511) % (31 * MIB);
                    let len = 1 + (step * 4093 + seed) % 300_000;
                    let got = read(&file, at, len);
                    assert!(got == want[at as usize..(at + len) as usize], "{at} {len}");
                }
            });
        }
    });
    lab.umount();
}

#[test]
fn a_host_without_the_program_or_without_landlock_says_so() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk; : > nothing");
    // In a mount namespace of its own, which ends with the command.
    let hidden = "mount --bind nothing \"$(realpath \"$(command -v qemu-nbd)\")\"
        exec \"$COWSLIP\" mount m d=vm.vmdk,format=vmdk";
    let output = lab.output("unshare", &["-m", "sh", "-euc", hidden]);
    let line = one_line(1, &output, "without qemu-nbd");
    assert!(line.contains("install qemu-utils"), "{line}");
    assert!(line.contains("qemu-img convert -f vmdk -O raw "), "{line}");
    // landlock_create_ruleset(2) is 444 everywhere; the filter answers EOPNOTSUPP.
    let without_landlock = r#"
import ctypes, os, struct
code = b"".join(struct.pack("HBBI", *one) for one in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x0005005f), (0x06, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(code)
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(buffer))
assert ctypes.CDLL(None).prctl(22, 2, ctypes.byref(program)) == 0
os.execv(os.environ["COWSLIP"], ["cowslip", "mount", "m", "d=vm.vmdk,format=vmdk"])
"#;
    let output = lab.output("python3", &["-c", without_landlock]);
    let line = one_line(1, &output, "without Landlock");
    assert!(line.contains("has no Landlock") && line.contains("qemu-img convert"), "{line}");
}

#[test]
fn an_image_on_a_server_is_read_by_a_server() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O vmdk base.img vm.vmdk");
    let path = lab.path("vm.vmdk").display().to_string();
    let disk = |format: &str| format!("d=nbd+exec:qemu-nbd -r -f {format} {path}");
    let output = lab.output(COWSLIP, &["mount", "m", &(disk("raw") + ",format=vmdk")]);
    let line = one_line(1, &output, "on a server");
    assert!(line.contains("let qemu-nbd -r -f vmdk be the server"), "{line}");
    let output = lab.output(COWSLIP, &["mount", "m", &disk("vmdk")]);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh("cmp m/d base.img");
    lab.umount();
}
