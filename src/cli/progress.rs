//! How far long work is: one line on stderr that changes on a terminal, a line a second elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::spec::format_size;

/// How often the line changes on a terminal, and how often there is another elsewhere.
const CHANGES: Duration = Duration::from_millis(250);
const ANOTHER: Duration = Duration::from_secs(1);

/// The line.
pub(super) struct Line {
    is_terminal: bool,
    is_shown: bool,
    last: Instant,
}

impl Line {
    pub(super) fn new() -> Self {
        Self { is_terminal: io::stderr().is_terminal(), is_shown: false, last: Instant::now() }
    }

    /// Whether it is time to show how far it is.
    pub(super) fn is_due(&self) -> bool {
        self.last.elapsed() >= if self.is_terminal { CHANGES } else { ANOTHER }
    }

    pub(super) fn show(&mut self, text: &str) {
        (self.is_shown, self.last) = (true, Instant::now());
        let _ = match self.is_terminal {
            true => write!(io::stderr(), "\r\x1b[K{text}"),
            false => writeln!(io::stderr(), "{text}"),
        };
    }

    /// The work is over: what changes goes, what was printed stays.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.is_shown) && self.is_terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// How far the daemon is, as it tells.
pub(super) struct Progress {
    line: Line,
    seconds: u64,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { line: Line::new(), seconds: 0 }
    }

    /// The daemon gives a sign of life every second; it may say how far it is.
    pub(super) fn show(&mut self, now: &Value) {
        self.seconds += 1;
        let text = match (now["done"].as_u64(), now["total"].as_u64()) {
            (Some(done), Some(total)) if total > 0 => {
                let percent = u128::from(done) * 100 / u128::from(total);
                format!("{} of {}, {percent} %", format_size(done), format_size(total))
            }
            _ => format!("working, {} s", self.seconds),
        };
        self.line.show(&text);
    }

    pub(super) fn end(&mut self) {
        self.line.end();
    }
}
