//! The check of a store itself: entries that belong to no disk.

use std::io;
use std::path::Path;

use super::OfflineError;
use super::check::CheckMode;
use crate::store::StoreDirs;

/// An entry of a store that belongs to no disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoreFinding {
    /// The kind of entry.
    pub kind: StoreFindingKind,
    /// Name of the entry.
    pub name: String,
    /// The reaction of the check.
    pub outcome: StoreOutcome,
}

/// Kind of an entry that belongs to no disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreFindingKind {
    /// A name whose disk does not exist, which is damage.
    Name,
    /// A disk without a name.
    Disk,
    /// A layer that no disk uses.
    Layer,
    /// An entry that cowslip did not create.
    Foreign,
}

/// Reaction to an entry that belongs to no disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoreOutcome {
    /// The entry is only reported.
    Reported,
    /// The entry was removed.
    Removed,
    /// The entry stays; the line names the foreign file that it contains.
    Kept(String),
}

/// Finds the entries of the store at `dir` that belong to no disk, and removes those that cowslip
/// made if `mode` allows. A repair does this before it checks the disks, so that nameless disks are
/// not checked.
///
/// # Errors
/// [`OfflineError::Host`].
pub(crate) fn check_store(
    store: &StoreDirs,
    dir: &Path,
    mode: CheckMode,
) -> Result<Vec<StoreFinding>, OfflineError> {
    let failed =
        |error| OfflineError::host(format!("cannot sweep the store '{}'", dir.display()))(error);
    let leftovers = store.leftovers().map_err(failed)?;
    let mut findings = Vec::new();
    let mut add = |kind, name: String, remove: &dyn Fn() -> io::Result<()>| {
        let outcome = match mode {
            CheckMode::Report => StoreOutcome::Reported,
            CheckMode::Repair => match remove() {
                Ok(()) => StoreOutcome::Removed,
                Err(error) if error.kind() == io::ErrorKind::Other => {
                    StoreOutcome::Kept(error.to_string())
                }
                Err(error) => return Err(failed(error)),
            },
        };
        findings.push(StoreFinding { kind, name, outcome });
        Ok(())
    };
    for name in leftovers.names {
        add(StoreFindingKind::Name, name.clone(), &|| store.remove_name(&name))?;
    }
    for name in leftovers.disks {
        add(StoreFindingKind::Disk, name.clone(), &|| store.remove_disk(&name))?;
    }
    for uuid in leftovers.layers {
        add(StoreFindingKind::Layer, uuid.to_string(), &|| store.remove_layer(uuid))?;
    }
    findings.extend(leftovers.foreign.into_iter().map(|name| StoreFinding {
        kind: StoreFindingKind::Foreign,
        name,
        outcome: StoreOutcome::Reported,
    }));
    Ok(findings)
}
