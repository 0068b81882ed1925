//! Files made by others: overlays, stores and configurations that refer elsewhere, are not what
//! they seem, or belong to another user.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::Path;

use crate::common::mount::*;

/// The id of a user other than root.
const OTHER: u32 = 12345;

/// Gives `path` and everything below it to the user `uid`.
fn give(path: &Path, uid: u32) {
    let owner = format!("{uid}:{uid}");
    let done = std::process::Command::new("chown").args(["-hR", &owner]).arg(path).status();
    assert!(done.unwrap().success());
}

/// Writes `body` after a line with its checksum, the format of `stack` and `intent`.
fn write_checked(path: &Path, body: &str) {
    let crc = crc32c::crc32c(body.as_bytes());
    fs::write(path, format!("checksum = \"crc32c:{crc:08x}\"\n{body}")).unwrap();
}

/// Replaces `old` with `new` in the `stack` of an overlay, with a valid checksum.
fn forge(stack: &Path, old: &str, new: &str) {
    let text = fs::read_to_string(stack).unwrap();
    let body = text.split_once('\n').unwrap().1;
    assert!(body.contains(old), "{body}");
    write_checked(stack, &body.replace(old, new));
}

/// Creates a closed overlay `o` of the disk `d` over `base.img`, with some data in it.
fn overlay(lab: &mut Lab, keys: &str) {
    lab.base("base.img", MIB);
    lab.mount(&format!("d=base.img,overlay=o{keys}"));
    lab.sh("yes changed | head -c 8192 | dd of=m/d conv=notrunc status=none");
    lab.umount();
}

/// Runs every command that opens the overlay `o`; each must fail with output that contains `why`.
#[track_caller]
fn refused_by_all(lab: &Lab, why: &str) {
    for words in [
        "mount m d=base.img,overlay=o",
        "check o",
        "check o --repair",
        "commit o",
        "rebase o --base base.img",
    ] {
        let output = lab.cowslip(words);
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(!output.status.success(), "{words}: {text}");
        assert!(text.contains(why), "{words}: {text}");
    }
}

#[test]
fn directory_without_a_marker_is_no_store_and_is_not_swept() {
    let lab = Lab::new();
    // Unrelated data in directories that have the names of a store's directories.
    lab.sh("mkdir -p gis/names gis/layers/roads; echo 1 > gis/layers/roads/data.shp");
    lab.sh("cp -a gis all; mkdir all/disks");
    for dir in ["gis", "all"] {
        for words in ["mount m --store", "check", "check --repair"] {
            let line = lab.refused(1, &format!("{words} {dir}"));
            assert!(line.contains("is no store"), "{line}");
        }
        assert_eq!(lab.sh(&format!("cat {dir}/layers/roads/data.shp")), "1\n");
    }
}

#[test]
fn unknown_files_in_a_store_are_kept() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo kept > m/a");
    lab.umount();
    let layer = "st/layers/00000000-0000-4000-8000-000000000001";
    let disk = "st/disks/00000000-0000-4000-8000-000000000002";
    lab.sh(&format!(
        "mkdir -p st/layers/homedir {layer} {disk}; echo 1 > st/layers/homedir/x
         echo 1 > {layer}/thesis; touch {layer}/data {layer}/log; echo 1 > {disk}/letters; echo 1 > st/disks/file"
    ));
    let said = lab.ok("check st --repair");
    for name in ["homedir", "thesis", "letters", "disks/file"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/a"), "kept\n");
    assert!(lab.log().contains("is left alone"), "{}", lab.log());
    lab.umount();
    lab.sh(&format!(
        "cat st/layers/homedir/x {layer}/thesis {disk}/letters st/disks/file; ls {layer}/data"
    ));
    // Files left by a crash are still swept.
    lab.sh(&format!("rm {layer}/thesis {disk}/letters; mkdir st/disks/.cowslip-abcdef"));
    lab.mount("--store st");
    lab.umount();
    lab.sh(&format!("[ ! -e {layer} ]; [ ! -e {disk} ]; [ ! -e st/disks/.cowslip-abcdef ]"));
}

