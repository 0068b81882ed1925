//! Disks that come and go while the mount is there.
//!
//! ```text
//!   add:     parse -> open as `mount` does -> announce -> catalog        else: abandon
//!   remove:  refuse what is used -> out of the catalog -> the kernel forgets it -> close, unlock
//! ```
//!
//! Between the two steps of each nobody finds the disk: it is in the catalog only while all of it
//! works.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{Control, another, farewell, is_meant};
use crate::catalog::{Entry, Origin};
use crate::disk::{self, Disk, Opened, Setting, Use, split_name};
use crate::overlay::is_full;
use crate::spec::{check_cache, parse_disk};
use crate::stream::output::{Patience, State};
use crate::stream::sink::Inherit;
use crate::stream::{Ending, Stream};

/// What the kernel may still believe and is no longer so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stale {
    /// A disk has left the mount.
    Disk {
        /// The mounted file and those of its windows, each with its inode number.
        files: Vec<(String, u64)>,
    },
    /// A disk holds other bytes now.
    Bytes {
        /// The inode numbers of the mounted file and of its windows.
        inos: Vec<u64>,
    },
    /// A snapshot's name is gone: what is cached of its file is of no use to anybody.
    Name {
        /// The inode number of the directory.
        parent: u64,
        /// The name.
        name: String,
    },
}

/// Has the kernel forget what is stale. It may wait for requests that are under way, so it is
/// called by a thread of the disk's own.
pub type Forget = Arc<dyn Fn(&Stale) + Send + Sync>;

/// How long the kernel is waited for: what it knows holds for a second anyway.
const FORGETTING: Duration = Duration::from_secs(1);
/// How long requests that are under way are waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a disk is not removed.
enum Refusal {
    /// Somebody has it open: worth asking again.
    Open,
    /// Its name leads to another disk than the one that was meant.
    Another,
    /// The line for the user.
    Line(String),
}

/// What became of a removed disk.
#[derive(Default)]
struct Farewell {
    /// What was discarded or kept.
    lines: Vec<String>,
    /// What could not be done.
    failed: Vec<String>,
}

impl Control {
    /// Mounts the disk that `text` names and answers what `mount` would print of it.
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
        // The client has looked for a path with a comma already.
        let spec = parse_disk(text, cwd, &|_| false).map_err(|error| error.to_string())?;
        check_cache([&spec], self.cache).map_err(|error| error.to_string())?;
        let name = &spec.name;
        let taken = || {
            format!("there is a disk '{name}' in the mount already: give this one another NAME=")
        };
        self.check_stays()?;
        if self.catalog.shown(name).is_some() {
            return Err(taken());
        }
        let setting = Setting {
            mountpoint: &self.catalog.mountpoint,
            mount_dev: self.device.get().copied(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            force,
            allow_backing,
            stdio: Inherit::Nothing,
            looked_at: Mutex::new(HashSet::new()),
        };
        let store = spec.overlay.as_deref().and_then(|dir| self.catalog.store_at(dir));
        let opened = match store {
            Some(store) => store.create_over(&spec, &setting).map_err(|error| error.to_string())?,
            None => disk::open(&spec, &setting).map_err(|error| format!("{name}: {error}"))?,
        };
        let Opened { disk, summary, notes } = opened;
        let disk = Arc::new(disk);
        let clash = self.catalog.check_clash(name, &disk);
        clash.map_err(|line| format!("{name}: {line}")).inspect_err(|_| disk.abandon())?;
        disk.announce(&self.holder());
        let added = match store {
            Some(store) => self.catalog.add_new(store, name, &disk),
            None => self.catalog.add(name, Arc::clone(&disk), Origin::Given),
        };
        let Ok(entry) = added else {
            disk.abandon();
            return Err(taken());
        };
        // An end that has begun closes what it finds, and may have missed this one. Whoever has
        // it open already keeps the end waiting.
        if let Err(line) = self.check_stays()
            && self.catalog.take(name, &entry).is_ok()
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

    /// Refuses what would come too late.
    fn check_stays(&self) -> Result<(), String> {
        match self.draining.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("the mount is being unmounted: it takes no disks any more".to_owned()),
        }
    }

