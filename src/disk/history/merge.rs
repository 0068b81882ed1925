//! Merging of layers that no snapshot keeps separate any more.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use super::new_layer::NewLayer;
use crate::disk::Disk;
use crate::disk::operation::Operation;
use crate::disk::operation_error::OperationError;
use crate::host::file_system::probe_features;
use crate::layer::{Layer, WritableLayer};
use crate::overlay::Overlay;
use crate::overlay::record::LayerMap;
use crate::overlay::sealed::Sealed;
use crate::overlay::tree::LayerTree;

/// The most bytes of the top that are merged while all writers wait: 16 MiB.
const MAX_FINAL_MERGE: u64 = 16 << 20;
/// How often the top is sealed and merged before the rest is merged with writers waiting.
const MAX_SEAL_ROUNDS: u32 = 5;
/// A layer is much larger than those above it when it has more than this many times their data.
const MUCH_LARGER: u64 = 4;

/// The outcome of a merge.
enum MergeOutcome {
    Complete,
    Interrupted,
}

impl Disk {
    /// Finds a layer that no name keeps separate from the only layer above it: returns the tree,
    /// the lower and the upper layer. Layers in `without` are left as they are.
    ///
    /// # Errors
    /// The host's errno when the layers of other disks cannot be determined.
    fn find_mergeable(
        &self,
        without: &HashSet<Uuid>,
    ) -> io::Result<Option<(LayerTree, Uuid, Uuid)>> {
        let Some(tree) = self.overlay_location.tree() else { return Ok(None) };
        if tree.mergeable(|_| false).is_none() {
            return Ok(None);
        }
        let shared = self.layers_used_by_others()?;
        let found = tree.mergeable(|uuid| shared.contains(&uuid) || without.contains(&uuid));
        Ok(found.map(|(lower, upper)| (tree, lower, upper)))
    }

    /// Whether the disk has no snapshots at all, and layers that can be merged: a commit waits for
    /// these.
    pub(in crate::disk) fn is_mergeable(&self) -> bool {
        let is_nameless =
            self.overlay_location.tree().is_some_and(|tree| tree.snapshots.is_empty());
        is_nameless
            && !self.operations.is_ending()
            && matches!(self.find_mergeable(&HashSet::new()), Ok(Some(_)))
    }

    /// Whether `merge_layers` has work to do, at once or later.
    #[must_use]
    pub fn needs_merge(&self) -> bool {
        self.history.merges.is_wanted()
    }

    /// Whether `merge_layers` is to be called now.
    #[must_use]
    pub fn is_merge_due(&self) -> bool {
        self.history.merges.is_due(Instant::now())
            && self.operations.running().is_none()
            && self.history.diff_files.lock().is_empty()
            && !self.is_latched()
    }

    /// Merges the layers that no name keeps separate any more. Yields to other operations on the
    /// disk, and is then repeated later.
    ///
    /// # Errors
    /// [`OperationError`]; the disk reads the same in any case.
    pub fn merge_layers(&self) -> Result<(), OperationError> {
        self.history.merges.forget();
        match self.merge_all() {
            Ok(MergeOutcome::Complete) => {
                self.history.merges.completed();
                Ok(())
            }
            Ok(MergeOutcome::Interrupted) => {
                self.history.merges.interrupted();
                Ok(())
            }
            Err(error) => {
                self.history.merges.failed(Instant::now());
                if error.is_out_of_space() {
                    self.note_unmerged(&error);
                }
                Err(error)
            }
        }
    }

    /// Merges all that there is room for; what there is none for is the error in the end.
    fn merge_all(&self) -> Result<MergeOutcome, OperationError> {
        let (mut too_large, mut no_room) = (HashSet::new(), None);
        loop {
            // Begun before the layers are chosen: another operation would change them.
            let Ok(operation) = self.operations.begin_in_background("the merging of layers") else {
                return Ok(MergeOutcome::Interrupted);
            };
            let found = self.find_mergeable(&too_large);
            let found =
                found.map_err(OperationError::io("looking for the layers of other disks"))?;
            let Some((tree, lower, upper)) = found else {
                return no_room.map_or(Ok(MergeOutcome::Complete), Err);
            };
            if self.is_latched() {
                // Data of a latched disk may read back differently from what was written.
                return Ok(MergeOutcome::Interrupted);
            }
            let (lower, upper) = self.first_run(&tree, lower, upper)?;
            let done = match tree.top() {
                Some(top) if top.uuid == upper => self.merge_into_top(&operation, lower),
                _ => self.merge_sealed(&operation, lower, upper),
            };
            match done {
                Err(OperationError::Interrupted | OperationError::WriterStuck) => {
                    return Ok(MergeOutcome::Interrupted);
                }
                Err(error @ OperationError::NoRoomToMerge { .. }) => {
                    // Those above it may fit, and those of other snapshots.
                    too_large.insert(lower);
                    no_room = no_room.or(Some(error));
                }
                done => done?,
            }
        }
    }

