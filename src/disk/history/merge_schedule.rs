//! When the layers of a disk are merged.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long a merge that has failed is not tried again: the first time, and at most. What it failed for,
/// such as a full host, may last, and an attempt may copy all that the disk holds.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));

/// Whether there may be layers to merge, and when the next attempt is due.
#[derive(Default)]
pub(super) struct MergeSchedule(Mutex<State>);

#[derive(Default)]
struct State {
    is_wanted: bool,
    /// The end of the delay after the last failure, and the delay.
    retry: Option<(Instant, Duration)>,
}

impl MergeSchedule {
    /// Creates the schedule of a disk that may have layers to merge.
    pub(super) fn wanted() -> Self {
        let schedule = Self::default();
        schedule.want();
        schedule
    }

    /// Notes that there may be layers to merge. The next attempt is due at once: what was deleted may
    /// have made room for it.
    pub(super) fn want(&self) {
        *self.0.lock() = State { is_wanted: true, retry: None };
    }

    /// Notes that nothing is known to be merged.
    pub(super) fn forget(&self) {
        self.0.lock().is_wanted = false;
    }

    /// Notes that all was merged: the next failure is a first one again.
    pub(super) fn completed(&self) {
        self.0.lock().retry = None;
    }

    /// Notes that an attempt was interrupted: the next one is due at once.
    pub(super) fn interrupted(&self) {
        self.want();
    }

    /// Notes that an attempt failed at `now`.
    pub(super) fn failed(&self, now: Instant) {
        let (first, most) = RETRY_DELAYS;
        let mut state = self.0.lock();
        let delay = state.retry.map_or(first, |(_, delay)| most.min(delay * 2));
        *state = State { is_wanted: true, retry: Some((now + delay, delay)) };
    }

    /// Whether there may be layers to merge.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.lock().is_wanted
    }

    /// Whether an attempt is due at `now`.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let state = self.0.lock();
        state.is_wanted && state.retry.is_none_or(|(until, _)| until <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_repeated_later_and_later_and_new_work_at_once() {
        let (schedule, mut now) = (MergeSchedule::wanted(), Instant::now());
        assert!(schedule.is_due(now));
        for delay in [5, 10, 20, 40, 80, 160, 320, 600, 600] {
            schedule.forget();
            assert!(!schedule.is_due(now));
            schedule.failed(now);
            assert!(schedule.is_wanted());
            now += Duration::from_secs(delay - 1);
            assert!(!schedule.is_due(now));
            now += Duration::from_secs(1);
            assert!(schedule.is_due(now));
        }
        schedule.failed(now);
        schedule.want();
        assert!(schedule.is_due(now));
        schedule.failed(now);
        assert!(!schedule.is_due(now) && schedule.is_due(now + Duration::from_secs(5)));
        schedule.interrupted();
        assert!(schedule.is_due(now));
        schedule.failed(now);
        schedule.completed();
        schedule.failed(now);
        assert!(schedule.is_due(now + Duration::from_secs(5)));
    }
}
