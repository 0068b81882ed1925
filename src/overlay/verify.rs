//! Checking an overlay that nobody has open, and repairing where that is safe.
//!
//! Every layer that the stack names is read as the next mount would read it: its log, the records
//! that count, and whether the data they promise exists. Then the layers are compared with each
//! other. Nothing is guessed: a repair does what the next mount would do, and no more.

use std::collections::HashSet;
use std::fs::File;
use std::io;

use rustix::fs::AtFlags;
use uuid::Uuid;

use super::data_check::{misplaced, segment_ends};
use super::error::OverlayError;
use super::host_file::SEGMENT_LEN;
use super::persist::{LockedOverlay, end_missing, open_layer_files, open_sealed, remove_layer};
use super::record::BootTag;
use super::recover::{self, LayerFiles, Recovered};
use super::stack::LayerRecord;
use super::{Overlay, boot_tag};
use crate::confined;

/// The result of checking one layer.
pub struct LayerCheck {
    /// The layer.
    pub record: LayerRecord,
    /// The summary of the layer, or the reason why it cannot be read.
    pub summary: Result<LayerSummary, OverlayError>,
}

/// The state of a layer whose log can be read.
#[derive(Clone, Debug)]
pub struct LayerSummary {
    /// The disk's size in this layer, in bytes.
    pub size: u64,
    /// The offset in bytes from which on this layer hides the layers below.
    pub lower_limit: u64,
    /// Bytes in Data blocks.
    pub data: u64,
    /// Bytes in Zero blocks.
    pub zero: u64,
    /// The number of good records in the log.
    pub good_records: u64,
    /// The number of those records that count, from the first on.
    pub trusted_records: u64,
    /// The number of records at the end of the log that cannot be read.
    pub unreadable_records: u64,
    /// The state in which the next mount would find the layer.
    pub recovered: Recovered,
    /// Problems with Data blocks that the data file does not hold; one line each.
    pub misplaced: Vec<String>,
    /// Whether the log shows that all layers below were closed in good order.
    is_settled: bool,
    /// Whether the log is not the layer's first one, so that the layer may have been recovered to
    /// an older state.
    is_rewritten: bool,
}

/// A layer that no stack names, left behind by an interrupted operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnusedLayer {
    /// The layer's uuid, which names its directory.
    pub uuid: Uuid,
    /// Bytes that the layer takes on the host.
    pub bytes: u64,
}

/// Returns the first eight digits of a layer's uuid, enough for display.
#[must_use]
pub fn short_uuid(uuid: Uuid) -> String {
    uuid.simple().to_string().chars().take(8).collect()
}

impl LockedOverlay {
    /// Checks every layer that the stack names, in the stack's order: the top is last.
    #[must_use]
    pub fn check_layers(&self) -> Vec<LayerCheck> {
        let layers = self.stack.layers.iter();
        let mut checks: Vec<_> = layers
            .map(|record| LayerCheck { record: record.clone(), summary: self.check_layer(record) })
            .collect();
        let settled = checks
            .iter()
            .filter(|check| check.summary.as_ref().is_ok_and(|summary| summary.is_settled));
        let tree = self.stack.tree();
        let below = |check: &LayerCheck| tree.chain(check.record.uuid).into_iter().skip(1);
        let closed: HashSet<Uuid> = settled.flat_map(below).map(|layer| layer.uuid).collect();
        for LayerCheck { record, summary } in &mut checks {
            if let Ok(found) = summary
                && found.recovered != Recovered::Clean
                && closed.contains(&record.uuid)
            {
                let error = end_missing(found.good_records);
                *summary = Err(OverlayError::Log { uuid: record.uuid, error });
            }
        }
        checks
    }

    fn check_layer(&self, record: &LayerRecord) -> Result<LayerSummary, OverlayError> {
        let tag =
            boot_tag::current(&self.layers_dir).map_err(OverlayError::io("reading the boot id"))?;
        // All files are opened again, also the top's, because a recovery replaces the log.
        let files = open_layer_files(&self.layers_dir, record, |_| Ok(()))?.files;
        summarize(&files, tag)
    }

