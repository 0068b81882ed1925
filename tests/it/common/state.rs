//! The content of all disks of a mount with their snapshots, for comparisons.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::mount::Lab;

/// The bytes of a disk and of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub bytes: Vec<u8>,
    pub snapshots: BTreeMap<String, Vec<u8>>,
}

/// The disks of a mount, by name.
pub(crate) type States = BTreeMap<String, State>;

/// Reads all disks and snapshots of the mount at `m`.
pub(crate) fn found(lab: &Lab) -> States {
    let read_all = |path: &Path| fs::read(path).unwrap();
    let root = lab.path("m");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&root).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let dir = root.join(".cowslip").join(&name).join("snapshots");
        let names = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name());
        let snapshots = names.map(|name| {
            let bytes = read_all(&dir.join(&name));
            (name.into_string().unwrap(), bytes)
        });
        let snapshots = snapshots.collect();
        found.insert(name.clone(), State { bytes: read_all(&root.join(&name)), snapshots });
    }
    found
}

/// Describes the differences of `found` from `old` and from `new`, for a failure message.
pub(crate) fn differences(found: &States, old: &States, new: &States) -> String {
    let mut lines = String::new();
    for (name, state) in found {
        for (what, other) in [("old", old), ("new", new)] {
            let Some(other) = other.get(name) else {
                lines += &format!("{name} is not in {what}\n");
                continue;
            };
            let differ = |one: &[u8], two: &[u8]| {
                let at = one.iter().zip(two).position(|(one, two)| one != two);
                (one != two)
                    .then(|| format!("{} instead of {} bytes, first {at:?}", one.len(), two.len()))
            };
            if let Some(wrong) = differ(&state.bytes, &other.bytes) {
                lines += &format!("{name} against {what}: {wrong}\n");
            }
            let keys = |state: &State| state.snapshots.keys().cloned().collect::<Vec<_>>();
            lines += &format!("{name}: {:?}, {what} {:?}\n", keys(state), keys(other));
            for (shot, bytes) in &state.snapshots {
                if let Some(wrong) = other.snapshots.get(shot).and_then(|old| differ(bytes, old)) {
                    lines += &format!("{name}@{shot} against {what}: {wrong}\n");
                }
            }
        }
    }
    lines + &format!("{:?}, {:?}, {:?}", found.keys(), old.keys(), new.keys())
}

/// Returns the layers in the overlay or store `dir` that `stacks` does not name.
pub(crate) fn unnamed(dir: &Path, stacks: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.join("layers")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !stacks.contains(name.as_str())).collect()
}
