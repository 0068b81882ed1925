//! strace as a tool of the tests: records every system call of a program that changes files, and
//! kills the program at a chosen one.
//!
//! A [`Call`] is identified by its thread, the name of its system call, and its number among the
//! calls of this name in this thread, which is how strace counts. A kill happens at the entry of a
//! call, so the call itself is not executed: the disk holds the changes of the calls before it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Output;

use rustix::process::Signal;

use super::mount::{COWSLIP, Lab, Running, is_stopped, signal, wait_until};

/// All system calls that can change a file, its name or its durability; `?` marks calls that some
/// processors lack. (Changes through mapped memory cannot be traced; cowslip maps no files.)
const CHANGING: &str = "?creat,?open,openat,openat2,write,writev,pwrite64,pwritev,pwritev2,\
    sendfile,splice,copy_file_range,fallocate,ftruncate,truncate,sync,syncfs,fsync,fdatasync,\
    sync_file_range,msync,?rename,renameat,renameat2,?unlink,unlinkat,?rmdir,?mkdir,mkdirat,?link,\
    linkat,?symlink,symlinkat,?mknod,mknodat,?chmod,fchmod,fchmodat,?chown,?lchown,fchown,fchownat,\
    ?utime,?utimes,?futimesat,utimensat,setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,\
    fremovexattr,ioctl,io_uring_enter,io_submit";

/// A system call that changes a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    /// The thread's id in the kernel.
    pub thread: u32,
    pub name: String,
    /// Number, from 1, among all calls of this name in this thread, including those that change
    /// nothing.
    pub nth: u32,
    /// The line that strace printed for the call.
    pub shown: String,
}

impl Call {
    /// Returns the call's name and arguments.
    fn begin(&self) -> &str {
        let shown = self.shown.trim_start();
        shown.split(')').next().unwrap_or(shown).split(" <unfinished").next().unwrap_or(shown)
    }
}

/// The result of one strace run.
pub(crate) struct Seen {
    /// The changes to files in the lab, in order.
    pub calls: Vec<Call>,
    /// For every name of a call, the highest number of such calls in one thread, including those
    /// that change nothing.
    most: BTreeMap<String, u32>,
    pub killed: bool,
    /// The complete output, for failure messages.
    pub text: String,
}

impl Seen {
    fn read(lab: &Lab, path: &PathBuf) -> Self {
        let text = String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
        let dir = lab.dir().canonicalize().unwrap().display().to_string();
        let mut counts: HashMap<(&str, &str), u32> = HashMap::new();
        let mut calls = Vec::new();
        for line in text.lines() {
            let Some((thread, shown)) = line.split_once(' ') else { continue };
            // Skips signals, exits and the second half of an interrupted call.
            let Some((name, _)) = shown.trim_start().split_once('(') else { continue };
            if name.is_empty() || name.contains([' ', '<', '-', '+']) {
                continue;
            }
            let nth = counts.entry((thread, name)).or_default();
            *nth += 1;
            if is_change(name, shown, &dir) {
                let thread = thread.parse().unwrap();
                let (name, nth, shown) = (name.to_owned(), *nth, shown.to_owned());
                calls.push(Call { thread, name, nth, shown });
            }
        }
        let killed = text.contains("+++ killed by SIGKILL +++");
        if killed {
            // For a thread that is already dead strace may repeat the call that it read last: the
            // one of the kill.
            calls.dedup_by(|later, earlier| {
                later.thread != earlier.thread && later.begin() == earlier.begin()
            });
        }
        let mut most = BTreeMap::new();
        for ((_, name), count) in counts {
            let known: &mut u32 = most.entry(name.to_owned()).or_default();
            *known = count.max(*known);
        }
        Self { calls, most, killed, text }
    }

    /// Returns kill conditions just past the last call of each kind.
    pub(crate) fn past(&self) -> Vec<String> {
        let kinds: BTreeSet<&str> = self.calls.iter().map(|call| call.name.as_str()).collect();
        kinds.into_iter().map(|name| kill_at(name, self.most[name] + 1)).collect()
    }
}

/// Whether a call changes a file below `dir`.
fn is_change(name: &str, shown: &str, dir: &str) -> bool {
    // A file without a name disappears with its process, so changes to it do not count.
    let is_nameless = shown.contains(">(deleted)") || shown.contains("O_TMPFILE");
    if is_nameless || !shown.contains(dir) {
        return false;
    }
    match name {
        "open" | "openat" | "openat2" => shown.contains("O_CREAT") || shown.contains("O_TRUNC"),
        "ioctl" => shown.contains("CLONE"),
        _ => true,
    }
}

