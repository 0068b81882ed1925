//! How far long work is, as the daemon tells it.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use crate::spec::format_size;

/// How far long work is, on stderr: one line that changes on a terminal, a line each elsewhere.
pub(super) struct Progress {
    is_terminal: bool,
    seconds: u64,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self { is_terminal: io::stderr().is_terminal(), seconds: 0 }
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
        let _ = match self.is_terminal {
            true => write!(io::stderr(), "\r\x1b[K{text}"),
            false => writeln!(io::stderr(), "{text}"),
        };
    }

    pub(super) fn end(&self) {
        if self.is_terminal && self.seconds > 0 {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
