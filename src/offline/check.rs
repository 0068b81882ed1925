//! Check: reads every layer of an overlay as the next mount would read it, and compares the base
//! with its record. A repair does the recovery of the next mount now, and removes what nothing
//! needs.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{OfflineError, OverlayTarget};
use crate::config::{RemoteAddress, RemoteSpec, SourcePart};
use crate::confined::{FileAccess, PathHandle};
use crate::host::mountinfo;
use crate::identity::Identity;
use crate::overlay::error::{LogError, OverlayError};
use crate::overlay::persist::{self, LockedOverlay};
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{FileRecord, RecordedSource, SourceLocation};
use crate::overlay::verify::{LayerCheck, UnusedLayer, contradictions, short_uuid};
use crate::remote;

/// Reaction of a check to its findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CheckMode {
    /// Report only.
    Report,
    /// Repair whatever is safe to repair.
    Repair,
}

/// The findings of a check.
#[derive(Default)]
pub(crate) struct CheckReport {
    /// The overlay, if it could be read.
    pub overlay: Option<OverlayReport>,
    /// The reaction to what can be repaired. Empty without [`CheckMode::Repair`].
    pub repairs: Vec<Repair>,
    /// Damage, one line for the user each.
    pub damage: Vec<String>,
}

/// The contents of an overlay that could be read.
pub(crate) struct OverlayReport {
    /// Version of the overlay's format.
    pub version: u32,
    /// The base.
    pub base: BaseReport,
    /// Backing files of the base: path, recorded size in bytes, whether unchanged.
    pub backing_files: Vec<(PathBuf, u64, bool)>,
    /// Size of a block of the top layer, in bytes.
    pub block_size: u32,
    /// The layers, the lowest first.
    pub layers: Vec<LayerReport>,
    /// Layers that nothing needs. Not filled for a disk of a store, where
    /// [`check_store`](super::check_store) finds them.
    pub unused: Vec<UnusedLayer>,
}

/// A layer of an overlay.
pub(crate) struct LayerReport {
    /// The state of the layer.
    pub check: LayerCheck,
    /// Name of the snapshot that the layer is, if it is one.
    pub snapshot: Option<String>,
    /// Whether the layer is the one that is written to.
    pub is_top: bool,
}

/// The base of an overlay, compared with its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BaseReport {
    /// There is none.
    Blank {
        /// Size of the disk in bytes.
        size: u64,
    },
    /// A file, a device, or an image on a server.
    Source {
        /// Recorded path or address.
        location: String,
        /// Recorded format.
        format: String,
        /// Recorded size of the whole in bytes.
        size: u64,
        /// The part of it that is the base.
        part: SourcePart,
        /// Its state.
        state: BaseState,
    },
}

/// The state of a base, compared with its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BaseState {
    /// The base is as it was.
    Unchanged,
    /// The base is another one.
    Changed,
    /// There is no such file.
    Missing,
    /// The server does not answer.
    Unreachable,
    /// A commit into the base was cut short, and can be finished.
    Committing,
}

/// Something that a repair did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repair {
    /// The recovery of a layer.
    Recovered {
        /// Uuid of the layer.
        layer: Uuid,
        /// The state in which it was found.
        recovered: Recovered,
    },
    /// The removal of a layer that nothing needed.
    RemovedLayer(UnusedLayer),
    /// The removal of a file that a killed mount left behind.
    RemovedFile(&'static str),
    /// There was nothing to repair.
    Nothing,
    /// Nothing was touched: a layer that nothing needs may be the source for a rescue of what is
    /// damaged.
    Damaged,
}

