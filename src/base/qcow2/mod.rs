//! The qcow2 base: an image in QEMU's format, and the images it is a difference to.
//!
//! ```text
//!   Chain ── Image ── header.rs  what it says of itself, checked before anything is believed
//!     │        │      runs.rs    what lies where, remembered
//!     │        └────── tables.rs imago reads the tables and inflates clusters, within a budget
//!     └───── Image, or RawBase for a raw one
//! ```
//!
//! Bytes that lie in a file as they are do not go through the library: they are read from the file
//! as those of a raw base are. `chain.rs` opens the images, each by its recorded format and only
//! below directories that were allowed.

mod chain;
mod header;
mod inflated;
mod runs;
mod tables;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use self::chain::{Chain, ChainError, TopImage, open, open_top};
pub use self::header::{Header, HeaderError};
use self::inflated::Inflated;
use self::runs::{Place, Run, Runs};
use self::tables::{Budget, Mapping, Tables};
use super::raw::RawBase;
use crate::extents::{Extent, Kind};
use crate::host::errno;
use crate::layer::{Copy, Layer, Wait};

/// One image of a chain.
pub struct Image {
    tables: Tables,
    /// The image itself: its locks end with it.
    _own: Arc<RawBase>,
    /// Where its data lies: the image itself, or its data file.
    data: Arc<RawBase>,
    size: u64,
    cluster: u64,
    runs: Runs,
    inflated: Arc<Inflated>,
    /// What reads where it has nothing.
    below: Kind,
}

impl Image {
    /// Reads the tables of `own`, which is open as `file` as well and whose `header` has been
    /// checked; `data` is where its bytes are.
    ///
    /// # Errors
    /// The host's, and `InvalidData`.
    fn new(
        file: Arc<File>,
        own: Arc<RawBase>,
        data: Arc<RawBase>,
        header: &Header,
        budget: &Budget,
        inflated: Arc<Inflated>,
    ) -> io::Result<Self> {
        Ok(Self {
            tables: Tables::open(file, header, budget)?,
            _own: own,
            data,
            size: header.size,
            cluster: header.cluster,
            runs: Runs::new(header.size, header.cluster, budget.images()),
            inflated,
            below: if header.backing.is_some() { Kind::Lower } else { Kind::Hole },
        })
    }

    /// The run at `range.start`, which is inside the size.
    fn run(&self, range: &Range<u64>, wait: Wait) -> io::Result<Run> {
        let run = match self.runs.get(range) {
            Some(run) => run,
            None => self.look_up(range, wait)?,
        };
        let Place::Data(at) = run.place else { return Ok(run) };
        let end = self.data.size();
        if at < end {
            let len = (run.range.end - run.range.start).min(end - at);
            return Ok(Run { range: run.range.start..run.range.start + len, ..run });
        }
        // QEMU leaves the rest of the last cluster away. A cluster that is missing whole was cut off.
        let cluster = at - at % self.cluster;
        if cluster >= end {
            return Err(damaged(&io::Error::other(format!("a cluster at {cluster} is cut off"))));
        }
        let len = (run.range.end - run.range.start).min(cluster + self.cluster - at);
        Ok(Run { range: run.range.start..run.range.start + len, place: Place::Zero })
    }

    /// Asks the tables what a stretch is.
    fn look_up(&self, range: &Range<u64>, wait: Wait) -> io::Result<Run> {
        if wait == Wait::No {
            return Err(errno(libc::EAGAIN));
        }
        let stretch = self.runs.stretch(range.start);
        let mut runs = Vec::new();
        let mut at = stretch.start;
        while at < stretch.end {
            let (mapping, len) =
                self.tables.mapping(at, stretch.end - at).map_err(|error| damaged(&error))?;
            let place = match mapping {
                Mapping::Nothing => Place::Lower,
                Mapping::Zero => Place::Zero,
                Mapping::Data(offset) => Place::Data(offset),
                Mapping::Packed => Place::Packed,
            };
            let end = at + len.clamp(1, stretch.end - at);
            runs::push(&mut runs, Run { range: at..end, place });
            at = end;
        }
        self.runs.keep(runs, range).ok_or_else(|| errno(libc::EIO))
    }

    /// The bytes of the compressed cluster that begins at `start`.
    fn inflate(&self, start: u64, wait: Wait) -> io::Result<Arc<[u8]>> {
        let key = (std::ptr::from_ref(self).addr(), start);
        if let Some(bytes) = self.inflated.get(key) {
            return Ok(bytes);
        }
        if wait == Wait::No {
            return Err(errno(libc::EAGAIN));
        }
        let len = usize::try_from(self.cluster.min(self.size - start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        self.tables.inflate(&mut bytes, start).map_err(|error| damaged(&error))?;
        let bytes: Arc<[u8]> = bytes.into();
        self.inflated.keep(key, &bytes);
        Ok(bytes)
    }
}

/// What the library could not read: an error with the host's errno, or `EIO`.
fn damaged(error: &io::Error) -> io::Error {
    log::warn!("a qcow2 base cannot be read: {error}");
    errno(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Layer for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        if range.start >= self.size {
            return Ok(Extent::new(range, Kind::Hole));
        }
        let run = match self.run(&(range.start..range.end.min(self.size)), wait) {
            Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => {
                // What is damaged is found by who reads it.
                let cluster = range.start - range.start % self.cluster + self.cluster;
                return Ok(Extent::new(range.start..range.end.min(cluster), Kind::Data));
            }
            run => run?,
        };
        let kind = match run.place {
            Place::Lower => self.below,
            Place::Zero => Kind::Zero,
            Place::Packed => Kind::Data,
            Place::Data(at) => {
                // Allocated clusters may be holes of the file: as QEMU, these are zeros.
                let found =
                    self.data.extent_at(at..at + (run.range.end - run.range.start), wait)?;
                let end = run.range.start + found.len();
                let kind = if found.kind == Kind::Data { Kind::Data } else { Kind::Zero };
                return Ok(Extent::new(run.range.start..end, kind));
            }
        };
        Ok(Extent::new(run.range, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size {
            return Ok(Extent::new(asked, Kind::Hole));
        }
        let run = self.run(&(offset..asked.end.min(self.size)), wait)?;
        let len = run.range.end - run.range.start;
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
        match run.place {
            Place::Lower => Ok(Extent::new(run.range, self.below)),
            Place::Zero => Ok(Extent::new(run.range, Kind::Zero)),
            Place::Data(at) => {
                let found = self.data.read_at(&mut buf[..len], at, wait)?;
                let kind = if found.kind == Kind::Data { Kind::Data } else { Kind::Zero };
                Ok(Extent::new(offset..offset + found.len(), kind))
            }
            Place::Packed => {
                let start = offset - offset % self.cluster;
                let bytes = self.inflate(start, wait)?;
                let from = usize::try_from(offset - start).unwrap_or(usize::MAX);
                let Some(rest) = bytes.get(from..) else { return Err(errno(libc::EIO)) };
                let len = len.min(rest.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(Extent::new(offset..offset + len as u64, Kind::Data))
            }
        }
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: Copy<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        if range.start < self.size
            && let Run { range: run, place: Place::Data(at) } =
                self.run(&(range.start..range.end.min(self.size)), wait)?
        {
            let (found, copied) = self.data.lend_at(at..at + (run.end - run.start), wait, copy)?;
            let kind = if found.kind == Kind::Data { Kind::Data } else { Kind::Zero };
            return Ok((Extent::new(run.start..run.start + found.len(), kind), copied));
        }
        Ok((self.extent_at(range, wait)?, None))
    }
}
