//! The daemon's log: written to stderr, a file or the system's log, with the latest part kept in
//! memory for `.cowslip/log`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use log::{Level, Log, Metadata, Record};
use parking_lot::Mutex;

use crate::printable;

/// Size in bytes of the log kept in memory: a few thousand lines.
const RING_CAPACITY: usize = 256 << 10;

static LOG_RING: OnceLock<Mutex<LogRing>> = OnceLock::new();

/// The last bytes of a growing text.
#[derive(Default)]
struct LogRing {
    /// Number of bytes dropped at the front.
    start: u64,
    bytes: VecDeque<u8>,
}

impl LogRing {
    fn push(&mut self, text: &[u8]) {
        self.bytes.extend(text);
        let extra = self.bytes.len().saturating_sub(RING_CAPACITY);
        self.bytes.drain(..extra);
        self.start += extra as u64;
    }

    /// Returns up to `len` bytes starting at `offset`, or at the oldest byte still held.
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let skip = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.iter().skip(skip).take(len).copied().collect()
    }
}

/// Destination of log lines besides memory.
pub(crate) enum LogTarget {
    /// The terminal (`-f`).
    Stderr,
    /// The file of `--log FILE`.
    File(File),
    /// The system's log, for warnings and errors, which must outlive the daemon.
    System,
}

struct LogTee(LogTarget);

impl Write for LogTee {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        LOG_RING.get_or_init(Mutex::default).lock().push(text);
        // A log that cannot be written must not fail the logged operation.
        let _ = match &mut self.0 {
            LogTarget::Stderr => io::stderr().write_all(text),
            LogTarget::File(file) => file.write_all(text),
            LogTarget::System => Ok(()),
        };
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct DaemonLogger {
    lines: env_logger::Logger,
    system: Option<Syslog>,
}

impl Log for DaemonLogger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.lines.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.lines.matches(record) || is_interrupted_reply(record) {
            return;
        }
        self.lines.log(record);
        if let Some(system) = self.system.as_ref().filter(|_| record.level() <= Level::Warn) {
            system.send(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// Returns whether `record` is the FUSE adapter's error that the kernel no longer wants a reply
/// (`ENOENT`): the client was killed or interrupted. Hundreds of them may come at once.
fn is_interrupted_reply(record: &Record<'_>) -> bool {
    record.target().starts_with("fuser")
        && record.level() == Level::Error
        && record.args().to_string().starts_with("Failed to send FUSE reply")
        && record.args().to_string().ends_with("(os error 2)")
}

/// The system's log, as in syslog(3): one datagram per line.
struct Syslog {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Syslog {
    /// Facility of the messages: `LOG_DAEMON`.
    const FACILITY: u8 = 3;
    /// Maximum length of a line in bytes: most daemons accept 8 KiB and cut off the rest.
    const MAX_LINE_LEN: usize = 4096;

    /// Opens a socket to the log at `path` that never blocks.
    fn at(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned() })
    }

    fn send(&self, level: Level, text: &str) {
        let severity = if level == Level::Error { 3 } else { 4 };
        let priority = Self::FACILITY << 3 | severity;
        let (now, pid) = (syslog_time(), std::process::id());
        let mut line = format!("<{priority}>{now} cowslip[{pid}]: {}", printable::line(text));
        line.truncate(line.floor_char_boundary(Self::MAX_LINE_LEN));
        // Ignore errors: if nobody listens, or not fast enough, the daemon must not wait. Send by
        // path each time, since the log daemon may have been restarted.
        let _ = self.socket.send_to(line.as_bytes(), &self.path);
    }
}

/// Starts logging. `RUST_LOG` selects the records; the default is everything from level info up.
pub(crate) fn start(sink: LogTarget) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Info);
    // fuser logs every request for an unimplemented operation, which is noise here.
    builder.filter_module("fuser", log::LevelFilter::Error);
    builder.parse_default_env();
    builder.format(|out, record| {
        // Keep a record on one line, whatever names it contains.
        let text = record.args().to_string();
        let now = out.timestamp_seconds();
        writeln!(out, "{now} {:5} {}", record.level(), printable::line(&text))
    });
    let system = match sink {
        LogTarget::System => Syslog::at(Path::new("/dev/log")).ok(),
        LogTarget::Stderr | LogTarget::File(_) => None,
    };
    builder.target(env_logger::Target::Pipe(Box::new(LogTee(sink))));
    let lines = builder.build();
    let most = lines.filter();
    // A second call, in a test, keeps the first logger.
    if log::set_boxed_logger(Box::new(DaemonLogger { lines, system })).is_ok() {
        log::set_max_level(most);
    }
}

/// Returns the local time in the format of syslog (RFC 3164, section 4.1.2): `Jan 31 12:34:56`.
fn syslog_time() -> String {
    jiff::Zoned::now().strftime("%b %e %H:%M:%S").to_string()
}

/// Returns up to `len` bytes of the log in memory, starting at `offset`.
#[must_use]
pub(crate) fn read(offset: u64, len: usize) -> Vec<u8> {
    LOG_RING.get_or_init(Mutex::default).lock().read(offset, len)
}

/// Returns the offset of the oldest byte of the log still in memory.
#[must_use]
pub(crate) fn oldest_offset() -> u64 {
    LOG_RING.get_or_init(Mutex::default).lock().start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ring_keeps_the_last_bytes_at_their_offsets() {
        let mut ring = LogRing::default();
        for number in 0..40_000 {
            ring.push(format!("line {number:06}\n").as_bytes());
        }
        assert_eq!(ring.start + ring.bytes.len() as u64, 40_000 * 12);
        assert_eq!(ring.read(39_999 * 12, 100), b"line 039999\n");
        assert_eq!(ring.read(0, 100), ring.read(ring.start, 100));
    }

    #[test]
    fn syslog_line_is_one_datagram_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Syslog::at(&path).unwrap();
        // Nobody listens yet.
        log.send(Level::Warn, "lost");
        let listener = UnixDatagram::bind(&path).unwrap();
        log.send(Level::Warn, "a\nb \u{1b}[2J");
        log.send(Level::Error, &"é".repeat(Syslog::MAX_LINE_LEN));
        let mut buf = [0; 2 * Syslog::MAX_LINE_LEN];
        let mut received = || {
            let len = listener.recv(&mut buf).unwrap();
            String::from_utf8(buf[..len].to_vec()).unwrap()
        };
        let line = received();
        let end = format!(" cowslip[{}]: a\\nb \\u{{1b}}[2J", std::process::id());
        assert!(line.starts_with("<28>") && line.ends_with(&end), "{line}");
        let line = received();
        assert!(line.starts_with("<27>") && line.len() <= Syslog::MAX_LINE_LEN, "{line}");
        // A full queue must not block the sender.
        (0..10_000).for_each(|_| log.send(Level::Error, "again"));
    }

    #[test]
    fn reply_to_an_interrupted_request_is_not_logged() {
        let is_one = |target: &str, text: &str| {
            let args = format_args!("{text}");
            let record = Record::builder().level(Level::Error).target(target).args(args).build();
            is_interrupted_reply(&record)
        };
        let gone = "Failed to send FUSE reply: No such file or directory (os error 2)";
        assert!(is_one("fuser::reply", gone));
        assert!(!is_one("cowslip::fs", gone));
        assert!(!is_one("fuser::reply", "Failed to send FUSE reply: Bad address (os error 14)"));
    }
}