    /// Lets the disk `name` go and answers what became of its changes. `inode`: which disk that has
    /// to be.
    pub(super) fn remove(&self, name: &str, inode: Option<u64>) -> Value {
        match self.remove_disk(name, inode) {
            Ok(Farewell { lines, failed }) => {
                json!({ "ok": { "lines": lines, "failed": failed } })
            }
            Err(Refusal::Another) => another(name),
            Err(Refusal::Open) => json!({ "error": format!("{name} is in use"), "busy": true }),
            Err(Refusal::Line(line)) => json!({ "error": line }),
        }
    }

    fn remove_disk(&self, name: &str, inode: Option<u64>) -> Result<Farewell, Refusal> {
        let gone = || Refusal::Line(format!("there is no disk '{name}' in the mount"));
        if self.catalog.window_named(name).is_some()
            && let Some((disk, number)) = split_name(name)
        {
            return Err(Refusal::Line(format!(
                "'{name}' is partition {number} of the disk '{disk}', and goes with it: name that"
            )));
        }
        let entry = self.catalog.named(name).ok_or_else(gone)?;
        if !is_meant(&entry.disk, inode) {
            return Err(Refusal::Another);
        }
        self.check_removable(name, &entry)?;
        self.catalog.take(name, &entry).map_err(|used| match used {
            None => gone(),
            Some(Use::Open) => Refusal::Open,
            Some(Use::Held) => {
                Refusal::Line(format!("{name} is being worked on: wait until that is done"))
            }
        })?;
        let disk = Arc::clone(&entry.disk);
        // What is late finds no disk behind the slot either.
        drop(entry);
        let parts = disk.windows().iter().map(|window| (window.name(name), window.ino()));
        let files = std::iter::once((name.to_owned(), disk.ino())).chain(parts).collect();
        self.forget(&disk, Stale::Disk { files });
        let done = close(name, &disk);
        log::info!("{name}: removed");
        done.lines.iter().for_each(|line| log::info!("{line}"));
        done.failed.iter().for_each(|line| log::error!("{line}"));
        Ok(done)
    }

    fn check_removable(&self, name: &str, entry: &Entry) -> Result<(), Refusal> {
        let path = self.catalog.mountpoint.join(name);
        let path = path.display();
        if entry.origin == Origin::Stored {
            return Err(Refusal::Line(format!(
                "{name} is a disk of the store: rm '{path}' removes it with its data"
            )));
        }
        if entry.disk.openers() > 0 {
            return Err(Refusal::Open);
        }
        if let Some(Stream::Output(output)) = entry.disk.stream()
            && matches!(output.status().state, State::Open | State::Finishing)
        {
            return Err(Refusal::Line(format!(
                "{name} is not finished: cowslip finish '{path}' completes it, cowslip abort '{path}' gives it up"
            )));
        }
        // While the disk is there, what is wrong can still be put right.
        match entry.disk.sync() {
            Err(error) if is_full(&error) => {
                Err(Refusal::Line(format!("{name}: cannot be made durable: {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Has the kernel forget what is `stale` of a disk, and waits for that: nobody may see it when
    /// the request has been answered.
    pub(super) fn forget(&self, disk: &Disk, stale: Stale) {
        let Some(forget) = self.forget.get().map(Arc::clone) else {
            return;
        };
        let (tell, told) = mpsc::channel();
        disk.notices().run(Box::new(move || {
            forget(&stale);
            // Nobody listens any more when it took too long.
            let _ = tell.send(());
        }));
        // What the kernel waits for may need this very thread, so the wait has an end.
        let _ = told.recv_timeout(FORGETTING);
    }
}

/// Closes a disk that nobody can find any more.
fn close(name: &str, disk: &Disk) -> Farewell {
    let mut done = Farewell::default();
    match disk.settle(Ending::Settle, Patience::Endless) {
        Ok(line) => done.lines.extend(line),
        Err(why) => done.failed.push(format!("{name}: {why}")),
    }
    let left = disk.leave(PATIENCE, |disk| match farewell(name, disk) {
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
