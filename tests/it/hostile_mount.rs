//! Commands on a hostile mount: any program can serve a FUSE mount of cowslip's type and reply with
//! anything.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use crate::common::mount::*;
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, ReplyWrite, Request,
    Session, SessionACL, WriteFlags,
};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount};

const ROOT: u64 = 1;
const CONTROL: u64 = 2;
const STATUS: u64 = 3;
const LOG: u64 = 4;
const DISK: u64 = 5;
const CTL: u64 = 6;
const SNAPSHOTS: u64 = 7;
const FILE: u64 = 8;
const LINK: u64 = 9;

/// The replies of a hostile mount.
#[derive(Clone, Default)]
struct Answers {
    status: Text,
    log: Text,
    ctl: Text,
    /// Target of all links in the snapshots directory.
    link: PathBuf,
    /// Whether requests for attributes and names are read and never answered.
    is_silent: Arc<AtomicBool>,
    /// The request for attributes at which the mount at this path unmounts itself before the answer.
    detach: Option<(usize, PathBuf)>,
    /// Number of requests for attributes so far.
    attrs: Arc<AtomicUsize>,
    /// Number of read requests so far.
    reads: Arc<AtomicUsize>,
    /// Number of open requests so far.
    asked: Arc<AtomicUsize>,
    /// Length of the last request: the reply is read from this offset on.
    behind: Arc<AtomicUsize>,
    /// All requests so far.
    requests: Arc<Mutex<Vec<String>>>,
}

/// The content of a control file.
#[derive(Clone)]
enum Text {
    Of(String),
    /// Repeats this byte without end.
    Endless(u8),
}

impl Default for Text {
    fn default() -> Self {
        // The status of the disk `d`.
        Self::Of(format!("{{\"inode\":{FILE}}}\n"))
    }
}

fn text(text: impl Into<String>) -> Text {
    Text::Of(text.into())
}

impl Filesystem for Answers {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if self.is_silent.load(Ordering::SeqCst) {
            return std::mem::forget(reply);
        }
        let ino = match (parent.0, name.to_str().unwrap_or_default()) {
            (ROOT, ".cowslip") => CONTROL,
            (ROOT, "d") => FILE,
            (ROOT, "dir") => DISK,
            (CONTROL, "status") | (DISK, "status") => STATUS,
            (CONTROL, "log") => LOG,
            (CONTROL, "d") => DISK,
            (CONTROL | DISK, "ctl") => CTL,
            (DISK, "snapshots") => SNAPSHOTS,
            (SNAPSHOTS, _) => LINK,
            _ => return reply.error(Errno::ENOENT),
        };
        reply.entry(&Duration::ZERO, &attr(ino), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if self.is_silent.load(Ordering::SeqCst) {
            // Dropped, it would answer.
            return std::mem::forget(reply);
        }
        let count = self.attrs.fetch_add(1, Ordering::SeqCst);
        if let Some((at, path)) = &self.detach
            && *at == count
        {
            rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH).unwrap();
        }
        reply.attr(&Duration::ZERO, &attr(ino.0));
    }

    fn readlink(&self, _: &Request, _: INodeNo, reply: ReplyData) {
        reply.data(self.link.as_os_str().as_encoded_bytes());
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let text = match ino.0 {
            STATUS => &self.status,
            LOG => &self.log,
            CTL => &self.ctl,
            _ => return reply.error(Errno::EIO),
        };
        match text {
            Text::Of(text) => {
                let behind = if ino.0 == CTL { self.behind.load(Ordering::SeqCst) } else { 0 };
                let start = text.len().min(offset as usize - behind);
                reply.data(&text.as_bytes()[start..text.len().min(start + size as usize)]);
            }
            Text::Endless(byte) => reply.data(&vec![*byte; size as usize]),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.behind.store(data.len(), Ordering::SeqCst);
        self.requests.lock().unwrap().push(String::from_utf8(data.to_vec()).unwrap());
        reply.written(data.len() as u32);
    }
}