#[test]
fn store_with_linked_directories_is_rejected() {
    let lab = Lab::new();
    for name in ["disks", "layers", "names"] {
        lab.sh("mkdir -p home/dir; echo 1 > home/dir/file; rm -rf st");
        lab.mount("--store st");
        lab.umount();
        lab.sh(&format!("rmdir st/{name}"));
        symlink(lab.path("home"), lab.path("st").join(name)).unwrap();
        for marker in ["", "rm -f st/store"] {
            lab.sh(marker);
            for words in ["mount m --store st", "check st", "check st --repair"] {
                // Without its marker the directory is not a store at all.
                lab.refused(1, words);
            }
        }
        assert_eq!(lab.sh("cat home/dir/file"), "1\n");
    }
}

#[test]
fn store_from_before_markers_is_accepted() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo kept > m/a");
    lab.umount();
    lab.sh("rm st/store");
    lab.ok("check st");
    assert!(!lab.path("st/store").exists(), "check changes nothing");
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/a"), "kept\n");
    lab.umount();
    assert_eq!(lab.sh("cat st/store"), "version = 1\n");
    lab.sh("echo 'version = 2' > st/store");
    assert!(lab.refused(1, "mount m --store st").contains("use a newer cowslip"));
}

#[test]
fn interrupted_revert_resolves_only_to_a_snapshot() {
    let mut lab = Lab::new();
    lab.host("x", "xfs", 400 * MIB);
    lab.sh("head -c 1M /dev/urandom > x/base; yes secret | head -c 1M > x/secret; mkdir x/other; cp x/secret x/other/");
    lab.mount("d=x/base,overlay=x/o,reflink");
    lab.umount();
    lab.watch("x/o/data");
    let secret = lab.path("x/secret").display().to_string();
    symlink(&secret, lab.path("x/o/snapshots/link")).unwrap();
    for name in [&*secret, "../../secret", "..", "", "link"] {
        write_checked(
            &lab.path("x/o/intent"),
            &format!("from = \"snapshot\"\nname = \"{name}\"\n"),
        );
        let line = lab.refused(1, "mount m d=x/base,overlay=x/o");
        assert!(line.contains("intent") || line.contains("revert"), "{line}");
    }
}

#[test]
fn root_rejects_an_overlay_that_another_user_can_write() {
    let mut lab = Lab::new();
    overlay(&mut lab, "");
    give(&lab.path("o"), OTHER);
    refused_by_all(&lab, "uid 12345");
    lab.ok("check o --trust o");
    assert!(lab.mount("d=base.img,overlay=o --trust o").contains("overlay"));
    lab.umount();
    // The same if only a parent directory is another user's, and for a new overlay.
    give(&lab.path("o"), 0);
    lab.sh("mkdir home; mv o home/; ln -s home/o o");
    chown(lab.path("home"), Some(OTHER), None).unwrap();
    refused_by_all(&lab, "uid 12345");
    assert!(lab.refused(1, "mount m d=base.img,overlay=home/new").contains("uid 12345"));
    lab.ok("check o --trust home");
    // The same if every user can write to the directory.
    chown(lab.path("home"), Some(0), None).unwrap();
    lab.sh("chmod 777 home/o");
    refused_by_all(&lab, "can be written by every user");
}

#[test]
fn root_rejects_a_store_or_config_of_another_user() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo text > m/a");
    lab.umount();
    give(&lab.path("st"), OTHER);
    for words in ["mount m --store st", "check st", "check st --repair", "check st/names/a"] {
        assert!(lab.refused(1, words).contains("uid 12345"), "{words}");
    }
    fs::write(lab.path("a.toml"), "mountpoint = \"m\"\nstore = \"st\"\n").unwrap();
    give(&lab.path("a.toml"), OTHER);
    assert!(lab.refused(1, "mount --config a.toml").contains("uid 12345"));
    give(&lab.path("a.toml"), 0);
    assert!(lab.refused(1, "mount --config a.toml").contains("uid 12345"));
    fs::write(lab.path("a.toml"), "mountpoint = \"m\"\nstore = \"st\"\ntrust = \"st\"\n").unwrap();
    lab.ok("mount --config a.toml");
    assert_eq!(lab.sh("cat m/a"), "text\n");
    lab.umount();
    lab.sh("chmod 666 a.toml");
    assert!(lab.refused(1, "mount --config a.toml").contains("every user"));
}

