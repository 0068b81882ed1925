//! The commands that talk to a mount: status, map, log, keep, umount, run and check.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::mount::*;
use crate::common::strace::Strace;
use serde_json::Value;

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img e=blank:1G,overlay=ov");
    lab
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn mount_prints_a_line_for_every_disk() {
    let lab = Lab::new();
    let said = lab.mount("a=blank:20G b=blank:1G,overlay=ov");
    let lines: Vec<_> = said.lines().collect();
    let keep = "temporary overlay: changes end at umount ('cowslip keep' saves them)";
    assert_eq!(lines[0], format!("a: 20 GiB, {keep}"));
    assert!(lines[1].starts_with("b: 1 GiB, overlay '"), "{said}");
    assert_eq!(lines.len(), 2);
}

#[test]
fn status_shows_the_mount_and_its_disks() {
    let lab = lab();
    lab.open("m/e").write_all_at(&[1; 8192], 0).unwrap();
    let status = lab.status();
    assert_eq!(status["mountpoint"], lab.path("m").to_str().unwrap());
    assert_eq!(status["state"], "ready");
    let e = lab.disk("e");
    assert_eq!((&e["size"], &e["mode"], &e["state"]), (&GIB.into(), &"cow".into(), &"ok".into()));
    assert_eq!(
        (&e["overlay"]["changed"], &e["overlay"]["temporary"]),
        (&8192.into(), &false.into())
    );
    assert_eq!(e["overlay"]["recovered"], Value::Null);
    assert_eq!(lab.disk("d")["overlay"]["temporary"], true);
    let text = lab.ok("status m/e");
    assert!(text.contains("1 GiB") && text.contains(" e "), "{text}");
    // The mounts of other tests are listed too, and an unhealthy one changes the exit code.
    let all = lab.cowslip("status --json");
    let all = json(&String::from_utf8_lossy(&all.stdout));
    assert_eq!(all["schema"], 1);
    let here = all["mounts"].as_array().unwrap().iter();
    assert_eq!(here.filter(|mount| mount["mountpoint"] == status["mountpoint"]).count(), 1);
}

#[test]
fn status_of_a_dead_mount_is_unhealthy() {
    let lab = lab();
    lab.kill();
    let output = lab.cowslip("status m --json");
    assert_eq!(output.status.code(), Some(3), "{}", show(&output));
    assert_eq!(json(&String::from_utf8_lossy(&output.stdout))["mounts"][0]["state"], "dead");
    assert!(lab.ok("umount m").contains("dead mount is cleared"));
}

#[test]
fn map_matches_seek_and_covers_the_disk() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 2), 10 * MIB + 5).unwrap();
    fallocate(&file, PUNCH, 0..MIB).unwrap();
    let map = json(&lab.ok("map m/d --json"));
    let mut at = 0;
    let mut data = Vec::new();
    for extent in map.as_array().unwrap() {
        let start = extent["start"].as_u64().unwrap();
        assert_eq!(start, at);
        at += extent["length"].as_u64().unwrap();
        assert_eq!(extent["zero"].as_bool().unwrap(), extent["kind"] != "data");
        if extent["kind"] != "hole" {
            data.push(start..at);
        }
    }
    assert_eq!(at, 16 * MIB);
    data = data.into_iter().fold(Vec::new(), |mut all: Vec<std::ops::Range<u64>>, run| {
        match all.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => all.push(run),
        }
        all
    });
    assert_eq!(data, data_runs(&file));
    let text = lab.ok("map m/d");
    assert!(text.contains("KIND") && text.contains("hole"), "{text}");
    drop(file);
}

#[test]
fn map_of_many_extents_is_complete() {
    let lab = lab();
    let file = lab.open("m/e");
    for index in 0..20_000 {
        file.write_all_at(&[1; 100], index * 8192).unwrap();
    }
    let map = json(&lab.ok("map m/e --json"));
    assert_eq!(map.as_array().unwrap().len(), 40_000);
    drop(file);
}

