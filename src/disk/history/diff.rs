//! Differences: the changes of a disk between a snapshot, or its base, and one moment.
//!
//! ```text
//!                 |-- changed --|        |-changed-|
//!   layers above  |  data, zero |        |  data   |         of the frozen moment
//!   ------------------------------------------------------   `since` this snapshot, or the base
//! ```
//!
//! A difference is two files whose names only the requester knows: the disk as of that moment, and
//! a file with data where the disk was changed and holes elsewhere. Both exist for a while, then
//! for as long as they are open. The layers below stay open with them, whatever happens to the
//! disk.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::disk::Disk;
use crate::disk::base_description::BaseDescription;
use crate::disk::layers::LayerStack;
use crate::disk::operation_error::OperationError;
use crate::extents::{Extent, ExtentKind};
use crate::layer::{CopyFn, Layer, Wait};
use crate::overlay::sealed::Sealed;
use crate::overlay::tree::DIFF_FILE_PREFIX;

/// How long the requester may take to look the files up, and then to open them.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(30);
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// The base of a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiffBase {
    /// A blank base: zeros.
    Zeros,
    /// All of a file, and its format.
    File(PathBuf, String),
    /// A part of a file, or an image on a server, which other formats cannot refer to.
    Part,
}

impl DiffBase {
    fn of(base: &BaseDescription) -> Self {
        match base {
            BaseDescription::File { view: Some(_), .. } | BaseDescription::Remote { .. } => {
                Self::Part
            }
            BaseDescription::File { path, format, .. } => {
                Self::File(path.clone(), format.to_string())
            }
            BaseDescription::Blank(_) => Self::Zeros,
        }
    }
}

/// The result of a comparison.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The name, among the snapshots' files, of the disk as of the frozen moment.
    pub frozen_file: String,
    /// The name of the file that has data where the disk was changed.
    pub changes_file: String,
    /// The base that the difference is relative to, without `since`.
    pub base: DiffBase,
}

/// A file of a difference.
pub(super) struct DiffFile {
    uuid: Uuid,
    file: Arc<Disk>,
    /// The file is removed then, unless it is open.
    expires: Instant,
}

/// A layer with data where `layers` have data or zeros, and holes elsewhere.
struct ChangeMap {
    layers: Option<Sealed>,
    /// Size in bytes of the state compared with: all bytes after it are zeros.
    base_size: u64,
    size: u64,
}

