//! A limit for log lines that anybody can cause who may read a disk.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Shortest time between two lines of one kind.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Lets one log line of a kind pass in a second.
#[derive(Debug, Default)]
pub(crate) struct LogThrottle(Mutex<Option<Instant>>);

impl LogThrottle {
    /// Returns whether a line may be logged now, and counts it as logged.
    pub(crate) fn allow(&self) -> bool {
        let mut last = self.0.lock();
        let passes = last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if passes {
            *last = Some(Instant::now());
        }
        passes
    }

    /// Makes the last line older than the interval.
    #[cfg(test)]
    pub(crate) fn age(&self) {
        *self.0.lock() = Instant::now().checked_sub(LOG_INTERVAL);
    }
}
