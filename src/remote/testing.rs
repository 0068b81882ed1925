//! A server in memory, for tests.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::transport::{
    ChangeDone, ExtentsDone, IdentityCheck, MAX_ZERO, ReadDone, RequestLimits, Transport,
    WritableTransport,
};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;

/// An image in memory, whose requests are answered by threads of their own.
pub(super) struct MemoryServer {
    pub(super) bytes: Mutex<Vec<u8>>,
    size: u64,
    /// A run of zeros that is told as a hole; without one nothing is told.
    hole: Option<Range<u64>>,
    limits: RequestLimits,
    delay: Duration,
    /// Reads that touch one of these ranges fail with the errno.
    pub(super) failing: Mutex<Vec<(Range<u64>, i32)>>,
    /// The ranges that were read, and the number of questions for extents.
    pub(super) reads: Mutex<Vec<Range<u64>>>,
    /// The starts of requests that somebody waits for.
    pub(super) hurried: Mutex<Vec<u64>>,
    pub(super) extent_questions: Mutex<usize>,
    pub(super) flushes: Mutex<usize>,
}

impl MemoryServer {
    /// Creates a server of `bytes` that knows no extents.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self {
            size: bytes.len() as u64,
            bytes: Mutex::new(bytes),
            hole: None,
            limits: RequestLimits { alignment: 1, max_len: 32 << 20, max_in_flight: 16 },
            delay: Duration::ZERO,
            failing: Mutex::default(),
            reads: Mutex::default(),
            hurried: Mutex::default(),
            extent_questions: Mutex::default(),
            flushes: Mutex::default(),
        }
    }

    pub(super) fn with_hole(self, hole: Range<u64>) -> Self {
        Self { hole: Some(hole), ..self }
    }

    pub(super) fn with_limits(self, limits: RequestLimits) -> Self {
        Self { limits, ..self }
    }

    pub(super) fn with_delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Answers on another thread, after the delay.
    fn answer<T: Send + 'static>(
        &self,
        done: Box<dyn FnOnce(io::Result<T>) + Send>,
        result: io::Result<T>,
    ) {
        let delay = self.delay;
        thread::spawn(move || {
            thread::sleep(delay);
            done(result);
        });
    }

    fn check(&self, range: &Range<u64>) {
        let alignment = u64::from(self.limits.alignment);
        assert!(!range.is_empty() && range.end <= self.size, "{range:?}");
        assert!(range.end - range.start <= u64::from(self.limits.max_len), "{range:?}");
        assert!(range.start.is_multiple_of(alignment), "{range:?}");
        assert!(range.end.is_multiple_of(alignment) || range.end == self.size, "{range:?}");
    }
}

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

impl Transport for MemoryServer {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> RequestLimits {
        self.limits
    }

    fn read(&self, range: Range<u64>, done: ReadDone) {
        self.check(&range);
        self.reads.lock().push(range.clone());
        let touches = |bad: &Range<u64>| bad.start < range.end && range.start < bad.end;
        let failing = self.failing.lock().iter().find(|(bad, _)| touches(bad)).map(|bad| bad.1);
        let result = match failing {
            Some(errno) => Err(os_error(errno)),
            None => Ok(self.bytes.lock()[span(&range)].to_vec()),
        };
        self.answer(done, result);
    }

    fn hurry(&self, start: u64) {
        self.hurried.lock().push(start);
    }

    fn knows_extents(&self) -> bool {
        self.hole.is_some()
    }

    fn extents(&self, range: Range<u64>, done: ExtentsDone) {
        *self.extent_questions.lock() += 1;
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let next = match self.hole.iter().find(|hole| hole.end > at && !hole.is_empty()) {
                Some(hole) if hole.start <= at => Extent::new(at..hole.end, ExtentKind::Hole),
                Some(hole) => Extent::new(at..hole.start, ExtentKind::Data),
                None => Extent::new(at..self.size, ExtentKind::Data),
            };
            let next = next.clip(&range).unwrap();
            at = next.range.end;
            found.push(next);
        }
        self.answer(done, Ok(found));
    }
}

impl WritableTransport for MemoryServer {
    fn write(&self, offset: u64, bytes: Vec<u8>, done: ChangeDone) {
        let range = offset..offset + bytes.len() as u64;
        self.check(&range);
        self.bytes.lock()[span(&range)].copy_from_slice(&bytes);
        self.answer(done, Ok(()));
    }

    fn zero(&self, range: Range<u64>, punch: bool, done: ChangeDone) {
        assert!(range.start.is_multiple_of(u64::from(self.limits.alignment)));
        assert!(range.end - range.start <= MAX_ZERO);
        if !punch {
            return self.answer(done, Err(os_error(libc::EOPNOTSUPP)));
        }
        self.bytes.lock()[span(&range)].fill(0);
        self.answer(done, Ok(()));
    }

    fn flush(&self, done: ChangeDone) {
        *self.flushes.lock() += 1;
        let failing = self.failing.lock().iter().any(|(bad, _)| bad.is_empty());
        self.answer(done, if failing { Err(os_error(libc::EIO)) } else { Ok(()) });
    }

    fn set_identity_check(&self, _: IdentityCheck) {}
}

/// Bytes of an image, all different enough that a shifted block shows.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at / 7 + at / 4096 * 31) % 251).unwrap()).collect()
}

/// The address of no server.
pub(super) fn address() -> crate::config::RemoteAddress {
    crate::config::RemoteAddress::parse("nbd://memory/").unwrap()
}

/// A server that can be asked for its counts beside the layer that uses it.
pub(super) type SharedServer = Arc<MemoryServer>;
