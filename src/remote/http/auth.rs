//! Header lines by which the server knows this side, from a file or a command. They are read again when
//! the server refuses them, and no part of them is ever shown.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use super::error::HttpError;
use crate::config::AuthSource;
use crate::confined;
use crate::host::os_message;
use crate::printable;
use crate::process::restore_caller_limits;
use crate::program::stderr::StderrTail;
use crate::trusted_path;

/// The most bytes of a file, or of what a command prints: tokens have a few KiB, and servers take 8 KiB.
const MAX_LEN: u64 = 64 << 10;
/// The most header lines.
const MAX_LINES: usize = 32;
/// The longest time that a command may take.
const MAX_TIME: Duration = Duration::from_secs(20);
/// The shortest time between two readings: a server that refuses everything must not make a command
/// run in a loop.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

/// Headers that belong to the request itself.
const OURS: &[&str] = &[
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-match",
    "if-range",
    "keep-alive",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The source of header lines, and what it last gave.
pub(super) struct Auth {
    source: AuthSource,
    dir: PathBuf,
    time: Duration,
    given: RwLock<Given>,
    /// Held while the source is read: others who were refused wait for it.
    reading: tokio::sync::Mutex<()>,
}

/// What a reading gave.
#[derive(Clone)]
pub(super) struct Given {
    pub(super) headers: HeaderMap,
    /// When it was read.
    read: Instant,
}

impl Auth {
    /// Reads the lines for the first time; a command runs in `dir`, for at most `time`.
    ///
    /// # Errors
    /// [`HttpError::Auth`]. It waits for the command.
    pub(super) fn read(source: &AuthSource, dir: &Path, time: Duration) -> Result<Self, HttpError> {
        let time = time.min(MAX_TIME);
        let given = Given { headers: read(source, dir, time)?, read: Instant::now() };
        Ok(Self {
            source: source.clone(),
            dir: dir.to_owned(),
            time,
            given: RwLock::new(given),
            reading: tokio::sync::Mutex::default(),
        })
    }

    /// Returns what was read last.
    pub(super) fn given(&self) -> Given {
        self.given.read().clone()
    }

    /// Reads the lines again after the server refused `refused`, unless that was done meanwhile or a
    /// moment ago. Returns whether there are others to try.
    ///
    /// # Errors
    /// [`HttpError::Auth`].
    pub(super) async fn refresh(&self, refused: &Given) -> Result<bool, HttpError> {
        let _reading = self.reading.lock().await;
        let last = self.given().read;
        if last != refused.read {
            return Ok(true);
        }
        if last.elapsed() < MIN_INTERVAL {
            return Ok(false);
        }
        let (source, dir, time) = (self.source.clone(), self.dir.clone(), self.time);
        let reading = tokio::task::spawn_blocking(move || read(&source, &dir, time));
        let headers = reading.await.map_err(|error| HttpError::Auth(error.to_string()))?;
        let given = Given { headers: headers?, read: Instant::now() };
        *self.given.write() = given;
        Ok(true)
    }
}

fn read(source: &AuthSource, dir: &Path, time: Duration) -> Result<HeaderMap, HttpError> {
    let (place, bytes) = match source {
        AuthSource::File(file) => {
            let place = format!("auth='{}'", file.display());
            let failed =
                |error: io::Error| HttpError::Auth(format!("{place}: {}", os_message(&error)));
            // Another user must not decide which of our secrets goes to a server.
            let opened = trusted_path::open_input(file).map_err(failed)?;
            check_file(&opened, &place)?;
            trusted_path::check_file(&opened).map_err(failed)?;
            let bytes = confined::read_to_limit(&opened, MAX_LEN).map_err(failed)?;
            (place, bytes)
        }
        AuthSource::Command(words) => {
            let name = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
            let place = format!("auth=cmd:{}", printable::line(&name));
            let bytes = run(words, dir, time);
            (place.clone(), bytes.map_err(|why| HttpError::Auth(format!("{place}: {why}")))?)
        }
    };
    parse(&bytes).map_err(|why| HttpError::Auth(format!("{place}: {why}")))
}

/// Makes sure that nobody else can read or change the file.
fn check_file(file: &File, place: &str) -> Result<(), HttpError> {
    let refused = |why: &str| Err(HttpError::Auth(format!("{place} {why}")));
    let found = file.metadata().map_err(|error| HttpError::Auth(os_message(&error)))?;
    if !found.is_file() || found.len() == 0 {
        return refused("is empty, or no file");
    }
    if found.uid() != rustix::process::geteuid().as_raw() && found.uid() != 0 {
        return refused("belongs to somebody else: take a file of yours");
    }
    if found.mode() & 0o077 != 0 {
        return refused("can be read by others: chmod 600 it");
    }
    Ok(())
}

/// Parses lines `Name: value`; empty ones, and those that begin with `#`, are skipped.
fn parse(bytes: &[u8]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        // Not the line itself: it is a secret.
        let bad = |why: &str| format!("line {}: {why}", number + 1);
        let colon = line.iter().position(|byte| *byte == b':');
        let (name, value) = line.split_at(colon.ok_or_else(|| bad("write 'Name: value'"))?);
        let name = HeaderName::from_bytes(name.trim_ascii());
        let name = name.map_err(|_| bad("no header has such a name: write 'Name: value'"))?;
        if OURS.contains(&name.as_str()) {
            return Err(bad(&format!("the header '{name}' is cowslip's own")));
        }
        let value = HeaderValue::from_bytes(value.get(1..).unwrap_or_default().trim_ascii());
        let mut value = value.map_err(|_| bad("no header has such a value"))?;
        value.set_sensitive(true);
        if headers.len() >= MAX_LINES {
            return Err(format!("there are more than {MAX_LINES} header lines"));
        }
        headers.append(name, value);
    }
    match headers.is_empty() {
        true => Err("there is no header line: write 'Authorization: ...'".to_owned()),
        false => Ok(headers),
    }
}

/// A command and its process group, which end with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The number of the group is ours until the program is reaped.
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}

/// Runs a command, and returns what it printed.
fn run(words: &[OsString], dir: &Path, time: Duration) -> Result<Vec<u8>, String> {
    let failed = |error: io::Error| format!("cannot run it: {}", os_message(&error));
    let until = Instant::now() + time;
    let (program, arguments) = words.split_first().ok_or("a program is missing")?;
    let (stderr, stderr_end) = StderrTail::new().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(dir).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr_end);
    restore_caller_limits(&mut command);
    let mut running = Running(command.spawn().map_err(failed)?);
    drop(command);
    let mut output = running.0.stdout.take().ok_or("it has no output")?;
    let mut bytes = Vec::new();
    let mut buf = [0; 4096];
    let late = || format!("it did not end within {} s", time.as_secs_f32());
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| late())?;
        let mut fds = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)];
        match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left))) {
            Ok(0) => return Err(late()),
            Ok(_) => {}
            Err(error) => return Err(failed(error.into())),
        }
        match output.read(&mut buf).map_err(failed)? {
            0 => break,
            len => bytes.extend(buf.iter().take(len)),
        }
        if bytes.len() as u64 > MAX_LEN {
            return Err(format!("it printed more than {} KiB", MAX_LEN >> 10));
        }
    }
    let status = loop {
        match running.0.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() >= until => return Err(late()),
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    if !status.success() {
        let line = stderr.last_line().map_or_else(String::new, |line| format!(": {line}"));
        return Err(format!("it ended with {status}{line}"));
    }
    Ok(bytes)
}
