//! Adding and removing disks while the mount exists.
//!
//! ```text
//!   add:     parse -> open as `mount` does -> write holder -> catalog             else: abandon
//!   remove:  refuse a disk in use -> out of the catalog -> out of the kernel's caches -> close, unlock
//! ```
//!
//! A disk that is only half added or removed cannot be found: it is in the catalog only while all
//! of it works.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use super::api::{Answer, Lines, Outcome, Refusal};
use super::{Control, Invalidation, matches_inode, unmount_summary};
use crate::catalog::{CatalogEntry, DiskOrigin};
use crate::config::{CacheMode, DiskSpec, check_cache, parse_disk};
use crate::disk::{self, Disk, InUse, OpenContext, OpenedDisk, split_name};
use crate::host::is_out_of_space;
use crate::store::Store;
use crate::stream::context::StdioMode;
use crate::stream::output::{DrainTimeout, OutputState};
use crate::stream::{Stream, UnmountPolicy};

/// Time limit for requests in progress when a disk is removed.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);

impl Control {
    /// Mounts the disk described by `text` and answers with the lines that `mount` would print.
    pub(super) fn add(
        &self,
        text: &str,
        cwd: &Path,
        force: bool,
        allow_backing: Vec<PathBuf>,
    ) -> Answer {
        if !cwd.is_absolute() {
            return Err(format!("'{}' is not an absolute path", cwd.display()).into());
        }
        // The client has already looked for a path with a comma.
        let spec = parse_disk(text, cwd, &|_| false).map_err(|error| error.to_string())?;
        check_cache([&spec], self.cache).map_err(|error| error.to_string())?;
        let name = &spec.name;
        self.check_not_draining()?;
        if self.catalog.file_named(name).is_some() {
            return Err(name_taken(name).into());
        }
        let store = spec.overlay.as_deref().and_then(|dir| self.catalog.store_at(dir));
        let OpenedDisk { disk, summary, notes } =
            self.open_disk(&spec, store, force, allow_backing)?;
        let disk = Arc::new(disk);
        self.publish_disk(name, &disk, store)?;
        log::info!("{name}: added");
        let mut lines = vec![format!("{name}: {summary}")];
        for note in notes {
            log::info!("{name}: {note}");
            lines.push(format!("{name}: {note}"));
        }
        Ok(Outcome::Lines(Lines { lines, failed: None }))
    }

    /// Opens the disk `spec` as `mount` does, in `store` if its overlay lies there.
    fn open_disk(
        &self,
        spec: &DiskSpec,
        store: Option<&Store>,
        force: bool,
        allow_backing: Vec<PathBuf>,
    ) -> Result<OpenedDisk, String> {
        let context = OpenContext {
            mountpoint: &self.catalog.mountpoint,
            mount_dev: self.device.get().copied(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            force,
            allow_backing,
            stdio: StdioMode::Unavailable,
            probed_dirs: Mutex::new(HashSet::new()),
        };
        match store {
            Some(store) => store.create_over(spec, &context).map_err(|error| error.to_string()),
            None => disk::open(spec, &context).map_err(|error| format!("{}: {error}", spec.name)),
        }
    }

    /// Puts a disk that works into the catalog. If that fails, closes it and removes what was created for
    /// it.
    fn publish_disk(
        &self,
        name: &str,
        disk: &Arc<Disk>,
        store: Option<&Store>,
    ) -> Result<(), String> {
        let clash = self.catalog.check_clash(name, disk);
        clash
            .map_err(|line| format!("{name}: {line}"))
            .inspect_err(|_| self.catalog.discard(disk, store))?;
        if self.cache == CacheMode::Writeback {
            self.catalog.renumber_returning(disk);
        }
        disk.write_holder(&self.holder());
        let added = match store {
            Some(store) => self.catalog.add_created(store, name, disk),
            None => self
                .catalog
                .add(name, Arc::clone(disk), DiskOrigin::Given)
                .inspect_err(|_| self.catalog.discard(disk, None)),
        };
        let entry = added.map_err(|error| match (error.raw_os_error(), store) {
            (Some(libc::EEXIST), _) | (_, None) => name_taken(name),
            (_, Some(_)) => format!("{name}: naming it in the store: {error}"),
        })?;
        // A shutdown that started meanwhile may have missed this disk, so the disk is removed
        // again. If it is open already, the shutdown waits for it. A disk of the store stays there.
        let Err(line) = self.check_not_draining() else { return Ok(()) };
        if store.is_some() || self.catalog.remove(name, &entry).is_err() {
            return Ok(());
        }
        self.catalog.discard(disk, None);
        Err(line)
    }

    /// Refuses a request that comes after the start of the shutdown.
    fn check_not_draining(&self) -> Result<(), String> {
        match self.draining.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("the mount is being unmounted: it takes no disks any more".to_owned()),
        }
    }

