//! `cowslip check` and `cowslip rebase` on overlays created by real mounts.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use crate::common::mount::*;
use crate::common::written;

const SIZE: u64 = 8 * MIB;

/// Returns the directories of the layers of the overlay `ov`, lowest first.
fn layers(lab: &Lab) -> Vec<PathBuf> {
    let said = lab.cowslip("check ov");
    let said = String::from_utf8(said.stdout).unwrap();
    let line = said.lines().find_map(|line| line.strip_prefix("layers   ")).unwrap();
    line.split(", ").map(|uuid| lab.path("ov/layers").join(uuid)).collect()
}

/// Mounts an overlay `ov` over `base.img` with the snapshots `one` and `two`.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("d=base.img,overlay=ov");
    let write = |seed| lab.open("m/d").write_all_at(&noise(MIB, seed), seed * MIB).unwrap();
    write(1);
    lab.ok("snapshot m/d one");
    write(2);
    lab.ok("snapshot m/d two");
    write(3);
    lab
}

fn mounted_bytes(lab: &Lab) -> u32 {
    checksum(&lab.path("m/d"))
}

/// Runs a check that must find damage, and returns its report.
fn damaged(lab: &Lab, words: &str) -> String {
    let output = lab.cowslip(words);
    assert_eq!(output.status.code(), Some(3), "{}", show(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the number of entries in a directory of the store `st`.
fn count(lab: &Lab, what: &str) -> usize {
    fs::read_dir(lab.path("st").join(what)).unwrap().count()
}

fn short(layer: &Path) -> String {
    layer.file_name().unwrap().to_str().unwrap()[..8].to_owned()
}

#[test]
fn check_prints_a_row_for_every_layer() {
    let lab = lab();
    lab.umount();
    let said = lab.ok("check ov");
    let layers = layers(&lab);
    assert_eq!(layers.len(), 3);
    for (name, layer) in ["one", "two", "now"].iter().zip(&layers) {
        let row = said.lines().find(|line| line.starts_with(name)).unwrap();
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words[..4], [*name, &short(layer), "1", "MiB"], "{said}");
        assert_eq!(words.last(), Some(&"clean"), "{said}");
    }
    assert!(said.contains("\nstate    clean\n"), "{said}");
    assert!(lab.ok("check ov --repair").ends_with("\nrepair   nothing to do\n"));
}

#[test]
fn check_names_a_damaged_sealed_layer() {
    let lab = lab();
    lab.umount();
    let layers = layers(&lab);
    let log = layers[0].join("log");
    let good = fs::read(&log).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    fs::write(&log, bad).unwrap();
    let said = damaged(&lab, "check ov");
    let named =
        format!("damage   layer {} (snapshot 'one'): the log is damaged", short(&layers[0]));
    assert!(said.contains(&named), "{said}");
    assert_eq!(said.matches("damage  ").count(), 1, "{said}");
    fs::write(&log, good).unwrap();
    lab.ok("check ov");

    let data = File::options().write(true).open(layers[1].join("data")).unwrap();
    let len = data.metadata().unwrap().len();
    data.set_len(2 * MIB + 4096).unwrap();
    let said = damaged(&lab, "check ov --repair");
    let named = format!("layer {} (snapshot 'two'): 1020 KiB of data", short(&layers[1]));
    assert!(said.contains(&named) && said.contains("nothing was touched"), "{said}");
    data.set_len(len).unwrap();

    fs::rename(&layers[1], lab.path("aside")).unwrap();
    let said = damaged(&lab, "check ov");
    assert!(said.contains(&format!("layer {} (snapshot 'two'): opening", short(&layers[1]))));
    fs::rename(lab.path("aside"), &layers[1]).unwrap();
    lab.ok("check ov");
}

#[test]
fn sealed_layer_without_its_end_is_damage_once_a_layer_above_was_synced() {
    let lab = lab();
    lab.umount();
    let layers = layers(&lab);
    let log = layers[0].join("log");
    let good = fs::read(&log).unwrap();
    // Only the `Close`; and so much that data is gone with it.
    for cut in [32, 96] {
        fs::write(&log, &good[..written(&good) - cut]).unwrap();
        let said = damaged(&lab, "check ov --repair");
        let named = format!("damage   layer {} (snapshot 'one'): the log", short(&layers[0]));
        assert!(said.contains(&named) && said.contains("was closed before"), "{said}");
        let said = lab.refused(1, "mount m d=base.img,overlay=ov");
        assert!(said.contains("was closed before"), "{said}");
    }
    fs::write(&log, good).unwrap();
    assert!(lab.ok("check ov").contains("\nstate    clean\n"));
}

#[test]
fn unreadable_end_of_the_log_of_a_killed_daemon_is_told_or_refused() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("d=base.img,overlay=ov");
    let file = lab.open("m/d");
    for at in 0..5 {
        file.write_all_at(&noise(4096, at), at * 8192).unwrap();
        file.sync_all().unwrap();
    }
    lab.kill();
    drop(file);
    lab.ok("umount m");
    let log = layers(&lab)[0].join("log");
    let good = fs::read(&log).unwrap();
    let last = written(&good) - 32;
    let flipped = |places: &[usize]| {
        let mut bad = good.clone();
        places.iter().for_each(|at| bad[*at] ^= 1);
        fs::write(&log, bad).unwrap();
    };
    flipped(&[last - 32 + 9, last + 9]);
    let said = damaged(&lab, "check ov");
    assert!(said.contains("neither it nor what follows can be read"), "{said}");
    lab.refused(1, "mount m d=base.img,overlay=ov");
    assert!(damaged(&lab, "check ov --repair").contains("nothing was touched"));
    flipped(&[last + 9]);
    let said = damaged(&lab, "check ov");
    assert!(said.contains("of them count, 1 unreadable at the end"), "{said}");
    assert!(said.contains("the last record of its log is damaged, what it said is lost"), "{said}");
    assert!(!said.contains("nothing is lost"), "{said}");
    let said = lab.mount("d=base.img,overlay=ov");
    assert!(said.contains("the last record of a log is damaged"), "{said}");
    assert!(lab.ok("status m --json").contains(r#""recovered":"damaged""#));
    for at in 0..5 {
        assert!(read(&lab.open_ro("m/d"), at * 8192, 4096) == noise(4096, at));
    }
}

#[test]
fn error_while_the_boot_tag_is_read_makes_no_power_cut_of_a_kill() {
    let lab = lab();
    let before = mounted_bytes(&lab);
    lab.kill();
    // The first failures hit what else the command reads; the later ones come after all is read.
    for call in ["readlink", "statx", "fstatfs"] {
        for nth in 1..12 {
            let fail = format!("inject={call}:error=EIO:when={nth}");
            let trace = format!("trace={call}");
            let words =
                ["-f", "-o", "/dev/null", "-e", &trace, "-e", &fail, COWSLIP, "check", "ov"];
            let said = lab.output("strace", &words);
            let said = String::from_utf8_lossy(&said.stdout).into_owned();
            assert!(!said.contains("since the last sync"), "{call} {nth}: {said}");
            assert!(!said.contains("are lost"), "{call} {nth}: {said}");
        }
    }
    lab.mount("d=base.img,overlay=ov");
    assert_eq!(mounted_bytes(&lab), before);
    lab.umount();
}

#[test]
fn repair_recovers_the_overlay_of_a_killed_daemon() {
    let lab = lab();
    let before = mounted_bytes(&lab);
    assert!(lab.refused(1, "check ov").contains("is in use"));
    assert!(lab.refused(1, "check ov --repair").contains("is in use"));
    lab.kill();
    let said = lab.ok("check ov");
    assert!(said.contains("\nstate    needs recovery: nothing is lost"), "{said}");
    assert!(lab.path("ov/holder").exists());
    let said = lab.ok("check ov --repair");
    let top = short(layers(&lab).last().unwrap());
    assert!(said.contains(&format!("repair   recovered layer {top}: nothing is lost")), "{said}");
    assert!(said.contains("repair   removed 'holder'"), "{said}");
    assert!(said.contains("\nstate    clean\n"), "{said}");
    assert!(!lab.path("ov/holder").exists());
    assert!(lab.ok("check ov").contains("\nstate    clean\n"));
    let said = lab.mount("d=base.img,overlay=ov");
    assert!(!said.contains("recovered"), "{said}");
    assert_eq!(mounted_bytes(&lab), before);
    lab.ok("revert m/d one");
    assert!(read(&lab.open_ro("m/d"), MIB, MIB) == noise(MIB, 1));
}

#[test]
fn repair_removes_unused_layers_and_temporary_files() {
    let lab = lab();
    let before = mounted_bytes(&lab);
    lab.umount();
    lab.sh(
        "o=ov/layers/00000000-0000-4000-8000-000000000000; cp -r $(ls -d ov/layers/* | head -1) $o
         echo x > ov/stack.new; echo x > ov/holder.new; for d in ov/layers/*; do echo x > $d/log.new; done",
    );
    let said = lab.ok("check ov");
    assert!(said.contains("unused   layer 00000000-0000-4000-8000-000000000000"), "{said}");
    assert_eq!(fs::read_dir(lab.path("ov/layers")).unwrap().count(), 4);
    let said = lab.ok("check ov --repair");
    assert!(said.contains("repair   removed layer 00000000-0000-4000-8000"), "{said}");
    assert_eq!(said.matches("repair   removed 'log.new'").count(), 3, "{said}");
    assert!(said.contains("'stack.new'") && said.contains("'holder.new'"), "{said}");
    assert_eq!(fs::read_dir(lab.path("ov/layers")).unwrap().count(), 3);
    assert!(lab.sh("find ov -name '*.new'").is_empty());
    assert!(lab.ok("check ov --repair").contains("repair   nothing to do"));
    lab.mount("d=base.img,overlay=ov");
    assert_eq!(mounted_bytes(&lab), before);
}

#[test]
fn repair_sweeps_a_store() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo one > m/a; echo two > m/b");
    assert!(lab.refused(1, "check st --repair").contains("is in use"));
    lab.umount();
    let gone = "../disks/00000000-0000-4000-8000-000000000000";
    symlink(gone, lab.path("st/names/c")).unwrap();
    lab.sh(
        "rm st/names/b; mkdir st/layers/00000000-0000-4000-8000-000000000003 st/disks/.cowslip-x",
    );
    let said = damaged(&lab, "check st");
    assert!(said.contains("damage   the name 'c': it leads nowhere"), "{said}");
    assert_eq!(said.matches("unused   the disk").count(), 2, "{said}");
    // The layers of the lost disk are unknown, so all layers stay as long as its name does.
    assert!(!said.contains("unused   the layer"), "{said}");
    assert!(lab.refused(1, "mount m --store st").contains("disk 'c' of the store"));
    assert_eq!(count(&lab, "layers"), 3);
    lab.sh("mkdir st/disks/.cowslip-x");
    let said = damaged(&lab, "check st");
    assert!(said.contains("damage   the name 'c'"), "{said}");
    let said = lab.ok("check st --repair");
    assert!(said.contains("repair   removed the name 'c'"), "{said}");
    assert!(said.contains("repair   removed the disk '.cowslip-x'"), "{said}");
    assert_eq!(count(&lab, "layers"), 3);
    assert_eq!(lab.ok("check st").matches("unused   the layer").count(), 2);
    let said = lab.ok("check st --repair");
    assert_eq!(said.matches("repair   removed the layer").count(), 2, "{said}");
    assert_eq!([count(&lab, "names"), count(&lab, "disks"), count(&lab, "layers")], [1; 3]);
    assert!(lab.ok("check st --repair").contains("store    st\nrepair   nothing to do\n"));
    lab.ok("check st/names/a");
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/*"), "one\n");
}

#[test]
fn rebase_accepts_a_moved_or_copied_base() {
    let mut lab = Lab::new();
    put(&lab.path("base.img"), &noise(SIZE, 9));
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(&noise(MIB, 1), MIB).unwrap();
    let before = mounted_bytes(&lab);
    assert!(lab.refused(1, "rebase ov --base base.img").contains("is in use"));
    lab.umount();

    lab.sh("mkdir new; mv base.img new/moved.img");
    lab.watch("new/moved.img");
    let line = lab.refused(1, "mount m d=new/moved.img,overlay=ov");
    assert!(line.contains("which is gone") && line.contains("cowslip rebase"), "{line}");
    assert!(damaged(&lab, "check ov").contains("cowslip rebase"));
    let said = lab.ok("rebase ov --base new/moved.img");
    assert!(said.contains("ov: its base is now '") && said.contains("/new/moved.img'"), "{said}");
    lab.ok("check ov");
    lab.mount("d=new/moved.img,overlay=ov");
    assert_eq!(mounted_bytes(&lab), before);
    lab.umount();

    lab.sh("cp new/moved.img copy.img; touch -d 2001-01-01 copy.img");
    lab.ok("rebase ov --base copy.img");
    lab.mount("d=copy.img,overlay=ov");
    assert_eq!(mounted_bytes(&lab), before);
}

#[test]
fn rebase_rejects_another_base_unless_forced() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(&noise(MIB, 1), MIB).unwrap();
    lab.umount();
    let stack = fs::read(lab.path("ov/stack")).unwrap();
    lab.sh("cp base.img other.img; printf x | dd of=other.img conv=notrunc status=none; head -c 1M base.img > short.img");
    let line = lab.refused(1, "rebase ov --base other.img");
    assert!(line.contains("its contents differ") && line.contains("--force"), "{line}");
    assert!(lab.refused(1, "rebase ov --base short.img").contains("size 8 MiB -> 1 MiB"));
    assert!(lab.refused(1, "rebase ov --base none.img").contains("does not exist"));
    assert!(lab.refused(1, "rebase ov --base m --force").contains("is a directory"));
    assert_eq!(fs::read(lab.path("ov/stack")).unwrap(), stack);
    let said = lab.ok("rebase ov --base other.img --force");
    assert!(said.contains("forced, it is not the same (its contents differ)"), "{said}");
    lab.mount("d=other.img,overlay=ov");
    assert_eq!(read(&lab.open_ro("m/d"), 0, 1), b"x");
    assert!(read(&lab.open_ro("m/d"), MIB, MIB) == noise(MIB, 1));
}

#[test]
fn copy_of_a_store_without_symlinks_is_rejected_and_keeps_its_disks() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo one > m/a");
    lab.umount();
    lab.sh("cp -rL st copy");
    for words in ["mount m --store copy", "check copy", "check copy --repair"] {
        let line = lab.refused(1, words);
        assert!(line.contains("'names/a' is no link to one of its disks: remove it"), "{line}");
    }
    lab.sh("rm -r copy/names; cp -a st/names copy/names");
    lab.mount("--store copy");
    assert_eq!(lab.sh("cat m/a"), "one\n");
}

#[test]
fn disk_of_a_store_is_rebased_by_its_name() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("--store st d=base.img,overlay=st");
    lab.open("m/d").write_all_at(&noise(MIB, 1), MIB).unwrap();
    let before = mounted_bytes(&lab);
    assert!(lab.refused(1, "rebase st/names/d --base base.img").contains("is in use"));
    lab.umount();
    lab.sh("cp base.img moved.img; mv base.img aside.img");
    let line = lab.refused(1, "mount m --store st");
    assert!(line.contains("which is gone") && line.contains("cowslip rebase"), "{line}");
    assert!(lab.refused(1, "rebase st --base moved.img").contains("st/names/NAME"));
    lab.ok("rebase st/names/d --base moved.img");
    lab.ok("check st");
    lab.mount("--store st");
    assert_eq!(mounted_bytes(&lab), before);
    lab.umount();
    lab.sh("mv aside.img base.img");
}

#[test]
fn overlay_with_a_short_data_file_is_rejected_instead_of_reading_zeros() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    lab.mount("x=base.img,overlay=cow");
    lab.sh("head -c 8M /dev/urandom | dd of=m/x bs=1M seek=4 conv=notrunc,fsync status=none");
    lab.ok("snapshot m/x one");
    lab.sh("head -c 1M /dev/urandom | dd of=m/x bs=1M seek=20 conv=notrunc,fsync status=none");
    lab.umount();
    for data in lab.sh("ls cow/layers/*/data").lines() {
        lab.sh(&format!("cp {data} kept; truncate -s 5M {data}"));
        let line = lab.refused(1, "mount m x=base.img,overlay=cow");
        assert!(line.contains("are missing: restore the overlay from a backup"), "{line}");
        lab.sh(&format!("cat kept > {data}"));
    }
    lab.mount("x=base.img,overlay=cow");
}
