//! Waiting for readers that began before a change of the map.
//!
//! A reader looks up a block in the map and then reads the data file. Between these two steps the
//! block may be freed; its space must not be punched until that reader has finished. Readers count
//! themselves in one of two counters; [`Readers::drain`] directs new readers to the other counter
//! and waits until the first one is zero.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

/// The readers of one layer, in two generations.
#[derive(Default)]
pub struct Readers {
    generation: AtomicUsize,
    counts: [AtomicUsize; 2],
    draining: Mutex<()>,
}

impl Readers {
    /// Counts one reader in before it looks at the map; dropping the guard counts it out.
    pub fn enter(&self) -> ReaderGuard<'_> {
        loop {
            let generation = self.generation.load(Ordering::SeqCst);
            let count = &self.counts[generation & 1];
            count.fetch_add(1, Ordering::SeqCst);
            // A drain may have switched counters between the two steps and would not wait for this
            // reader.
            if self.generation.load(Ordering::SeqCst) == generation {
                return ReaderGuard { count };
            }
            count.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for every reader that entered before the call. Called after the map has changed and
    /// without holding any lock that a reader takes.
    pub fn drain(&self) {
        let _one = self.draining.lock();
        let old = self.generation.fetch_add(1, Ordering::SeqCst) & 1;
        while self.counts[old].load(Ordering::SeqCst) != 0 {
            // Readers take microseconds, and this runs in the background or after an fsync.
            thread::sleep(Duration::from_micros(50));
        }
    }
}

/// One counted reader.
#[must_use]
pub struct ReaderGuard<'a> {
    count: &'a AtomicUsize,
}

impl Drop for ReaderGuard<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn a_drain_waits_for_older_readers_but_not_for_newer_ones() {
        let readers = Arc::new(Readers::default());
        let older = readers.enter();
        let drained = Arc::new(AtomicBool::new(false));
        let waiter = thread::spawn({
            let (readers, drained) = (Arc::clone(&readers), Arc::clone(&drained));
            move || {
                readers.drain();
                drained.store(true, Ordering::SeqCst);
            }
        });
        while readers.generation.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        let newer = readers.enter();
        assert!(!drained.load(Ordering::SeqCst));
        drop(older);
        waiter.join().unwrap();
        drop(newer);
    }
}