    /// Returns the layers in the layers' directory that the stack does not name. Only for an
    /// overlay that does not share its directory of layers.
    ///
    /// # Errors
    /// The host's errno.
    pub fn unused_layers(&self) -> io::Result<Vec<UnusedLayer>> {
        let named: HashSet<Uuid> = self.stack.layers.iter().map(|layer| layer.uuid).collect();
        let mut unused = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.layers_dir)? {
            let entry = entry?;
            let name = entry.file_name().to_str().ok();
            if let Some(uuid) = name.and_then(|name| Uuid::parse_str(name).ok())
                && !named.contains(&uuid)
            {
                let bytes = allocated_bytes(&self.layers_dir, uuid).unwrap_or(0);
                unused.push(UnusedLayer { uuid, bytes });
            }
        }
        unused.sort_by_key(|layer| layer.uuid);
        Ok(unused)
    }

    /// Removes an unused layer.
    ///
    /// # Errors
    /// The host's errno.
    pub fn remove_unused(&self, layer: UnusedLayer) -> io::Result<()> {
        remove_layer(&self.layers_dir, layer.uuid)
    }

    /// Returns the files that a killed daemon left behind, as directory and name.
    fn leftovers(&self) -> io::Result<Vec<(File, &'static str)>> {
        let mut found = Vec::new();
        let mut add = |dir: &File, names: &[&'static str]| -> io::Result<()> {
            for name in names {
                match rustix::fs::statat(dir, *name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(_) => found.push((dir.try_clone()?, *name)),
                    Err(rustix::io::Errno::NOENT) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        };
        add(&self.dir, &["stack.new", "holder.new", "holder"])?;
        for layer in &self.stack.layers {
            add(&confined::open_subdir(&self.layers_dir, layer.uuid.to_string())?, &["log.new"])?;
        }
        Ok(found)
    }

    /// Removes the files that a killed daemon left behind and returns their names. Nothing reads
    /// these files any more, because the caller holds the lock.
    ///
    /// # Errors
    /// The host's errno.
    pub fn remove_leftovers(&self) -> io::Result<Vec<&'static str>> {
        let mut removed = Vec::new();
        for (dir, name) in self.leftovers()? {
            rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
            removed.push(name);
        }
        Ok(removed)
    }

    /// Recovers the layer `record` as the next mount would, and closes it. Layers below must be
    /// recovered first.
    ///
    /// # Errors
    /// [`OverlayError`]; the layer is unchanged in that case.
    pub fn recover(&self, record: &LayerRecord) -> Result<Recovered, OverlayError> {
        if self.stack.layers.last() != Some(record) {
            let opened = open_sealed(&self.layers_dir, &self.stack.tree(), record);
            return opened.map(|(_, recovered)| recovered);
        }
        let tag = boot_tag::current(&self.dir).map_err(OverlayError::io("reading the boot id"))?;
        let in_log = |error| OverlayError::Log { uuid: record.uuid, error };
        let files = open_layer_files(&self.layers_dir, record, |_| Ok(()))?.files;
        let (top, recovered) = Overlay::open(&files, tag, None, &[]).map_err(in_log)?;
        top.close_sealed().map_err(OverlayError::io("closing its log"))?;
        Ok(recovered)
    }
}

/// Returns a line for each pair of layers whose sizes contradict each other.
#[must_use]
pub fn contradictions(checks: &[LayerCheck]) -> Vec<String> {
    let readable = |uuid: Uuid| {
        let check = checks.iter().find(|check| check.record.uuid == uuid)?;
        check.summary.as_ref().ok()
    };
    let mut lines = Vec::new();
    for check in checks {
        let (Ok(layer), Some(parent)) = (&check.summary, check.record.parent) else { continue };
        let Some(below) = readable(parent) else { continue };
        // A layer that a power cut rolled back to its last sync may be smaller than it was.
        let is_older = below.is_rewritten || below.trusted_records < below.good_records;
        if layer.lower_limit > below.size && !is_older {
            lines.push(format!(
                "layer {} shows {} bytes of layer {} below it, which has only {}: they are not of one disk, restore it from a backup",
                short_uuid(check.record.uuid), layer.lower_limit, short_uuid(parent), below.size
            ));
        }
    }
    lines
}

