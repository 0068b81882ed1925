//! The `.cowslip` directory inside a mount: what the command line talks to.
//!
//! ```text
//!   .cowslip/status          JSON of the mount          .cowslip/DISK/status    JSON of the disk
//!   .cowslip/log             the daemon's log           .cowslip/DISK/map       its extents as JSON
//!   .cowslip/ctl             requests to the mount      .cowslip/DISK/ctl       requests to the disk
//!                                                       .cowslip/DISK/snapshots/NAME  as it was
//! ```
//!
//! It is reachable by name and not listed. Its files are direct I/O files of size 0. A request is
//! one line of JSON written to a `ctl`; the answer is lines of JSON, the last with `ok` or
//! `error`, and a `progress` line at least every second before it.

mod disks;
mod life;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde::Deserialize;
use serde_json::{Value, json};

pub use self::disks::{Forget, Stale};
use crate::base::place;
use crate::catalog::{Catalog, Entry};
use crate::disk::Disk;
use crate::extents::{Extent, Kind};
use crate::host::errno;
use crate::layer::Wait;
use crate::overlay::persist::Place;
use crate::overlay::recover::Recovered;
use crate::spec::format_size;
use crate::stream::output::{FinishError, Patience};
use crate::stream::{Ending, Stream};

/// A client is told at least this often that its request is still being worked on.
const PROGRESS: Duration = Duration::from_secs(1);
/// Extents described at a time for a `map`: a few milliseconds of work.
const MAP_BATCH: usize = 4096;

/// One place in the `.cowslip` directory. A disk is named by its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spot {
    /// `.cowslip` itself.
    Directory,
    /// `.cowslip/status`.
    Status,
    /// `.cowslip/log`.
    Log,
    /// `.cowslip/ctl`.
    Ctl,
    /// `.cowslip/DISK`.
    Disk(u64),
    /// `.cowslip/DISK/status`.
    DiskStatus(u64),
    /// `.cowslip/DISK/map`.
    DiskMap(u64),
    /// `.cowslip/DISK/ctl`.
    DiskCtl(u64),
    /// `.cowslip/DISK/snapshots`: what it holds are disks.
    Snapshots(u64),
}

impl Spot {
    /// Its inode number: 2 to 5 for the mount's own, then eight a slot. Disks' own numbers start
    /// at 2^62.
    #[must_use]
    pub fn ino(self) -> u64 {
        match self {
            Self::Directory => 2,
            Self::Status => 3,
            Self::Log => 4,
            Self::Ctl => 5,
            Self::Disk(slot) => slot * 8,
            Self::DiskStatus(slot) => slot * 8 + 1,
            Self::DiskMap(slot) => slot * 8 + 2,
            Self::DiskCtl(slot) => slot * 8 + 3,
            Self::Snapshots(slot) => slot * 8 + 4,
        }
    }

    /// The place of an inode number.
    #[must_use]
    pub fn of(ino: u64) -> Option<Self> {
        match (ino, ino / 8, ino % 8) {
            (2, ..) => Some(Self::Directory),
            (3, ..) => Some(Self::Status),
            (4, ..) => Some(Self::Log),
            (5, ..) => Some(Self::Ctl),
            (8..0x4000_0000_0000_0000, slot, 0) => Some(Self::Disk(slot)),
            (8..0x4000_0000_0000_0000, slot, 1) => Some(Self::DiskStatus(slot)),
            (8..0x4000_0000_0000_0000, slot, 2) => Some(Self::DiskMap(slot)),
            (8..0x4000_0000_0000_0000, slot, 3) => Some(Self::DiskCtl(slot)),
            (8..0x4000_0000_0000_0000, slot, 4) => Some(Self::Snapshots(slot)),
            _ => None,
        }
    }

    /// Whether it is a directory.
    #[must_use]
    pub fn is_directory(self) -> bool {
        matches!(self, Self::Directory | Self::Disk(_) | Self::Snapshots(_))
    }

    /// What it holds under `name`.
    #[must_use]
    pub fn child(self, name: &str, catalog: &Catalog) -> Option<Self> {
        match (self, name) {
            (Self::Directory, "status") => Some(Self::Status),
            (Self::Directory, "log") => Some(Self::Log),
            (Self::Directory, "ctl") => Some(Self::Ctl),
            (Self::Directory, name) => catalog.named(name).map(|entry| Self::Disk(entry.slot)),
            (Self::Disk(slot), "status") => Some(Self::DiskStatus(slot)),
            (Self::Disk(slot), "map") => Some(Self::DiskMap(slot)),
            (Self::Disk(slot), "ctl") => Some(Self::DiskCtl(slot)),
            (Self::Disk(slot), "snapshots") => Some(Self::Snapshots(slot)),
            _ => None,
        }
    }