    /// Removes the disk `name` and answers what became of its changes. The disk must have the inode
    /// number `inode`, if given.
    pub(super) fn remove(&self, name: &str, inode: Option<u64>) -> Answer {
        let missing = || Refusal::new(format!("there is no disk '{name}' in the mount"));
        if self.catalog.partition_named(name).is_some()
            && let Some((disk, number)) = split_name(name)
        {
            return Err(Refusal::new(format!(
                "'{name}' is partition {number} of the disk '{disk}', and goes with it: name that"
            )));
        }
        let entry = self.catalog.named(name).ok_or_else(missing)?;
        if !matches_inode(&entry.disk, inode) {
            return Err(Refusal::stale(name));
        }
        self.check_removable(name, &entry)?;
        self.catalog.remove(name, &entry).map_err(|in_use| match in_use {
            None => missing(),
            Some(InUse::Open) => in_use_refusal(name),
            Some(InUse::Busy) => {
                Refusal::new(format!("{name} is being worked on: wait until that is done"))
            }
        })?;
        let disk = Arc::clone(&entry.disk);
        // Late requests to the slot must not find the disk either.
        drop(entry);
        let partitions = disk.partition_files().iter();
        let partitions = partitions.map(|partition| (partition.name(name), partition.ino()));
        let files = std::iter::once((name.to_owned(), disk.ino())).chain(partitions).collect();
        self.wait_for_invalidation(&disk, Invalidation::Disk { files });
        let (lines, failed) = close_disk(name, &disk);
        log::info!("{name}: removed");
        lines.iter().for_each(|line| log::info!("{line}"));
        failed.iter().for_each(|line| log::error!("{line}"));
        Ok(Outcome::Lines(Lines { lines, failed: Some(failed) }))
    }

    fn check_removable(&self, name: &str, entry: &CatalogEntry) -> Result<(), Refusal> {
        let path = self.catalog.mountpoint.join(name);
        let path = path.display();
        if entry.origin == DiskOrigin::Stored {
            return Err(Refusal::new(format!(
                "{name} is a disk of the store: rm '{path}' removes it with its data"
            )));
        }
        if entry.disk.handle_count() > 0 {
            return Err(in_use_refusal(name));
        }
        if let Some(Stream::Output(output)) = entry.disk.stream()
            && matches!(output.status().state, OutputState::Open | OutputState::Finishing)
        {
            return Err(Refusal::new(format!(
                "{name} is not finished: cowslip finish '{path}' completes it, cowslip abort '{path}' gives it up"
            )));
        }
        // While the disk is still mounted, the user can mend the problem.
        match entry.disk.sync() {
            Err(error) if is_out_of_space(&error) => {
                Err(Refusal::new(format!("{name}: cannot be made durable: {error}")))
            }
            _ => Ok(()),
        }
    }
}

fn name_taken(name: &str) -> String {
    format!("there is a disk '{name}' in the mount already: give this one another NAME=")
}

/// Refuses to remove a disk that has an open handle: worth another try.
fn in_use_refusal(name: &str) -> Refusal {
    Refusal::new(format!("{name} is in use")).with_busy(true)
}

/// Closes a disk that can no longer be found. Returns what was discarded or kept, and what failed, a
/// line each.
fn close_disk(name: &str, disk: &Disk) -> (Vec<String>, Vec<String>) {
    let (mut lines, mut failed) = (Vec::new(), Vec::new());
    match disk.end_stream(UnmountPolicy::Settle, DrainTimeout::Unlimited) {
        Ok(line) => lines.extend(line),
        Err(reason) => failed.push(format!("{name}: {reason}")),
    }
    let closed = disk.shut_down(REMOVE_TIMEOUT, |disk| match unmount_summary(name, disk) {
        Ok(line) => lines.extend(line),
        Err(line) => failed.push(line),
    });
    match closed {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => failed.push(format!(
            "{name}: a request still waits for its base: its files stay locked until that ends"
        )),
        Err(error) => failed.push(format!("{name}: could not be made durable: {error}")),
    }
    (lines, failed)
}
