//! The limit of requests that wait for streams.
//!
//! The kernel has a limit of requests in flight for read-ahead and asynchronous I/O, which all disks
//! of a mount share (`max_background`). Whoever may read a stream could use it up with asynchronous
//! reads of bytes that do not arrive, and every other disk would wait. So the requests that wait for
//! a stream are limited, and the next one is refused.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The most requests that wait for one stream: above the queue depth of any client, 128 for a loop
/// device or a virtual machine.
pub(crate) const MAX_PER_STREAM: usize = 512;
/// The most requests that wait for all streams of a mount, beyond [`MIN_PER_STREAM`] of each.
pub(crate) const MAX_PARKED: usize = 2048;
/// The number of requests that may wait for a stream whatever waits for others.
const MIN_PER_STREAM: usize = 16;

/// The number of requests that wait for streams of this process, which has one mount.
static PARKED: AtomicUsize = AtomicUsize::new(0);

/// A permit for a request to wait for a stream, returned when dropped.
pub(super) struct ParkPermit(&'static AtomicUsize);

impl ParkPermit {
    /// Takes a permit for a stream for which `waiting` requests wait already; `None` at the limit.
    pub(super) fn acquire(waiting: usize) -> Option<Self> {
        Self::acquire_from(&PARKED, waiting)
    }

    fn acquire_from(parked: &'static AtomicUsize, waiting: usize) -> Option<Self> {
        // Dropping the permit takes back the excess count.
        let permit = Self(parked);
        let others = parked.fetch_add(1, Ordering::Relaxed);
        let fits = waiting < MIN_PER_STREAM || waiting < MAX_PER_STREAM && others < MAX_PARKED;
        fits.then_some(permit)
    }
}

impl Drop for ParkPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_limited_for_each_stream_and_for_all_and_each_keeps_a_share() {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let fill = || -> Vec<ParkPermit> {
            (0..).map_while(|waiting| ParkPermit::acquire_from(&COUNT, waiting)).collect()
        };
        let first: Vec<Vec<ParkPermit>> = (0..4).map(|_| fill()).collect();
        assert!(first.iter().all(|permits| permits.len() == MAX_PER_STREAM));
        let more = [fill(), fill()];
        assert!(more.iter().all(|permits| permits.len() == MIN_PER_STREAM));
        drop(first);
        assert_eq!(fill().len(), MAX_PER_STREAM);
        drop(more);
        assert_eq!(COUNT.load(Ordering::Relaxed), 0);
    }
}
