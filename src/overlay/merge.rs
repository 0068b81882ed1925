//! Merging several layers into one, after the deletion of a snapshot in the middle of a stack.
//!
//! Sealed layers are never written, so their combined contents go into a new layer:
//!
//! ```text
//!   upper   .  d  .  z  .  .          d data, z zeros, . lower
//!   lower   a  a  .  a  .  a |...     | upper's lower_limit: nothing past it is copied
//!   new     a  d  .  z  .  . |
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::Overlay;
use super::sealed::Sealed;
use crate::extents::ExtentKind;
use crate::host::{copy_range, or_copied_none, os_error};
use crate::layer::{Layer, ReadBelow, Wait, WritableLayer};

/// Bytes copied between two checks of `stop`: 32 MiB.
const COPY_STEP: u64 = 32 << 20;
/// Bytes read and written at a time where the host cannot copy: 1 MiB.
const COPY_BUFFER_LEN: u64 = 1 << 20;

/// An empty stack below a layer that is being assembled: reads as zeros.
pub(super) struct NothingBelow;

impl ReadBelow for NothingBelow {
    fn read_below(&self, buf: &mut [u8], _: u64, _: Wait) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn is_zero_below(&self, _: Range<u64>, _: Wait) -> io::Result<bool> {
        Ok(true)
    }
}

impl Overlay {
    /// Copies the contents of `layers` into this layer, as if they were stacked on top of it.
    /// Nobody else uses this layer.
    ///
    /// # Errors
    /// `EINTR` when `stop` returns true between two pieces; `ENOSPC`; otherwise the host's errno.
    pub fn merge_from(&self, layers: &Sealed, stop: &dyn Fn() -> bool) -> io::Result<()> {
        let (lower_limit, size) = (layers.lower_limit(), layers.size());
        if lower_limit < self.size() {
            // Bytes that those layers once cut off must not come back.
            self.set_size(lower_limit)?;
        }
        self.set_size(size)?;
        let mut at = 0;
        while at < size {
            if stop() {
                return Err(os_error(libc::EINTR));
            }
            let (extent, _) = layers.extent_and_layer(&(at..size));
            at = extent.range.end;
            match extent.kind {
                ExtentKind::Data => self.merge_data(layers, extent.range, stop)?,
                ExtentKind::Zero | ExtentKind::Hole => {
                    // After data that was cut off inside a block, the rest of that block is already
                    // zeros.
                    let start = extent.range.start.next_multiple_of(self.block_size);
                    let end = extent
                        .range
                        .end
                        .min(lower_limit)
                        .next_multiple_of(self.block_size)
                        .min(size);
                    if start < end {
                        self.zero(start..end, &NothingBelow, Wait::Yes)?;
                    }
                }
                ExtentKind::Lower => {}
            }
        }
        Ok(())
    }

    fn merge_data(
        &self,
        layers: &Sealed,
        range: Range<u64>,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            if stop() {
                return Err(os_error(libc::EINTR));
            }
            let end = range.end.min(at + COPY_STEP);
            // Whole blocks, or up to the end of the disk.
            let whole =
                if end == self.size() { end } else { end / self.block_size * self.block_size };
            if at < whole {
                let copied = self.copy_in_host(layers, at..whole)?;
                at += copied;
                if copied > 0 {
                    continue;
                }
            }
            let len = (end - at).min(COPY_BUFFER_LEN);
            let mut buf = vec![0; usize::try_from(len).map_err(|_| os_error(libc::EFBIG))?];
            layers.read_at(&mut buf, at, Wait::Yes)?;
            self.write_at(&buf, at, &NothingBelow, Wait::Yes)?;
            at += len;
        }
        Ok(())
    }

    /// Lets the host copy `range`, whole blocks that are Data in one layer; returns 0 when it
    /// cannot.
    fn copy_in_host(&self, layers: &Sealed, range: Range<u64>) -> io::Result<u64> {
        or_copied_none(self.copy_in(&range, &mut |to, place| {
            let mut lent = |from: BorrowedFd<'_>, piece: Range<u64>| {
                copy_range(from, piece.clone(), to, piece.start)
            };
            Ok(layers.lend_at(place, Wait::Yes, &mut lent)?.1.unwrap_or(0))
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::keep::temporary;
    use super::super::sealed::tests::{StackPlan, bytes, large, parts, pieces, slow, small};
    use super::*;

    /// Creates an empty layer that replaces `old`.
    fn empty(dir: &Path, old: &Overlay) -> Overlay {
        let block = u32::try_from(old.block_size()).unwrap();
        temporary(dir, block, old.size(), old.lower_limit(), None).unwrap()
    }

    fn sealed(layers: &[Arc<Overlay>]) -> Sealed {
        Sealed::new(layers.to_vec()).unwrap()
    }

    /// Asserts that two stacks give the same bytes and show the base at the same places.
    fn check_same(old: &[Arc<Overlay>], new: &[Arc<Overlay>]) {
        let size = old[0].size();
        assert_eq!(new[0].size(), size);
        let lower = |layers: &[Arc<Overlay>]| {
            let mut all = pieces(size, |range| slow(layers, range));
            all.retain(|piece| piece.1 == ExtentKind::Lower);
            all.into_iter().map(|piece| piece.0).collect::<Vec<_>>()
        };
        assert_eq!(lower(new), lower(old), "where the base shows");
        for layers in [old, new] {
            for (range, ..) in pieces(size, |range| slow(layers, range)) {
                for part in parts(&range) {
                    assert!(bytes(new, part.clone()) == bytes(old, part.clone()), "{part:?}");
                }
            }
        }
    }

    /// Merges the layer at depth `at` with the one below it, in both possible ways.
    fn check(plan: &StackPlan, at: usize) {
        let dir = tempfile::tempdir().unwrap();
        let old = plan.build(dir.path());
        let at = at % old.len();
        let pair = &old[at..old.len().min(at + 2)];
        let bottom = pair.last().unwrap();
        let never = || false;
        let both = empty(dir.path(), bottom);
        both.merge_from(&sealed(pair), &never).unwrap();
        // One after the other, as a busy top is merged.
        let each = empty(dir.path(), bottom);
        for layer in pair.iter().rev() {
            each.merge_from(&sealed(std::slice::from_ref(layer)), &never).unwrap();
        }
        for merged in [both, each] {
            let mut new = old.clone();
            new.splice(at..at + pair.len(), [Arc::new(merged)]);
            check_same(&old, &new);
        }
    }

    proptest! {
        #[test]
        fn a_merged_layer_reads_like_its_two_sources(plan in small(), at in 0usize..6) {
            check(&plan, at);
        }
    }

    proptest! {
        // Each case copies megabytes.
        #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(24) })]

        #[test]
        fn a_merge_of_many_chunks_reads_like_its_two_sources(plan in large(), at in 0usize..6) {
            check(&plan, at);
        }
    }

    #[test]
    fn merging_stops_when_asked_to() {
        let dir = tempfile::tempdir().unwrap();
        let lower = temporary(dir.path(), 4096, 1 << 20, 1 << 20, None).unwrap();
        lower.write_at(&[7; 9000], 100, &NothingBelow, Wait::Yes).unwrap();
        let lower = Arc::new(lower);
        let new = empty(dir.path(), &lower);
        let stopped = new.merge_from(&sealed(&[lower]), &|| true).unwrap_err();
        assert_eq!(stopped.raw_os_error(), Some(libc::EINTR));
    }
}