fn attr(ino: u64) -> FileAttr {
    let kind = match ino {
        ROOT | CONTROL | DISK | SNAPSHOTS => FileType::Directory,
        LINK => FileType::Symlink,
        _ => FileType::RegularFile,
    };
    FileAttr {
        ino: INodeNo(ino),
        size: if ino == FILE { 4096 } else { 0 },
        blocks: 8,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Mounts a server of `answers` at `m`, owned by the user `uid`. The lab's cleanup unmounts it.
fn served(lab: &Lab, uid: u32, answers: Answers) {
    served_at(lab, "m", "fuse.cowslip", uid, answers);
}

/// Mounts a server of `answers` at `path`, of the type `fstype`.
fn served_at(lab: &Lab, path: &str, fstype: &str, uid: u32, answers: Answers) {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let device: OwnedFd = rustix::fs::open("/dev/fuse", flags, Mode::empty()).unwrap();
    let data = format!(
        "fd={},rootmode=40000,user_id={uid},group_id={uid},allow_other",
        device.as_raw_fd()
    );
    let data = std::ffi::CString::new(data).unwrap();
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("evil", lab.path(path), fstype, flags, &*data).unwrap();
    let session = Session::from_fd(answers, device, SessionACL::All, Config::default()).unwrap();
    thread::spawn(move || session.run());
}

/// Unmounts `m`, which ends the server thread.
fn unmount(lab: &Lab) {
    rustix::mount::unmount(lab.path("m"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

fn lines_of(output: &std::process::Output) -> String {
    let all = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8(all).unwrap()
}

#[test]
fn mount_of_another_user_gets_no_requests() {
    let lab = Lab::new();
    fs::write(lab.path("secret"), b"root's own").unwrap();
    let secret = lab.path("secret").display().to_string();
    let answers = Answers {
        status: Text::Endless(b' '),
        ctl: text(format!("{{\"ok\":{{\"file\":\"{secret}\",\"changed\":\"{secret}\"}}}}\n")),
        link: lab.path("secret"),
        ..Answers::default()
    };
    let asked = Arc::clone(&answers.asked);
    served(&lab, 65534, answers);
    let output = lab.cowslip("status");
    // Other mounts on this host may be unhealthy.
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", show(&output));
    assert!(lines_of(&output).contains("another user's (uid 65534)"), "{}", show(&output));
    for words in [
        "status m",
        "log m",
        "send m/d",
        "diff m/d -o out.q",
        "map m/d",
        "snapshot m/d one",
        "commit m/d",
        "keep m/d kept",
        "remove m/d",
    ] {
        // Output to a pipe, and without the data that the mount would return.
        let output = lab.cowslip(words);
        assert_eq!(output.status.code(), Some(1), "{words}: {}", show(&output));
        let said = lines_of(&output);
        assert!(said.contains("another user's (uid 65534)"), "{words}: {said}");
        assert!(!said.contains("root's own"), "{words}");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0, "it was asked");
    // The mount can still be unmounted.
    lab.ok("umount m");
}

#[test]
fn commands_send_the_known_requests() {
    let lab = Lab::new();
    let ctl = text("{\"ok\":{\"file\":\"\",\"changed\":\"\"}}\n");
    let answers = Answers { ctl, ..Answers::default() };
    let requests = Arc::clone(&answers.requests);
    served(&lab, 0, answers);
    for (words, known) in [
        (
            "keep m/d kept --trust .",
            r#"{"op":"keep","dir":"DIR/kept","trust":["DIR/."],"inode":8}"#,
        ),
        ("finish m/d", r#"{"op":"finish","timeout_ms":null,"inode":8}"#),
        ("finish m/d --timeout 500ms", r#"{"op":"finish","timeout_ms":500,"inode":8}"#),
        ("abort m/d", r#"{"op":"abort","inode":8}"#),
        ("snapshot m/d", r#"{"op":"snapshot","name":null,"sync":false,"inode":8}"#),
        ("snapshot m/d s --sync", r#"{"op":"snapshot","name":"s","sync":true,"inode":8}"#),
        ("snapshot m/d --list", r#"{"op":"snapshots","inode":8}"#),
        ("snapshot m/d --delete s", r#"{"op":"unsnapshot","name":"s","inode":8}"#),
        ("revert m/d s", r#"{"op":"revert","name":"s","force":false,"inode":8}"#),
        ("reset m/d --force", r#"{"op":"reset","force":true,"inode":8}"#),
        ("clone m/d c", r#"{"op":"clone","name":"c","inode":8}"#),
        ("commit m/d", r#"{"op":"commit","force":false,"inode":8}"#),
        (
            "prefetch m/d",
            r#"{"op":"prefetch","start":0,"end":18446744073709551615,"copy":false,"inode":8}"#,
        ),
        (
            "prefetch m/d 4K..1M --copy",
            r#"{"op":"prefetch","start":4096,"end":1048576,"copy":true,"inode":8}"#,
        ),
        ("diff m/d -o out", r#"{"op":"difference","since":null,"until":null,"inode":8}"#),
        (
            "diff m/d --since s --until t -O bmap -o out",
            r#"{"op":"difference","since":"s","until":"t","inode":8}"#,
        ),
        ("send m/d", r#"{"op":"difference","since":null,"until":null,"inode":8}"#),
        ("hydrate m/d", r#"{"op":"hydrate","rate":0,"action":"wait","inode":8}"#),
        (
            "hydrate m/d --rate 1M --background",
            r#"{"op":"hydrate","rate":1048576,"action":"start","inode":8}"#,
        ),
        ("hydrate m/d --pause", r#"{"op":"hydrate","rate":0,"action":"pause","inode":8}"#),
        ("hydrate m/d --cancel", r#"{"op":"hydrate","rate":0,"action":"cancel","inode":8}"#),
        ("remove m/d", r#"{"op":"remove","name":"d","inode":8}"#),
        (
            "add m x=blank:1M --force",
            r#"{"op":"add","disk":"x=blank:1M","cwd":"DIR","force":true,"allow_backing":[],"trust":[]}"#,
        ),
        (
            "add m x=blank:1M --trust . --allow-backing b",
            r#"{"op":"add","disk":"x=blank:1M","cwd":"DIR","force":false,"allow_backing":["DIR/b"],"trust":["DIR/."]}"#,
        ),
        ("umount m --timeout 2s", r#"{"op":"drain","streams":"settle","timeout_ms":2000}"#),
    ] {
        let output = lab.cowslip(words);
        let sent = requests.lock().unwrap().drain(..).collect::<Vec<_>>().join("\n");
        let sent = sent.replace(&lab.dir().display().to_string(), "DIR");
        assert_eq!(sent, known, "{words}: {}", show(&output));
    }
}

#[test]
fn files_named_by_a_mount_are_opened_only_inside_it() {
    for file in ["/secret", "../../../../secret", "link", ""] {
        let lab = Lab::new();
        fs::write(lab.path("secret"), b"root's own").unwrap();
        let file = match file {
            "/secret" => lab.path("secret").display().to_string(),
            file => file.to_owned(),
        };
        let ctl = text(format!("{{\"ok\":{{\"file\":\"{file}\",\"changed\":\"{file}\"}}}}\n"));
        served(&lab, 0, Answers { ctl, link: lab.path("secret"), ..Answers::default() });
        for words in ["send m/d", "diff m/d --full -O rbd -o -"] {
            let output = lab.cowslip(words);
            assert_eq!(output.status.code(), Some(1), "{words}: {}", show(&output));
            assert!(!lines_of(&output).contains("root's own"), "{words}: {file}");
        }
        unmount(&lab);
    }
}

#[test]
fn endless_reply_is_rejected() {
    let lab = Lab::new();
    let endless = || Text::Endless(b' ');
    served(
        &lab,
        0,
        Answers { status: endless(), log: endless(), ctl: endless(), ..Answers::default() },
    );
    for words in ["status m", "log m", "snapshot m/d --list"] {
        let limited = format!("ulimit -v 2000000; exec $COWSLIP {words}");
        let line = one_line(1, &lab.output("sh", &["-c", &limited]), words);
        assert!(line.contains("answers without end"), "{words}: {line}");
    }
    // One bad mount does not hide the others.
    assert!(lines_of(&lab.cowslip("status")).contains("answers without end"));
    unmount(&lab);
}

#[test]
fn invalid_reply_gives_at_most_one_line_on_stderr() {
    let deep = "[".repeat(100_000);
    let texts = [
        "",
        "nothing",
        &deep,
        "{\"mounts\": 7}\n",
        "{\"mounts\":[{\"disks\":[{\"name\":\"d\",\"size\":1e400}]}]}\n",
        "{\"mounts\":[{\"mountpoint\":[],\"disks\":{\"a\":1}}]}\n",
        "{\"ok\":{\"line\":{}}}\n{\"error\":[1]}\n",
    ];
    for answer in texts {
        let lab = Lab::new();
        let answers = Answers {
            status: text(answer),
            log: text(answer),
            ctl: text(answer),
            ..Answers::default()
        };
        served(&lab, 0, answers);
        for words in ["status m", "status m/d", "status", "map m/d", "snapshot m/d x", "send m/d"] {
            let output = lab.cowslip(words);
            let said = String::from_utf8(output.stderr.clone()).unwrap();
            assert!(said.lines().count() <= 1, "{words}: {}", show(&output));
            assert!(matches!(output.status.code(), Some(0..=3)), "{words}: {}", show(&output));
        }
        unmount(&lab);
    }
}

#[test]
fn text_of_a_mount_is_printed_without_control_characters() {
    let evil = "\\u001b]0;owned\\u0007 \\u202egpj.exe\\u009b2J";
    let raw = "\u{1b}]0;owned\u{7} \u{202e}gpj.exe\u{9b}2J";
    let mount = format!(
        "{{\"mountpoint\":\"{evil}\",\"source\":\"{evil}\",\"pid\":1,\"state\":\"{evil}\",\"disks\":[\
         {{\"name\":\"{evil}\",\"mode\":\"{evil}\",\"base\":\"{evil}\",\"error\":\"{evil}\"}}]}}"
    );
    for ctl in
        [format!("{{\"error\":\"{evil}\"}}\n"), format!("{{\"ok\":{{\"line\":\"{evil}\"}}}}\n")]
    {
        let lab = Lab::new();
        let status = text(format!("{{\"schema\":1,\"mounts\":[{mount}]}}\n"));
        let log = text(format!("2026 {raw}\nnext\n"));
        served(&lab, 0, Answers { status, log, ctl: text(ctl), ..Answers::default() });
        for words in
            ["status m", "status m --json", "status", "log m", "snapshot m/d x", "keep m/d k"]
        {
            let said = lines_of(&lab.cowslip(words));
            assert!(said.contains("gpj.exe"), "{words}: {said:?}");
            let hostile = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
            assert!(!said.contains(hostile), "{words}: {said:?}");
        }
        unmount(&lab);
    }
}

#[test]
fn a_fuse_mount_of_another_user_is_not_trusted_whatever_it_says_of_owners() {
    let lab = Lab::new();
    served(&lab, 65534, Answers::default());
    for words in ["mount --config m/d", "mount m2 --store m/.cowslip"] {
        lab.sh("mkdir -p m2");
        let line = lab.refused(1, words);
        let why = "FUSE file system of another user (uid 65534)";
        assert!(line.contains(why), "{words}: {line}");
    }
    unmount(&lab);
}

fn silent() -> Arc<AtomicBool> {
    Arc::new(AtomicBool::new(true))
}

/// Runs `cowslip WORDS`, which must end by itself; nothing but the end of the mount would end one that
/// waits for an answer.
#[track_caller]
fn ended(lab: &Lab, words: &str) -> std::process::Output {
    let all: Vec<&str> =
        ["-s", "KILL", "30", COWSLIP].into_iter().chain(words.split(' ')).collect();
    let ended = lab.output("timeout", &all);
    assert!(ended.status.code().is_some_and(|code| code < 100), "{words}: {}", show(&ended));
    ended
}

#[test]
fn silent_mount_of_another_user_over_a_directory_with_a_mount_holds_up_nobody() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.sh("mkdir -p d/m m2; cp base.img b.img");
    lab.ok("mount d/m w=base.img,overlay=o.cow");
    // Of another type than cowslip's: any FUSE mount can keep silent.
    served_at(&lab, "d", "fuse.evil", 65534, Answers { is_silent: silent(), ..Answers::default() });
    let hidden = lab.path("d/m");
    assert!(lines_of(&ended(&lab, "status")).contains("another mount hides it"));
    for words in
        ["check o.cow", "rebase o.cow --base b.img", "mount m2 b.img,overlay=o.cow", "commit o.cow"]
    {
        assert!(lines_of(&ended(&lab, words)).contains("is in use by"), "{words}");
    }
    for words in ["status d/m", "log d/m", "snapshot d/m/w", "umount d/m", "umount d/m/w"] {
        assert_eq!(ended(&lab, words).status.code(), Some(1), "{words}");
    }
    let error = cowslip::host::mountinfo::open_resolved(&hidden).unwrap_err();
    assert!(error.to_string().contains("another user (uid 65534)"), "{error}");
    rustix::mount::unmount(lab.path("d"), rustix::mount::UnmountFlags::DETACH).unwrap();
    lab.ok("umount d/m");
}

#[test]
fn mount_in_a_silent_mount_of_another_user_holds_up_nobody() {
    let lab = Lab::new();
    lab.sh("mkdir y");
    let answers = Answers::default();
    let is_silent = Arc::clone(&answers.is_silent);
    served_at(&lab, "y", "fuse.evil", 65534, answers);
    served_at(&lab, "y/dir", "fuse.cowslip", 65534, Answers::default());
    is_silent.store(true, Ordering::SeqCst);
    assert!(lines_of(&ended(&lab, "status")).contains("another user's (uid 65534)"));
    for words in ["status y/dir", "log y/dir", "snapshot y/dir/d", "umount y/dir"] {
        let said = lines_of(&ended(&lab, words));
        assert!(said.contains("another user") && said.contains("uid 65534"), "{words}: {said}");
    }
    rustix::mount::unmount(lab.path("y"), rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[test]
fn a_mount_that_takes_questions_and_never_answers_holds_up_nobody() {
    let lab = Lab::new();
    served(&lab, 65534, Answers { is_silent: silent(), ..Answers::default() });
    for words in ["status m", "status", "umount m"] {
        ended(&lab, words);
    }
    assert_eq!(mounts_below(lab.dir()), Vec::<PathBuf>::new());
}

/// Returns the open files of the processes that `pid` has started.
fn files_of_children(pid: u32) -> Vec<usize> {
    let parent = format!("PPid:\t{pid}\n");
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|process| process.path());
    let children = processes.filter(|process| {
        fs::read_to_string(process.join("status")).is_ok_and(|status| status.contains(&parent))
    });
    children.flat_map(|child| fs::read_dir(child.join("fd"))).map(Iterator::count).collect()
}

#[test]
fn process_that_asks_a_silent_mount_has_no_files_of_the_command() {
    let lab = Lab::new();
    served(&lab, 0, Answers { is_silent: silent(), ..Answers::default() });
    // It cannot end while the mount is there, and whoever waits for a pipe or a lock would wait as long.
    let umount = Running(lab.command(COWSLIP).args(["umount", "m"]).spawn().unwrap());
    wait_until("it has but the pipe for its answer", || files_of_children(umount.pid()) == [1]);
    // Ends the connection, and with it all that waits for an answer.
    let _ = rustix::mount::unmount(lab.path("m"), rustix::mount::UnmountFlags::FORCE);
    wait_until("the command ends", || !is_alive(umount.pid()));
}

#[test]
fn fuse_mount_that_detaches_itself_while_it_is_judged_is_not_trusted() {
    for at in 0..6 {
        let lab = Lab::new();
        let answers = Answers { detach: Some((at, lab.path("m"))), ..Answers::default() };
        let reads = Arc::clone(&answers.reads);
        served(&lab, 65534, answers);
        lab.sh("mkdir mnt");
        assert!(!lab.cowslip("mount --config m/d").status.success(), "{at}");
        assert_eq!(reads.load(Ordering::SeqCst), 0, "{at}: the configuration was read");
        let _ = rustix::mount::unmount(lab.path("m"), rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn recorded_paths_are_not_looked_for_in_a_mount_of_another_user() {
    let lab = Lab::new();
    lab.sh("mkdir S own");
    lab.file_with_holes("S/b.img", MIB);
    lab.mount("--store st d=S/b.img,overlay=S/ov x=S/b.img,overlay=st");
    lab.sh("mv S/ov ov2; mv S/b.img own/");
    let answers = Answers::default();
    let asked = Arc::clone(&answers.asked);
    served_at(&lab, "S", "fuse.evil", 65534, answers);
    let said = lines_of(&lab.cowslip("status m"));
    assert!(said.contains("  d  ") && said.contains("  x  "), "{said}");
    lab.umount();
    for words in ["check ov2", "check st"] {
        let said = lines_of(&lab.cowslip(words));
        assert!(said.contains("cannot be compared: '"), "{words}: {said}");
        assert!(said.contains("is a FUSE file system of another user (uid 65534)"), "{said}");
    }
    for words in ["mount m --store st", "commit ov2"] {
        let line = lab.refused(1, words);
        assert!(line.contains("is a FUSE file system of another user (uid 65534)"), "{line}");
    }
    let line = lab.refused(1, "mount m d=own/b.img,overlay=ov2");
    assert!(line.contains("cowslip rebase"), "{line}");
    lab.ok("rebase ov2 --base own/b.img");
    lab.ok("rebase st/names/x --base own/b.img");
    assert_eq!(asked.load(Ordering::SeqCst), 0, "it was asked");
    rustix::mount::unmount(lab.path("S"), rustix::mount::UnmountFlags::DETACH).unwrap();
    lab.mount("--store st d=own/b.img,overlay=ov2");
    lab.sh("cmp m/d own/b.img; cmp m/x own/b.img");
    lab.umount();
}