#[test]
fn add_and_keep_reject_a_directory_of_another_user() {
    let mut lab = Lab::new();
    overlay(&mut lab, "");
    lab.mount("e=base.img");
    lab.sh("mkdir home; mv o home/");
    give(&lab.path("home"), OTHER);
    assert!(lab.refused(1, "add m d=base.img,overlay=home/o").contains("uid 12345"));
    assert!(lab.refused(1, "keep m/e home/new").contains("uid 12345"));
    lab.ok("add m d=base.img,overlay=home/o --trust home");
    lab.ok("keep m/e home/new --trust home");
}

#[test]
fn interrupted_commit_is_finished_only_in_the_same_file() {
    let mut lab = Lab::new();
    lab.sh("head -c 1M /dev/zero > base.img");
    lab.mount("d=base.img,overlay=o");
    lab.sh("yes evil | head -c 1M | dd of=m/d conv=notrunc status=none");
    lab.umount();
    // Killed before the first byte is copied: the log records that a commit has begun.
    lab.sh("strace -f -qq -e trace=copy_file_range -e inject=copy_file_range:signal=KILL:when=1 -o trace $COWSLIP commit o || true");
    let said = String::from_utf8(lab.cowslip("check o").stdout).unwrap();
    assert!(said.contains("a commit into it was cut short"), "{said}");
    lab.sh("cp base.img victim; cp -p base.img copy");
    lab.watch("victim");
    // A forged base path, and a replaced base: other files under the name.
    let base = lab.path("base.img").display().to_string();
    let stack = lab.path("o/stack");
    forge(&stack, &base, &lab.path("victim").display().to_string());
    assert!(lab.refused(1, "commit o").contains("inode"));
    forge(&stack, &lab.path("victim").display().to_string(), &base);
    lab.sh("mv base.img old; cp -p old base.img");
    for words in ["commit o", "rebase o --base base.img"] {
        let line = lab.refused(1, words);
        assert!(line.contains("inode") || line.contains("modified"), "{words}: {line}");
    }
    // The same file under another name is accepted, and the output names it.
    lab.ok("rebase o --base old");
    let said = lab.ok("commit o");
    assert!(said.contains("/old'"), "{said}");
    assert_eq!(lab.sh("head -c 5 old; cmp old base.img | wc -l"), "evil\n1\n");
}

#[test]
fn special_files_in_an_overlay_are_rejected_without_blocking() {
    let mut lab = Lab::new();
    overlay(&mut lab, "");
    lab.sh("cp -a o good; layer=$(echo o/layers/*); echo $layer > layer");
    let layer = lab.sh("cat layer").trim().to_owned();
    for name in ["stack", "layers", &layer, &format!("{layer}/data"), &format!("{layer}/log")] {
        let name = name.replacen("o/", "", 1);
        for make in ["mkfifo", "mkdir -p", "ln -s /etc/passwd", "mknod -m 600"] {
            let more = if make.starts_with("mknod") { "c 1 5" } else { "" };
            let is_dir = name.matches('/').count() == 1 || name == "layers";
            if is_dir && make == "mkdir -p" {
                continue;
            }
            lab.sh(&format!("rm -rf o; cp -a good o; rm -rf o/{name}"));
            lab.sh(&match make {
                "ln -s /etc/passwd" => format!("ln -s /etc/passwd o/{name}"),
                make => format!("{make} o/{name} {more}"),
            });
            for words in ["mount m d=base.img,overlay=o", "check o", "check o --repair", "commit o"]
            {
                let output = lab.cowslip(words);
                assert!(!output.status.success(), "{words} with {make} {name}: {}", show(&output));
            }
        }
    }
    // The `holder` file is only informative: an invalid one is ignored, and removed by a repair.
    for make in ["mkfifo", "mkdir", "ln -s /etc/passwd"] {
        lab.sh(&format!("rm -rf o; cp -a good o; {make} o/holder"));
        lab.cowslip("check o --repair");
        lab.mount("d=base.img,overlay=o");
        lab.umount();
    }
    assert!(fs::metadata("/etc/passwd").unwrap().len() > 0);
}

#[test]
fn new_overlays_and_stores_are_private_to_the_user() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.sh("umask 000; $COWSLIP mount m d=base.img,overlay=o --store st; echo 1 > m/a; $COWSLIP umount m");
    let private = |path: &Path| {
        let found = fs::symlink_metadata(path).unwrap();
        let is_private = found.file_type().is_symlink() || found.mode() & 0o077 == 0;
        assert!(is_private, "{}: {:o}", path.display(), found.mode());
    };
    for dir in ["o", "st"] {
        let all = lab.sh(&format!("find {dir}"));
        all.lines().for_each(|path| private(&lab.path(path)));
    }
}