/// Checks one overlay, and repairs it first if `mode` allows.
///
/// # Errors
/// [`OfflineError`] when the overlay could not be checked: it is in use, has another version, or
/// the host failed.
pub(crate) fn check(target: &OverlayTarget, mode: CheckMode) -> Result<CheckReport, OfflineError> {
    let overlay = match persist::lock_overlay(target.overlay_path()) {
        Ok(overlay) => overlay,
        Err(error) => {
            let damage = damage_text(target, &error);
            let damage = damage.ok_or_else(|| OfflineError::overlay(&target.dir)(error))?;
            return Ok(CheckReport { damage: vec![damage], ..CheckReport::default() });
        }
    };
    let (mut damage, mut repairs) = (Vec::new(), Vec::new());
    let base = check_base(&overlay, &mut damage)?;
    let backing_files = check_backing_files(&overlay, &mut damage)?;
    let mut layers = check_layers(target, &overlay)?;
    let mut layer_damage = describe_damage(target, &overlay, &layers);
    damage.extend(layers.iter().filter_map(describe_dropped));
    if mode == CheckMode::Repair {
        if layer_damage.is_empty() {
            repairs = repair(target, &overlay, &layers)?;
            layers = check_layers(target, &overlay)?;
            layer_damage = describe_damage(target, &overlay, &layers);
        } else {
            repairs.push(Repair::Damaged);
        }
    }
    damage.extend(layer_damage);
    let unused = match target.layers {
        None => overlay.unused_layers().map_err(failed(target))?,
        Some(_) => Vec::new(),
    };
    let tree = overlay.stack.tree();
    let report = |check: LayerCheck| LayerReport {
        snapshot: tree.snapshot_name_of(check.record.uuid).map(str::to_owned),
        is_top: tree.top().is_some_and(|top| top.uuid == check.record.uuid),
        check,
    };
    let report = OverlayReport {
        version: overlay.stack.version,
        base,
        backing_files,
        block_size: overlay.block_size(),
        layers: layers.into_iter().map(report).collect(),
        unused,
    };
    Ok(CheckReport { overlay: Some(report), repairs, damage })
}

/// Adds the overlay's path to an error of the host.
fn failed(target: &OverlayTarget) -> impl Fn(io::Error) -> OfflineError {
    |error| OfflineError::host(format!("overlay '{}'", target.dir.display()))(error)
}

/// Does the recovery that the next mount would do, and removes unneeded layers and files.
fn repair(
    target: &OverlayTarget,
    overlay: &LockedOverlay,
    layers: &[LayerCheck],
) -> Result<Vec<Repair>, OfflineError> {
    let mut repairs = Vec::new();
    for LayerCheck { record, summary } in layers {
        if summary.as_ref().is_ok_and(|summary| summary.recovered != Recovered::Clean) {
            let recovered = overlay.recover(record).map_err(OfflineError::overlay(&target.dir))?;
            repairs.push(Repair::Recovered { layer: record.uuid, recovered });
        }
    }
    if target.layers.is_none() {
        for layer in overlay.unused_layers().map_err(failed(target))? {
            overlay.remove_unused(layer).map_err(failed(target))?;
            repairs.push(Repair::RemovedLayer(layer));
        }
    }
    let leftovers = overlay.remove_leftovers().map_err(failed(target))?;
    repairs.extend(leftovers.into_iter().map(Repair::RemovedFile));
    if repairs.is_empty() {
        repairs.push(Repair::Nothing);
    }
    Ok(repairs)
}

/// Returns the description of `error` if it means damage, and not that the check failed.
fn damage_text(target: &OverlayTarget, error: &OverlayError) -> Option<String> {
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    // The overlay exists, so the missing file belongs to it; in a store, its name exists.
    let is_inside = || target.layers.is_some() || target.dir.is_dir();
    match error {
        OverlayError::Damaged
        | OverlayError::Syntax(_)
        | OverlayError::Log { error: LogError::Damaged { .. }, .. } => Some(error.to_string()),
        OverlayError::Io { error: cause, .. } if is_missing(cause) && is_inside() => {
            Some(error.to_string())
        }
        // A name in a store, or the layers, show that there was an overlay.
        OverlayError::NotAnOverlay => {
            Some("its 'stack' is missing: restore it from a backup".to_owned())
        }
        _ => None,
    }
}

