//! The daemon's log: to stderr or a file, and the last of it in memory for `.cowslip/log`.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;

use parking_lot::Mutex;

use crate::printable;

/// What is kept in memory: some thousand lines.
const KEPT: usize = 256 << 10;

static RING: OnceLock<Mutex<Ring>> = OnceLock::new();

/// The last bytes of a text that only grows.
#[derive(Default)]
struct Ring {
    /// Bytes that were dropped at the front.
    start: u64,
    bytes: VecDeque<u8>,
}

impl Ring {
    fn push(&mut self, text: &[u8]) {
        self.bytes.extend(text);
        let extra = self.bytes.len().saturating_sub(KEPT);
        self.bytes.drain(..extra);
        self.start += extra as u64;
    }

    /// Up to `len` bytes from `offset` on, or from the oldest byte that is still there.
    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let skip = usize::try_from(offset.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.iter().skip(skip).take(len).copied().collect()
    }
}

/// Where log lines go besides memory.
pub enum Sink {
    /// The terminal (`-f`).
    Stderr,
    /// `--log FILE`.
    File(File),
    /// Nowhere.
    Nothing,
}

struct Tee(Sink);

impl Write for Tee {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        RING.get_or_init(Mutex::default).lock().push(text);
        // A log that cannot be written is no reason to fail what was logged.
        let _ = match &mut self.0 {
            Sink::Stderr => io::stderr().write_all(text),
            Sink::File(file) => file.write_all(text),
            Sink::Nothing => Ok(()),
        };
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Starts logging. `RUST_LOG` chooses what is logged; by default everything but debugging.
pub fn start(sink: Sink) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(log::LevelFilter::Info);
    // The adapter logs each request of an operation it does not have; none of that is ours.
    builder.filter_module("fuser", log::LevelFilter::Error);
    builder.parse_default_env();
    builder.format(|out, record| {
        let now = time_of_day();
        // One line each, whatever names are in it.
        let text = record.args().to_string();
        writeln!(out, "{now} {:5} {}", record.level(), printable::line(&text))
    });
    builder.target(env_logger::Target::Pipe(Box::new(Tee(sink))));
    // A second start, in a test, keeps the first.
    let _ = builder.try_init();
}

/// Now in UTC, as `2026-01-31T12:34:56Z`.
fn time_of_day() -> String {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
    let (days, rest) = (now.div_euclid(86_400), now.rem_euclid(86_400));
    // Civil date from days since 1970 (Howard Hinnant, "chrono-compatible low-level date
    // algorithms": eras of 400 years that begin in March).
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Up to `len` bytes of the log from `offset` on.
#[must_use]
pub fn read(offset: u64, len: usize) -> Vec<u8> {
    RING.get_or_init(Mutex::default).lock().read(offset, len)
}

/// The offset of the oldest byte that is still there.
#[must_use]
pub fn oldest() -> u64 {
    RING.get_or_init(Mutex::default).lock().start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_bytes_at_their_offsets() {
        let mut ring = Ring::default();
        for number in 0..40_000 {
            ring.push(format!("line {number:06}\n").as_bytes());
        }
        assert_eq!(ring.start + ring.bytes.len() as u64, 40_000 * 12);
        assert_eq!(ring.read(39_999 * 12, 100), b"line 039999\n");
        assert_eq!(ring.read(0, 100), ring.read(ring.start, 100));
    }
}