#[test]
fn leftovers_of_a_killed_mount_are_removed_by_a_later_mount() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    // Killed while the overlay is created, so that nothing is cleaned up.
    lab.sh("strace -f -qq -o trace -e trace=rename,renameat,renameat2 -e inject=rename,renameat,renameat2:signal=KILL:when=2 $COWSLIP mount m d=base.img,overlay=o || true");
    let left = || lab.sh("ls -A | grep -c '^.cowslip-' || true").trim().to_owned();
    assert_eq!((left().as_str(), lab.path("o").exists()), ("1", false));
    // Recent leftovers may still be in use by a running command.
    lab.mount("d=base.img,overlay=o");
    assert_eq!(left(), "1");
    lab.umount();
    lab.sh("touch -d '1 hour ago' .cowslip-*; mkdir .cowslip-other; echo 1 > .cowslip-other/thesis; touch -d '1 hour ago' .cowslip-other");
    lab.mount("d=base.img,overlay=o2");
    assert_eq!(
        lab.sh("ls -A | grep '^.cowslip-'; cat .cowslip-other/thesis"),
        ".cowslip-other\n1\n"
    );
}

#[test]
fn commit_does_not_follow_a_link_that_replaced_its_base() {
    let mut lab = Lab::new();
    lab.sh("head -c 1M /dev/zero > base.img; cp -p base.img victim");
    lab.watch("victim");
    lab.mount("d=base.img,overlay=o");
    lab.sh("yes evil | head -c 1M | dd of=m/d conv=notrunc status=none");
    lab.umount();
    // The same bytes and times: only the file differs.
    lab.sh("mv base.img kept; ln -s victim base.img");
    let line = lab.refused(1, "commit o");
    assert!(line.contains("/victim' by now"), "{line}");
    lab.mount("d=base.img,overlay=o");
    assert!(lab.refused(1, "commit m/d").contains("/victim' by now"));
    lab.umount();
    // An interrupted commit does not follow the link either.
    lab.sh("rm base.img; mv kept base.img");
    lab.sh("strace -f -qq -e trace=copy_file_range -e inject=copy_file_range:signal=KILL:when=1 -o trace $COWSLIP commit o || true");
    lab.sh("mv base.img kept; ln -s victim base.img");
    let line = lab.refused(1, "commit o");
    assert!(line.contains("/victim' by now") || line.contains("inode"), "{line}");
    lab.sh("rm base.img; mv kept base.img");
    lab.ok("commit o");
    assert_eq!(lab.sh("head -c 5 base.img"), "evil\n");
}

#[test]
fn interrupted_commit_is_not_finished_on_another_device() {
    let mut lab = Lab::new();
    lab.sh("truncate -s 4M one; truncate -s 4M two");
    lab.watch("two");
    let device = lab.loop_device("one", "");
    lab.mount(&format!("d={device},overlay=o"));
    lab.sh("yes evil | head -c 1M | dd of=m/d conv=notrunc status=none");
    lab.umount();
    let calls = "pwrite64,pwritev,copy_file_range";
    lab.sh(&format!(
        "strace -f -qq -P {device} -e trace={calls} -e inject={calls}:signal=KILL:when=1 -o trace $COWSLIP commit o || true"
    ));
    let said = String::from_utf8(lab.cowslip("check o").stdout).unwrap();
    assert!(said.contains("a commit into it was cut short"), "{said}");
    lab.sh(&format!("losetup -d {device}; losetup {device} two"));
    let line = lab.refused(1, "commit o");
    assert!(line.contains("backing_file"), "{line}");
    lab.sh(&format!("losetup -d {device}; losetup {device} one"));
    lab.ok("commit o");
    lab.sh(&format!("losetup -d {device}"));
    assert_eq!(lab.sh("head -c 5 one"), "evil\n");
}

