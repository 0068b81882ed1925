//! Bytes for which the host has no room: in memory for a short time, until those who wait for them have
//! read them. A full host file system makes a mount slow, never wrong.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// The most bytes of each kind. Bytes that are waited for and bytes ahead of a reader are apart, so that
/// no read-ahead throws out what a reader is about to take.
const CAPACITY: usize = 16 << 20;

/// Why bytes were fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Somebody waits for them.
    Demand,
    /// They will be read, perhaps.
    Ahead,
}

struct Part {
    offset: u64,
    bytes: Vec<u8>,
}

impl Part {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes.len() as u64
    }
}

/// Parts in the order in which they came.
#[derive(Default)]
struct Parts {
    parts: VecDeque<Part>,
    len: usize,
}

impl Parts {
    fn push(&mut self, part: Part) {
        while self.len + part.bytes.len() > CAPACITY && self.pop() {}
        self.len += part.bytes.len();
        self.parts.push_back(part);
    }

    fn pop(&mut self) -> bool {
        let Some(oldest) = self.parts.pop_front() else { return false };
        self.len -= oldest.bytes.len();
        true
    }
}

#[derive(Default)]
struct All {
    demand: Parts,
    ahead: Parts,
}

impl All {
    fn iter(&self) -> impl Iterator<Item = &Part> {
        self.demand.parts.iter().chain(&self.ahead.parts)
    }
}

/// The bytes that the host has no room for.
#[derive(Default)]
pub(super) struct Overflow {
    all: Mutex<All>,
    /// Whether there are none, to be asked without the lock.
    is_used: AtomicBool,
}

impl Overflow {
    /// Keeps `bytes` until newer ones need their room.
    pub(super) fn keep(&self, offset: u64, bytes: Vec<u8>, urgency: Urgency) {
        let mut all = self.all.lock();
        let parts = match urgency {
            Urgency::Demand => &mut all.demand,
            Urgency::Ahead => &mut all.ahead,
        };
        parts.push(Part { offset, bytes });
        self.is_used.store(true, Ordering::Release);
    }

    /// Forgets the oldest bytes of each kind: the host has room again.
    pub(super) fn shrink(&self) {
        if self.is_used.load(Ordering::Acquire) {
            let mut all = self.all.lock();
            all.demand.pop();
            all.ahead.pop();
            self.is_used.store(all.iter().next().is_some(), Ordering::Release);
        }
    }

    /// Forgets the bytes that touch `range` (bytes of the image).
    pub(super) fn forget(&self, range: &Range<u64>) {
        let mut all = self.all.lock();
        let All { demand, ahead } = &mut *all;
        for parts in [demand, ahead] {
            parts.parts.retain(|part| part.range().end <= range.start || part.offset >= range.end);
            parts.len = parts.parts.iter().map(|part| part.bytes.len()).sum();
        }
    }

    /// Fills a prefix of `buf` with the bytes at `offset`. Returns its length, 0 when there are none.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        if !self.is_used.load(Ordering::Acquire) {
            return 0;
        }
        let all = self.all.lock();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let Some(part) = all.iter().find(|part| part.range().contains(&at)) else { break };
            let skip = usize::try_from(at - part.offset).unwrap_or(usize::MAX);
            let found = part.bytes.get(skip..).unwrap_or_default();
            let len = found.len().min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&found[..len]);
            done += len;
        }
        done
    }

    /// Removes from `ranges` (bytes, ascending) what is kept here.
    pub(super) fn subtract_from(&self, ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
        if !self.is_used.load(Ordering::Acquire) {
            return ranges;
        }
        let all = self.all.lock();
        all.iter().fold(ranges, |left, part| {
            let cut = part.range();
            let both = |range: Range<u64>| {
                let before = range.start..range.end.min(cut.start);
                let after = range.start.max(cut.end)..range.end;
                [before, after].into_iter().filter(|range| !range.is_empty())
            };
            left.into_iter().flat_map(both).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_ahead_never_throws_out_what_is_waited_for() {
        let overflow = Overflow::default();
        overflow.keep(0, vec![1; 4096], Urgency::Demand);
        for at in 1..=20u64 {
            overflow.keep(at << 20, vec![2; 1 << 20], Urgency::Ahead);
        }
        let mut buf = [0; 8192];
        assert_eq!(overflow.read(&mut buf, 0), 4096);
        assert_eq!(overflow.read(&mut buf, 4 << 20), 0);
        assert_eq!(overflow.read(&mut buf, (6 << 20) - 4096), 8192);
        let left = overflow.subtract_from(vec![2048..8192, (4 << 20)..(21 << 20) + 1]);
        assert_eq!(left, [4096..8192, (4 << 20)..(5 << 20), (21 << 20)..(21 << 20) + 1]);
        for _ in 0..20 {
            overflow.shrink();
        }
        assert_eq!(overflow.read(&mut buf, 6 << 20), 0);
        assert!(!overflow.is_used.load(Ordering::Acquire));
    }
}
