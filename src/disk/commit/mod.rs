//! Commit: copies a disk's changes down into its base and continues with an empty overlay above.

mod checks;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use self::checks::check_space;
use super::Disk;
use super::base_description::BaseDescription;
use super::history::ResetSizes;
use super::operation::{Force, Operation};
use super::operation_error::OperationError;
use super::overlay_location::OverlayFiles;
use crate::base::advice::way_of_changes;
use crate::base::formats::BaseFormat;
use crate::base::view::RangeView;
use crate::base::{self, WritableBase};
use crate::config::{Locking, format_size};
use crate::identity::Identity;
use crate::layer::Layer;
use crate::overlay::stack::BaseRecord;
use crate::overlay::{CommitTarget, Overlay, Usage};
use crate::remote::RemoteImage;

/// How long a commit waits for layers that are being merged.
const MERGE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a commit waits for readers of a diff: as long as an unmount waits for users of the
/// mount.
const READER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a commit checks whether these waits are over.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The outcome of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitSummary {
    /// Bytes that went into the base.
    pub committed: Usage,
    /// Bytes that were changed meanwhile and stay in the overlay.
    pub remaining: Usage,
}

impl Disk {
    /// Commits the overlay to its base, until `is_gone` returns true. A commit that is interrupted
    /// at any moment is finished by the next one. The disk reads the same throughout, and may be
    /// written.
    ///
    /// # Errors
    /// [`OperationError`]; an error before the copying began leaves everything unchanged.
    pub fn commit(
        &self,
        force: Force,
        is_gone: &dyn Fn() -> bool,
    ) -> Result<CommitSummary, OperationError> {
        self.wait_for_readers(is_gone);
        self.wait_for_merge()?;
        let operation = self.operations.begin("a commit")?;
        let overlay = self.committable_overlay()?;
        self.check_writers(force)?;
        let described = self.described_base();
        let format = match &*described {
            BaseDescription::File { format, .. } | BaseDescription::Remote { format, .. } => format,
            BaseDescription::Blank(_) => {
                return Err(refused("its base is blank: there is nothing to commit to"));
            }
        };
        if !BaseFormat::of(*format).is_plain() {
            return Err(OperationError::Refused(format!(
                "its base is a {format} image, which is only read: {}",
                way_of_changes(*format)
            )));
        }
        self.check_base_identity(overlay.is_committing())?;
        let base = self.open_writable_base(&described)?;
        let (size, base_size) = (self.size(), base.layer.size());
        if base_size < size {
            return Err(OperationError::Refused(format!(
                "it is larger ({}) than its base '{}' ({}): shrink it first, or copy it out whole with cp",
                format_size(size),
                described.location().display(),
                format_size(base_size)
            )));
        }
        drop(described);
        if let Some(disk) = &base.server {
            self.read_base_as(RemoteImage::Direct(Arc::clone(disk)));
        }
        check_space(&overlay, &base, self.overlay_dir().as_deref())?;
        let before = overlay.usage();
        let done = self.commit_into(&operation, is_gone, &overlay, &base);
        overlay.pause_commit();
        done?;
        let left = overlay.usage();
        let gone = Usage {
            data: before.data.saturating_sub(left.data),
            zero: before.zero.saturating_sub(left.zero),
        };
        Ok(CommitSummary { committed: gone, remaining: left })
    }

