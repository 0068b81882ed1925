//! The progress of a long operation: on a terminal, one line on stderr that is redrawn. Elsewhere
//! nothing, unless requested; then a plain line every second.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::config::format_size;
use crate::control::api::Progress;
use crate::printable;

/// Redraws a second on a terminal, at most.
const REDRAW_RATE: u8 = 4;
/// Interval between two lines where stderr is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// How much of it is shown.
#[derive(Clone, Copy, Debug, Default, Args)]
pub(super) struct Verbosity {
    /// Show how far it is also where stderr is no terminal: a line a second
    #[arg(long, conflicts_with = "quiet")]
    progress: bool,
    /// Do not show how far it is
    #[arg(short = 'q', long)]
    quiet: bool,
}

/// The progress line on stderr.
pub(super) enum ProgressLine {
    /// One line of a terminal, redrawn.
    Redraw(ProgressBar),
    /// One line after another; `last` is the time of the latest.
    Lines {
        last: Instant,
    },
    Silent,
}

impl ProgressLine {
    pub(super) fn new(verbosity: Verbosity) -> Self {
        match verbosity {
            Verbosity { quiet: true, .. } => Self::Silent,
            _ if io::stderr().is_terminal() => {
                let target = ProgressDrawTarget::stderr_with_hz(REDRAW_RATE);
                let bar = ProgressBar::with_draw_target(None, target);
                // The template is constant and valid.
                let style = ProgressStyle::with_template("{wide_msg}").ok();
                Self::Redraw(
                    style.map_or_else(|| bar.clone(), |style| bar.clone().with_style(style)),
                )
            }
            Verbosity { progress: true, .. } => Self::Lines { last: Instant::now() },
            _ => Self::Silent,
        }
    }

    /// Returns whether [`show`](Self::show) would show a new text now.
    pub(super) fn is_due(&self) -> bool {
        match self {
            // The bar itself limits how often it is redrawn.
            Self::Redraw(_) => true,
            Self::Lines { last } => last.elapsed() >= LINE_INTERVAL,
            Self::Silent => false,
        }
    }

    pub(super) fn show(&mut self, text: &str) {
        match self {
            Self::Redraw(bar) => bar.set_message(printable::line(text).into_owned()),
            Self::Lines { last } => {
                *last = Instant::now();
                let _ = writeln!(io::stderr(), "{}", printable::line(text));
            }
            Self::Silent => {}
        }
    }

    /// Ends the display: erases the redrawn line, and keeps printed lines.
    pub(super) fn end(&mut self) {
        if let Self::Redraw(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// A formatter of the daemon's progress reports.
#[derive(Default)]
pub(super) struct ProgressFormatter {
    seconds: u64,
    /// Time and number of bytes done of the first report.
    baseline: Option<(Instant, u64)>,
}

impl ProgressFormatter {
    /// Formats the report `progress`; called once per second.
    pub(super) fn text(&mut self, progress: Progress) -> String {
        self.seconds += 1;
        match (progress.done, progress.total) {
            (Some(done), Some(total)) if total > 0 => self.share_text(Instant::now(), done, total),
            _ => format!("working, {} s", self.seconds),
        }
    }

    fn share_text(&mut self, now: Instant, done: u64, total: u64) -> String {
        let first = self.baseline.filter(|(_, first)| *first <= done);
        let (since, first) = *self.baseline.insert(first.unwrap_or((now, done)));
        let percent = u128::from(done) * 100 / u128::from(total);
        let mut text = format!("{} of {}", format_size(done), format_size(total));
        let millis = u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
        let rate = bytes_per_second(done - first, millis.max(1));
        if rate > 0 {
            text += &format!(", {}/s", format_size(rate));
        }
        text += &format!(", {percent} %");
        if rate > 0 {
            text +=
                &format!(", {} left", format_seconds(total.saturating_sub(done).div_ceil(rate)));
        }
        text
    }
}

/// Returns the rate in bytes per second of `bytes` in `millis` milliseconds.
pub(super) fn bytes_per_second(bytes: u64, millis: u64) -> u64 {
    u64::try_from(u128::from(bytes) * 1000 / u128::from(millis)).unwrap_or(u64::MAX)
}

/// Formats `seconds` for people.
pub(super) fn format_seconds(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds} s"),
        (0, minutes, seconds) => format!("{minutes}:{seconds:02} min"),
        (hours, minutes, _) => format!("{hours}:{minutes:02} h"),
    }
}

/// The display of the daemon's progress.
pub(super) struct ProgressDisplay {
    line: ProgressLine,
    gauge: ProgressFormatter,
}

impl ProgressDisplay {
    pub(super) fn new(verbosity: Verbosity) -> Self {
        Self { line: ProgressLine::new(verbosity), gauge: ProgressFormatter::default() }
    }

    /// Shows the daemon's sign of life, sent every second, which may contain progress.
    pub(super) fn show(&mut self, progress: Progress) {
        let text = self.gauge.text(progress);
        self.line.show(&text);
    }

    pub(super) fn end(&mut self) {
        self.line.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_text_has_rate_and_time_left_once_known() {
        let (mut gauge, start) = (ProgressFormatter::default(), Instant::now());
        let mib = 1 << 20;
        let mut at = |seconds, done| {
            gauge.share_text(start + Duration::from_secs(seconds), done * mib, 1000 * mib)
        };
        assert_eq!(at(0, 100), "100 MiB of 1000 MiB, 10 %");
        assert_eq!(at(10, 300), "300 MiB of 1000 MiB, 20 MiB/s, 30 %, 35 s left");
        // Another operation.
        assert_eq!(at(11, 0), "0 bytes of 1000 MiB, 0 %");
        assert_eq!(at(12, 1), "1 MiB of 1000 MiB, 1 MiB/s, 0 %, 16:39 min left");
        assert_eq!(format_seconds(100_000), "27:46 h");
    }
}