impl Layer for ChangeMap {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        let Some(layers) = &self.layers else { return Ok(Extent::new(range, ExtentKind::Hole)) };
        let found = layers.extent_at(range, wait)?;
        if found.kind != ExtentKind::Lower {
            return Ok(Extent::new(found.range, ExtentKind::Data));
        }
        // Where the disk was cut off and has grown again, the layers below do not show through.
        let (start, end) = (found.range.start, found.range.end);
        let hidden = layers.lower_limit()..self.base_size;
        let (kind, end) = if hidden.contains(&start) {
            (ExtentKind::Data, end.min(hidden.end))
        } else if start < hidden.start && !hidden.is_empty() {
            (ExtentKind::Hole, end.min(hidden.start))
        } else {
            (ExtentKind::Hole, end)
        };
        Ok(Extent::new(start..end, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let found = self.extent_at(offset..offset + buf.len() as u64, wait)?;
        let len = usize::try_from(found.len()).unwrap_or(usize::MAX).min(buf.len());
        if found.kind == ExtentKind::Data {
            buf[..len].fill(0);
        }
        Ok(found)
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

impl Disk {
    /// Freezes the disk, or takes its state at snapshot `until`, and returns the changes since
    /// snapshot `since` or the base.
    ///
    /// # Errors
    /// [`OperationError`] when a snapshot does not exist, or the state is not based on snapshot
    /// `since`.
    pub fn difference(
        &self,
        since: Option<&str>,
        until: Option<&str>,
    ) -> Result<Difference, OperationError> {
        let _operation = self.operations.begin("a comparison")?;
        let tree = self.tree("differences")?;
        let layer_of = |name: &str| {
            let found = tree.snapshot(name).map(|found| found.layer);
            found.ok_or_else(|| OperationError::NoSnapshot(name.to_owned()))
        };
        let since =
            since.map(|name| Ok::<_, OperationError>((name, layer_of(name)?))).transpose()?;
        let until = until.map(layer_of).transpose()?;
        if let Some((name, old)) = since {
            // Refused before anything is frozen.
            let from = until.or_else(|| tree.top().map(|top| top.uuid));
            let chain = from.map_or_else(Vec::new, |from| tree.chain(from));
            if chain.iter().all(|record| record.uuid != old) {
                return Err(OperationError::Refused(format!(
                    "it does not stand on snapshot '{name}': it has gone back to another"
                )));
            }
        }
        let layer = match until {
            Some(layer) => layer,
            None if self.is_latched() => return Err(OperationError::Latched),
            None => self.freeze_top()?,
        };
        // Once the files are closed, the layer that was sealed for them may be merged with the top.
        self.history.merges.want();
        let tree = self.tree("differences")?;
        let chain = self.open_chain(&tree, layer)?;
        let bottom = self.layers().bottom.clone();
        let records = tree.chain(layer);
        let (upper, below) = match since {
            None => (chain.len(), bottom.as_ref().map_or(0, |bottom| bottom.size())),
            Some((_, old)) => {
                let at = records.iter().position(|record| record.uuid == old);
                let at = at.ok_or(OperationError::NoOverlay("differences"))?;
                (at, chain.get(at).map_or(0, |layer| layer.size()))
            }
        };
        let size = chain.first().map_or(0, |top| top.size());
        let mtime = chain.first().and_then(|layer| layer.mtime()).map_or(0, |(mtime, _)| mtime);
        let changes =
            ChangeMap { layers: Sealed::new(chain[..upper].to_vec()), base_size: below, size };
        let frozen = LayerStack::read_only(chain, bottom);
        let changes = LayerStack::read_only(Vec::new(), Some(Arc::new(changes)));
        Ok(Difference {
            frozen_file: self.add_diff_file(frozen, mtime),
            changes_file: self.add_diff_file(changes, mtime),
            base: DiffBase::of(&self.described_base()),
        })
    }

    /// Whether files of a difference exist.
    pub(in crate::disk) fn has_diff_files(&self) -> bool {
        !self.history.diff_files.lock().is_empty()
    }

    /// Shows `layers` as a file for a while, and returns its name.
    fn add_diff_file(&self, layers: LayerStack, mtime: i64) -> String {
        let uuid = Uuid::new_v4();
        let name = format!("{DIFF_FILE_PREFIX}{uuid}");
        let file = self.make_snapshot_file(&name, (uuid, uuid), layers, mtime);
        let file = DiffFile { uuid, file, expires: Instant::now() + LOOKUP_TIMEOUT };
        self.history.diff_files.lock().push(file);
        name
    }

    /// Returns the file of a difference.
    pub(super) fn diff_file(&self, name: &str) -> Option<Arc<Self>> {
        let uuid = Uuid::parse_str(name.strip_prefix(DIFF_FILE_PREFIX)?).ok()?;
        let mut files = self.history.diff_files.lock();
        let DiffFile { file, expires: until, .. } =
            files.iter_mut().find(|file| file.uuid == uuid)?;
        *until = Instant::now() + OPEN_TIMEOUT;
        // A change of the layers drops files that are not open.
        self.history.snapshot_files.lock().entry(uuid).or_insert_with(|| Arc::clone(file));
        Some(Arc::clone(file))
    }

    /// Drops files of differences that were not opened in time, or are closed again.
    pub fn release_expired(&self) {
        let mut files = self.history.diff_files.lock();
        files.retain(|diff| {
            let is_kept = diff.file.handle_count() > 0 || Instant::now() < diff.expires;
            if !is_kept {
                self.history.snapshot_files.lock().remove(&diff.uuid);
            }
            is_kept
        });
    }
}