#[test]
fn log_records_mount_and_unmount() {
    let lab = lab();
    assert!(lab.ok("log m").contains("mounted at"));
    let pid = lab.pid();
    let mut command = lab.command(COWSLIP);
    let follow = command.args(["log", "-f", "m"]).stdout(std::process::Stdio::piped());
    let mut follow = Running(follow.spawn().unwrap());
    lab.umount();
    assert!(!is_alive(pid));
    wait_until("log -f ends with its mount", || follow.0.try_wait().unwrap().is_some());
    assert!(lab.log().contains("unmounted"));
}

#[test]
fn keep_saves_the_changes_for_the_next_mount() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 3), 5 * MIB + 77).unwrap();
    let said = lab.ok("keep m/d kept");
    assert!(said.contains("kept"), "{said}");
    // Later changes are kept too, and survive a killed daemon.
    file.write_all_at(b"later", 0).unwrap();
    drop(file);
    lab.sh("cp m/d copy");
    lab.kill();
    lab.mount("d=base.img,overlay=kept");
    lab.sh("cmp m/d copy");
}

#[test]
fn keep_works_across_file_systems() {
    let lab = lab();
    lab.host("host", "xfs", 320 * MIB);
    lab.open("m/d").write_all_at(&noise(MIB, 3), 5 * MIB + 77).unwrap();
    lab.sh("cp m/d copy");
    lab.ok("keep m/d host/kept");
    lab.umount();
    lab.mount("d=base.img,overlay=host/kept");
    lab.sh("cmp m/d copy");
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn keep_rejects_invalid_disks_and_directories() {
    let lab = lab();
    lab.sh("mkdir full; touch full/x");
    assert!(lab.refused(1, "keep m/d full").contains("full"));
    assert!(lab.refused(1, "keep m/d m/inside").contains("mount"));
    lab.refused(1, "keep m/e kept");
    lab.refused(1, "keep base.img kept");
    lab.refused(1, "keep m/nothing kept");
    lab.sh("[ ! -e kept ]; [ \"$(ls full)\" = x ]");
}

#[test]
fn keep_that_cannot_be_made_durable_leaves_nothing_behind() {
    let lab = Lab::new();
    // Temporary overlays lie in the same file system, so the data is linked.
    lab.sh("mkdir host");
    lab.mount("d=blank:1G e=blank:1G");
    // What has its name is kept, though its lock cannot be released.
    for nth in 1.. {
        let fail = format!("inject=flock:error=EIO:when={nth}");
        let strace = Strace::attach_with(&lab, lab.pid(), "flock", &[fail]);
        let kept = lab.cowslip("keep m/e kept");
        strace.end(&lab, || true);
        assert_eq!(lab.path("kept").exists(), kept.status.success(), "{nth}: {}", show(&kept));
        if kept.status.success() {
            break;
        }
    }
    lab.open("m/d").write_all_at(&noise(MIB, 1), 0).unwrap();
    let mut failed = 0;
    loop {
        let fail = format!("inject=fsync:error=EIO:when={}", failed + 1);
        let strace = Strace::attach_with(&lab, lab.pid(), "fsync", &[fail]);
        let kept = lab.cowslip("keep m/d host/kept");
        strace.end(&lab, || true);
        if kept.status.success() {
            break;
        }
        failed += 1;
        assert_eq!(fs::read_dir(lab.path("host")).unwrap().count(), 0, "{}", show(&kept));
    }
    assert!(failed >= 4, "{failed}");
    lab.open("m/d").write_all_at(&noise(MIB, 2), MIB).unwrap();
    lab.umount();
    lab.mount("d=blank:1G,overlay=host/kept");
    let disk = lab.open_ro("m/d");
    assert!(read(&disk, 0, MIB) == noise(MIB, 1) && read(&disk, MIB, MIB) == noise(MIB, 2));
    drop(disk);
}

#[test]
fn umount_reports_discarded_and_kept_changes() {
    let lab = lab();
    lab.open("m/d").write_all_at(&[1; 4096], 0).unwrap();
    lab.open("m/e").write_all_at(&[1; 8192], 0).unwrap();
    let said = lab.umount();
    assert!(said.contains("d: 4 KiB of changes discarded"), "{said}");
    assert!(said.contains("e: 8 KiB of changes kept in '"), "{said}");
}

#[test]
fn umount_waits_for_the_daemon() {
    let lab = lab();
    let pid = lab.pid();
    lab.open("m/e").write_all_at(&noise(20 * MIB, 1), 0).unwrap();
    lab.umount();
    assert!(!is_alive(pid));
    // The overlay is unlocked at once.
    lab.mount("e=blank:1G,overlay=ov");
}

/// Returns the ID that mountinfo has for the mount at `m`.
fn mount_id(lab: &Lab) -> u64 {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let at = lab.path("m").display().to_string();
    let mut fields = table.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.find(|fields| fields[4] == at).unwrap()[0].parse().unwrap()
}

#[test]
fn umount_that_another_overtakes_leaves_a_later_mount_alone() {
    let lab = lab();
    let earlier = mount_id(&lab);
    let file = lab.open("m/d");
    let mut umount = lab.command(COWSLIP);
    umount.args(["umount", "--timeout", "10", "m"]);
    umount.stderr(fs::File::create(lab.path("err.txt")).unwrap());
    let mut umount = Running(umount.spawn().unwrap());
    // It has found the mount, and waits for its user.
    wait_held_up(umount.0.id(), libc::SYS_clock_nanosleep, 1);
    stop(umount.0.id());
    drop(file);
    // The kernel usually gives the next mount the ID of the one that is gone.
    for _ in 0..10 {
        lab.umount();
        lab.mount("d=base.img e=blank:1G,overlay=ov");
        if mount_id(&lab) == earlier {
            break;
        }
    }
    let pid = lab.pid();
    signal(umount.0.id(), rustix::process::Signal::CONT).unwrap();
    let status = umount.0.wait().unwrap();
    let said = fs::read_to_string(lab.path("err.txt")).unwrap();
    assert!(status.success() && said.is_empty(), "{status}: {said}");
    assert_eq!(lab.pid(), pid);
}

#[test]
fn umount_rejects_open_disks_and_names_their_users() {
    let lab = lab();
    let file = lab.open("m/d");
    let line = lab.refused(1, "umount --timeout 1 m");
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    assert_eq!(read(&file, 0, 1).len(), 1);
    lab.ok("umount -l m");
    drop(file);
    wait_until("the daemon ends after its last user", || mounts_below(lab.dir()).is_empty());
    wait_until("the overlay is free", || lab.cowslip("check ov").status.success());
}

#[test]
fn sigterm_ends_a_mount_cleanly() {
    let lab = lab();
    lab.open("m/e").write_all_at(&noise(MIB, 1), 0).unwrap();
    let pid = lab.pid();
    signal(pid, rustix::process::Signal::TERM).unwrap();
    wait_until("the daemon ends", || !is_alive(pid));
    assert_eq!(mounts_below(lab.dir()).len(), 0);
    assert!(lab.ok("check ov").contains("clean"));
}

#[test]
fn commands_end_although_a_daemon_is_stopped() {
    let lab = lab();
    lab.sh("mkdir m2 m3; $COWSLIP mount m2 b=blank:1M --log log2.txt");
    lab.sh(
        "truncate -s 1M b; $COWSLIP mount m3 b=b,overlay=ov2; echo x > m3/b; $COWSLIP umount m3",
    );
    lab.sh("cp m/e out; rm out");
    let pid = lab.pid();
    stop(pid);
    let commands = [
        "commit m/e",
        "send m/e",
        "send m/.cowslip/e/map",
        "recv m/e --overwrite",
        "import m/e --overlay new",
        "rebase ov2 --base m/d",
        "check m/e",
        "diff m2/b -O bmap -o m/x",
        "map m2/b --svg m/x",
        "keep m2/b m/x",
        "add m2 f=m/e",
        "mount m3 f=m/e",
        "run f=m/d -- true",
        "snapshot m/e",
        "status m",
    ];
    std::thread::scope(|scope| {
        for words in commands {
            let lab = &lab;
            scope.spawn(move || {
                let output = lab.cowslip(words);
                assert!(!output.status.success(), "{words}");
                let said = show(&output);
                assert!(said.contains("does not answer") || words == "status m", "{words}: {said}");
            });
        }
    });
    signal(pid, rustix::process::Signal::CONT).unwrap();
    lab.ok("umount m2");
}

#[test]
fn plain_umount_ends_a_mount_cleanly() {
    let lab = lab();
    lab.open("m/e").write_all_at(&noise(MIB, 1), 0).unwrap();
    let pid = lab.pid();
    lab.sh("umount m");
    wait_until("the daemon ends", || !is_alive(pid));
    assert!(lab.ok("check ov").contains("clean"));
}

#[test]
fn run_mounts_for_a_command_and_returns_its_exit_code() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let run = |words: &[&str]| {
        let all = [&["run", "d=base.img", "e=blank:1M", "--"], words].concat();
        let output = lab.output(COWSLIP, &all);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, said) = run(&[
        "sh",
        "-c",
        "cmp base.img $COWSLIP_MNT/d && ls $COWSLIP_MNT && echo x > $COWSLIP_MNT/d",
    ]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("d\ne\n"), "{said}");
    assert_eq!(run(&["sh", "-c", "exit 7"]).0, Some(7));
    assert_eq!(run(&["/no/such/command"]).0, Some(127));
    assert_eq!(run(&["/etc/passwd"]).0, Some(126));
    assert_eq!(lab.refused(125, "run nothing.img -- true").lines().count(), 1);
}