/// Returns the strace option that kills at the `nth` call of `name`.
pub(crate) fn kill_at(name: &str, nth: u32) -> String {
    format!("inject={name}:signal=SIGKILL:when={nth}")
}

/// A running strace, attached to a daemon.
pub(crate) struct Strace {
    child: Running,
    out: PathBuf,
}

impl Strace {
    /// Attaches to all present and future threads of `pid`; counting begins now.
    #[track_caller]
    pub(crate) fn attach(lab: &Lab, pid: u32, kills: &[String]) -> Self {
        Self::attach_with(lab, pid, CHANGING, kills)
    }

    /// Attaches like [`attach`](Self::attach), but traces `calls` instead of the calls that change
    /// files.
    #[track_caller]
    pub(crate) fn attach_with(lab: &Lab, pid: u32, calls: &str, kills: &[String]) -> Self {
        let (out, said) = (lab.path("strace.txt"), lab.path("strace.err"));
        let mut command = lab.command("strace");
        command.args(words(&out, calls, kills)).args(["-p", &pid.to_string()]);
        command.stderr(File::create(&said).unwrap());
        let child = command.spawn();
        let mut child =
            Running(child.unwrap_or_else(|error| panic!("strace: {error}: install it")));
        // strace prints "attached" once every thread is stopped, before any of them continues.
        wait_until("strace has attached", || {
            let said = fs::read_to_string(&said).unwrap_or_default();
            assert!(child.0.try_wait().unwrap().is_none(), "strace ends: {said}");
            said.contains(" attached")
        });
        Self { child, out }
    }

    /// Waits until `is_over` or until all traced processes have exited, and returns the calls seen.
    #[track_caller]
    pub(crate) fn end(mut self, lab: &Lab, mut is_over: impl FnMut() -> bool) -> Seen {
        let mut has_ended = false;
        wait_until("what strace watches comes to its end", || {
            has_ended = self.child.0.try_wait().unwrap().is_some();
            has_ended || is_over()
        });
        if !has_ended {
            self.detach();
        }
        Seen::read(lab, &self.out)
    }

    fn detach(&mut self) {
        signal(self.child.pid(), Signal::INT).unwrap();
        wait_until("strace lets go", || self.child.0.try_wait().unwrap().is_some());
    }
}

fn words(out: &std::path::Path, calls: &str, kills: &[String]) -> Vec<String> {
    let mut words: Vec<String> = ["-f", "-y", "-o"].map(str::to_owned).into();
    words.extend([out.display().to_string(), "-e".to_owned(), format!("trace={calls}")]);
    words.extend(kills.iter().flat_map(|kill| ["-e".to_owned(), kill.clone()]));
    words
}

/// Runs `cowslip WORDS` under strace.
pub(crate) fn run(lab: &Lab, words_of_it: &str, kills: &[String]) -> (Output, Seen) {
    run_on(lab, words_of_it, "/dev/null", kills)
}

/// Runs `cowslip WORDS` under strace, with the file `input` of the lab as its stdin.
pub(crate) fn run_on(
    lab: &Lab,
    words_of_it: &str,
    input: &str,
    kills: &[String],
) -> (Output, Seen) {
    let out = lab.path("strace.txt");
    let script = format!("exec strace \"$@\" < {input}");
    let mut args = vec!["-c".to_owned(), script, "strace".to_owned()];
    args.extend(words(&out, CHANGING, kills));
    args.push(COWSLIP.to_owned());
    args.extend(words_of_it.split_whitespace().map(str::to_owned));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    (lab.output("sh", &args), Seen::read(lab, &out))
}

/// Stops the process `pid` right after one of its threads has made its `nth` call of `name`, which
/// must be a call that no signal interrupts. Later calls can then be counted separately; SIGCONT
/// continues the process.
#[track_caller]
pub(crate) fn stop_after<T>(
    lab: &Lab,
    pid: u32,
    name: &str,
    nth: u32,
    ask: impl FnOnce() -> T,
) -> T {
    let stop = [format!("inject={name}:signal=SIGSTOP:when={nth}")];
    let mut strace = Strace::attach_with(lab, pid, name, &stop);
    let asked = ask();
    let has_come = || fs::read_to_string(&strace.out).unwrap().contains("--- stopped by SIGSTOP");
    wait_until("the call is made", || has_come() && is_stopped(pid));
    strace.detach();
    asked
}
