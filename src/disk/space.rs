//! Space on the host: the space that is left for a disk's changes, and what failed for lack of it, which are logged at most once a minute and shown in `status` for a while.

use std::io;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::fs::StatVfs;

use super::Disk;
use super::operation_error::OperationError;
use crate::config::format_size;

/// Shortest time between two log lines about lack of space.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long `status` reports a failure.
const REPORT_PERIOD: Duration = Duration::from_secs(600);

/// Space on the file system that stores a disk's changes.
#[derive(Clone, Copy, Debug)]
pub struct FsSpace {
    /// Total space in bytes.
    pub total: u64,
    /// Free space in bytes.
    pub free: u64,
    /// Free space available to this process, in bytes.
    pub available: u64,
}

impl From<StatVfs> for FsSpace {
    fn from(found: StatVfs) -> Self {
        Self {
            total: found.f_blocks * found.f_frsize,
            free: found.f_bfree * found.f_frsize,
            available: found.f_bavail * found.f_frsize,
        }
    }
}

/// The recent failures for lack of space.
#[derive(Default)]
pub(super) struct SpaceFailures {
    state: Mutex<SpaceFailureState>,
}

#[derive(Default)]
struct SpaceFailureState {
    /// Time of the last failure.
    last_failure: Option<Instant>,
    /// Time of the last log line.
    last_logged: Option<Instant>,
    /// Number of failures since the last log line.
    unlogged: u64,
}

impl SpaceFailures {
    /// Records a failure at `now`. Returns the number of failures since the last log line if a new
    /// line is due.
    fn record(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        state.last_failure = Some(now);
        state.unlogged += 1;
        if state.last_logged.is_some_and(|said| now.duration_since(said) < LOG_INTERVAL) {
            return None;
        }
        state.last_logged = Some(now);
        Some(std::mem::take(&mut state.unlogged))
    }

    /// Returns the time since the last failure, unless it is longer than [`REPORT_PERIOD`].
    fn age(&self, now: Instant) -> Option<Duration> {
        let failed = self.state.lock().last_failure?;
        Some(now.duration_since(failed)).filter(|since| *since < REPORT_PERIOD)
    }
}

impl Disk {
    /// Returns the space on the file system that stores the disk's changes.
    ///
    /// # Errors
    /// The host's errno from fstatvfs(2).
    pub fn space(&self) -> io::Result<FsSpace> {
        let Some(file) = self.layers().top.data_file() else {
            return Ok(FsSpace { total: self.size(), free: 0, available: 0 });
        };
        Ok(FsSpace::from(rustix::fs::fstatvfs(&file)?))
    }

    /// Returns `done` unchanged, and records it if it failed for lack of space.
    pub(super) fn note_no_space<T>(&self, done: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &done
            && matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            && let Some(times) = self.space_failures.record(Instant::now())
        {
            let times = if times > 1 {
                format!(" ({times} since it was last said)")
            } else {
                String::new()
            };
            log::error!(
                "{}: a write failed{times}: {error}: {}",
                self.source,
                self.describe_free_space()
            );
        }
        done
    }

    /// Records that layers were not merged for lack of space.
    pub(super) fn note_unmerged(&self, error: &OperationError) {
        if self.merge_failures.record(Instant::now()).is_some() {
            log::error!("{}: {error}", self.source);
        }
    }

    /// Describes the last failure for lack of space, for some minutes after it.
    #[must_use]
    pub fn no_space_status(&self) -> Option<String> {
        let now = Instant::now();
        let write = self.space_failures.age(now).map(|since| ("a write", since));
        let merge = || Some(("the merging of layers", self.merge_failures.age(now)?));
        let (what, since) = write.or_else(merge)?;
        Some(format!(
            "{what} failed for want of space {} s ago: {}",
            since.as_secs(),
            self.describe_free_space()
        ))
    }

    fn describe_free_space(&self) -> String {
        let free = self.space().map_or(0, |space| space.available);
        let limit = self.limit().map(|limit| format!(", and its limit is {}", format_size(limit)));
        format!("{} are free on its host{}", format_size(free), limit.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_logged_once_a_minute_and_reported_for_ten() {
        let (room, start) = (SpaceFailures::default(), Instant::now());
        assert_eq!(room.age(start), None);
        assert_eq!(room.record(start), Some(1));
        for second in 1..60 {
            assert_eq!(room.record(start + Duration::from_secs(second)), None);
        }
        assert_eq!(room.record(start + Duration::from_secs(60)), Some(60));
        let later = start + Duration::from_secs(90);
        assert_eq!(room.age(later), Some(Duration::from_secs(30)));
        assert_eq!(room.age(start + Duration::from_secs(3600)), None);
    }
}
