//! The space of a disk as stat(2) reports it (`st_blocks`): counted from the extents, and cached.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Disk;
use super::layers::LayerStack;
use crate::extents::ExtentKind;
use crate::layer::Wait;
use crate::stream::Stream;

/// The most pieces that one count asks the layers for; all bytes after them count as data.
const MAX_COUNTED_PIECES: usize = 64 << 10;

/// The longest time of one count; until the next one all bytes after it count as data. QEMU needs 3 ms to
/// look through 1 GiB of an empty VMDK image, and an image may say that it is as large as it likes.
const MAX_COUNTING: Duration = Duration::from_secs(2);

/// The last count of the bytes of data in a file that shows a disk.
#[derive(Debug, Default)]
pub(super) struct AllocatedCache {
    last: Mutex<Option<LastCount>>,
}

#[derive(Clone, Copy, Debug)]
struct LastCount {
    /// That of the layers; `None` where they have none.
    revision: Option<u64>,
    count: Count,
}

/// The bytes of data in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Count {
    bytes: u64,
    /// Where the time was over. The next count comes further, since layers remember what they were told.
    cut_at: Option<u64>,
}

impl AllocatedCache {
    /// Returns the cached figure if it belongs to `revision`, else that of `count`. When `count`
    /// would have to wait, returns the older figure; marks in `is_stale` a figure that another count
    /// can better.
    ///
    /// # Errors
    /// The errors of `count`; `EAGAIN` only as long as nothing was counted yet.
    fn get_or_count(
        &self,
        revision: Option<u64>,
        is_stale: &AtomicBool,
        count: impl FnOnce() -> io::Result<Count>,
    ) -> io::Result<u64> {
        let last = *self.last.lock();
        if let Some(LastCount { revision: at, count: Count { bytes, cut_at: None } }) = last
            && revision.is_some()
            && revision == at
        {
            return Ok(bytes);
        }
        match (count(), last) {
            (Ok(mut count), last) => {
                let before = last.and_then(|last| last.count.cut_at);
                // One that comes no further would be repeated for ever.
                count.cut_at = count.cut_at.filter(|at| before.is_none_or(|before| before < *at));
                if count.cut_at.is_some() {
                    is_stale.store(true, Ordering::Relaxed);
                }
                *self.last.lock() = Some(LastCount { revision, count });
                Ok(count.bytes)
            }
            (Err(error), Some(last)) if error.raw_os_error() == Some(libc::EAGAIN) => {
                is_stale.store(true, Ordering::Relaxed);
                Ok(last.count.bytes)
            }
            (Err(error), _) => Err(error),
        }
    }
}

/// The space of a whole disk.
#[derive(Default)]
pub(super) struct Allocated {
    cache: AllocatedCache,
    /// Set when a stat of the disk or of a partition file was answered with an older figure.
    is_stale: AtomicBool,
}

impl Allocated {
    /// Whether a figure may be out of date.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::Relaxed)
    }

    /// Returns whether a figure may be out of date, and clears that mark: the caller counts again.
    pub(super) fn take_stale(&self) -> bool {
        self.is_stale.swap(false, Ordering::SeqCst)
    }
}

impl Disk {
    /// Counts the bytes of data in the disk.
    ///
    /// # Errors
    /// The errors of [`allocated_in`](Self::allocated_in).
    pub(super) fn allocated(&self, wait: Wait) -> io::Result<u64> {
        if let Some(Stream::Output(output)) = &self.stream {
            return Ok(output.written());
        }
        self.allocated_in(0..self.size(), &self.allocated.cache, wait)
    }

    /// Counts the bytes of data in `range` from the extents. After [`MAX_COUNTED_PIECES`] pieces, or
    /// [`MAX_COUNTING`], all further bytes count as data, so no hole is ever claimed that does not exist. The result
    /// is kept in `cache`.
    ///
    /// A stat never waits for a slow base: it is answered with the cached figure, and `maintain`
    /// updates the figure later.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when nothing was counted yet and the base would have to be
    /// waited for; `EIO` when this thread's request has been given up; the host's errno.
    pub(super) fn allocated_in(
        &self,
        range: Range<u64>,
        cache: &AllocatedCache,
        wait: Wait,
    ) -> io::Result<u64> {
        // A stream's data arrives without a count of revisions.
        let revision = self.layers().top.revision().filter(|_| self.stream.is_none());
        let count = || count_data(&self.layers(), range, wait, MAX_COUNTING);
        cache.get_or_count(revision, &self.allocated.is_stale, count)
    }
}