    /// Returns the lowest and the highest layer that are merged first of the chain from `upper` down to
    /// `lower`: from the uppermost sealed layer on those that are not much larger than all above them. So a
    /// merge that new snapshots interrupt again and again does not leave more and more layers, and
    /// what is copied again is little beside what is copied once.
    fn first_run(
        &self,
        tree: &LayerTree,
        lower: Uuid,
        upper: Uuid,
    ) -> Result<(Uuid, Uuid), OperationError> {
        let top = tree.top().map(|top| top.uuid);
        let chain = tree.chain(upper);
        let chain = chain.iter().map(|layer| layer.uuid).filter(|uuid| Some(*uuid) != top);
        let mut sealed: Vec<Uuid> = chain.take_while(|uuid| *uuid != lower).collect();
        sealed.push(lower);
        let layers = self.open_chain(tree, sealed[0])?;
        let (mut sum, mut count) = (0, 0);
        for data in layers.iter().take(sealed.len()).map(|layer| layer.usage().data) {
            if count >= 2 && data / MUCH_LARGER > sum {
                break;
            }
            (sum, count) = (sum + data, count + 1);
        }
        match sealed.get(count.max(1) - 1) {
            Some(lowest) if count < sealed.len() => Ok((*lowest, sealed[0])),
            _ => Ok((lower, upper)),
        }
    }

    /// Refuses to merge `both` where the host has no room for a copy of them and of `more` bytes.
    fn check_room(&self, both: &Sealed, more: u64) -> Result<(), OperationError> {
        let needed = both.visible_usage().iter().map(|usage| usage.data).sum::<u64>() + more;
        let Ok(space) = self.space() else { return Ok(()) };
        if needed <= space.available || space.total == 0 || self.shares_blocks() {
            return Ok(());
        }
        Err(OperationError::NoRoomToMerge { needed, free: space.available })
    }

    /// Whether the host shares the blocks of copies in the overlay's directory.
    fn shares_blocks(&self) -> bool {
        let dir = self.overlay_location.files_dir();
        dir.and_then(|dir| probe_features(&dir).ok()).is_some_and(|found| found.reflink)
    }

    /// Merges `lower` and `upper`, the only layer based on it, into one sealed layer.
    fn merge_sealed(
        &self,
        operation: &Operation<'_>,
        lower: Uuid,
        upper: Uuid,
    ) -> Result<(), OperationError> {
        let tree = self.tree("layers")?;
        let both = self.open_pair(&tree, lower, upper)?;
        self.check_room(&both, 0)?;
        let new = self.build_merged(&tree, lower, &both, operation)?;
        let (uuid, layer) = (new.uuid, Arc::new(new.overlay));
        let layer_cache = self.history.layer_cache();
        let done = || -> Result<LayerTree, OperationError> {
            layer.close_sealed().map_err(OperationError::io("closing a merged layer"))?;
            // Before the tree names it: who opens a snapshot by the new tree looks here.
            layer_cache.insert(uuid, &layer);
            self.history.sealed.lock().insert(uuid, Arc::clone(&layer));
            let mut next = tree.clone();
            next.replace(upper, lower, uuid);
            self.replace_tree(&next, None)?;
            Ok(next)
        };
        let _layers_locked = layer_cache.lock_changes();
        let next = done().inspect_err(|_| {
            self.history.sealed.lock().remove(&uuid);
            self.remove_layer(uuid);
        })?;
        let below = match next.top().and_then(|top| top.parent) {
            Some(parent) => self.open_chain(&next, parent)?,
            None => Vec::new(),
        };
        {
            // The bytes stay the same, so nobody has to wait.
            let mut layers = self.layers.write();
            if let Some(top) = layers.top.overlay().cloned() {
                top.set_lower_layers(&self.layers_to_sync(&next, &below));
                *layers = Arc::new(layers.with_top(top, below));
            }
        }
        self.drop_unused_layers(&tree, &next);
        Ok(())
    }