/// Checks that the base exists, and is unchanged or partly overwritten by a commit.
fn check_base(
    overlay: &LockedOverlay,
    damage: &mut Vec<String>,
) -> Result<BaseReport, OfflineError> {
    let Some(source) = overlay.stack.base.source() else {
        return Ok(BaseReport::Blank { size: overlay.stack.base.blank_size() });
    };
    let shown = source.location.text();
    let failed = |error| OfflineError::host(format!("cannot read the base '{shown}'"))(error);
    let identity = source.identity;
    let found = match source.location {
        SourceLocation::Remote(address) => match remote_identity(address) {
            Ok(found) => Some(found),
            Err(why) => {
                damage.push(format!("the base cannot be compared: {why}"));
                return Ok(report_base(&source, overlay.stack.base.part(), BaseState::Unreachable));
            }
        },
        SourceLocation::File(path) => match open_recorded(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) if mountinfo::is_foreign_mount(&error) => {
                damage.push(format!("the base '{shown}' cannot be compared: {error}"));
                return Ok(report_base(&source, overlay.stack.base.part(), BaseState::Unreachable));
            }
            file => Some(Identity::of(&file.map_err(failed)?).map_err(failed)?),
        },
    };
    let state = match found {
        None => {
            damage.push(format!(
                "the base '{shown}' is missing: put it back, or use cowslip rebase if it was moved"
            ));
            BaseState::Missing
        }
        // A log that cannot be read is reported as damage elsewhere.
        Some(_) if overlay.is_committing().unwrap_or(false) => BaseState::Committing,
        Some(now) => match identity.differences(&now) {
            None => BaseState::Unchanged,
            Some(difference) => {
                let remedy = match identity.differences_of_copy(&now) {
                    Some(_) => "put the old one back",
                    None => "if it is a copy, use cowslip rebase",
                };
                damage.push(format!("the base '{shown}' has changed: {difference}: {remedy}"));
                BaseState::Changed
            }
        },
    };
    Ok(report_base(&source, overlay.stack.base.part(), state))
}

fn report_base(source: &RecordedSource<'_>, part: SourcePart, state: BaseState) -> BaseReport {
    BaseReport::Source {
        location: source.location.text(),
        format: source.format.to_owned(),
        size: source.identity.size,
        part,
        state,
    }
}

/// Asks the server for the identity of the image at `address`.
fn remote_identity(address: &str) -> Result<Identity, String> {
    let address = RemoteAddress::parse(address).map_err(|error| error.to_string())?;
    if address.is_command() {
        return Err(format!("'{address}' is a command, which is started only by a mount"));
    }
    let remote = remote::open(&RemoteSpec::new(address)).map_err(|error| error.to_string())?;
    remote.identity().map_err(|error| format!("'{}': {error}", remote.address()))
}

/// Opens the file at `path`, which an overlay has recorded, to read it.
fn open_recorded(path: &Path) -> io::Result<File> {
    PathHandle::of(mountinfo::open_recorded(path)?)?.open_input(FileAccess::Read)
}

/// Checks that the backing files of the base exist and are unchanged, and returns the path, the
/// recorded size in bytes and the verdict for each.
fn check_backing_files(
    overlay: &LockedOverlay,
    damage: &mut Vec<String>,
) -> Result<Vec<(PathBuf, u64, bool)>, OfflineError> {
    let Some(source) = overlay.stack.base.source() else { return Ok(Vec::new()) };
    let mut report = Vec::new();
    for FileRecord { path, identity } in source.needs {
        let shown = path.display();
        let now = open_recorded(path).and_then(|file| Identity::of(&file));
        let difference = match now {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("is missing".to_owned()),
            Err(error) if mountinfo::is_foreign_mount(&error) => {
                Some(format!("cannot be compared: {error}"))
            }
            now => {
                let now = now.map_err(OfflineError::host(format!("cannot read '{shown}'")))?;
                identity.differences(&now).map(|difference| format!("has changed: {difference}"))
            }
        };
        report.push((path.clone(), identity.size, difference.is_none()));
        damage.extend(difference.map(|difference| {
            format!("'{shown}', which the base needs, {difference}: put the old one back")
        }));
    }
    Ok(report)
}