#[test]
fn check_tells_clean_overlays_from_damaged_ones() {
    let lab = lab();
    lab.open("m/e").write_all_at(&noise(MIB, 1), 0).unwrap();
    assert_eq!(lab.cowslip("check ov").status.code(), Some(1), "in use");
    lab.umount();
    assert!(lab.ok("check ov").contains("clean"));
    let log = layer_dir(&lab.path("ov")).join("log");
    let whole = fs::read(&log).unwrap();
    let mut bad = whole.clone();
    bad[33] ^= 1;
    fs::write(&log, &bad).unwrap();
    let output = lab.cowslip("check ov");
    assert_eq!(output.status.code(), Some(3), "{}", show(&output));
    lab.refused(1, "mount m e=blank:1G,overlay=ov");
    fs::write(&log, &whole).unwrap();
    let stack = fs::read_to_string(lab.path("ov/stack")).unwrap();
    fs::write(lab.path("ov/stack"), stack.replace("perm", "prem")).unwrap();
    assert_eq!(lab.cowslip("check ov").status.code(), Some(3));
    assert!(lab.refused(1, "mount m e=blank:1G,overlay=ov").contains("damaged"));
    fs::write(lab.path("ov/stack"), &stack).unwrap();
    lab.ok("check ov");
    lab.refused(1, "check nowhere");
}

