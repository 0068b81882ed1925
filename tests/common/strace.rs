//! strace, which sees every change that a program makes to files, and kills at the one asked for.
//!
//! A [`Call`] is named by its thread, its system call and its number among the calls of that name
//! in that thread: so does strace count. A kill comes at the entry of a call, which is then not
//! done: what is on disk is what the calls before it have left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Output;

use rustix::process::Signal;

use super::mount::{COWSLIP, Lab, Running, is_stopped, signal, wait_until};

/// Every system call that can change a file, its name or how durable it is; `?` where not every
/// processor has it. (Memory that is mapped from a file cannot be seen so; cowslip maps none.)
const CHANGING: &str = "?creat,?open,openat,openat2,write,writev,pwrite64,pwritev,pwritev2,\
    sendfile,splice,copy_file_range,fallocate,ftruncate,truncate,sync,syncfs,fsync,fdatasync,\
    sync_file_range,msync,?rename,renameat,renameat2,?unlink,unlinkat,?rmdir,?mkdir,mkdirat,?link,\
    linkat,?symlink,symlinkat,?mknod,mknodat,?chmod,fchmod,fchmodat,?chown,?lchown,fchown,fchownat,\
    ?utime,?utimes,?futimesat,utimensat,setxattr,lsetxattr,fsetxattr,removexattr,lremovexattr,\
    fremovexattr,ioctl,io_uring_enter,io_submit";

/// A system call that changes something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// As the kernel numbers it.
    pub thread: u32,
    pub name: String,
    /// From 1, among the calls of that name in its thread; those that change nothing count, too.
    pub nth: u32,
    /// As strace shows it.
    pub shown: String,
}

impl Call {
    /// Its name and what it was called with.
    fn begin(&self) -> &str {
        let shown = self.shown.trim_start();
        shown.split(')').next().unwrap_or(shown).split(" <unfinished").next().unwrap_or(shown)
    }
}

/// What strace has seen.
pub struct Seen {
    /// The changes to files in the laboratory, in their order.
    pub calls: Vec<Call>,
    /// How many calls of a name there were in one thread at most, other calls included.
    most: BTreeMap<String, u32>,
    pub killed: bool,
    /// All of it, for a message.
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
            // Not a signal, an end, or the second half of a call.
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
            // Of a thread that is dead already strace may show what it has read last: the call
            // that killed.
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

    /// Kills just past the last call of each kind.
    pub fn past(&self) -> Vec<String> {
        let kinds: BTreeSet<&str> = self.calls.iter().map(|call| call.name.as_str()).collect();
        kinds.into_iter().map(|name| kill_at(name, self.most[name] + 1)).collect()
    }
}

/// Whether a call changes what a name in `dir` leads to.
fn is_change(name: &str, shown: &str, dir: &str) -> bool {
    // A file without a name is gone with its process, whatever is done to it.
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

/// The condition under which strace is to kill.
pub fn kill_at(name: &str, nth: u32) -> String {
    format!("inject={name}:signal=SIGKILL:when={nth}")
}

/// A strace that watches a daemon.
pub struct Strace {
    child: Running,
    out: PathBuf,
}

impl Strace {
    /// Attaches to all threads of `pid`, also those to come; counts begin now.
    #[track_caller]
    pub fn attach(lab: &Lab, pid: u32, kills: &[String]) -> Self {
        Self::attach_with(lab, pid, CHANGING, kills)
    }

    /// As [`attach`](Self::attach), with other system calls than those that change a file.
    #[track_caller]
    pub fn attach_with(lab: &Lab, pid: u32, calls: &str, kills: &[String]) -> Self {
        let (out, said) = (lab.path("strace.txt"), lab.path("strace.err"));
        let mut command = lab.command("strace");
        command.args(words(&out, calls, kills)).args(["-p", &pid.to_string()]);
        command.stderr(File::create(&said).unwrap());
        let child = command.spawn();
        let mut child =
            Running(child.unwrap_or_else(|error| panic!("strace: {error}: install it")));
        // It says so once every thread is held, before any of them goes on.
        wait_until("strace has attached", || {
            let said = fs::read_to_string(&said).unwrap_or_default();
            assert!(child.0.try_wait().unwrap().is_none(), "strace ends: {said}");
            said.contains(" attached")
        });
        Self { child, out }
    }

    /// Waits until `is_over` or until all that it watches is dead, and tells what it saw.
    #[track_caller]
    pub fn end(mut self, lab: &Lab, mut is_over: impl FnMut() -> bool) -> Seen {
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
pub fn run(lab: &Lab, words_of_it: &str, kills: &[String]) -> (Output, Seen) {
    run_on(lab, words_of_it, "/dev/null", kills)
}

/// Runs `cowslip WORDS` under strace, with the file `input` of the laboratory as its stdin.
pub fn run_on(lab: &Lab, words_of_it: &str, input: &str, kills: &[String]) -> (Output, Seen) {
    let out = lab.path("strace.txt");
    let script = format!("exec strace \"$@\" < {input}");
    let mut args = vec!["-c".to_owned(), script, "strace".to_owned()];
    args.extend(words(&out, CHANGING, kills));
    args.push(COWSLIP.to_owned());
    args.extend(words_of_it.split_whitespace().map(str::to_owned));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    (lab.output("sh", &args), Seen::read(lab, &out))
}

/// Stops the process `pid` when one of its threads has made its `nth` call of that `name`, which
/// must be one that no signal interrupts. What comes after it can then be counted by itself;
/// SIGCONT continues it.
#[track_caller]
pub fn stop_after<T>(lab: &Lab, pid: u32, name: &str, nth: u32, ask: impl FnOnce() -> T) -> T {
    let stop = [format!("inject={name}:signal=SIGSTOP:when={nth}")];
    let mut strace = Strace::attach_with(lab, pid, name, &stop);
    let asked = ask();
    let has_come = || fs::read_to_string(&strace.out).unwrap().contains("--- stopped by SIGSTOP");
    wait_until("the call is made", || has_come() && is_stopped(pid));
    strace.detach();
    asked
}
