//! The qcow2 base: an image in QEMU's format, and its backing images.
//!
//! ```text
//!   BackingChain ── Qcow2Layer ── header.rs     the header, checked before anything else is used
//!     │               │           l1_map.rs     what no table maps, in one step
//!     │               │           run_cache.rs  the mapping of the image, cached as runs
//!     │               └────────── tables.rs     imago reads the tables and inflates clusters,
//!     │                                         within a budget; storage.rs gives it the bytes
//!     └───── Qcow2Layer, or RawBase for a raw image
//! ```
//!
//! An image is read through the [`Layer`] that has its bytes: a file of the host, or an image on a
//! server. Uncompressed bytes do not go through the library: they are read as those of a raw base
//! are, and where the layer below answers `EAGAIN`, so does this one, at once. What needs the tables
//! is `EAGAIN` under [`Wait::No`]. `chain.rs` opens the images, each by its recorded format and only below the directories
//! that `allowed_dirs.rs` accepts.

mod allowed_dirs;
mod chain;
mod chain_error;
mod cluster_cache;
mod header;
mod l1_map;
mod run_cache;
mod storage;
mod tables;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

pub use self::chain::{BackingChain, TopImage, open, open_top};
pub use self::chain_error::{ChainError, FileRole};
use self::cluster_cache::ClusterCache;
pub use self::header::{DataFile, HeaderError, Qcow2Header};
use self::l1_map::L1Map;
use self::run_cache::{MappedRun, RunCache, RunMapping};
use self::tables::{ImageTables, TableBudget};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};
use crate::log_throttle::LogThrottle;

/// An image of a chain.
pub struct Qcow2Layer {
    tables: ImageTables,
    /// What holds the data: the image itself, or its data file.
    data: Arc<dyn Layer>,
    size: u64,
    cluster_size: u64,
    l2_tables: L1Map,
    run_cache: RunCache,
    cluster_cache: Arc<ClusterCache>,
    damage_log: LogThrottle,
    /// How unallocated ranges are described.
    unallocated_kind: ExtentKind,
}

impl Qcow2Layer {
    /// Reads the tables of `image`, whose `header` has been checked and has the L2 tables `l2_tables`;
    /// `data` holds its bytes.
    ///
    /// # Errors
    /// The errno of the image; `InvalidData` for damaged tables.
    fn new(
        image: Arc<dyn Layer>,
        data: Arc<dyn Layer>,
        header: &Qcow2Header,
        l2_tables: L1Map,
        budget: &TableBudget,
        inflated: Arc<ClusterCache>,
    ) -> io::Result<Self> {
        Ok(Self {
            tables: ImageTables::open(image, header, budget)?,
            data,
            size: header.size,
            cluster_size: header.cluster_size,
            l2_tables,
            run_cache: RunCache::new(header.size, header.cluster_size, budget.images()),
            cluster_cache: inflated,
            damage_log: LogThrottle::default(),
            unallocated_kind: if header.backing.is_some() {
                ExtentKind::Lower
            } else {
                ExtentKind::Hole
            },
        })
    }

    /// Returns the run at `range.start`, which is inside the size.
    fn run_at(&self, range: &Range<u64>, wait: Wait) -> io::Result<MappedRun> {
        let unmapped_end = self.l2_tables.unmapped_end(range);
        if unmapped_end > range.start {
            // However large it is: the size of a disk is no measure of the work on its image.
            let range = range.start..unmapped_end;
            return Ok(MappedRun { range, mapping: RunMapping::Lower });
        }
        let run = match self.run_cache.get(range) {
            Some(run) => run,
            None => self.look_up_run(range, wait)?,
        };
        let RunMapping::Data(at) = run.mapping else { return Ok(run) };
        let end = self.data.size();
        if at < end {
            let len = (run.range.end - run.range.start).min(end - at);
            return Ok(MappedRun { range: run.range.start..run.range.start + len, ..run });
        }
        // QEMU omits the rest of the last cluster. A cluster that is missing as a whole was cut
        // off.
        let cluster = at - at % self.cluster_size;
        if cluster >= end {
            let error = io::Error::other(format!("a cluster at {cluster} is cut off"));
            return Err(self.read_error(&error));
        }
        let len = (run.range.end - run.range.start).min(cluster + self.cluster_size - at);
        Ok(MappedRun { range: run.range.start..run.range.start + len, mapping: RunMapping::Zero })
    }