/// Counts the bytes of `range` that are no hole, for up to `time`. The part of it past the size is none
/// either.
fn count_data(
    layers: &LayerStack,
    range: Range<u64>,
    wait: Wait,
    time: Duration,
) -> io::Result<Count> {
    let until = Instant::now() + time;
    let end = range.end.min(layers.size());
    let mut cut_at = None;
    let (mut held, mut counted_to) = (range.end.saturating_sub(end), range.start.min(end));
    for piece in layers.pieces(range.start..end, wait).take(MAX_COUNTED_PIECES) {
        let (extent, _) = piece?;
        counted_to = extent.range.end;
        if extent.kind != ExtentKind::Hole {
            held += extent.len();
        }
        if counted_to < end && Instant::now() >= until {
            cut_at = Some(counted_to);
            break;
        }
    }
    Ok(Count { bytes: held + (end - counted_to), cut_at })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::extents::Extent;
    use crate::layer::{CopyFn, Layer};
    use crate::pool::{Cancellable, run_cancellable};

    const LONG: Duration = Duration::from_secs(60);

    /// Holes and nothing else, told in pieces of 4 KiB.
    #[derive(Default)]
    struct Crumbs {
        asked: AtomicUsize,
    }

    impl Layer for Crumbs {
        fn size(&self) -> u64 {
            1 << 62
        }

        fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let end = range.end.min((range.start / 4096 + 1) * 4096);
            Ok(Extent::new(range.start..end, ExtentKind::Hole))
        }

        fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
            self.extent_at(offset..offset + buf.len() as u64, wait)
        }

        fn lend_at(
            &self,
            range: Range<u64>,
            wait: Wait,
            _: CopyFn<'_>,
        ) -> io::Result<(Extent, Option<u64>)> {
            Ok((self.extent_at(range, wait)?, None))
        }
    }

    fn crumbs() -> (Arc<Crumbs>, LayerStack) {
        let crumbs = Arc::new(Crumbs::default());
        (Arc::clone(&crumbs), LayerStack::read_only(Vec::new(), Some(crumbs)))
    }

    #[test]
    fn counting_stops_after_so_many_pieces_and_the_rest_is_data() {
        let (crumbs, layers) = crumbs();
        let counted = count_data(&layers, 0..1 << 62, Wait::Yes, LONG).unwrap();
        let bytes = (1 << 62) - MAX_COUNTED_PIECES as u64 * 4096;
        assert_eq!(counted, Count { bytes, cut_at: None });
        assert_eq!(crumbs.asked.load(Ordering::Relaxed), MAX_COUNTED_PIECES);
        assert_eq!(count_data(&layers, 5..40_000, Wait::Yes, LONG).unwrap().bytes, 0);
        // As for a partition that reaches past the end.
        assert_eq!(
            count_data(&layers, (1 << 62) - 9..(1 << 62) + 9, Wait::Yes, LONG).unwrap().bytes,
            9
        );
    }

    #[test]
    fn counting_stops_when_it_takes_too_long_and_the_rest_is_data() {
        let (crumbs, layers) = crumbs();
        let counted = count_data(&layers, 0..1 << 62, Wait::Yes, Duration::ZERO).unwrap();
        assert_eq!(counted, Count { bytes: (1 << 62) - 4096, cut_at: Some(4096) });
        assert_eq!(crumbs.asked.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_count_that_was_cut_short_is_repeated_as_long_as_it_comes_further() {
        let (cache, is_stale) = (AllocatedCache::default(), AtomicBool::new(false));
        let count = |bytes, cut_at| {
            let counted = cache.get_or_count(Some(7), &is_stale, || Ok(Count { bytes, cut_at }));
            (counted.unwrap(), is_stale.swap(false, Ordering::Relaxed))
        };
        assert_eq!(count(100, Some(10)), (100, true));
        assert_eq!(count(90, Some(20)), (90, true));
        let busy = cache
            .get_or_count(Some(7), &is_stale, || Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        assert_eq!((busy.unwrap(), is_stale.swap(false, Ordering::Relaxed)), (90, true));
        assert_eq!(count(90, Some(20)), (90, false));
        // That was the last one, until something changes.
        assert_eq!(count(1, None), (90, false));
        let changed =
            cache.get_or_count(Some(8), &is_stale, || Ok(Count { bytes: 5, cut_at: None }));
        assert_eq!(changed.unwrap(), 5);
    }

    /// A request that is given up when it has been looked at so many times.
    struct GivenUpAfter(AtomicUsize);

    impl Cancellable for GivenUpAfter {
        fn is_cancelled(&self) -> bool {
            let left = self.0.load(Ordering::Relaxed);
            self.0.store(left.saturating_sub(1), Ordering::Relaxed);
            left == 0
        }

        fn hold(&self) -> bool {
            true
        }

        fn release(&self) {}
    }

    #[test]
    fn looking_at_a_disk_ends_when_nobody_waits_for_it() {
        let (crumbs, layers) = crumbs();
        let given_up = GivenUpAfter(AtomicUsize::new(100));
        let counted =
            run_cancellable(given_up, || count_data(&layers, 0..1 << 62, Wait::Yes, LONG))
                .unwrap_err();
        assert_eq!(counted.raw_os_error(), Some(libc::EIO));
        assert_eq!(crumbs.asked.load(Ordering::Relaxed), 100);
    }
}
