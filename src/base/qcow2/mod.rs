//! The qcow2 base: an image in QEMU's format, and the images it is a difference to.
//!
//! ```text
//!   Chain ── Image ── header.rs  what it says of itself, checked before anything is believed
//!     │        │      runs.rs    what lies where, remembered
//!     │        └───── imago      reads the tables and inflates clusters
//!     └───── Image, or RawBase for a raw one
//! ```
//!
//! Bytes that lie in a file as they are do not go through the library: they are read from the file
//! as those of a raw base are. `chain.rs` opens the images, each by its recorded format and only
//! below directories that were allowed.

mod chain;
mod header;
mod runs;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use imago::format::drivers::FormatDriverInstance;
use imago::{ShallowMapping, StorageOpenOptions};
use parking_lot::Mutex;

pub use self::chain::{Chain, ChainError, TopImage, open, open_top};
pub use self::header::{Header, HeaderError};
use self::runs::{Place, Run, Runs};
use super::raw::RawBase;
use crate::extents::{Extent, Kind};
use crate::host::errno;
use crate::layer::{Copy, Layer, Wait};

/// How much inflated data an image keeps: reads come in pieces smaller than a cluster.
const INFLATED: usize = 4 << 20;

type Tables = imago::qcow2::Qcow2<imago::file::File>;

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
    /// Clusters that were inflated, the newest last.
    inflated: Mutex<VecDeque<(u64, Arc<[u8]>)>>,
    /// What reads where it has nothing.
    below: Kind,
}

impl Image {
    /// Reads the tables of `own`, which is open as `file` as well and whose `header` has been
    /// checked; `data` is where its bytes are.
    ///
    /// # Errors
    /// The host's, and `InvalidData`.
    fn new(file: File, own: Arc<RawBase>, data: Arc<RawBase>, header: &Header) -> io::Result<Self> {
        let as_storage = |file| imago::file::File::from_open_file(file, StorageOpenOptions::new());
        let external = match header.data_file {
            // Only the tables are read through it.
            Some(_) => Some(as_storage(file.try_clone()?)?),
            None => None,
        };
        let mut tables = Tables::open_image(as_storage(file)?, false)?;
        tables.set_data_file(external);
        tables.set_backing(None);
        Ok(Self {
            tables,
            _own: own,
            data,
            size: header.size,
            cluster: header.cluster,
            runs: Runs::new(header.size, header.cluster),
            inflated: Mutex::default(),
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
                self.tables.get_mapping(at, stretch.end - at).map_err(|error| damaged(&error))?;
            let place = match mapping {
                ShallowMapping::Zero { explicit: false, .. } => Place::Lower,
                ShallowMapping::Zero { .. } => Place::Zero,
                ShallowMapping::Raw { offset, .. } => Place::Data(offset),
                ShallowMapping::Special { .. } => Place::Packed,
                _ => return Err(errno(libc::EIO)),
            };
            let end = at + len.clamp(1, stretch.end - at);
            runs::push(&mut runs, Run { range: at..end, place });
            at = end;
        }
        self.runs.keep(runs, range).ok_or_else(|| errno(libc::EIO))
    }

    /// The bytes of the compressed cluster that begins at `start`.
    fn inflate(&self, start: u64, wait: Wait) -> io::Result<Arc<[u8]>> {
        let known = |kept: &VecDeque<(u64, Arc<[u8]>)>| {
            kept.iter().find(|(at, _)| *at == start).map(|(_, bytes)| Arc::clone(bytes))
        };
        if let Some(bytes) = known(&self.inflated.lock()) {
            return Ok(bytes);
        }
        if wait == Wait::No {
            return Err(errno(libc::EAGAIN));
        }
        let len = usize::try_from(self.cluster.min(self.size - start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        self.tables.readv_special((&mut bytes).into(), start).map_err(|error| damaged(&error))?;
        let bytes: Arc<[u8]> = bytes.into();
        let mut kept = self.inflated.lock();
        if known(&kept).is_none() {
            kept.push_back((start, Arc::clone(&bytes)));
        }
        let most = usize::try_from(INFLATED as u64 / self.cluster).unwrap_or(1).max(2);
        while kept.len() > most {
            kept.pop_front();
        }
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