/// Checks every layer, the lowest first.
///
/// # Errors
/// [`OfflineError::Overlay`] when a layer could not be checked.
fn check_layers(
    target: &OverlayTarget,
    overlay: &LockedOverlay,
) -> Result<Vec<LayerCheck>, OfflineError> {
    let check = |layer: LayerCheck| match layer.summary {
        Err(error) if damage_text(target, &error).is_none() => {
            Err(OfflineError::overlay(&target.dir)(error))
        }
        summary => Ok(LayerCheck { summary, ..layer }),
    };
    overlay.check_layers().into_iter().map(check).collect()
}

/// Tells of a layer whose last record is damaged. Neither a mount nor a repair refuses that: a record
/// that was not written whole would look the same.
fn describe_dropped(layer: &LayerCheck) -> Option<String> {
    let summary = layer.summary.as_ref().ok()?;
    let layer = short_uuid(layer.record.uuid);
    (summary.recovered == Recovered::Damaged).then(|| {
        format!("layer {layer}: the last record of its log is damaged, what it said is lost")
    })
}

/// Describes the damage of each layer, and contradictions between layers.
fn describe_damage(
    target: &OverlayTarget,
    overlay: &LockedOverlay,
    layers: &[LayerCheck],
) -> Vec<String> {
    let tree = overlay.stack.tree();
    let mut lines = Vec::new();
    for LayerCheck { record, summary } in layers {
        let layer = match tree.snapshot_name_of(record.uuid) {
            // A single layer needs no name.
            None if layers.len() == 1 => String::new(),
            Some(name) => format!("layer {} (snapshot '{name}'): ", short_uuid(record.uuid)),
            None => format!("layer {}: ", short_uuid(record.uuid)),
        };
        match summary {
            Ok(summary) => {
                lines.extend(summary.misplaced.iter().map(|line| format!("{layer}{line}")));
            }
            Err(OverlayError::Log { error: error @ LogError::Damaged { .. }, .. })
                if !layer.is_empty() =>
            {
                lines.push(format!("{layer}{error}"));
            }
            Err(error) => lines.extend(damage_text(target, error).map(|text| layer + &text)),
        }
    }
    lines.extend(contradictions(layers));
    lines
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;

    use super::super::overlay_targets;
    use super::*;
    use crate::config::OverlayKind;
    use crate::overlay::FORMAT_VERSION;
    use crate::overlay::persist::{NewOverlay, OverlayPath};
    use crate::overlay::record::LayerMap;
    use crate::overlay::stack::BaseRecord;
    use crate::overlay::stack::{LayerRecord, SnapshotRecord, Stack};
    use crate::overlay::state::{BlockIndex, BlockState};
    use crate::trusted_path::open_dir;
    use uuid::Uuid;

    /// Creates an overlay at `dir` over `base`, left open as by a killed daemon.
    fn make(dir: &Path, base: BaseRecord) {
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            kind: OverlayKind::Blocks,
            base,
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block: 4096, parent: None }],
            snapshots: Vec::new(),
        };
        let mut image = LayerMap::new(1 << 20, 1 << 20);
        image.blocks.set(BlockIndex(0)..BlockIndex(2), BlockState::Data);
        let new = NewOverlay { stack, map: &image, limit: None };
        drop(persist::create(OverlayPath { dir, layers: None }, new).unwrap());
    }

    fn checked(dir: &Path) -> CheckReport {
        check(&overlay_targets(dir).unwrap()[0], CheckMode::Report).unwrap()
    }

    fn layer(dir: &Path) -> PathBuf {
        fs::read_dir(dir.join("layers")).unwrap().next().unwrap().unwrap().path()
    }

    #[test]
    fn intact_overlay_is_healthy_and_described() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let report = checked(&dir);
        assert_eq!(report.damage, Vec::<String>::new());
        let overlay = report.overlay.unwrap();
        assert_eq!((overlay.version, overlay.block_size), (1, 4096));
        assert_eq!(overlay.base, BaseReport::Blank { size: 1 << 20 });
        let [LayerReport { check, snapshot: None, is_top: true }] = &overlay.layers[..] else {
            panic!("one layer, which is no snapshot");
        };
        let summary = check.summary.as_ref().unwrap();
        assert_eq!((summary.size, summary.data, summary.zero), (1 << 20, 8192, 0));
        assert_eq!(summary.recovered, Recovered::All);
    }

    #[test]
    fn changed_or_missing_base_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let (dir, path) = (home.path().join("o"), home.path().join("vm.img"));
        fs::write(&path, [7; 9000]).unwrap();
        let identity = Identity::of(&File::open(&path).unwrap()).unwrap();
        let base = BaseRecord::File {
            path: path.clone(),
            format: "raw".into(),
            offset: None,
            len: None,
            identity,
            needs: Vec::new(),
        };
        make(&dir, base);
        assert!(checked(&dir).damage.is_empty());
        fs::write(&path, [7; 100]).unwrap();
        assert!(checked(&dir).damage[0].contains("has changed: size 8.8 KiB -> 100 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(checked(&dir).damage[0].contains("is missing"));
    }

    #[test]
    fn missing_data_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let data = File::options().write(true).open(layer(&dir).join("data")).unwrap();
        data.set_len(4096).unwrap();
        let damage = checked(&dir).damage;
        assert!(damage[0].starts_with("4 KiB of data from byte 4096 on are missing"), "{damage:?}");
    }

    #[test]
    fn damaged_stack_or_log_is_damage_and_not_a_failure() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let log = layer(&dir).join("log");
        let good = fs::read(&log).unwrap();
        let mut bad = good.clone();
        bad[40] ^= 1;
        fs::write(&log, &bad).unwrap();
        assert!(checked(&dir).damage[0].contains("the log is damaged"));
        fs::remove_file(&log).unwrap();
        assert!(checked(&dir).damage[0].starts_with("opening its log"));
        fs::write(&log, good).unwrap();
        fs::write(dir.join("stack"), "x\n").unwrap();
        assert!(checked(&dir).damage[0].contains("its 'stack' is damaged"));
        fs::remove_file(dir.join("stack")).unwrap();
        assert!(checked(&dir).damage[0].contains("its 'stack' is missing"));
    }

    #[test]
    fn contradictory_stack_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let open = open_dir(&dir).unwrap();
        let good = Stack::read(&open).unwrap();
        let mut stack = good.clone();
        stack.layers[0].parent = Some(Uuid::from_u128(1));
        stack.write(&open).unwrap();
        assert!(checked(&dir).damage[0].contains("what is below layer"));
        let layer = good.layers[0].uuid;
        let name = "clean".to_owned();
        let snapshots = vec![SnapshotRecord { name, layer, taken: 0 }];
        Stack { snapshots, ..good }.write(&open).unwrap();
        assert!(checked(&dir).damage[0].contains("the layer of snapshot 'clean' is missing"));
    }

    #[test]
    fn repair_recovers_open_layers_and_reports_it() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let targets = overlay_targets(&dir).unwrap();
        let repairs = || check(&targets[0], CheckMode::Repair).unwrap().repairs;
        assert!(matches!(repairs()[..], [Repair::Recovered { recovered: Recovered::All, .. }]));
        assert_eq!(repairs(), [Repair::Nothing]);
        let layers = checked(&dir).overlay.unwrap().layers;
        assert_eq!(layers[0].check.summary.as_ref().unwrap().recovered, Recovered::Clean);
    }

    #[test]
    fn overlay_that_cannot_be_checked_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        let error = |dir: &Path| {
            let target = &overlay_targets(dir).unwrap()[0];
            check(target, CheckMode::Report).err().unwrap().to_string()
        };
        assert!(error(&dir).contains("No such file"));
        let line = overlay_targets(home.path()).unwrap_err().to_string();
        assert!(line.contains("no overlay and no store"), "{line}");
        make(&dir, BaseRecord::Blank { size: 1 });
        let held = persist::lock_overlay(OverlayPath { dir: &dir, layers: None }).unwrap();
        assert!(error(&dir).contains("is in use"));
        drop(held);
    }
}
