//! Adding and removing disks while the mount exists.
//!
//! ```text
//!   add:     parse -> open as `mount` does -> write holder -> catalog             else: abandon
//!   remove:  refuse a disk in use -> out of the catalog -> invalidate -> close, unlock
//! ```
//!
//! A disk that is only half added or removed cannot be found: it is in the catalog only while all
//! of it works.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Control, matches_inode, stale_answer, unmount_summary};
use crate::catalog::{CatalogEntry, DiskOrigin};
use crate::config::{check_cache, parse_disk};
use crate::disk::{self, Disk, InUse, OpenContext, OpenedDisk, split_name};
use crate::overlay::is_out_of_space;
use crate::stream::output::{DrainTimeout, OutputState};
use crate::stream::sink::StdioMode;
use crate::stream::{Stream, UnmountPolicy};

/// State that the kernel may have cached and that is stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// A disk has left the mount.
    Disk {
        /// The mounted file and the files of its partitions, each with its inode number.
        files: Vec<(String, u64)>,
    },
    /// A disk's contents have changed.
    Bytes {
        /// The inode numbers of the mounted file and of its partitions.
        inos: Vec<u64>,
    },
    /// A snapshot was deleted: cached data of its file is useless.
    Name {
        /// The inode number of the directory.
        parent: u64,
        /// The name.
        name: String,
    },
}

/// Makes the kernel forget stale state. May wait for requests that are under way, so it is called
/// by a thread of the disk's own pool.
pub type Invalidator = Arc<dyn Fn(&Invalidation) + Send + Sync>;

/// How long an invalidation is waited for. Names and attributes in the kernel's cache expire after a
/// second anyway; its pages of a file go once the invalidation is done.
const INVALIDATE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long requests under way are waited for when a disk is removed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The reason why a disk is not removed.
enum RemoveError {
    /// A handle is open: worth another try.
    Open,
    /// The name belongs to another disk than the one that was meant.
    Stale,
    /// Another reason, as a line for the user.
    Message(String),
}

/// The outcome of removing a disk.
#[derive(Default)]
struct RemoveReport {
    /// What was discarded or kept, a line each.
    lines: Vec<String>,
    /// What failed, a line each.
    failed: Vec<String>,
}

impl Control {
    /// Mounts the disk described by `text` and answers with the lines that `mount` would print.
    pub(super) fn add(
        &self,
        text: &str,
        cwd: &Path,
        force: bool,
        allow_backing: Vec<PathBuf>,
    ) -> Value {
        match self.add_disk(text, cwd, force, allow_backing) {
            Ok(lines) => json!({ "ok": { "lines": lines } }),
            Err(line) => json!({ "error": line }),
        }
    }