    /// What a listing of it shows, with each name's place.
    #[must_use]
    pub fn children(self, catalog: &Catalog) -> Vec<(String, Self)> {
        let named = |names: &[&str]| -> Vec<(String, Self)> {
            let found = names.iter().map(|name| ((*name).to_owned(), self.child(name, catalog)));
            found.filter_map(|(name, spot)| Some((name, spot?))).collect()
        };
        match self {
            Self::Directory => {
                let mut all = named(&["status", "log", "ctl"]);
                let disks = catalog.list().into_iter();
                all.extend(disks.map(|(name, entry)| (name, Self::Disk(entry.slot))));
                all
            }
            Self::Disk(_) => named(&["status", "map", "ctl", "snapshots"]),
            _ => Vec::new(),
        }
    }
}

/// What the control files know of the mount.
pub struct Control {
    /// The disks.
    pub catalog: Arc<Catalog>,
    /// What the mount table shows as its source.
    pub source: String,
    /// The daemon is on its way out.
    pub draining: AtomicBool,
    /// The mount's device number, once it is there.
    pub device: std::sync::OnceLock<u64>,
    /// Has the kernel forget a disk, once the mount is there.
    pub forget: std::sync::OnceLock<Forget>,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum MountRequest {
    /// Sync every disk, say what an unmount will discard, and bring streams to their end.
    Drain {
        #[serde(default)]
        streams: Ending,
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Mount another disk; relative paths in it start at `cwd`.
    Add {
        disk: String,
        cwd: PathBuf,
        #[serde(default)]
        force: bool,
        #[serde(default)]
        allow_backing: Vec<PathBuf>,
    },
    /// Let a disk go that the command line or `Add` has named.
    Remove { name: String },
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum DiskRequest {
    /// Make a temporary overlay persistent.
    Keep { dir: PathBuf },
    /// Complete a stream.
    Finish {
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Give a stream up.
    Abort,
    /// Freeze what the disk holds under a name.
    Snapshot {
        #[serde(default)]
        name: Option<String>,
        #[serde(default)]
        sync: bool,
    },
    /// Tell its snapshots.
    Snapshots,
    /// Delete a snapshot.
    Unsnapshot { name: String },
    /// Make the disk what it was at a snapshot.
    Revert {
        name: String,
        #[serde(default)]
        force: bool,
    },
    /// Make the disk what its base is.
    Reset {
        #[serde(default)]
        force: bool,
    },
    /// Make another disk that holds the same.
    Clone { name: String },
    /// Merge the overlay down into its base.
    Commit {
        #[serde(default)]
        force: bool,
    },
    /// Bring bytes in: from `start` to `end`.
    Prefetch {
        start: u64,
        end: u64,
        #[serde(default)]
        copy: bool,
    },
    /// Freeze it, and tell what has changed since a snapshot or the base.
    Difference {
        #[serde(default)]
        since: Option<String>,
        #[serde(default)]
        until: Option<String>,
    },
    /// Fill the overlay until it needs its base no more; `rate` in bytes a second.
    Hydrate {
        #[serde(default)]
        rate: u64,
        #[serde(default)]
        action: HydrateAction,
    },
}

/// What is to become of a hydration.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum HydrateAction {
    /// Begin it, or go on; answered at its end.
    #[default]
    Wait,
    /// Begin it, or go on; answered at once.
    Start,
    Pause,
    Cancel,
}

impl Control {
    /// The text of `.cowslip/status`.
    #[must_use]
    pub fn status(&self) -> Vec<u8> {
        let state = if self.draining.load(Ordering::SeqCst) { "draining" } else { "ready" };
        let disks: Vec<Value> =
            self.catalog.list().iter().map(|(name, entry)| self.disk_value(name, entry)).collect();
        let mount = json!({
            "mountpoint": self.catalog.mountpoint.to_string_lossy(),
            "source": self.source,
            "pid": std::process::id(),
            "state": state,
            "disks": disks,
        });
        lines(&json!({ "schema": 1, "mounts": [mount] }))
    }

    /// The text of `.cowslip/DISK/status`.
    #[must_use]
    pub fn disk_status(&self, name: &str, entry: &Entry) -> Vec<u8> {
        lines(&self.disk_value(name, entry))
    }

    fn disk_value(&self, name: &str, entry: &Entry) -> Value {
        let disk = &entry.disk;
        let (state, error) = if disk.is_latched() {
            let why = "a sync failed: nothing written since is safe, see the log";
            ("read-only", Some(why.to_owned()))
        } else {
            match disk.stream().and_then(Stream::failure) {
                Some(why) => ("failed", Some(why)),
                None => ("ok", None),
            }
        };
        let overlay = disk.overlay().map(|overlay| {
            let chain = disk.chain();
            let since = chain.last().map_or_else(|| overlay.usage(), |lowest| lowest.since);
            let recovered = match disk.recovered() {
                Recovered::New | Recovered::Clean => None,
                Recovered::All => Some("all"),
                Recovered::Vouched { .. } => Some("vouched"),
            };
            json!({
                "temporary": overlay.is_temporary(),
                "path": disk.overlay_dir().map(|dir| dir.to_string_lossy().into_owned()),
                "block": overlay.block(),
                "changed": since.data,
                "zeroed": since.zero,
                "allocated": allocated_on_host(disk),
                "free": disk.space().map(|space| space.available).unwrap_or(0),
                "recovered": recovered,
                "doing": disk.doing(),
                "committing": overlay.is_committing(),
                "hydration": disk.hydration(),
                "done": disk.progress().0,
                "total": disk.progress().1,
                "limit": disk.limit(),
                "chain": chain.iter().map(life::layer_value).collect::<Vec<_>>(),
                "kind": "blocks",
            })
        });
        let overlay = overlay.or_else(|| reflink_value(disk));
        json!({
            "name": name,
            "path": self.catalog.mountpoint.join(name).to_string_lossy(),
            "size": disk.size(),
            "mode": disk.mode.to_string(),
            "state": state,
            "error": error,
            "openers": disk.openers(),
            "base": disk.base_shown(),
            "overlay": overlay,
            "stream": disk.stream().map(stream_value),
        })
    }

    /// Answers a request to the mount.
    fn answer_mount(&self, request: &[u8]) -> Value {
        match serde_json::from_slice(request) {
            Ok(MountRequest::Drain { streams, timeout_ms }) => {
                self.drain(streams, Patience::of_request(timeout_ms))
            }
            Ok(MountRequest::Add { disk, cwd, force, allow_backing }) => {
                self.add(&disk, &cwd, force, allow_backing)
            }
            Ok(MountRequest::Remove { name }) => self.remove(&name),
            Err(error) => json!({ "error": format!("request not understood: {error}") }),
        }
    }

    /// Makes everything durable and says what will become of each disk.
    fn drain(&self, streams: Ending, patience: Patience) -> Value {
        let (mut said, mut failed) = (Vec::new(), Vec::new());
        for (name, entry) in self.catalog.list() {
            if entry.disk.stream().is_some() {
                match entry.disk.settle(streams, patience) {
                    Ok(line) => said.extend(line),
                    Err(why) => failed.push(format!("{name}: {why}")),
                }
                continue;
            }
            if let Err(error) = entry.disk.sync() {
                failed.push(format!("{name}: could not be made durable: {error}"));
                continue;
            }
            said.extend(farewell(&name, &entry.disk));
        }
        json!({ "ok": { "lines": said, "failed": failed } })
    }

    /// Answers a request to a disk.
    fn answer_disk(&self, slot: u64, request: &[u8], is_gone: &(dyn Fn() -> bool + Sync)) -> Value {
        let Some((name, entry)) = self.catalog.slot(slot) else {
            return json!({ "error": "the disk is gone" });
        };
        match serde_json::from_slice(request) {
            Ok(DiskRequest::Keep { dir }) => match self.keep(&name, &entry, &dir) {
                Ok(()) => {
                    let line = format!("{name}: changes are kept in '{}'", dir.display());
                    log::info!("{line}");
                    json!({ "ok": { "line": line } })
                }
                Err(error) => json!({ "error": error }),
            },
            Ok(DiskRequest::Finish { timeout_ms }) => finish(&name, &entry.disk, timeout_ms),
            Ok(DiskRequest::Abort) => abort(&name, &entry.disk),
            Ok(DiskRequest::Snapshot { name: snapshot, sync }) => {
                self.snapshot(&name, &entry.disk, snapshot.as_deref(), sync)
            }
            Ok(DiskRequest::Snapshots) => life::list(&name, &entry.disk),
            Ok(DiskRequest::Unsnapshot { name: snapshot }) => {
                self.unsnapshot(&name, &entry, &snapshot)
            }
            Ok(DiskRequest::Revert { name: snapshot, force }) => {
                self.go_back(&name, &entry.disk, Some(&snapshot), force.into())
            }
            Ok(DiskRequest::Reset { force }) => {
                self.go_back(&name, &entry.disk, None, force.into())
            }
            Ok(DiskRequest::Clone { name: new }) => self.clone_disk(&name, &new),
            Ok(DiskRequest::Commit { force }) => {
                self.forget_bytes(&entry.disk);
                life::commit(&name, &entry.disk, force.into(), is_gone)
            }
            Ok(DiskRequest::Prefetch { start, end, copy }) => {
                life::prefetch(&name, &entry.disk, start..end, copy, is_gone)
            }
            Ok(DiskRequest::Difference { since, until }) => {
                self.difference(&name, &entry.disk, since.as_deref(), until.as_deref())
            }
            Ok(DiskRequest::Hydrate { rate, action }) => {
                life::hydrate(&name, &entry.disk, rate, action)
            }
            Err(error) => json!({ "error": format!("request not understood: {error}") }),
        }
    }

    /// Tells how far what a request to `spot` is about has come: bytes, and of how many.
    fn progress_of(&self, spot: Spot) -> Option<Progress> {
        let Spot::DiskCtl(slot) = spot else {
            return None;
        };
        let disk = Arc::clone(&self.catalog.slot(slot)?.1.disk);
        match disk.stream() {
            Some(Stream::Output(output)) => {
                let output = Arc::clone(output);
                Some(Box::new(move || Some(output.progress())))
            }
            Some(Stream::Input { .. }) => None,
            None => Some(Box::new(move || Some(disk.progress()).filter(|(_, all)| *all > 0))),
        }
    }

    fn keep(&self, name: &str, entry: &Entry, dir: &Path) -> Result<(), String> {
        if !dir.is_absolute() {
            return Err(format!("'{}' is not an absolute path", dir.display()));
        }
        let device = self.device.get().copied();
        place::refuse_inside(dir, &self.catalog.mountpoint, device)
            .map_err(|error| error.to_string())?;
        match self.catalog.keep_in_store(name, entry, dir) {
            Some(kept) => kept?,
            None => {
                let place = Place { dir, layers: None };
                entry.disk.keep(place).map_err(|error| error.to_string())?;
            }
        }
        entry.disk.announce(&self.holder());
        Ok(())
    }

    /// What others read who want an overlay of this mount.
    #[must_use]
    pub fn holder(&self) -> crate::overlay::persist::Holder {
        crate::overlay::persist::Holder {
            pid: std::process::id(),
            mountpoint: self.catalog.mountpoint.to_string_lossy().into_owned(),
            draining: self.draining.load(Ordering::SeqCst),
        }
    }
}

fn finish(name: &str, disk: &Disk, timeout_ms: Option<u64>) -> Value {
    let Some(Stream::Output(output)) = disk.stream() else {
        return json!({ "error": format!("{name} is no output stream: there is nothing to finish") });
    };
    match output.finish(&|| disk.has_writers(), Patience::of_request(timeout_ms)) {
        Ok(line) => json!({ "ok": { "line": line } }),
        Err(error @ FinishError::Busy) => {
            json!({ "error": format!("{name} {error}"), "busy": true })
        }
        Err(error) => json!({ "error": format!("{name}: {error}") }),
    }
}

fn abort(name: &str, disk: &Disk) -> Value {
    let result = match disk.stream() {
        Some(Stream::Output(output)) => output.abort("aborted"),
        Some(Stream::Input { input, .. }) => {
            // Whatever had failed before, it is over now.
            let _ = input.close();
            Ok(())
        }
        None => Err("it is no stream: there is nothing to abort".to_owned()),
    };
    match result {
        Ok(()) => json!({ "ok": { "line": format!("{name}: aborted") } }),
        Err(why) => json!({ "error": format!("{name}: {why}") }),
    }
}

/// A stream in `status`.
fn stream_value(stream: &Stream) -> Value {
    match stream {
        Stream::Output(output) => {
            let status = output.status();
            json!({
                "direction": "out",
                "state": status.state.name(),
                "frontier": status.frontier,
                "highest": status.highest,
                "accepted": status.accepted,
                "window": { "size": status.window.0, "used": status.window.1 },
                "spill": { "size": status.spill.0, "used": status.spill.1 },
                "needed": { "window": status.needed.0, "spill": status.needed.1 },
                "sink": {
                    "kind": status.kind,
                    "description": status.sink,
                    "status": status.error.as_deref().unwrap_or(status.state.name()),
                },
            })
        }
        Stream::Input { input, monitor } => {
            let status = input.status();
            json!({
                "direction": "in",
                "state": status.state.name(),
                "frontier": status.arrived,
                "highest": status.highest,
                "accepted": status.arrived,
                "window": { "size": status.window, "used": status.used },
                "spill": { "size": Value::Null, "used": status.spooled },
                "needed": { "window": status.needed, "spill": 0 },
                "sink": Value::Null,
                "source": {
                    "kind": monitor.kind(),
                    "description": monitor.describe(),
                    "status": status.error.as_deref().unwrap_or(status.state.name()),
                },
            })
        }
    }
}

/// A reflink overlay in `status`.
fn reflink_value(disk: &Disk) -> Option<Value> {
    use std::os::unix::fs::MetadataExt;
    let reflink = disk.reflink()?;
    let allocated = reflink.data().metadata().map_or(0, |found| found.blocks() * 512);
    Some(json!({
        "temporary": false,
        "path": disk.overlay_dir().map(|dir| dir.to_string_lossy().into_owned()),
        "block": disk.block(),
        "changed": reflink.changed_about().unwrap_or(disk.size()),
        "zeroed": 0,
        "allocated": allocated,
        "free": disk.space().map(|space| space.available).unwrap_or(0),
        "recovered": Value::Null,
        "kind": "reflink",
    }))
}

/// What an unmount does to the changes of a disk, when there are any.
fn farewell(name: &str, disk: &Disk) -> Option<String> {
    if let (Some(reflink), Some(dir)) = (disk.reflink(), disk.overlay_dir()) {
        let changed = format_size(reflink.changed_about().ok()?);
        return Some(format!("{name}: {changed} of changes kept in '{}'", dir.display()));
    }
    let overlay = disk.overlay()?;
    let usage = disk.chain().last().map_or_else(|| overlay.usage(), |lowest| lowest.since);
    let changed = format_size(usage.data + usage.zero);
    match disk.overlay_dir() {
        None if overlay.revision() == 0 => None,
        None => Some(format!("{name}: {changed} of changes discarded (temporary overlay)")),
        Some(dir) => Some(format!("{name}: {changed} of changes kept in '{}'", dir.display())),
    }
}

/// Bytes that the overlay's data file takes on the host.
fn allocated_on_host(disk: &Disk) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = disk.overlay().and_then(|overlay| overlay.first_file());
    file.and_then(|file| file.metadata().ok()).map_or(0, |found| found.blocks() * 512)
}

fn lines(value: &Value) -> Vec<u8> {
    let mut text = value.to_string().into_bytes();
    text.push(b'\n');
    text
}

/// A `map` that is being read: JSON made as the reader goes on, so that a disk of a million
/// extents costs no memory.
pub struct MapText {
    disk: Arc<Disk>,
    state: Mutex<MapState>,
}

#[derive(Default)]
struct MapState {
    /// Where in the text `ready` begins.
    start: u64,
    ready: Vec<u8>,
    /// The next byte of the disk to describe.
    next: u64,
    /// An extent that may go on in the next batch.
    open: Option<(Extent, u32)>,
    begun: bool,
    ended: bool,
}

impl MapText {
    /// The map of `disk`, from its beginning.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    /// Up to `len` bytes of the text from `offset` on, which must not go backwards.
    ///
    /// # Errors
    /// `ESPIPE` for an offset before what was read; the host's errno from the base.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        if offset < state.start {
            return Err(errno(libc::ESPIPE));
        }
        while !state.ended && state.start + (state.ready.len() as u64) < offset + len as u64 {
            self.describe(&mut state)?;
        }
        let skip = usize::try_from(offset - state.start).unwrap_or(usize::MAX);
        let skip = skip.min(state.ready.len());
        state.ready.drain(..skip);
        state.start = offset;
        let len = len.min(state.ready.len());
        Ok(state.ready[..len].to_vec())
    }

