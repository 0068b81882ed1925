//! When a request that failed is sent again. Pure.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The bound of the first pause.
const FIRST: Duration = Duration::from_millis(100);
/// The bound of the longest one.
const LONGEST: Duration = Duration::from_secs(5);

/// Returns the pause after `failures` failures in a row, at least 1. `random` has 64 random bits, and `asked`
/// is what the server asked for (`Retry-After`).
///
/// Full jitter: any time up to a bound that doubles, so that clients who failed together do not come
/// back together. A server that names a time gets it, and the same jitter on top.
pub(super) fn pause(failures: u32, random: u64, asked: Option<Duration>) -> Duration {
    let factor = 1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX);
    let bound = FIRST.saturating_mul(factor).min(LONGEST);
    let millis = u64::try_from(bound.as_millis()).unwrap_or(u64::MAX);
    let jitter = Duration::from_millis(random % millis.saturating_add(1));
    asked.unwrap_or_default().saturating_add(jitter)
}

/// Returns 64 bits that differ from call to call: enough to keep clients apart, and no secret.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pause_is_below_a_bound_that_doubles(failures in 1_u32..100, random: u64, asked in 0_u64..100) {
            let bound = Duration::from_millis(100 << (failures - 1).min(6)).min(LONGEST);
            prop_assert!(pause(failures, random, None) <= bound);
            let asked = Duration::from_secs(asked);
            let given = pause(failures, random, Some(asked));
            prop_assert!(given >= asked && given <= asked + bound);
        }
    }

    #[test]
    fn pauses_are_spread() {
        let pauses: std::collections::HashSet<_> =
            (0..200).map(|_| pause(10, random(), None)).collect();
        assert!(pauses.len() > 100, "{}", pauses.len());
    }
}
