//! The tables of an image, read by the imago library, and the memory budget for them.
//!
//! An L1 table is kept as long as its image is open, and the library caches up to 128 L2 tables,
//! each as long as a cluster: 256 MiB for an image with clusters of 2 MiB, and a chain may have 257
//! images. So a chain has a budget. Memory that is needed at once, every L1 table and one L2 table
//! per image, is charged before anything is read; the rest is shared out as space for further L2
//! tables, and an image that has filled its share drops all of them.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use imago::ShallowMapping;
use imago::format::drivers::FormatDriverInstance;
use parking_lot::{Mutex, RwLock};

use super::header::{DataFile, HeaderError, Qcow2Header};
use super::run_cache::RunMapping;
use super::storage::LayerStorage;
use crate::layer::Layer;

/// The most bytes of tables that a chain may need at once, and the space for further tables shared
/// by its images: 128 MiB each. The largest possible L1 table has 32 MiB; 256 images of 1 TiB in
/// clusters of 64 KiB need 20 MiB.
pub(super) const MAX_TABLE_BYTES: u64 = 128 << 20;

type Qcow2 = imago::qcow2::Qcow2<LayerStorage>;

/// The memory that the tables of a chain need, in bytes, and the number of images.
#[derive(Debug, Default)]
pub(super) struct TableBudget {
    needed: u64,
    images: u64,
}

impl TableBudget {
    /// Adds an image; returns `false` when the budget is exceeded.
    pub(super) fn charge(&mut self, header: &Qcow2Header) -> bool {
        self.images += 1;
        self.needed = self.needed.saturating_add(header.l1_len() + header.cluster_size);
        self.needed <= MAX_TABLE_BYTES
    }

    /// Number of images that share the budget; at least one.
    pub(super) fn images(&self) -> u64 {
        self.images.max(1)
    }
}

/// The tables of one image.
pub(super) struct ImageTables {
    image: Arc<dyn Layer>,
    header: Qcow2Header,
    qcow2: RwLock<Qcow2>,
    /// The L2 tables loaded since they were last dropped, by the index of the range they map.
    loaded_l2: Mutex<HashSet<u64>>,
    /// The most L2 tables loaded at a time.
    max_loaded_l2: usize,
}

impl ImageTables {
    /// Reads the tables of `image`, whose `header` has been checked.
    ///
    /// # Errors
    /// The errno of the image; `InvalidData` for damaged tables.
    pub(super) fn open(
        image: Arc<dyn Layer>,
        header: &Qcow2Header,
        budget: &TableBudget,
    ) -> io::Result<Self> {
        let most = MAX_TABLE_BYTES / budget.images() / header.cluster_size;
        Ok(Self {
            qcow2: RwLock::new(open_imago(&image, header)?),
            image,
            header: header.clone(),
            loaded_l2: Mutex::default(),
            max_loaded_l2: usize::try_from(most).unwrap_or(usize::MAX).max(1),
        })
    }