#[test]
fn retargeted_link_does_not_redirect_an_open_store() {
    let lab = Lab::new();
    lab.sh("mkdir good bad; ln -s good way");
    lab.mount("--store way/st");
    lab.sh("ln -sfn bad way; mkdir -p bad/st/disks bad/st/layers bad/st/names; echo 1 > m/a; rm m/a; echo 2 > m/b");
    assert_eq!(lab.sh("find bad -type f"), "");
    lab.umount();
    lab.sh("ln -sfn good way");
    lab.mount("--store way/st");
    assert_eq!(lab.sh("cat m/b"), "2\n");
}

#[test]
fn trust_applies_only_to_the_named_directory() {
    let mut lab = Lab::new();
    overlay(&mut lab, "");
    lab.sh("mkdir home; mv o home/; ln -s / home/way");
    give(&lab.path("home"), OTHER);
    let line = lab.refused(1, "check home/o --trust home/way");
    assert!(line.contains("links lead from there to '/'"), "{line}");
    lab.ok("check home/o --trust home");
}

#[test]
fn disk_is_no_more_readable_than_its_base_files() {
    let lab = Lab::new();
    lab.sh("
        head -c 1M /dev/urandom > b.raw; chmod 600 b.raw
        qemu-img create -q -f qcow2 -b b.raw -F raw i.qcow2; chmod 644 i.qcow2
        head -c 1M /dev/urandom > open.raw; chmod 644 open.raw
    ");
    lab.mount("i=i.qcow2,format=qcow2 o=open.raw");
    let mode = |name: &str| fs::metadata(lab.path(name)).unwrap().mode() & 0o777;
    assert_eq!((mode("m/i"), mode("m/o")), (0o600, 0o644));
}

#[test]
fn pipe_of_another_user_is_rejected_as_a_sink() {
    let lab = Lab::new();
    lab.sh("mkfifo pipe");
    give(&lab.path("pipe"), OTHER);
    let line = lab.refused(1, "mount m o=stream:1M,to=fifo:pipe");
    assert!(line.contains("a named pipe of another user"), "{line}");
}

#[test]
fn received_file_does_not_inherit_set_id_bits() {
    let lab = Lab::new();
    lab.sh("head -c 1M /dev/urandom > a; echo 1 > program; chmod 4755 program");
    lab.sh("$COWSLIP send a | $COWSLIP recv program --overwrite");
    assert_eq!(fs::metadata(lab.path("program")).unwrap().mode() & 0o7777, 0o755);
}

/// A process in a mount namespace of its own, in which it runs `lines`, and then waits.
fn in_own_namespace(lab: &Lab, lines: &str) -> Running {
    let mut command = lab.command("unshare");
    command.args(["-m", "sh", "-euc", &format!("{lines}\ntouch ready; exec sleep 1000")]);
    let running = Running(command.spawn().unwrap());
    wait_until("the namespace is ready", || lab.path("ready").exists());
    running
}

#[test]
fn another_mount_namespace_is_not_trusted() {
    let mut lab = Lab::new();
    overlay(&mut lab, "");
    lab.mount("--store st");
    lab.umount();
    lab.sh("mkdir ns; printf 'mountpoint = \"m\"\n[[disk]]\nsource = \"blank:1M\"\n' > a.toml");
    let inside = in_own_namespace(&lab, "mount -t tmpfs t ns; cp -a o st a.toml ns");
    let there = format!("/proc/{}/root{}/ns", inside.pid(), lab.dir().display());
    symlink(there, lab.path("x")).unwrap();
    for words in [
        "mount m d=base.img,overlay=x/o",
        "mount m d=base.img,overlay=x/new",
        "mount m --store x/st",
        "mount --config x/a.toml",
        "check x/o",
    ] {
        let line = lab.refused(1, words);
        assert!(line.contains("another mount namespace"), "{words}: {line}");
    }
    drop(inside);
}

#[test]
fn an_image_of_another_mount_namespace_has_no_directory_of_its_own() {
    let lab = Lab::new();
    lab.sh("mkdir ns; head -c 64K /dev/urandom > secret");
    let inside = in_own_namespace(
        &lab,
        "mount -t tmpfs t ns
         qemu-img create -q -u -f qcow2 -F raw -b $PWD/secret ns/top.qcow2 64K
         exec 9<ns/top.qcow2; umount -l ns",
    );
    symlink(format!("/proc/{}/fd/9", inside.pid()), lab.path("evil.qcow2")).unwrap();
    lab.sh("mkdir home; mv evil.qcow2 home");
    for words in ["mount m v=home/evil.qcow2,format=qcow2", "import home/evil.qcow2 --overlay i"] {
        let line = lab.refused(1, words);
        assert!(line.contains("--allow-backing"), "{words}: {line}");
    }
    drop(inside);
}

#[test]
fn a_backing_file_beside_others_belongs_to_the_owner_of_the_image() {
    let lab = Lab::new();
    lab.sh("mkdir -m 1777 shared; mkdir home; cd shared; truncate -s 64K root.img other.img
            for base in root other; do
                qemu-img create -q -f qcow2 -F raw -b $base.img $base.qcow2
            done
            chmod 600 root.img; chown 12345 other.img *.qcow2; ln -s ../shared/root.qcow2 ../home/x");
    for image in ["shared/root.qcow2", "home/x"] {
        let mount = format!("mount m v={image},format=qcow2");
        for words in [mount, format!("import {image} --overlay i")] {
            let line = lab.refused(1, &words);
            assert!(line.contains("--allow-backing"), "{words}: {line}");
        }
    }
    lab.ok("mount m v=shared/other.qcow2,format=qcow2");
    lab.umount();
    lab.ok("mount m v=shared/root.qcow2,format=qcow2 --allow-backing shared");
    lab.umount();
    lab.sh("chown 0 shared/root.qcow2");
    lab.ok("mount m v=shared/root.qcow2,format=qcow2");
}

#[test]
fn a_clone_has_the_base_of_its_disk_and_no_other() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("--store st v=base.img,overlay=st");
    lab.sh("cp base.img secret; mv base.img old; ln -s secret base.img");
    let line = lab.refused(1, "clone m/v m/c");
    assert!(line.contains("another file is in the place of its base"), "{line}");
    lab.sh("rm base.img; mv old base.img");
    lab.ok("clone m/v m/c");
    lab.sh("cmp m/v m/c");
}

#[test]
fn a_pipe_that_was_replaced_by_another_users_gets_nothing() {
    let lab = Lab::new();
    lab.mount("o=stream:64K,to=fifo:pipe");
    lab.sh("mv pipe old; mkfifo pipe");
    give(&lab.path("pipe"), OTHER);
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK;
    let reader = rustix::fs::open(lab.path("pipe"), flags, rustix::fs::Mode::empty()).unwrap();
    let _ = lab.output("sh", &["-c", "yes secret | head -c 32K > m/o"]);
    let finished = lab.cowslip("finish m/o --timeout 10");
    assert!(!finished.status.success(), "{}", show(&finished));
    let mut bytes = [0; 16];
    assert_eq!(rustix::io::read(&reader, &mut bytes), Err(rustix::io::Errno::AGAIN));
    let output = lab.cowslip("umount m");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("Operation not permitted"),
        "{}",
        show(&output)
    );
}