    fn add_disk(
        &self,
        text: &str,
        cwd: &Path,
        force: bool,
        allow_backing: Vec<PathBuf>,
    ) -> Result<Vec<String>, String> {
        if !cwd.is_absolute() {
            return Err(format!("'{}' is not an absolute path", cwd.display()));
        }
        // The client has already looked for a path with a comma.
        let spec = parse_disk(text, cwd, &|_| false).map_err(|error| error.to_string())?;
        check_cache([&spec], self.cache).map_err(|error| error.to_string())?;
        let name = &spec.name;
        let taken = || {
            format!("there is a disk '{name}' in the mount already: give this one another NAME=")
        };
        self.check_not_draining()?;
        if self.catalog.file_named(name).is_some() {
            return Err(taken());
        }
        let setting = OpenContext {
            mountpoint: &self.catalog.mountpoint,
            mount_dev: self.device.get().copied(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            force,
            allow_backing,
            stdio: StdioMode::Unavailable,
            probed_dirs: Mutex::new(HashSet::new()),
        };
        let store = spec.overlay.as_deref().and_then(|dir| self.catalog.store_at(dir));
        let opened = match store {
            Some(store) => store.create_over(&spec, &setting).map_err(|error| error.to_string())?,
            None => disk::open(&spec, &setting).map_err(|error| format!("{name}: {error}"))?,
        };
        let OpenedDisk { disk, summary, notes } = opened;
        let disk = Arc::new(disk);
        let clash = self.catalog.check_clash(name, &disk);
        clash.map_err(|line| format!("{name}: {line}")).inspect_err(|_| disk.abandon())?;
        disk.write_holder(&self.holder());
        let added = match store {
            Some(store) => self.catalog.add_stored(store, name, &disk),
            None => self.catalog.add(name, Arc::clone(&disk), DiskOrigin::Given),
        };
        let Ok(entry) = added else {
            disk.abandon();
            return Err(taken());
        };
        // A shutdown that started meanwhile may have missed this disk, so the disk is removed
        // again. If it is open already, the shutdown waits for it.
        if let Err(line) = self.check_not_draining()
            && self.catalog.remove(name, &entry).is_ok()
        {
            disk.abandon();
            return Err(line);
        }
        log::info!("{name}: added");
        let mut lines = vec![format!("{name}: {summary}")];
        for note in notes {
            log::info!("{name}: {note}");
            lines.push(format!("{name}: {note}"));
        }
        Ok(lines)
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
    pub(super) fn remove(&self, name: &str, inode: Option<u64>) -> Value {
        match self.remove_disk(name, inode) {
            Ok(RemoveReport { lines, failed }) => {
                json!({ "ok": { "lines": lines, "failed": failed } })
            }
            Err(RemoveError::Stale) => stale_answer(name),
            Err(RemoveError::Open) => json!({ "error": format!("{name} is in use"), "busy": true }),
            Err(RemoveError::Message(line)) => json!({ "error": line }),
        }
    }

    fn remove_disk(&self, name: &str, inode: Option<u64>) -> Result<RemoveReport, RemoveError> {
        let gone = || RemoveError::Message(format!("there is no disk '{name}' in the mount"));
        if self.catalog.partition_named(name).is_some()
            && let Some((disk, number)) = split_name(name)
        {
            return Err(RemoveError::Message(format!(
                "'{name}' is partition {number} of the disk '{disk}', and goes with it: name that"
            )));
        }
        let entry = self.catalog.named(name).ok_or_else(gone)?;
        if !matches_inode(&entry.disk, inode) {
            return Err(RemoveError::Stale);
        }
        self.check_removable(name, &entry)?;
        self.catalog.remove(name, &entry).map_err(|used| match used {
            None => gone(),
            Some(InUse::Open) => RemoveError::Open,
            Some(InUse::Busy) => {
                RemoveError::Message(format!("{name} is being worked on: wait until that is done"))
            }
        })?;
        let disk = Arc::clone(&entry.disk);
        // Late requests to the slot must not find the disk either.
        drop(entry);
        let parts = disk.partition_files().iter().map(|window| (window.name(name), window.ino()));
        let files = std::iter::once((name.to_owned(), disk.ino())).chain(parts).collect();
        self.invalidate(&disk, Invalidation::Disk { files });
        let done = close_disk(name, &disk);
        log::info!("{name}: removed");
        done.lines.iter().for_each(|line| log::info!("{line}"));
        done.failed.iter().for_each(|line| log::error!("{line}"));
        Ok(done)
    }

    fn check_removable(&self, name: &str, entry: &CatalogEntry) -> Result<(), RemoveError> {
        let path = self.catalog.mountpoint.join(name);
        let path = path.display();
        if entry.origin == DiskOrigin::Stored {
            return Err(RemoveError::Message(format!(
                "{name} is a disk of the store: rm '{path}' removes it with its data"
            )));
        }
        if entry.disk.handle_count() > 0 {
            return Err(RemoveError::Open);
        }
        if let Some(Stream::Output(output)) = entry.disk.stream()
            && matches!(output.status().state, OutputState::Open | OutputState::Finishing)
        {
            return Err(RemoveError::Message(format!(
                "{name} is not finished: cowslip finish '{path}' completes it, cowslip abort '{path}' gives it up"
            )));
        }
        // While the disk is still mounted, the user can mend the problem.
        match entry.disk.sync() {
            Err(error) if is_out_of_space(&error) => {
                Err(RemoveError::Message(format!("{name}: cannot be made durable: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Makes the kernel forget the `stale` state of a disk and waits for that: it must not be
    /// visible once the request has been answered.
    pub(super) fn invalidate(&self, disk: &Disk, stale: Invalidation) {
        let Some(forget) = self.invalidator.get().map(Arc::clone) else {
            return;
        };
        let (tell, told) = mpsc::channel();
        disk.pools.notify.run(Box::new(move || {
            forget(&stale);
            // The receiver may have timed out.
            let _ = tell.send(());
        }));
        // The kernel may be waiting for this very thread, so the wait is bounded.
        let _ = told.recv_timeout(INVALIDATE_TIMEOUT);
    }
}

/// Closes a disk that can no longer be found.
fn close_disk(name: &str, disk: &Disk) -> RemoveReport {
    let mut done = RemoveReport::default();
    match disk.end_stream(UnmountPolicy::Settle, DrainTimeout::Unlimited) {
        Ok(line) => done.lines.extend(line),
        Err(why) => done.failed.push(format!("{name}: {why}")),
    }
    let left = disk.shut_down(DRAIN_TIMEOUT, |disk| match unmount_summary(name, disk) {
        Ok(line) => done.lines.extend(line),
        Err(line) => done.failed.push(line),
    });
    match left {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => done.failed.push(format!(
            "{name}: a request still waits for its base: its files stay locked until that ends"
        )),
        Err(error) => done.failed.push(format!("{name}: could not be made durable: {error}")),
    }
    done
}
