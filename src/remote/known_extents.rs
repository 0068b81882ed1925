//! Where an image that is read through a cache has holes: its server is asked, or a bmap has said it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::answer::is_outage;
use super::extent_cache::{ExtentCache, ExtentWalk};
use super::transport::Transport;
use crate::arrival::Arrival;
use crate::extents::{Extent, ExtentKind};
use crate::formats::bmap::Bmap;

/// What is known of the extents of an image.
pub(super) enum KnownExtents {
    /// What its server has told, and which extents it is asked for.
    Told(Arc<Mutex<Told>>),
    /// All of it: what has data, in ascending order, without neighbours that touch.
    Mapped(Vec<Range<u64>>),
}

#[derive(Default)]
pub(super) struct Told {
    cache: ExtentCache,
    walk: ExtentWalk,
    /// The questions that are not answered yet.
    asked: Vec<(Range<u64>, Arrival)>,
}

impl KnownExtents {
    /// Knows what `bmap` says; without one nothing yet.
    pub(super) fn new(bmap: Option<&Bmap>) -> Self {
        let Some(bmap) = bmap else { return Self::Told(Arc::default()) };
        let mut mapped: Vec<Range<u64>> = Vec::new();
        for range in &bmap.ranges {
            match mapped.last_mut() {
                Some(last) if last.end == range.bytes.start => last.end = range.bytes.end,
                _ => mapped.push(range.bytes.clone()),
            }
        }
        Self::Mapped(mapped)
    }

    /// Returns the extent at `range.start`, as far as it is known; otherwise `transport` is asked for it,
    /// and the arrival of the answer is returned.
    pub(super) fn at(
        &self,
        range: &Range<u64>,
        transport: &dyn Transport,
    ) -> Result<Extent, Arrival> {
        let told = match self {
            Self::Mapped(mapped) => return Ok(mapped_at(mapped, range)),
            Self::Told(_) if !transport.knows_extents() => {
                return Ok(Extent::new(range.clone(), ExtentKind::Data));
            }
            Self::Told(told) => told,
        };
        let questions: Vec<_> = {
            let mut guard = told.lock();
            let extents = &mut *guard;
            if let Some(found) = extents.cache.get(range) {
                return Ok(found);
            }
            let asked = extents.asked.iter().find(|(asked, _)| asked.contains(&range.start));
            if let Some((_, arrival)) = asked {
                return Err(arrival.clone());
            }
            let size = transport.size();
            let questions = extents.walk.questions(range.start, size, &extents.cache);
            let noted = questions.into_iter().map(|question| (question, Arrival::default()));
            let noted: Vec<_> = noted.collect();
            extents.asked.extend(noted.iter().cloned());
            noted
        };
        let first = questions.first().map(|(_, arrival)| arrival.clone());
        for (question, arrival) in questions {
            ask(told, transport, question, arrival);
        }
        first.map_or_else(|| Ok(Extent::new(range.clone(), ExtentKind::Data)), Err)
    }

    /// Returns the extent at `range.start`, cut to `range`, without asking anybody: what is not known may
    /// be data.
    pub(super) fn probably_at(&self, range: &Range<u64>) -> Extent {
        match self {
            Self::Mapped(mapped) => mapped_at(mapped, range),
            Self::Told(told) => {
                let extents = told.lock();
                extents.cache.get(range).unwrap_or_else(|| {
                    let end = extents.cache.unknown_end(range);
                    Extent::new(range.start..end, ExtentKind::Data)
                })
            }
        }
    }

    /// Returns the prefix of `range` that has data, for all that is known: all of it where nothing is.
    pub(super) fn data_prefix(&self, range: &Range<u64>) -> Range<u64> {
        let end = match self {
            Self::Mapped(mapped) => mapped_at(mapped, range).range.end,
            Self::Told(told) => {
                told.lock().cache.get(range).map_or(range.end, |found| found.range.end)
            }
        };
        range.start..end
    }
}

/// Returns the extent at `range.start`, cut to `range`, where `mapped` has data.
fn mapped_at(mapped: &[Range<u64>], range: &Range<u64>) -> Extent {
    let next = mapped.get(mapped.partition_point(|data| data.end <= range.start));
    let (end, kind) = match next {
        Some(data) if data.start <= range.start => (data.end, ExtentKind::Data),
        Some(data) => (data.start, ExtentKind::Hole),
        None => (range.end, ExtentKind::Hole),
    };
    Extent::new(range.start..end.min(range.end), kind)
}

/// Asks the server for the extents of `stretch`, which is noted as asked for.
fn ask(told: &Arc<Mutex<Told>>, transport: &dyn Transport, stretch: Range<u64>, arrival: Arrival) {
    let (shared, asked) = (Arc::clone(told), stretch.clone());
    let done = move |result: io::Result<Vec<Extent>>| {
        let outcome = {
            let mut extents = shared.lock();
            extents.asked.retain(|(other, _)| *other != asked);
            match result {
                Ok(found) => {
                    extents.cache.insert(&found);
                    Ok(())
                }
                Err(error) if is_outage(&error) => Err(libc::EIO),
                // A server that cannot say holds data, for all that is known.
                Err(_) => {
                    extents.cache.insert(&[Extent::new(asked, ExtentKind::Data)]);
                    Ok(())
                }
            }
        };
        arrival.complete(outcome);
    };
    transport.extents(stretch, Box::new(done));
}