#[test]
fn a_directory_like_tmp_takes_what_is_new_and_what_is_ones_own() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.sh("mkdir -m 1777 shared");
    lab.mount("d=base.img,overlay=shared/o e=base.img");
    lab.ok("keep m/e shared/kept");
    lab.umount();
    lab.mount("d=base.img,overlay=shared/o e=base.img,overlay=shared/kept");
    lab.umount();
    fs::write(
        lab.path("shared/a.toml"),
        "mountpoint = \"m\"\n[[disk]]\nname = \"b\"\nsource = \"blank:1M\"\n",
    )
    .unwrap();
    let text = fs::read_to_string(lab.path("shared/a.toml")).unwrap();
    let at = lab.path("m").display().to_string();
    fs::write(lab.path("shared/a.toml"), text.replace("\"m\"", &format!("\"{at}\""))).unwrap();
    lab.ok("mount --config shared/a.toml");
    lab.umount();
    give(&lab.path("shared/o"), OTHER);
    assert!(lab.refused(1, "mount m d=base.img,overlay=shared/o").contains("uid 12345"));
}

#[test]
fn backing_file_needs_a_trusted_author_at_each_image_of_the_chain() {
    let lab = Lab::new();
    lab.sh(
        "mkdir -p img/users; head -c 64K /dev/urandom > img/secret.img; chmod 600 img/secret.img
            cd img; qemu-img create -q -u -f qcow2 -F raw -b ../secret.img users/base.qcow2 64K
            qemu-img create -q -u -f qcow2 -F qcow2 -b users/base.qcow2 top.qcow2 64K
            qemu-img create -q -u -f qcow2 -F raw -b secret.img own.qcow2 64K
            chown 12345 users users/base.qcow2 own.qcow2",
    );
    for image in ["img/top.qcow2", "img/own.qcow2"] {
        let line = lab.refused(1, &format!("mount m v={image},format=qcow2"));
        assert!(line.contains("--allow-backing"), "{image}: {line}");
    }
    // An image without a name, behind a link of root's in the directory of the secret.
    lab.sh("mkdir home; cp img/own.qcow2 home/e; chown 12345 home/e");
    let mut command = lab.command("sh");
    command.args(["-euc", "exec 9<home/e; rm home/e; touch ready; exec sleep 1000"]);
    let holder = Running(command.spawn().unwrap());
    wait_until("the image is held", || lab.path("ready").exists());
    symlink(format!("/proc/{}/fd/9", holder.pid()), lab.path("img/link.qcow2")).unwrap();
    let line = lab.refused(1, "mount m v=img/link.qcow2,format=qcow2");
    assert!(line.contains("--allow-backing"), "{line}");
    drop(holder);
    lab.sh("chown 0 img/users img/users/base.qcow2");
    lab.ok("mount m v=img/top.qcow2,format=qcow2");
}

