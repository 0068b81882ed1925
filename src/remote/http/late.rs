//! When an answer is late. Pure.

use std::time::Duration;

/// The answers after which it is known how long one takes.
const MIN_ANSWERS: u32 = 8;
/// No answer is late before this: far more than a second request costs.
const MIN_LATE: Duration = Duration::from_millis(100);
/// One request in so many may be sent twice: a server that is slow because it has too much to do must not
/// get twice as much.
const SHARE: u32 = 16;

/// How long answers take, smoothed as round trips are (RFC 6298).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latency {
    smoothed: Duration,
    deviation: Duration,
    answers: u32,
    repeated: u32,
}

impl Latency {
    /// Notes an answer that took `time`.
    pub(super) fn note(&mut self, time: Duration) {
        if self.answers == 0 {
            (self.smoothed, self.deviation) = (time, time / 2);
        } else {
            self.deviation = self.deviation * 3 / 4 + self.smoothed.abs_diff(time) / 4;
            self.smoothed = self.smoothed * 7 / 8 + time / 8;
        }
        self.answers = self.answers.saturating_add(1);
    }

    /// Returns the time after which an answer is late; `None` while nothing is known.
    pub(super) fn late_after(&self) -> Option<Duration> {
        let late = (self.smoothed + self.deviation * 4).max(self.smoothed * 2).max(MIN_LATE);
        (self.answers >= MIN_ANSWERS).then_some(late)
    }

    /// Takes the right to send one request twice, if there is one.
    pub(super) fn take_repeat(&mut self) -> bool {
        let is_allowed = self.repeated <= self.answers / SHARE;
        self.repeated = self.repeated.saturating_add(u32::from(is_allowed));
        is_allowed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn what_takes_far_longer_than_the_others_is_late() {
        let mut latency = Latency::default();
        for _ in 0..7 {
            latency.note(20 * MS);
            assert_eq!(latency.late_after(), None);
        }
        for _ in 0..20 {
            latency.note(20 * MS);
        }
        assert_eq!(latency.late_after(), Some(100 * MS));
        for _ in 0..100 {
            latency.note(300 * MS);
        }
        let late = latency.late_after().unwrap();
        assert!(late >= 595 * MS && late < 700 * MS, "{late:?}");
    }

    proptest! {
        #[test]
        fn answers_that_differ_little_are_not_late(base in 1_u32..5_000, noise in prop::collection::vec(0_u32..100, 50..200)) {
            let mut latency = Latency::default();
            for percent in noise {
                let time = MS * base * (100 + percent / 2) / 100;
                if let Some(late) = latency.late_after() {
                    prop_assert!(time <= late, "{:?} of {:?}", time, late);
                }
                latency.note(time);
            }
        }

        #[test]
        fn few_requests_are_repeated(answers in 0_u32..2_000) {
            let mut latency = Latency::default();
            (0..answers).for_each(|_| latency.note(MS));
            let repeated = (0..1_000).filter(|_| latency.take_repeat()).count();
            prop_assert_eq!(repeated, usize::try_from(answers / SHARE + 1).unwrap());
        }
    }
}