#[test]
fn check_includes_every_disk_of_a_store() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo x > m/a; echo y > m/b");
    lab.umount();
    let said = lab.ok("check st");
    assert!(said.contains(" a\n") && said.contains(" b\n"), "{said}");
}

#[test]
fn config_file_mounts_its_disks() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    fs::write(
        lab.path("vms.toml"),
        "mountpoint = \"m\"\n[[disk]]\nname = \"d\"\nsource = \"base.img\"\n[[disk]]\nname = \"e\"\nsource = \"blank:1M\"\nperm = 0o640\n",
    )
    .unwrap();
    lab.sh("cd / && \"$COWSLIP\" mount --config \"$OLDPWD/vms.toml\"");
    lab.sh("cmp m/d base.img; [ $(stat -c %a m/e) = 640 ]");
}

#[test]
fn program_works_as_a_mount_helper() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("ln -s $COWSLIP mount.cowslip; ./mount.cowslip base.img m -o rw,noauto,x-test=1; cmp m/base.img base.img");
}

#[test]
fn foreground_daemon_exits_with_its_mount() {
    let lab = Lab::new();
    let mut command = lab.command(COWSLIP);
    let mut child = Running(
        command
            .args(["mount", "-f", "m", "e=blank:1M"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("the mount answers", || lab.path("m/e").exists());
    lab.umount();
    wait_until("it ends", || child.0.try_wait().unwrap().is_some());
    assert_eq!(child.0.try_wait().unwrap().unwrap().code(), Some(0));
}

#[test]
fn only_the_mounting_user_and_root_can_request_changes() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    // Another user may not reach the lab: the mount is beside it.
    lab.sh("chmod 755 .; mkdir open; chmod 755 open");
    lab.mount("d=base.img,perm=0666 -o allow_other");
    let request = format!("{{\"op\":\"keep\",\"dir\":\"{}/open/k\"}}", lab.dir().display());
    fs::write(lab.path("request"), request).unwrap();
    lab.sh("
        chmod 644 request
        setpriv --reuid 65534 --clear-groups dd if=m/d of=/dev/null bs=4k count=1 status=none
        ! setpriv --reuid 65534 --clear-groups dd if=request of=m/.cowslip/d/ctl conv=notrunc status=none
        test ! -e open/k
        dd if=request of=m/.cowslip/d/ctl conv=notrunc status=none
    ");
    wait_until("root's request is done", || lab.path("open/k/stack").exists());
    lab.umount();
}

#[test]
fn zeroed_bytes_are_not_counted_as_changed() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img n=blank:0,overlay=ov");
    lab.open("m/d").write_all_at(&[1; 4096], 0).unwrap();
    lab.sh("fallocate -p -o 4M -l 1M m/d; truncate -s 1G m/n; printf x | dd of=m/n conv=notrunc status=none
        fallocate -p -o 512M -l 256M m/n");
    assert!(lab.ok("status m").contains("4 KiB"));
    let said = lab.ok("diff m/d -o out.q");
    assert_eq!(said, "out.q: 4 KiB of changes (and 1 MiB zeroed) written\n");
    let said = lab.umount();
    assert!(said.contains("d: 4 KiB of changes (and 1 MiB zeroed) discarded"), "{said}");
    let line = said.lines().find(|line| line.starts_with("n: ")).unwrap();
    assert!(
        line.starts_with("n: 4 KiB of changes (and ") && line.contains(" zeroed) kept in '"),
        "{said}"
    );
}

#[test]
fn changes_of_a_deleted_overlay_are_reported_as_lost() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img,overlay=d.cow e=base.img,overlay=e.cow");
    for disk in ["d", "e"] {
        lab.open(&format!("m/{disk}")).write_all_at(&noise(MIB, 1), 0).unwrap();
    }
    lab.sh("rm -r d.cow; mv e.cow moved.cow; mkdir e.cow");
    let output = lab.cowslip("status m");
    assert_eq!(output.status.code(), Some(3), "{}", show(&output));
    assert_eq!(lab.disk("d")["state"], "lost");
    assert_eq!(lab.disk("e")["state"], "ok");
    let output = lab.cowslip("umount m");
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    let (said, failed) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(failed.contains("d: 1 MiB of changes are lost: its overlay '"), "{failed}");
    assert!(said.contains("e: 1 MiB of changes kept in what was '"), "{said}");
    lab.sh("rmdir e.cow; mv moved.cow e.cow");
    lab.mount("e=base.img,overlay=e.cow");
    assert!(read(&lab.open_ro("m/e"), 0, MIB) == noise(MIB, 1));
}

#[test]
fn lack_of_space_is_reported_in_status_and_once_in_the_log() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img,overlay=ov,limit=1M");
    let disk = lab.open("m/d");
    assert!(!lab.ok("status m").contains("for want of space"));
    for number in 0..100 {
        let written = disk.write_all_at(&noise(64 << 10, number), number * (64 << 10));
        assert_eq!(written.is_ok(), number < 16, "{number}");
    }
    let said = lab.ok("status m");
    assert!(said.contains("d: a write failed for want of space "), "{said}");
    assert!(said.contains("and its limit is 1 MiB"), "{said}");
    assert_eq!(lab.log().matches("a write failed").count(), 1, "{}", lab.log());
    drop(disk);
}