#[test]
fn part_of_another_user_is_not_resumed() {
    let lab = Lab::new();
    lab.sh(
        "head -c 8M /dev/urandom > big; $COWSLIP send big | head -c 5M | $COWSLIP recv x || true",
    );
    give(&lab.path("x.part"), OTHER);
    for words in ["recv x --resume", "recv x"] {
        let output = lab.output("sh", &["-c", &format!("$COWSLIP send big | $COWSLIP {words}")]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("uid 12345"), "{words}: {said}");
    }
    give(&lab.path("x.part"), 0);
    lab.sh("$COWSLIP send big | $COWSLIP recv x; cmp big x");
}

#[test]
fn pipes_and_logs_of_others_are_rejected() {
    let lab = Lab::new();
    // A pipe without a name belongs to whoever made it.
    let mut command = lab.command("sleep");
    let holder = Running(command.arg("1000").stdin(std::process::Stdio::piped()).spawn().unwrap());
    symlink(format!("/proc/{}/fd/0", holder.pid()), lab.path("p")).unwrap();
    lab.mount("o=stream:64K,to=fifo:p");
    let lines = "yes secret | head -c 32K > m/o; $COWSLIP finish m/o --timeout 5";
    assert!(!lab.output("sh", &["-c", lines]).status.success());
    assert!(!lab.cowslip("umount m").status.success());
    drop(holder);
    lab.sh("mkdir -m 1777 shared; touch shared/log root.log; ln -s ../root.log shared/link; mkfifo shared/out");
    for name in ["log", "link", "out"] {
        give(&lab.path(&format!("shared/{name}")), OTHER);
    }
    for name in ["log", "link"] {
        let line = lab.refused(1, &format!("mount m b=blank:1M --log shared/{name}"));
        assert!(line.contains("another user"), "{name}: {line}");
    }
    lab.mount("b=blank:1M");
    assert!(lab.refused(1, "map m/b --svg shared/out").contains("not permitted"));
}