    /// Describes the next batch of extents.
    fn describe(&self, state: &mut MapState) -> io::Result<()> {
        let size = self.disk.size();
        let pieces = self.disk.pieces(state.next..size, MAP_BATCH, Wait::Yes)?;
        if self.disk.is_closed() {
            // It was removed meanwhile: what is left of the text would look whole.
            return Err(errno(libc::ESTALE));
        }
        for (extent, depth) in pieces {
            state.next = extent.range.end;
            match &mut state.open {
                Some((open, at)) if open.kind == extent.kind && *at == depth => {
                    open.range.end = extent.range.end;
                }
                _ => {
                    state.flush();
                    state.open = Some((extent, depth));
                }
            }
        }
        if state.next >= size {
            state.flush();
            state.ready.extend_from_slice(if state.begun { b"]\n" } else { b"[]\n" });
            state.ended = true;
        }
        Ok(())
    }
}

impl MapState {
    /// Writes the extent that is open.
    fn flush(&mut self) {
        let Some((extent, depth)) = self.open.take() else {
            return;
        };
        let (kind, zero, data) = match extent.kind {
            Kind::Data => ("data", false, true),
            Kind::Zero => ("zero", true, true),
            Kind::Hole | Kind::Lower => ("hole", true, false),
        };
        let before = if self.begun { ",\n" } else { "[" };
        self.begun = true;
        let text = format!(
            "{before}{{ \"start\": {}, \"length\": {}, \"depth\": {depth}, \"present\": true, \"zero\": {zero}, \"data\": {data}, \"kind\": \"{kind}\"}}",
            extent.range.start,
            extent.len(),
        );
        self.ready.extend_from_slice(text.as_bytes());
    }
}