    /// Waits for readers of a diff's frozen files: the kernel reports a closed file only later.
    fn wait_for_readers(&self, is_gone: &dyn Fn() -> bool) {
        let until = Instant::now() + READER_TIMEOUT;
        loop {
            self.release_expired();
            if !self.has_diff_files() || is_gone() || Instant::now() >= until {
                return;
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits for layers that are still being merged after their snapshots were deleted.
    ///
    /// # Errors
    /// [`OperationError::NoRoomToMerge`].
    fn wait_for_merge(&self) -> Result<(), OperationError> {
        let until = Instant::now() + MERGE_TIMEOUT;
        while self.is_mergeable() && !self.is_latched() && Instant::now() < until {
            match self.merge_layers() {
                Err(error @ OperationError::NoRoomToMerge { .. }) => return Err(error),
                Err(error) => {
                    // The commit itself reports what this means for it.
                    log::warn!("{}: layers are not merged: {error}", self.source);
                    return Ok(());
                }
                Ok(()) => thread::sleep(POLL_INTERVAL),
            }
        }
        Ok(())
    }

    /// Returns the overlay if it can be committed.
    fn committable_overlay(&self) -> Result<Arc<Overlay>, OperationError> {
        let tree = self.tree("changes to commit")?;
        if self.overlay_location.is_temporary() {
            return Err(refused(
                "its overlay is temporary, and a commit that is cut short could not be finished: cowslip keep it in a directory first",
            ));
        }
        if !tree.snapshots.is_empty() {
            return Err(refused(
                "it has snapshots, which show the base as it is: delete them first (cowslip snapshot --delete)",
            ));
        }
        if tree.layers.len() > 1 {
            return Err(refused(
                "it has several layers: other disks of the store stand on them, or they are still being merged (try again then)",
            ));
        }
        if self.has_diff_files() {
            return Err(refused(
                "a diff of it is being read, which shows the base as it is: wait for its end",
            ));
        }
        if self.snapshot_handle_count() > 0 {
            return Err(refused(
                "a snapshot of it that was deleted is still open, and shows the base as it is: close it first",
            ));
        }
        if self.is_latched() {
            return Err(OperationError::Latched);
        }
        self.overlay().ok_or(OperationError::NoOverlay("changes to commit"))
    }

    /// Opens the base for writing, and locks all others out.
    fn open_writable_base(
        &self,
        described: &BaseDescription,
    ) -> Result<WritableBase, OperationError> {
        match described {
            BaseDescription::File { path, file, view, .. } => {
                let locking = self.history.locking.unwrap_or(Locking::Qemu);
                base::open_writable(path, file, view.clone(), locking)
                    .map_err(|error| OperationError::Refused(error.to_string()))
            }
            BaseDescription::Remote { remote, view, .. } => {
                let disk = remote.begin_commit();
                let disk = disk.map_err(|error| OperationError::Refused(error.to_string()))?;
                Ok(WritableBase::on_server(disk, view.clone()))
            }
            BaseDescription::Blank(_) => Err(refused("its base is blank")),
        }
    }

    /// Reads the base, an image on a server, as `remote` from now on, which has the same bytes where they
    /// show through.
    fn read_base_as(&self, remote: RemoteImage) {
        let layer = remote.layer();
        let mut described = self.described_base.lock();
        let Some(next) = described.with_remote(remote) else { return };
        let layer = match &next {
            BaseDescription::Remote { view: Some(view), .. } => {
                Arc::new(RangeView::new(layer, view.clone()))
            }
            _ => layer,
        };
        let mut layers = self.layers.write();
        let Some(top) = layers.top.overlay().cloned() else { return };
        *layers = Arc::new(layers.with_bottom(top, layer));
        *described = Arc::new(next);
    }

    fn commit_into(
        &self,
        operation: &Operation<'_>,
        is_gone: &dyn Fn() -> bool,
        overlay: &Overlay,
        base: &WritableBase,
    ) -> Result<(), OperationError> {
        let progress = |done, total| self.operations.report_progress(done, total);
        let stop = || operation.must_stop() || is_gone();
        let start = base.view.as_ref().map_or(0, |view| view.start);
        let to = CommitTarget {
            layer: &*base.layer,
            file: base.file.as_deref().map(|file| (file, start)),
            on_progress: &progress,
            should_stop: &stop,
        };
        {
            let _gate = self.gate_for_layers()?;
            overlay.begin_commit().map_err(OperationError::io("marking the commit"))?;
        }
        overlay.commit_truncation(&to).map_err(OperationError::io("zeroing the base"))?;
        {
            let _gate = self.gate_for_layers()?;
            let raised = overlay.raise_lower_limit(base.layer.size());
            raised.map_err(OperationError::io("marking the commit"))?;
        }
        overlay.commit_blocks(&to).map_err(OperationError::io("copying into the base"))?;
        self.finish_commit(overlay, base)
    }

    /// Truncates a base that is longer than its disk, and records the new identity of the base.
    fn finish_commit(&self, overlay: &Overlay, base: &WritableBase) -> Result<(), OperationError> {
        let in_base = || OperationError::io("making the base durable");
        let is_file = base
            .file
            .as_ref()
            .is_some_and(|file| file.metadata().is_ok_and(|found| found.is_file()));
        // Bytes after a part of a file belong to others and are not cut off.
        let is_whole = base.view.is_none();
        {
            let _gate = self.gate_for_layers()?;
            let size = overlay.size();
            if is_file && is_whole && size < base.layer.size() {
                base.layer.set_size(size).map_err(in_base())?;
            }
        }
        base.layer.sync().map_err(in_base())?;
        let size = base.layer.size();
        *self.history.reset_sizes.lock() = ResetSizes { size, lower_limit: size };
        self.record_base_identity(base)?;
        overlay.end_commit().map_err(OperationError::io("marking the commit's end"))?;
        if let Some(disk) = &base.server {
            match disk.end_commit() {
                Ok(again) => self.read_base_as(RemoteImage::cached(again)),
                // It is read without a cache until the next mount.
                Err(error) => log::warn!("{}: {error}", self.source),
            }
        }
        Ok(())
    }

    /// Records the identity that `base` has by now.
    fn record_base_identity(&self, base: &WritableBase) -> Result<(), OperationError> {
        let now = match (&base.file, &base.server) {
            (Some(file), _) => Identity::of(file),
            (None, Some(disk)) => RemoteImage::Direct(Arc::clone(disk)).identity_now(),
            (None, None) => return Ok(()),
        };
        let now = now.map_err(OperationError::io("reading the base"))?;
        let OverlayFiles::Persistent(dir) = &mut *self.overlay_location.lock() else {
            return Ok(());
        };
        let mut stack = dir.stack.clone();
        match &mut stack.base {
            BaseRecord::File { identity, .. } | BaseRecord::Remote { identity, .. } => {
                *identity = now;
            }
            BaseRecord::Blank { .. } => return Ok(()),
        }
        self.replace_stack(dir, stack, None)
    }
}

fn refused(line: &str) -> OperationError {
    OperationError::Refused(line.to_owned())
}