/// Runs `words`, which must fail because of a link of the user [`OTHER`].
#[track_caller]
fn refused_for_a_link(lab: &Lab, words: &str) {
    let output = lab.output("sh", &["-c", &format!("exec $COWSLIP {words}")]);
    let said = [&output.stdout[..], &output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(!output.status.success(), "{words}: {said}");
    let why = "belongs to another user (uid 12345), who can change it: name what it leads to";
    assert!(said.contains("the link '") && said.contains(why), "{words}: {said}");
}

/// Makes what root has in `root`, and a directory `shared` in which [`OTHER`] has links to all of it.
fn shared_links(lab: &mut Lab) {
    overlay(lab, "");
    lab.mount("--store st");
    lab.umount();
    lab.sh(
        "mkdir root; mv o st root; head -c 1M /dev/zero > root/secret; echo old > root/x.log
         head -c 1M /dev/zero > root/vm.img; printf '[[disk]]\nsource = \"vm.img\"\n' > root/a.toml
         mkdir -m 1777 shared; cd shared; ln -s ../root dir; ln -s ../root/new new
         for name in o st secret x.log vm.img a.toml; do ln -s ../root/$name; done; cd ..; mkdir n",
    );
    give(&lab.path("shared"), OTHER);
    lab.sh("chown 0:0 shared");
}

#[test]
fn links_of_another_user_in_a_shared_directory_are_not_followed() {
    let mut lab = Lab::new();
    shared_links(&mut lab);
    lab.mount("w=base.img");
    let all = "find root -type f | sort | xargs sha256sum; find root | sort";
    let before = lab.sh(all);
    // No sysctl guards links in a directory that a group may write.
    for mode in ["1777", "1770"] {
        lab.sh(&format!("chmod {mode} shared"));
        for words in [
            "mount n d=base.img,overlay=shared/o",
            "mount n d=base.img,overlay=shared/new",
            "mount n d=base.img,overlay=shared/dir/new",
            "check shared/o --repair",
            "commit shared/o",
            "rebase shared/o --base base.img",
            "keep m/w shared/dir/kept",
            "import base.img --overlay shared/dir/imported",
            "mount n --store shared/st",
            "mount n --store shared/dir/new",
            "check shared/st --repair",
            "mount n --config shared/a.toml",
            "mount n --config shared/dir/a.toml",
            "mount n b=blank:1M --log shared/x.log",
            "mount n b=blank:1M --log shared/dir/x.log",
            "mount n b=blank:1M --log shared/dir/new.log",
            "mount n s=stream:64K,to=file:shared/dir/new",
            "mount n s=stream:64K,to=file:shared/secret,overwrite",
            "mount n s=stream:64K,to=fifo:shared/dir/pipe",
            "diff m/w -o shared/dir/new",
            "diff m/w -o shared/secret --overwrite",
            "map m/w --svg shared/dir/new",
            "map m/w --svg shared/secret --overwrite",
            "recv shared/dir/new </dev/null",
            "recv shared/secret --overwrite </dev/null",
        ] {
            refused_for_a_link(&lab, words);
        }
    }
    assert_eq!(lab.sh(all), before);
    // Such a link of the user's own or of root's is followed.
    lab.sh("chmod 1777 shared; chown -h 0 shared/*");
    lab.umount();
    lab.ok("mount m d=base.img,overlay=shared/o --log shared/x.log");
    lab.umount();
    lab.ok("check shared/o");
    lab.ok("mount n --config shared/a.toml");
    lab.sh("cmp n/vm.img root/vm.img");
    lab.ok("umount n");
}

#[test]
fn relative_paths_in_a_configuration_start_at_its_directory_and_not_at_that_of_a_link() {
    let lab = Lab::new();
    lab.sh("mkdir home links n; head -c 64K /dev/urandom > home/vm.img; ln -s ../home/a.toml links
         head -c 64K /dev/zero > links/vm.img; echo '[[disk]]\nsource = \"vm.img\"' > home/a.toml");
    lab.ok("mount n --config links/a.toml");
    lab.sh("cmp n/vm.img home/vm.img");
    lab.ok("umount n");
}

#[test]
fn a_second_name_that_another_user_could_have_made_is_not_believed() {
    let lab = Lab::new();
    lab.sh(
        "mkdir -m 1777 shared; mkdir own n; echo old > own/x.log; ln own/x.log shared
         printf 'mountpoint = \"n\"\n[[disk]]\nsource = \"blank:1M\"\n' > own/a.toml; ln own/a.toml shared
         ln -s ../own own/link; ln own/link shared",
    );
    for words in [
        "mount n b=blank:1M --log shared/x.log",
        "mount n b=blank:1M --log shared/link/x.log",
        "mount n --config shared/a.toml",
    ] {
        let line = lab.refused(1, words);
        assert!(line.contains("has more than one name"), "{words}: {line}");
    }
    assert_eq!(lab.sh("cat own/x.log"), "old\n");
    lab.ok("mount m b=blank:1M --log own/x.log");
    lab.umount();
}

#[test]
fn refused_store_leaves_nothing_behind() {
    let lab = Lab::new();
    lab.sh("mkdir home");
    give(&lab.path("home"), OTHER);
    assert!(lab.refused(1, "mount m --store home/st/new").contains("uid 12345"));
    assert_eq!(fs::read_dir(lab.path("home")).unwrap().count(), 0);
}