    /// Returns the layers from `upper` down to `lower`, read as one.
    fn open_pair(
        &self,
        tree: &LayerTree,
        lower: Uuid,
        upper: Uuid,
    ) -> Result<Sealed, OperationError> {
        let gone = OperationError::NoOverlay("layers");
        let mut chain = self.open_chain(tree, upper)?;
        let depth = tree.chain(upper).iter().position(|layer| layer.uuid == lower);
        chain.truncate(depth.ok_or(gone)? + 1);
        Sealed::new(chain).ok_or(OperationError::NoOverlay("layers"))
    }

    /// Builds a new layer in place of `lower` with the contents of `both`.
    fn build_merged(
        &self,
        tree: &LayerTree,
        lower: Uuid,
        both: &Sealed,
        operation: &Operation<'_>,
    ) -> Result<NewLayer, OperationError> {
        let (Some(record), Some(bottom)) = (tree.layer(lower), both.layers().last()) else {
            return Err(OperationError::NoOverlay("layers"));
        };
        let parent = record.parent;
        if let Some(parent) = parent {
            // The new layer is synced, and those below a synced one have to be closed.
            let below = self.open_chain(tree, parent)?;
            let closed = below.iter().rev().try_for_each(|layer| layer.close_sealed());
            closed.map_err(OperationError::io("closing the layers below merged ones"))?;
        }
        let map = LayerMap::new(bottom.size(), bottom.lower_limit());
        let new = self.make_layer(tree, parent, &map, None)?;
        let merged = new.overlay.merge_from(both, &|| operation.must_stop());
        if let Err(error) = merged {
            self.remove_layer(new.uuid);
            return Err(OperationError::io("merging two layers")(error));
        }
        if let Some((mtime, stamp)) = both.layers().first().and_then(|layer| layer.mtime()) {
            // Best effort, as elsewhere: the time is recorded again when the mount ends.
            let _ = new.overlay.record_mtime(mtime, stamp);
        }
        Ok(new)
    }

    /// Merges the top and the layers below it into `lower`. The sealed layers are merged first, and the
    /// top is sealed only after that: an attempt that fails must not leave one layer more. Then the top is
    /// sealed and merged while writers continue, until the rest is small enough to merge while they wait.
    fn merge_into_top(&self, operation: &Operation<'_>, lower: Uuid) -> Result<(), OperationError> {
        let tree = self.tree("layers")?;
        let sealed = tree.top().and_then(|top| top.parent);
        let sealed = sealed.ok_or(OperationError::NoOverlay("layers"))?;
        let both = self.open_pair(&tree, lower, sealed)?;
        self.check_room(&both, self.overlay().map_or(0, |top| top.usage().data))?;
        let new = self.build_merged(&tree, lower, &both, operation)?;
        let uuid = new.uuid;
        self.finish_top_merge(operation, lower, new).inspect_err(|_| self.remove_layer(uuid))
    }

    fn finish_top_merge(
        &self,
        operation: &Operation<'_>,
        lower: Uuid,
        mut new: NewLayer,
    ) -> Result<(), OperationError> {
        let merge = |layer: Arc<Overlay>| -> Result<(), OperationError> {
            let layer = Sealed::new(vec![layer]).ok_or(OperationError::NoOverlay("layers"))?;
            let done = new.overlay.merge_from(&layer, &|| operation.must_stop());
            done.map_err(OperationError::io("merging the newest changes"))
        };
        let sync = || {
            let synced = new.overlay.sync();
            synced.map_err(OperationError::io("making a merged layer durable"))
        };
        for _ in 0..MAX_SEAL_ROUNDS {
            sync()?;
            let Some(top) = self.overlay() else { return Err(OperationError::NoOverlay("layers")) };
            if top.usage().data <= MAX_FINAL_MERGE {
                break;
            }
            self.seal(None)?;
            merge(top)?;
        }
        let layer_cache = self.history.layer_cache();
        let _layers_locked = layer_cache.lock_changes();
        let tree = self.tree("layers")?;
        let below = match tree.layer(lower).and_then(|layer| layer.parent) {
            Some(parent) => self.open_chain(&tree, parent)?,
            None => Vec::new(),
        };
        let mut next = tree.clone();
        {
            let _gate = self.gate_for_layers()?;
            let old = tree.top().map(|top| top.uuid).ok_or(OperationError::NoOverlay("layers"))?;
            let Some(top) = self.overlay() else { return Err(OperationError::NoOverlay("layers")) };
            if top.is_latched() {
                return Err(OperationError::Latched);
            }
            merge(top)?;
            sync()?;
            // Set last: the merged data may exceed a limit that was lowered since.
            new.overlay.set_limit(self.limit_above(&below));
            next.replace(old, lower, new.uuid);
            self.install_top(&next, new, below)?;
        }
        self.drop_unused_layers(&tree, &next);
        Ok(())
    }

