//! One worker is always kept free.
//!
//! A worker that writes into the host's page cache, or makes a few blocks durable, may be held
//! there: by a full cache, by a file system that hangs. Were all workers held, no request of any
//! disk would be answered, nor the control files. So the last free one does no such work; it hands
//! it to the disk's pool. That costs more than most writes, so it first sees whether another worker
//! is done within a moment.
//!
//! A write to a disk with the key `direct` holds no worker at all: it takes as long as the device,
//! so the disk answers `EAGAIN` to a worker and the write is its pool's from the start.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the last free worker waits for another: as long as handing the work over takes, about.
const MOMENT: Duration = Duration::from_micros(30);

/// How many workers may do at once what the host could hold up.
pub(super) struct Seats {
    taken: AtomicUsize,
    most: usize,
}

impl Seats {
    /// Seats for all of `workers` but one.
    pub(super) fn new(workers: usize) -> Self {
        Self { taken: AtomicUsize::new(0), most: workers.saturating_sub(1) }
    }

    /// A seat, unless only one worker is left and stays so for a moment.
    pub(super) fn take(&self) -> Option<Seat<'_>> {
        self.take_now().or_else(|| self.take_soon(MOMENT))
    }

    fn take_soon(&self, within: Duration) -> Option<Seat<'_>> {
        let begin = Instant::now();
        loop {
            // Who has a seat may wait for this very CPU.
            thread::yield_now();
            let seat = self.take_now();
            if seat.is_some() || begin.elapsed() >= within {
                return seat;
            }
        }
    }

    fn take_now(&self) -> Option<Seat<'_>> {
        let seat = Seat { seats: self };
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        // Dropping the seat gives back what was counted one too many.
        (taken < self.most).then_some(seat)
    }

    /// A seat, if nobody has one.
    pub(super) fn take_first(&self) -> Option<Seat<'_>> {
        let seat = self.take_now()?;
        (self.taken.load(Ordering::Relaxed) == 1).then_some(seat)
    }
}

/// A taken seat.
pub(super) struct Seat<'a> {
    seats: &'a Seats,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.seats.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_worker_gets_no_seat_until_another_is_back() {
        let seats = Seats::new(3);
        let first = seats.take();
        let second = seats.take();
        assert!(first.is_some() && second.is_some());
        assert!(seats.take().is_none());
        assert!(seats.take_first().is_none());
        drop(first);
        assert!(seats.take().is_some());
        let third = seats.take();
        assert!(thread::scope(|scope| {
            let waiting = scope.spawn(|| seats.take_soon(Duration::MAX).is_some());
            drop(third);
            waiting.join().unwrap()
        }));
        drop(second);
        let alone = seats.take_first();
        assert!(alone.is_some());
        assert!(seats.take_first().is_none() && seats.take().is_some());
    }
}