/// How far something has come, in bytes, and of how many.
type Progress = Box<dyn Fn() -> Option<(u64, u64)> + Send>;

/// One open `ctl` file: requests in, lines out.
#[derive(Default)]
pub struct Session {
    state: Mutex<SessionState>,
    more: Condvar,
}

#[derive(Default)]
struct SessionState {
    out: Vec<u8>,
    busy: bool,
    /// What is told meanwhile.
    progress: Option<Progress>,
}

impl Session {
    /// Takes a request for `spot` and has `run` do it.
    ///
    /// # Errors
    /// `EBUSY` while another one is worked on.
    pub fn request(
        self: &Arc<Self>,
        control: &Arc<Control>,
        spot: Spot,
        request: &[u8],
        run: impl FnOnce(crate::pool::Job),
    ) -> io::Result<()> {
        if std::mem::replace(&mut self.state.lock().busy, true) {
            return Err(errno(libc::EBUSY));
        }
        self.state.lock().progress = control.progress_of(spot);
        let (session, control, request) = (Arc::clone(self), Arc::clone(control), request.to_vec());
        run(Box::new(move || {
            let there = Arc::clone(&session);
            // The handle, this job and the question itself: without the first nobody waits.
            let is_gone = move || Arc::strong_count(&there) < 3;
            let answer = match spot {
                Spot::DiskCtl(slot) => control.answer_disk(slot, &request, &is_gone),
                _ => control.answer_mount(&request),
            };
            let mut state = session.state.lock();
            state.out.extend(lines(&answer));
            state.busy = false;
            session.more.notify_all();
        }));
        Ok(())
    }