    /// Records whether layers wait to be merged; `shared` are the layers of several disks.
    pub fn note_mergeable(&self, shared: &HashSet<Uuid>) {
        let tree = self.overlay_location.tree();
        if tree.is_some_and(|tree| tree.mergeable(|layer| shared.contains(&layer)).is_some()) {
            self.history.merges.want();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use parking_lot::Mutex;

    use super::*;
    use crate::config::{DiskSource, DiskSpec};
    use crate::disk::{Force, HandleAccess, OpenContext, SizeChange, open};
    use crate::layer::Wait;

    fn disk(dir: &Path) -> Disk {
        let mut spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(8 << 20));
        spec.overlay = Some(dir.to_owned());
        let context = OpenContext::unmounted();
        open(&spec, &context).map_err(|error| error.to_string()).unwrap().disk
    }

    #[test]
    fn small_layers_are_merged_with_each_other_before_a_much_larger_one() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        let mut layers = Vec::new();
        for (blocks, at) in [(40, 0), (3, 1), (2, 2), (1, 3)] {
            disk.write(&vec![7; blocks * 4096], at * 8192, Wait::Yes).unwrap();
            layers.push(disk.tree("layers").unwrap().top().unwrap().uuid);
            disk.seal(None).unwrap();
        }
        let tree = disk.tree("layers").unwrap();
        let top = tree.top().unwrap().uuid;
        let first = |lower, upper| disk.first_run(&tree, lower, upper).unwrap();
        assert_eq!(first(layers[0], top), (layers[1], layers[3]));
        assert_eq!(first(layers[0], layers[2]), (layers[1], layers[2]));
        // One layer, or layers of about the same size.
        assert_eq!(first(layers[0], layers[1]), (layers[0], layers[1]));
        assert_eq!(first(layers[1], top), (layers[1], top));
        assert_eq!(first(layers[3], top), (layers[3], top));
        disk.merge_layers().unwrap();
        assert_eq!(disk.layer_usages().len(), 1);
        assert!(!disk.needs_merge());
    }

