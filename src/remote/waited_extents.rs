//! The extents of an image whose readers wait for each answer: of a program on this host, or of a
//! server that is written to.

use std::io;
use std::ops::Range;

use parking_lot::Mutex;

use super::answer::{answer_of, as_told, is_outage};
use super::extent_cache::{ExtentCache, ExtentWalk};
use super::transport::Transport;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::Wait;

/// The extents that were told so far, and which are asked for next.
#[derive(Default)]
pub(super) struct WaitedExtents(Mutex<State>);

#[derive(Default)]
struct State {
    cache: ExtentCache,
    walk: ExtentWalk,
    /// How often all was forgotten. What was asked for before the last time is not remembered.
    generation: u64,
}

impl WaitedExtents {
    /// Returns the extent at `range.start`, clipped to `range`, when it is known.
    pub(super) fn get(&self, range: &Range<u64>) -> Option<Extent> {
        self.0.lock().cache.get(range)
    }

    /// Forgets all, since the image has changed.
    pub(super) fn forget(&self) {
        let mut state = self.0.lock();
        *state = State { generation: state.generation + 1, ..State::default() };
    }

    /// Returns the extent at `range.start`, clipped to `range` and to the size of the image; asks
    /// `transport` for it when it is not known. What the other end cannot tell is data, which a read
    /// finds good or bad.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`], when it has to be asked for; `EIO` when there was no answer in time,
    /// or the image is another one by now.
    pub(super) fn extent_at(
        &self,
        transport: &dyn Transport,
        range: Range<u64>,
        wait: Wait,
    ) -> io::Result<Extent> {
        let size = transport.size();
        if range.start >= size {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let range = range.start..range.end.min(size);
        if !transport.knows_extents() {
            return Ok(Extent::new(range, ExtentKind::Data));
        }
        if let Some(known) = self.get(&range) {
            return Ok(known);
        }
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let first = match self.ask(transport, range.start) {
            Ok(found) => found.first().and_then(|first| first.clip(&range)),
            Err(error) if is_outage(&error) => return Err(as_told(&error)),
            Err(_) => None,
        };
        Ok(first.unwrap_or_else(|| Extent::new(range, ExtentKind::Data)))
    }

    /// Asks `transport` for the extents from byte `at` on, of which nothing was known, and waits.
    fn ask(&self, transport: &dyn Transport, at: u64) -> io::Result<Vec<Extent>> {
        let (questions, generation) = {
            let State { cache, walk, generation } = &mut *self.0.lock();
            (walk.questions(at, transport.size(), cache), *generation)
        };
        let ask = |question| answer_of(|done| transport.extents(question, done));
        let answers: Vec<_> = questions.into_iter().map(ask).collect();
        let mut found = Vec::new();
        for answer in answers {
            found.extend(answer.wait()?);
        }
        let mut state = self.0.lock();
        if state.generation == generation {
            state.cache.insert(&found);
        }
        Ok(found)
    }
}
