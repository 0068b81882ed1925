//! Writes that found no room: told once a minute in the log, and in `status` for a while.

use std::io;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Disk;
use crate::spec::format_size;

/// How often the log says so, at most.
const SAID: Duration = Duration::from_secs(60);
/// How long `status` remembers.
const REMEMBERED: Duration = Duration::from_secs(600);

/// What is known of the lack of room.
#[derive(Default)]
pub(super) struct Room {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The last write that found none.
    failed: Option<Instant>,
    /// When the log said so last.
    said: Option<Instant>,
    /// How many were not told since.
    untold: u64,
}

impl Room {
    /// Notes a failure `now`; how many there were since the log was told, when it is to be told.
    fn fail(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        state.failed = Some(now);
        state.untold += 1;
        if state.said.is_some_and(|said| now.duration_since(said) < SAID) {
            return None;
        }
        state.said = Some(now);
        Some(std::mem::take(&mut state.untold))
    }

    /// How long ago the last failure was, unless that is long.
    fn since(&self, now: Instant) -> Option<Duration> {
        let failed = self.state.lock().failed?;
        Some(now.duration_since(failed)).filter(|since| *since < REMEMBERED)
    }
}

impl Disk {
    /// Hands `done` on, and notes when it failed for want of room.
    pub(super) fn noting_room<T>(&self, done: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &done
            && matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            && let Some(times) = self.room.fail(Instant::now())
        {
            let times = if times > 1 {
                format!(" ({times} since it was last said)")
            } else {
                String::new()
            };
            log::error!("{}: a write failed{times}: {error}: {}", self.source, self.room_left());
        }
        done
    }

    /// What there is to say of writes that failed for want of room, for some minutes.
    #[must_use]
    pub fn lack_of_room(&self) -> Option<String> {
        let since = self.room.since(Instant::now())?;
        Some(format!(
            "a write failed for want of space {} s ago: {}",
            since.as_secs(),
            self.room_left()
        ))
    }

    fn room_left(&self) -> String {
        let free = self.space().map_or(0, |space| space.available);
        let limit = self.limit().map(|limit| format!(", and its limit is {}", format_size(limit)));
        format!("{} are free on its host{}", format_size(free), limit.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_hears_of_it_once_a_minute_and_status_for_ten() {
        let (room, start) = (Room::default(), Instant::now());
        assert_eq!(room.since(start), None);
        assert_eq!(room.fail(start), Some(1));
        for second in 1..60 {
            assert_eq!(room.fail(start + Duration::from_secs(second)), None);
        }
        assert_eq!(room.fail(start + Duration::from_secs(60)), Some(60));
        let later = start + Duration::from_secs(90);
        assert_eq!(room.since(later), Some(Duration::from_secs(30)));
        assert_eq!(room.since(start + Duration::from_secs(3600)), None);
    }
}