    /// Reads the mapping of a whole stretch from the tables. A wrong entry is that of its cluster alone.
    fn look_up_run(&self, range: &Range<u64>, wait: Wait) -> io::Result<MappedRun> {
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let stretch = self.run_cache.stretch_at(range.start);
        let mut runs = Vec::new();
        let mut at = stretch.start;
        // Behind the cluster at which a longer run was found to be wrong somewhere.
        let mut checked_to = at;
        while at < stretch.end {
            let cluster_end = (at - at % self.cluster_size + self.cluster_size).min(stretch.end);
            let asked_to = if at < checked_to { cluster_end } else { stretch.end };
            let (mapping, len) = match self.tables.mapping(at, asked_to - at) {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    if asked_to > cluster_end {
                        // Somewhere in what was asked for: it is found cluster by cluster.
                        checked_to = asked_to;
                        continue;
                    }
                    (RunMapping::Damaged, cluster_end - at)
                }
                found => found.map_err(|error| self.read_error(&error))?,
            };
            let end = at + len.clamp(1, stretch.end - at);
            run_cache::push_merged(&mut runs, MappedRun { range: at..end, mapping });
            at = end;
        }
        self.run_cache.insert(runs, range).ok_or_else(|| os_error(libc::EIO))
    }

    /// Returns the bytes of the compressed cluster that starts at `start`.
    fn inflate(&self, start: u64, wait: Wait) -> io::Result<Arc<[u8]>> {
        let key = (std::ptr::from_ref(self).addr(), start);
        if let Some(bytes) = self.cluster_cache.get(key) {
            return Ok(bytes);
        }
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let len = usize::try_from(self.cluster_size.min(self.size - start)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        self.tables.inflate(&mut bytes, start).map_err(|error| self.read_error(&error))?;
        let bytes: Arc<[u8]> = bytes.into();
        self.cluster_cache.insert(key, &bytes);
        Ok(bytes)
    }

    /// Logs an error of the library and reduces it to the errno of the image, or `EIO`.
    fn read_error(&self, error: &io::Error) -> io::Error {
        if self.damage_log.allow() {
            log::warn!("a qcow2 base cannot be read: {error}");
        }
        os_error(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl Layer for Qcow2Layer {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        if range.start >= self.size {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let run = match self.run_at(&(range.start..range.end.min(self.size)), wait) {
            Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => {
                // Damage is reported to the reader of the bytes.
                let cluster = range.start - range.start % self.cluster_size + self.cluster_size;
                return Ok(Extent::new(range.start..range.end.min(cluster), ExtentKind::Data));
            }
            run => run?,
        };
        let kind = match run.mapping {
            RunMapping::Lower => self.unallocated_kind,
            RunMapping::Zero => ExtentKind::Zero,
            // Damage is reported to the reader of the bytes.
            RunMapping::Compressed | RunMapping::Damaged => ExtentKind::Data,
            RunMapping::Data(at) => {
                // Allocated clusters may be holes of the file: as in QEMU, these are zeros.
                let found =
                    self.data.extent_at(at..at + (run.range.end - run.range.start), wait)?;
                let end = run.range.start + found.len();
                let kind = if found.kind == ExtentKind::Data {
                    ExtentKind::Data
                } else {
                    ExtentKind::Zero
                };
                return Ok(Extent::new(run.range.start..end, kind));
            }
        };
        Ok(Extent::new(run.range, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        let run = self.run_at(&(offset..asked.end.min(self.size)), wait)?;
        let len = run.range.end - run.range.start;
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(buf.len());
        match run.mapping {
            RunMapping::Lower => Ok(Extent::new(run.range, self.unallocated_kind)),
            RunMapping::Zero => Ok(Extent::new(run.range, ExtentKind::Zero)),
            RunMapping::Damaged => {
                let what = format!("the entry of the cluster with byte {offset} is damaged");
                Err(self.read_error(&io::Error::other(what)))
            }
            RunMapping::Data(at) => {
                let found = self.data.read_at(&mut buf[..len], at, wait)?;
                let kind = if found.kind == ExtentKind::Data {
                    ExtentKind::Data
                } else {
                    ExtentKind::Zero
                };
                Ok(Extent::new(offset..offset + found.len(), kind))
            }
            RunMapping::Compressed => {
                let start = offset - offset % self.cluster_size;
                let bytes = self.inflate(start, wait)?;
                let from = usize::try_from(offset - start).unwrap_or(usize::MAX);
                let Some(rest) = bytes.get(from..) else { return Err(os_error(libc::EIO)) };
                let len = len.min(rest.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(Extent::new(offset..offset + len as u64, ExtentKind::Data))
            }
        }
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        if range.start < self.size
            && let MappedRun { range: run, mapping: RunMapping::Data(at) } =
                self.run_at(&(range.start..range.end.min(self.size)), wait)?
        {
            let (found, copied) = self.data.lend_at(at..at + (run.end - run.start), wait, copy)?;
            let kind =
                if found.kind == ExtentKind::Data { ExtentKind::Data } else { ExtentKind::Zero };
            return Ok((Extent::new(run.start..run.start + found.len(), kind), copied));
        }
        Ok((self.extent_at(range, wait)?, None))
    }
}