    /// Returns the mapping of a prefix of the `len` bytes from `at` on, and the length of that
    /// prefix.
    ///
    /// # Errors
    /// The errno of the image; `InvalidData` for damaged tables.
    pub(super) fn mapping(&self, at: u64, len: u64) -> io::Result<(RunMapping, u64)> {
        self.evict_l2(at)?;
        let qcow2 = self.qcow2.read();
        let (mapping, len) = qcow2.get_mapping(at, len)?;
        let mapping = match mapping {
            ShallowMapping::Zero { explicit: false, .. } => RunMapping::Lower,
            ShallowMapping::Zero { .. } => RunMapping::Zero,
            ShallowMapping::Raw { offset, .. } => RunMapping::Data(offset),
            ShallowMapping::Special { .. } => RunMapping::Compressed,
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        self.check_mapping(&mapping, at)?;
        Ok((mapping, len))
    }

    /// Refuses a `mapping` of the byte `at` that an image of this kind cannot have, as QEMU does.
    fn check_mapping(&self, mapping: &RunMapping, at: u64) -> io::Result<()> {
        let is_inside = self.header.data_file == DataFile::Inside;
        let flaw = match *mapping {
            RunMapping::Zero if self.header.version < 3 => {
                "a zero cluster, which version 2 has not"
            }
            RunMapping::Compressed if !is_inside => "a compressed cluster beside a data file",
            RunMapping::Data(host) if !is_inside && host != at => {
                "a cluster that is elsewhere in its data file than on the disk"
            }
            _ => return Ok(()),
        };
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("{flaw} (at {at})")))
    }

    /// Fills `buf` with the contents of the compressed cluster at `start`.
    ///
    /// # Errors
    /// The errno of the image; `InvalidData` for a damaged cluster.
    pub(super) fn inflate(&self, buf: &mut [u8], start: u64) -> io::Result<()> {
        self.evict_l2(start)?;
        self.qcow2.read().readv_special(buf.into(), start)
    }

    /// Drops all L2 tables when the one for `at` would exceed the limit.
    fn evict_l2(&self, at: u64) -> io::Result<()> {
        let table = at / self.header.bytes_per_l2();
        let mut held = self.loaded_l2.lock();
        if held.contains(&table) || held.len() < self.max_loaded_l2 {
            held.insert(table);
            return Ok(());
        }
        // Reopening the image drops them; its header must still be the one that was checked.
        let wrong = |error: HeaderError| match error {
            HeaderError::Io(error) => error,
            error => io::Error::new(io::ErrorKind::InvalidData, error.to_string()),
        };
        if Qcow2Header::read(&*self.image).map_err(wrong)? != self.header {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its header has changed"));
        }
        *self.qcow2.write() = open_imago(&self.image, &self.header)?;
        held.clear();
        held.insert(table);
        Ok(())
    }
}

fn open_imago(image: &Arc<dyn Layer>, header: &Qcow2Header) -> io::Result<Qcow2> {
    let storage = || LayerStorage::new(Arc::clone(image));
    let external = match header.data_file {
        // Only the tables are read through this storage.
        DataFile::External(_) => Some(storage()),
        DataFile::Inside => None,
    };
    let mut qcow2 = Qcow2::open_image(storage(), false)?;
    qcow2.set_data_file(external);
    qcow2.set_backing(None);
    Ok(qcow2)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::process::Command;

    use super::*;
    use crate::base::raw::{HostKind, RawBase};

    #[test]
    fn l2_tables_beyond_the_share_are_dropped_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let path = path.to_str().unwrap();
        let run = |program: &str, args: &[&str]| {
            assert!(Command::new(program).args(args).output().unwrap().status.success());
        };
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "512K"]);
        for table in (0..16).step_by(2) {
            run("qemu-io", &["-c", &format!("write -P {} {}K 2K", table + 1, table * 32), path]);
        }
        let file = Arc::new(File::options().read(true).write(true).open(path).unwrap());
        let size = file.metadata().unwrap().len();
        let raw = RawBase::new(Arc::clone(&file), HostKind::File, size).unwrap();
        let image: Arc<dyn Layer> = Arc::new(raw);
        let header = Qcow2Header::read(&*image).unwrap();
        assert_eq!(header.bytes_per_l2(), 32 << 10);
        let open = |images| {
            ImageTables::open(Arc::clone(&image), &header, &TableBudget { needed: 0, images })
                .unwrap()
        };
        let (all, few) = (open(1), open(MAX_TABLE_BYTES / 512 / 2));
        assert_eq!((few.max_loaded_l2, all.max_loaded_l2), (2, 1 << 18));
        for at in (0..512 << 10).step_by(512).chain((0..512 << 10).step_by(40 << 10)) {
            let found = few.mapping(at, 512).unwrap();
            assert_eq!(found, all.mapping(at, 512).unwrap(), "at {at}");
            assert_eq!(found.0 != RunMapping::Lower, at % (64 << 10) < 2 << 10, "at {at}");
            assert!(few.loaded_l2.lock().len() <= 2);
        }
        // Tables are read again only from the image that was checked.
        file.write_all_at(&21_u32.to_be_bytes(), 20).unwrap();
        let error = (0..16).find_map(|table| few.mapping(table << 15, 512).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