/// Reads a layer without changing it.
fn summarize(files: &LayerFiles, tag: BootTag) -> Result<LayerSummary, OverlayError> {
    let in_log = |error| OverlayError::Log { uuid: files.uuid, error };
    let trusted = recover::examine(files, tag).map_err(in_log)?;
    let map = recover::load_map(files, &trusted).map_err(in_log)?;
    let mut ends = segment_ends(&*files.data).map_err(OverlayError::io("looking at its data"))?;
    let block_size = u64::from(files.block_size);
    for held in trusted.journal.blocks.keys() {
        // Opening the layer writes these bytes into the data file.
        let end = (held.0 + 1).saturating_mul(block_size);
        let known = ends.entry((end - 1) / SEGMENT_LEN).or_default();
        *known = end.max(*known);
    }
    Ok(LayerSummary {
        size: map.size,
        lower_limit: map.lower_limit,
        data: map.blocks.data_blocks().saturating_mul(block_size),
        zero: map.blocks.zero_blocks().saturating_mul(block_size),
        good_records: trusted.scan.good,
        trusted_records: trusted.records,
        unreadable_records: trusted.scan.unreadable,
        recovered: trusted.recovered,
        misplaced: misplaced(&map, block_size, &ends),
        is_settled: trusted.scan.is_settled,
        is_rewritten: trusted.scan.first > 1,
    })
}

/// Returns the bytes that the files of a layer take on the host.
fn allocated_bytes(layers_dir: &File, uuid: Uuid) -> io::Result<u64> {
    let dir = confined::open_subdir(layers_dir, uuid.to_string())?;
    let mut blocks = 0;
    for entry in rustix::fs::Dir::read_from(&dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            let stat = rustix::fs::statat(&dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
            blocks += u64::try_from(stat.st_blocks).unwrap_or(0);
        }
    }
    Ok(blocks * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uuid: u128, parent: Option<u128>, size: u64, lower_limit: u64) -> LayerCheck {
        let (uuid, parent) = (Uuid::from_u128(uuid), parent.map(Uuid::from_u128));
        let found = LayerSummary {
            size,
            lower_limit,
            data: 0,
            zero: 0,
            good_records: 5,
            trusted_records: 5,
            unreadable_records: 0,
            recovered: Recovered::Clean,
            misplaced: Vec::new(),
            is_settled: false,
            is_rewritten: false,
        };
        LayerCheck { record: LayerRecord { uuid, block: 512, parent }, summary: Ok(found) }
    }

    #[test]
    fn a_layer_that_shows_more_than_its_parent_has_is_a_contradiction() {
        let checks = |size| [check(1, None, size, 0), check(2, Some(1), 9000, 8000)];
        assert_eq!(contradictions(&checks(8000)), Vec::<String>::new());
        let lines = contradictions(&checks(7999));
        assert!(lines[0].contains("shows 8000 bytes of layer 00000000"), "{lines:?}");
        assert!(lines[0].contains("which has only 7999"), "{lines:?}");
    }

    #[test]
    fn a_parent_that_a_power_cut_rolled_back_may_be_smaller() {
        let mut checks = [check(1, None, 10, 0), check(2, Some(1), 9000, 8000)];
        checks[0].summary.as_mut().unwrap().trusted_records = 4;
        assert_eq!(contradictions(&checks), Vec::<String>::new());
        let parent = checks[0].summary.as_mut().unwrap();
        (parent.trusted_records, parent.is_rewritten) = (5, true);
        assert_eq!(contradictions(&checks), Vec::<String>::new());
    }
}