    /// The next bytes of the answer: waits for them, but no longer than a second; then a
    /// progress line. Nothing when no request is being worked on.
    #[must_use]
    pub fn read(&self, len: usize) -> Vec<u8> {
        let mut state = self.state.lock();
        if state.out.is_empty() && state.busy {
            let waiting = |state: &mut SessionState| state.out.is_empty() && state.busy;
            self.more.wait_while_for(&mut state, waiting, PROGRESS);
            if state.out.is_empty() && state.busy {
                let far = state.progress.as_ref().and_then(|progress| progress());
                state.out = lines(&match far {
                    Some((done, total)) => json!({ "progress": { "done": done, "total": total } }),
                    None => json!({ "progress": {} }),
                });
            }
        }
        let len = len.min(state.out.len());
        state.out.drain(..len).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_and_its_inode_number_belong_together() {
        let spots = [
            Spot::Directory,
            Spot::Status,
            Spot::Log,
            Spot::Ctl,
            Spot::Disk(1),
            Spot::DiskStatus(1),
            Spot::DiskMap(7),
            Spot::DiskCtl(1000),
        ];
        for spot in spots {
            assert_eq!(Spot::of(spot.ino()), Some(spot));
        }
        assert_eq!(Spot::of(1), None);
        assert_eq!(Spot::of(1 << 62), None);
    }
}
