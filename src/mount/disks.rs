//! The opening of a mount's disks, one after another, before anything is mounted.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::kernel::check_answers;
use super::plan::{MountPlan, OnChangedBase, current_ids};
use super::signals::Signals;
use crate::base::self_reference;
use crate::catalog::{Catalog, DiskOrigin};
use crate::config::{DiskSource, DiskSpec, Partitions, check_names};
use crate::disk::{self, OpenContext, OpenedDisk};
use crate::remote;
use crate::store::Store;

/// Opens the store of `plan`, if it has one.
///
/// # Errors
/// A line for the user.
pub(super) fn open_store(plan: &MountPlan, mountpoint: &Path) -> Result<Option<Store>, String> {
    let Some(dir) = &plan.store else { return Ok(None) };
    check_answers(dir).map_err(|error| error.to_string())?;
    self_reference::check_self_reference(dir, mountpoint, None)
        .map_err(|error| error.to_string())?;
    Store::open(dir).map(Some).map_err(|error| error.to_string())
}

/// Opens every disk of the store and of the plan into `catalog`, and returns notes for the user. A
/// signal interrupts the work between two disks.
///
/// # Errors
/// A line for the user. The disks that were opened before stay in the catalog.
pub(super) fn open_disks(
    plan: &MountPlan,
    catalog: &Catalog,
    signals: &Signals,
) -> Result<Vec<String>, String> {
    check_names(&plan.disks).map_err(|error| error.to_string())?;
    signals.check_interrupted()?;
    remote::set_io_timeout(Duration::from_secs(plan.options.io_timeout));
    let (uid, gid) = current_ids();
    let context = OpenContext {
        mountpoint: &catalog.mountpoint,
        mount_dev: None,
        uid,
        gid,
        force: plan.on_changed_base == OnChangedBase::Accept,
        allow_backing: plan.allow_backing.clone(),
        stdio: plan.stdio,
        probed_dirs: Mutex::new(HashSet::new()),
    };
    let mut notes = Vec::new();
    let mut add = |name: &str, opened, origin, created_in| {
        notes.extend(add_opened(catalog, name, opened, origin, created_in)?);
        signals.check_interrupted()
    };
    catalog.open_stored(&context, |name, opened| add(name, opened, DiskOrigin::Stored, None))?;
    // Notes about disks of the store that the plan names as well come last.
    let mut stored_notes = Vec::new();
    for spec in &plan.disks {
        let mut files = spec.source.paths().chain(&spec.overlay);
        files
            .try_for_each(|path| check_answers(path))
            .map_err(|error| format!("{}: {error}", spec.name))?;
        let store = spec.overlay.as_deref().and_then(|dir| catalog.store_at(dir));
        if store.is_some()
            && let Some(line) = already_stored(catalog, spec)?
        {
            log::info!("{line}");
            stored_notes.extend(show_stored_partitions(catalog, spec)?);
            continue;
        }
        let (opened, origin) = match store {
            Some(store) => {
                let opened =
                    store.create_over(spec, &context).map_err(|error| error.to_string())?;
                (opened, DiskOrigin::Stored)
            }
            None => {
                let opened = disk::open(spec, &context)
                    .map_err(|error| format!("{}: {error}", spec.name))?;
                (opened, DiskOrigin::Given)
            }
        };
        add(&spec.name, opened, origin, store)?;
    }
    notes.extend(stored_notes);
    Ok(notes)
}

/// Adds a disk that was opened to `catalog`, and returns notes about it. With `created_in` it was created
/// in that store, and gets its name there.
fn add_opened(
    catalog: &Catalog,
    name: &str,
    opened: OpenedDisk,
    origin: DiskOrigin,
    created_in: Option<&Store>,
) -> Result<Vec<String>, String> {
    let OpenedDisk { disk, summary, notes } = opened;
    let disk = Arc::new(disk);
    let clash = catalog.check_clash(name, &disk);
    clash
        .map_err(|line| format!("{name}: {line}"))
        .inspect_err(|_| catalog.discard(&disk, created_in))?;
    let added = match created_in {
        Some(store) => catalog.add_created(store, name, &disk),
        None => catalog
            .add(name, Arc::clone(&disk), origin)
            .inspect_err(|_| catalog.discard(&disk, None)),
    };
    if let Err(error) = added {
        return Err(match error.raw_os_error() {
            Some(libc::EEXIST) => format!(
                "two disks are named '{name}', one of them in the store: give one another NAME="
            ),
            _ if created_in.is_some() => format!("{name}: naming it in the store: {error}"),
            _ => format!(
                "the store has a disk named {name:?}, which no file in a mount can be called: rename it in 'names'"
            ),
        });
    }
    let mut lines = vec![format!("{name}: {summary}")];
    for note in notes {
        let line = format!("{name}: {note}");
        log::info!("{line}");
        lines.push(line);
    }
    Ok(lines)
}

/// Shows the partitions of a disk that was already in the store, if `spec` asks for them.
fn show_stored_partitions(catalog: &Catalog, spec: &DiskSpec) -> Result<Vec<String>, String> {
    let Some(entry) = catalog.named(&spec.name).filter(|_| spec.partitions == Partitions::Shown)
    else {
        return Ok(Vec::new());
    };
    let with_name = |line: String| format!("{}: {line}", spec.name);
    let notes = catalog.show_partitions(&spec.name, &entry).map_err(with_name)?;
    Ok(notes.into_iter().map(with_name).collect())
}

/// Returns a line for the user if the store already has the disk that `spec` describes.
fn already_stored(catalog: &Catalog, spec: &DiskSpec) -> Result<Option<String>, String> {
    let Some(entry) = catalog.named(&spec.name) else { return Ok(None) };
    let is_same = match &spec.source {
        DiskSource::File(path) => path
            .canonicalize()
            .is_ok_and(|path| entry.disk.base_path().is_some_and(|base| base == path)),
        DiskSource::Remote(remote) => {
            entry.disk.base_address().is_some_and(|base| base.is_same_place(&remote.address))
        }
        _ => entry.disk.base_path().is_none() && entry.disk.base_address().is_none(),
    };
    if is_same {
        return Ok(Some(format!("{}: is in the store already", spec.name)));
    }
    Err(format!(
        "{}: the store has a disk of that name over '{}': give this one another NAME=",
        spec.name, entry.disk.source
    ))
}
