//! The progress of a transfer: data, holes, rate, time left.
//!
//! Both ends of `cowslip send ... | cowslip recv ...` share one terminal, which has room for one
//! progress line: the end that locks the terminal first shows it.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use super::progress::{ProgressLine, Verbosity, bytes_per_second, format_seconds};
use crate::config::format_size;
use crate::transfer::TransferProgress;

/// The display of a transfer's progress.
pub(super) struct TransferMeter {
    /// The progress line; `None` when the other end has the terminal.
    line: Option<ProgressLine>,
    /// The locked terminal.
    _terminal: Option<File>,
    /// The verb for the bytes: sent, received.
    verb: &'static str,
    /// Estimate of the amount of data in bytes, where known.
    expected_data: Option<u64>,
    started: Instant,
}

impl TransferMeter {
    pub(super) fn new(verb: &'static str, data: Option<u64>, verbosity: Verbosity) -> Self {
        let terminal = io::stderr().is_terminal().then(lock_terminal);
        let line = (!matches!(&terminal, Some(Err(_)))).then(|| ProgressLine::new(verbosity));
        let terminal = terminal.and_then(Result::ok);
        Self { line, _terminal: terminal, verb, expected_data: data, started: Instant::now() }
    }

    pub(super) fn show(&mut self, told: &TransferProgress) {
        if let Some(shown) = &mut self.line
            && shown.is_due()
        {
            let text = progress_text(told, self.expected_data, self.started.elapsed());
            shown.show(&format!("{} {text}", self.verb));
        }
    }

    pub(super) fn end(&mut self) {
        if let Some(line) = &mut self.line {
            line.end();
        }
    }
}

/// Locks the terminal behind stderr. The lock is on a newly opened file: the inherited open file is
/// shared with the other end.
fn lock_terminal() -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::open("/proc/self/fd/2", flags, Mode::empty())?);
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Formats the progress after `passed` time; `data` is an estimate of the amount of data in bytes.
fn progress_text(told: &TransferProgress, data: Option<u64>, passed: Duration) -> String {
    let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
    let rate = bytes_per_second(told.data, millis);
    let mut text = format!(
        "{} of data, {} of holes, {}/s",
        format_size(told.data),
        format_size(told.holes),
        format_size(rate)
    );
    let Some(size) = told.size.filter(|size| *size > told.from) else {
        return text;
    };
    let (done, total) = (told.reached - told.from, size - told.from);
    text += &format!(", {} %", u128::from(done) * 100 / u128::from(total));
    // Holes take no time, so what remains is the remaining data, as far as known.
    let left = total.saturating_sub(done);
    let left = data.map_or(left, |data| data.saturating_sub(told.data).min(left));
    if rate > 0 {
        let by_data = left.div_ceil(rate);
        // The estimate of data may be far too large; the share of the whole bounds the time.
        let by_share =
            u128::from(millis) * u128::from(total.saturating_sub(done)) / u128::from(done.max(1));
        let by_share = u64::try_from(by_share.div_ceil(1000)).unwrap_or(u64::MAX);
        text += &format!(", {} left", format_seconds(by_data.min(by_share)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(from: u64, reached: u64, size: Option<u64>, data: u64) -> TransferProgress {
        TransferProgress { from, reached, size, data, holes: reached - from - data }
    }

    #[test]
    fn progress_text_has_data_holes_rate_share_and_time_left() {
        let mib = 1 << 20;
        let half = told(0, 500 * mib, Some(1000 * mib), 100 * mib);
        assert_eq!(
            progress_text(&half, None, Duration::from_secs(2)),
            "100 MiB of data, 400 MiB of holes, 50 MiB/s, 50 %, 2 s left"
        );
        // Only 50 of the remaining 500 MiB are data.
        let text = progress_text(&half, Some(150 * mib), Duration::from_secs(2));
        assert!(text.ends_with("50 %, 1 s left"), "{text}");
        let slow = progress_text(&half, None, Duration::from_secs(200));
        assert!(slow.ends_with("3:20 min left"), "{slow}");
        let slower = progress_text(&half, None, Duration::from_secs(20_000));
        assert!(slower.ends_with(" 5:33 h left"), "{slower}");
        // A preallocated file: the estimate of data is far too large.
        let text = progress_text(&half, Some(100_000 * mib), Duration::from_secs(2));
        assert!(text.ends_with("50 %, 2 s left"), "{text}");
    }

    #[test]
    fn progress_text_omits_unknown_share_and_time() {
        let text = progress_text(&told(0, 10, None, 10), None, Duration::from_secs(1));
        assert_eq!(text, "10 bytes of data, 0 bytes of holes, 10 bytes/s");
        let none = progress_text(&told(5, 5, Some(6), 0), None, Duration::ZERO);
        assert!(none.ends_with("0 bytes/s, 0 %"), "{none}");
        assert!(!progress_text(&told(5, 5, Some(5), 0), None, Duration::ZERO).contains('%'));
    }
}