    #[test]
    fn a_revert_just_before_layers_are_merged_keeps_what_the_snapshot_showed() {
        let room = tempfile::tempdir().unwrap();
        let disk = Arc::new(disk(&room.path().join("ov")));
        disk.write(b"kept", 4096, Wait::Yes).unwrap();
        disk.snapshot(Some("a")).unwrap();
        disk.write(b"more", 8192, Wait::Yes).unwrap();
        disk.snapshot(Some("b")).unwrap();
        disk.write(b"last", 8192, Wait::Yes).unwrap();
        disk.delete_snapshot("b").unwrap();
        // `layer_users` is called when layers are about to be merged: just then another request
        // comes.
        let came = Arc::new(Mutex::new(None));
        let (seen, weak) = (Arc::clone(&came), Arc::downgrade(&disk));
        let layer_cache = disk.history.layer_cache();
        disk.share_layers(
            &layer_cache,
            Arc::new(move |_| {
                if let Some(disk) = weak.upgrade().filter(|_| seen.lock().is_none()) {
                    let other =
                        std::thread::spawn(move || disk.revert("a", Force::Yes, SizeChange::Seen));
                    // The request may have to wait for the merge, so this callback does not wait
                    // for the request.
                    let until = Instant::now() + Duration::from_millis(300);
                    while !other.is_finished() && Instant::now() < until {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    *seen.lock() = Some(other);
                }
                Ok(HashSet::new())
            }),
        );
        disk.merge_layers().unwrap();
        // The lock is released first: the revert calls `layer_users` as well.
        let other = came.lock().take().unwrap();
        other.join().unwrap().unwrap();
        let mut found = [0; 4];
        disk.read(&mut found, 8192, Wait::Yes).unwrap();
        assert_eq!(found, [0; 4]);
        disk.read(&mut found, 4096, Wait::Yes).unwrap();
        assert_eq!(&found, b"kept");
    }

    /// Opens a copy of the overlay `ov` in `room`: what the next mount would find if this process died
    /// now.
    fn killed(room: &Path, copy: &str) -> Disk {
        let copied = std::process::Command::new("cp")
            .arg("-r")
            .args([room.join("ov"), room.join(copy)])
            .status()
            .unwrap();
        assert!(copied.success());
        disk(&room.join(copy))
    }

    #[test]
    fn a_disk_killed_right_after_layers_were_merged_can_be_opened() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        for (name, at) in [("a", 4096), ("b", 8192), ("c", 12288), ("d", 16384)] {
            disk.write(name.as_bytes(), at, Wait::Yes).unwrap();
            disk.snapshot(Some(name)).unwrap();
        }
        // Nothing was synced so far: no layer is closed. First two sealed layers are merged, then
        // one and the top.
        for (name, copy) in [("b", "one"), ("d", "two")] {
            disk.delete_snapshot(name).unwrap();
            disk.merge_layers().unwrap();
            let found = killed(room.path(), copy);
            for (name, at) in [(b'a', 4096), (b'b', 8192), (b'c', 12288), (b'd', 16384)] {
                let mut byte = [0];
                found.read(&mut byte, at, Wait::Yes).unwrap();
                assert_eq!(byte, [name], "{copy}");
            }
        }
    }

    #[test]
    fn a_disk_can_be_synced_after_a_failed_snapshot_and_a_merge() {
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("ov");
        let disk = Arc::new(disk(&dir));
        for (name, at) in [("a", 4096), ("b", 8192), ("c", 12288)] {
            disk.write(name.as_bytes(), at, Wait::Yes).unwrap();
            disk.snapshot(Some(name)).unwrap();
        }
        // In the way of the new `stack`.
        std::fs::create_dir(dir.join("stack.new")).unwrap();
        disk.snapshot(Some("d")).unwrap_err();
        std::fs::remove_dir(dir.join("stack.new")).unwrap();
        disk.delete_snapshot("a").unwrap();
        disk.merge_layers().unwrap();
        disk.write(b"e", 16384, Wait::Yes).unwrap();
        let (done, synced) = std::sync::mpsc::channel();
        let syncing = Arc::clone(&disk);
        std::thread::spawn(move || done.send(syncing.sync()));
        synced.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
        disk.write(b"f", 20480, Wait::Yes).unwrap();
        let found = killed(room.path(), "copy");
        for (byte, at) in [(b'a', 4096), (b'c', 12288), (b'e', 16384), (b'f', 20480)] {
            let mut read = [0];
            found.read(&mut read, at, Wait::Yes).unwrap();
            assert_eq!(read, [byte]);
        }
    }

    #[test]
    fn an_open_snapshot_counts_as_a_handle_until_it_is_closed() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        for name in ["a", "b"] {
            disk.write(name.as_bytes(), 4096, Wait::Yes).unwrap();
            disk.snapshot(Some(name)).unwrap();
        }
        let open = disk.snapshot_file("b").unwrap();
        open.open_handle(HandleAccess::Read).unwrap();
        // The layer below the open snapshot is replaced by another, and then removed.
        for name in ["a", "b"] {
            disk.delete_snapshot(name).unwrap();
            disk.merge_layers().unwrap();
            assert_eq!(disk.handle_count(), 1);
        }
        let refused = disk.commit(Force::Yes, &|| false).unwrap_err().to_string();
        assert!(refused.contains("still open"), "{refused}");
        open.release_handle(HandleAccess::Read);
        assert_eq!(disk.handle_count(), 0);
        let refused = disk.commit(Force::Yes, &|| false).unwrap_err().to_string();
        assert!(refused.contains("blank"), "{refused}");
    }

    #[test]
    fn a_merge_is_tried_again_when_the_layers_of_others_were_not_known() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        for name in ["a", "b"] {
            disk.write(b"data", 4096, Wait::Yes).unwrap();
            disk.snapshot(Some(name)).unwrap();
        }
        let is_broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let (seen, layer_cache) = (Arc::clone(&is_broken), disk.history.layer_cache());
        disk.share_layers(
            &layer_cache,
            Arc::new(move |_| match seen.load(Ordering::SeqCst) {
                true => Err(io::Error::from_raw_os_error(libc::EIO)),
                false => Ok(HashSet::new()),
            }),
        );
        disk.delete_snapshot("a").unwrap();
        assert!(disk.merge_layers().is_err() && disk.needs_merge());
        is_broken.store(false, Ordering::SeqCst);
        disk.merge_layers().unwrap();
        assert!(!disk.needs_merge());
        assert_eq!(disk.layer_usages().len(), 2);
    }

    #[test]
    fn snapshots_can_be_opened_while_layers_are_merged() {
        let room = tempfile::tempdir().unwrap();
        let mut spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(8 << 20));
        for overlay in [None, Some(room.path().join("ov"))] {
            let rounds = if overlay.is_some() { 20 } else { 300 };
            spec.overlay = overlay;
            let opened = open(&spec, &OpenContext::unmounted());
            let disk = opened.map_err(|error| error.to_string()).unwrap().disk;
            disk.snapshot(Some("a")).unwrap();
            let ended = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                let merges = scope.spawn(|| {
                    for _ in 0..rounds {
                        disk.snapshot(Some("b")).unwrap();
                        disk.write(b"more", 8192, Wait::Yes).unwrap();
                        disk.snapshot(Some("c")).unwrap();
                        disk.delete_snapshot("b").unwrap();
                        disk.merge_layers().unwrap();
                        disk.delete_snapshot("c").unwrap();
                    }
                });
                let opens = scope.spawn(|| {
                    while !ended.load(Ordering::Relaxed) {
                        // It may have been deleted, and that is all.
                        match disk.snapshot_file("c").map(|_| ()).or_else(|error| {
                            (error.raw_os_error() == Some(libc::ENOENT)).then_some(()).ok_or(error)
                        }) {
                            Ok(()) => disk.history.drop_files(),
                            Err(error) => return Err(error),
                        }
                    }
                    Ok(())
                });
                let merged = merges.join();
                ended.store(true, Ordering::Relaxed);
                opens.join().unwrap().unwrap();
                merged.unwrap();
            });
        }
    }

    #[test]
    fn a_latched_disk_stays_latched_when_a_snapshot_is_deleted() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        disk.write(b"kept", 4096, Wait::Yes).unwrap();
        disk.snapshot(Some("a")).unwrap();
        disk.write(b"lost", 8192, Wait::Yes).unwrap();
        disk.overlay().unwrap().poison();
        disk.delete_snapshot("a").unwrap();
        disk.merge_layers().unwrap();
        assert!(disk.is_latched());
        assert!(disk.write(b"more", 0, Wait::Yes).is_err());
        assert!(disk.sync().is_err());
    }

    #[test]
    fn waiters_for_a_hanging_change_do_not_block_other_changes() {
        let room = tempfile::tempdir().unwrap();
        let disk = disk(&room.path().join("ov"));
        std::thread::scope(|scope| {
            // Held as by a change that waits for its base.
            let hanging = disk.gate.shared(Wait::Yes).unwrap();
            let resized = scope.spawn(|| disk.set_size(1 << 20, Wait::Yes));
            let sealed = scope.spawn(|| disk.snapshot(Some("a")));
            std::thread::sleep(Duration::from_millis(100));
            // For a second, or until the first write if that takes longer.
            let (start, mut written) = (Instant::now(), 0);
            while (written == 0 || start.elapsed() < Duration::from_secs(1))
                && !sealed.is_finished()
            {
                written += u32::from(disk.write(b"more", 4096, Wait::No).is_ok());
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(!resized.is_finished() && !sealed.is_finished());
            assert!(written > 0, "all other writes had to wait");
            drop(hanging);
            resized.join().unwrap().unwrap();
            sealed.join().unwrap().unwrap();
        });
    }
}
