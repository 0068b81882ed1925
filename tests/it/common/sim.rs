//! A simulated host: files in memory with a page cache and a disk, and the state that a power cut
//! leaves of them.
//!
//! ```text
//!   write, punch ->  versions of 512-byte sectors      a read returns the newest
//!                      |  sync: the newest becomes durable, the others are discarded
//!                      |  failed sync: a random one becomes durable; the newest stays cached
//!                      v
//!                    durable sectors                    a power cut leaves these
//! ```
//!
//! After a power cut every sector, independently of the others, holds its durable content or any
//! version since. The same applies to the length, and to the file that the log's name refers to.
//! This is worse than any real file system, so data that survives here survives there.
//!
//! A [`Host`] counts the operations of all its files, cuts the power before the n-th, lets chosen
//! operations fail, holds operations until they are released, and runs out of space.

// Disks are small and live in memory, and a test may panic.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use cowslip::host::os_error;
use cowslip::layer::Wait;
use cowslip::overlay::host_file::{Create, HostFile};
use cowslip::overlay::record_log::{LogDir, ReplacedLog};
use cowslip::overlay::recover::LayerFiles;
use cowslip::overlay::storage::Storage;
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

/// Size in bytes of the unit that a disk writes atomically.
pub(crate) const SECTOR: u64 = 512;
const LEN: usize = 512;

type Sector = [u8; LEN];

/// A deterministic random number generator (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Chance(pub u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Returns a number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// The file that an operation acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Data,
    Log,
    Journal,
    /// A base that is written to.
    Base,
    /// The directory that holds the log.
    Dir,
}

/// The kind of an operation on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Read,
    Write,
    Punch,
    Allocate,
    Truncate,
    Sync,
    Rename,
}

/// An injected failure.
#[derive(Clone, Copy, Debug)]
struct Fault {
    role: Role,
    deed: Deed,
    /// Number of matching operations that succeed first.
    pass: u64,
    errno: i32,
}

#[derive(Default)]
struct HostState {
    /// Number of operations so far that change something or make a change durable.
    steps: u64,
    /// The power is cut before this step.
    cut: Option<u64>,
    faults: Vec<Fault>,
    held: Vec<(Role, Deed)>,
    waiting: usize,
    /// Space in bytes for all files together.
    capacity: Option<u64>,
    used: u64,
}

/// The machine that the files are on.
#[derive(Default)]
pub(crate) struct Host {
    state: Mutex<HostState>,
    changed: Condvar,
}

impl Host {
    /// Cuts the power before step `step` (counted from 0); every later operation fails with `EIO`.
    pub(crate) fn cut_at(&self, step: u64) {
        self.state.lock().cut = Some(step);
    }

    /// Returns the number of steps so far.
    pub(crate) fn steps(&self) -> u64 {
        self.state.lock().steps
    }

    pub(crate) fn is_off(&self) -> bool {
        let state = self.state.lock();
        state.cut.is_some_and(|cut| state.steps >= cut)
    }

    /// Lets one operation fail with `errno`: the one that follows the next `pass` operations of
    /// this kind.
    pub(crate) fn fail(&self, role: Role, deed: Deed, pass: u64, errno: i32) {
        self.state.lock().faults.push(Fault { role, deed, pass, errno });
    }

    /// Holds every such operation until [`release`](Self::release).
    pub(crate) fn hold(&self, role: Role, deed: Deed) {
        self.state.lock().held.push((role, deed));
    }

    /// Waits until `count` operations are held.
    pub(crate) fn wait_held(&self, count: usize) {
        let mut state = self.state.lock();
        let limit = Duration::from_secs(60);
        let late = self.changed.wait_while_for(&mut state, |state| state.waiting < count, limit);
        assert!(!late.timed_out(), "nothing came to be held");
    }

    /// Releases all held operations.
    pub(crate) fn release(&self) {
        self.state.lock().held.clear();
        self.changed.notify_all();
    }

    /// Limits the space of all files together, in bytes.
    pub(crate) fn set_capacity(&self, capacity: Option<u64>) {
        self.state.lock().capacity = capacity;
    }

    /// Returns the number of bytes allocated by the files.
    pub(crate) fn used(&self) -> u64 {
        self.state.lock().used
    }

    /// Runs one operation through the simulation: holds, counts and fails it as configured.
    fn step(&self, role: Role, deed: Deed) -> io::Result<()> {
        let mut state = self.state.lock();
        state.waiting += 1;
        while state.held.contains(&(role, deed)) {
            self.changed.notify_all();
            // A limit, so that a test which fails while it holds an operation still ends.
            if self.changed.wait_for(&mut state, Duration::from_secs(60)).timed_out() {
                break;
            }
        }
        state.waiting -= 1;
        if state.cut.is_some_and(|cut| state.steps >= cut) {
            return Err(os_error(libc::EIO));
        }
        if deed != Deed::Read {
            state.steps += 1;
        }
        let hit = |fault: &&mut Fault| (fault.role, fault.deed) == (role, deed);
        let mut failed = None;
        for fault in state.faults.iter_mut().filter(hit) {
            if fault.pass == 0 {
                failed = Some(fault.errno);
            }
            fault.pass = fault.pass.wrapping_sub(1);
        }
        state.faults.retain(|fault| fault.pass != u64::MAX);
        failed.map_or(Ok(()), |code| Err(os_error(code)))
    }

    /// Allocates one sector, or fails with `ENOSPC`.
    fn take(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.capacity.is_some_and(|capacity| state.used + SECTOR > capacity) {
            return Err(os_error(libc::ENOSPC));
        }
        state.used += SECTOR;
        Ok(())
    }

    fn give_back(&self, sectors: u64) {
        self.state.lock().used -= sectors * SECTOR;
    }
}

/// The content of one sector on the disk and in the cache.
#[derive(Clone)]
struct Content {
    durable: Sector,
    /// Content that is clean in the cache but was lost by a failed sync.
    stale: Option<Sector>,
    /// Versions written since the last sync, oldest first.
    versions: Vec<Sector>,
}

impl Content {
    const BLANK: Self = Self { durable: [0; LEN], stale: None, versions: Vec::new() };

    fn newest(&self) -> &Sector {
        self.versions.last().or(self.stale.as_ref()).unwrap_or(&self.durable)
    }

    /// Returns the content on the disk after a power cut.
    fn by_chance(&self, chance: &mut Chance) -> Sector {
        match chance.below(self.versions.len() + 1) {
            0 => self.durable,
            version => self.versions[version - 1],
        }
    }
}

#[derive(Clone, Default)]
struct FileState {
    sectors: BTreeMap<u64, Content>,
    allocated: BTreeSet<u64>,
    len: u64,
    durable_len: u64,
    lens: Vec<u64>,
}

impl FileState {
    fn put(&mut self, sector: u64, change: impl FnOnce(&mut Sector)) {
        let content = self.sectors.entry(sector).or_insert(Content::BLANK);
        let mut next = *content.newest();
        change(&mut next);
        content.versions.push(next);
    }

    fn grow(&mut self, len: u64) {
        if len > self.len {
            self.len = len;
            self.lens.push(len);
        }
    }

    /// Truncates the file and returns the number of sectors freed.
    fn truncate(&mut self, len: u64) -> u64 {
        let past: Vec<u64> =
            self.sectors.range(len / SECTOR..).map(|(sector, _)| *sector).collect();
        for sector in past {
            let kept = len.saturating_sub(sector * SECTOR).min(SECTOR) as usize;
            self.put(sector, |next| next[kept..].fill(0));
        }
        self.len = len;
        self.lens.push(len);
        self.allocated.split_off(&len.div_ceil(SECTOR)).len() as u64
    }

    fn sync(&mut self) {
        for content in self.sectors.values_mut() {
            if let Some(newest) = content.versions.pop() {
                *content = Content { durable: newest, stale: None, versions: Vec::new() };
            }
        }
        self.durable_len = self.len;
        self.lens.clear();
    }

    /// Fails a sync: some of the data reached the disk, and the cache no longer knows that the rest
    /// did not.
    fn fail_sync(&mut self, chance: &mut Chance) {
        for content in self.sectors.values_mut() {
            if !content.versions.is_empty() {
                content.stale = Some(*content.newest());
                content.durable = content.by_chance(chance);
                content.versions.clear();
            }
        }
        if let Some(len) = self.lens.pop() {
            self.durable_len = if chance.below(2) == 0 { self.durable_len } else { len };
            self.lens.clear();
        }
    }

    fn crash(&self, role: Role, chance: &mut Chance) -> Self {
        let len = match chance.below(self.lens.len() + 1) {
            0 => self.durable_len,
            which => self.lens[which - 1],
        };
        let mut sectors = BTreeMap::new();
        for (&sector, content) in &self.sectors {
            let mut durable = content.by_chance(chance);
            // Bytes past the length are lost.
            let kept = len.saturating_sub(sector * SECTOR).min(SECTOR) as usize;
            durable[kept..].fill(0);
            sectors.insert(sector, Content { durable, ..Content::BLANK });
        }
        // An allocation makes the file longer at the same moment, so that the data file never keeps
        // space past its length.
        let mut allocated = self.allocated.clone();
        if role == Role::Data {
            allocated.retain(|sector| sector * SECTOR < len);
        }
        Self { sectors, allocated, len, durable_len: len, lens: Vec::new() }
    }
}

/// A file on a [`Host`].
pub(crate) struct SimFile {
    host: Arc<Host>,
    role: Role,
    state: Mutex<FileState>,
}

impl SimFile {
    #[must_use]
    pub(crate) fn new(host: &Arc<Host>, role: Role) -> Self {
        Self { host: Arc::clone(host), role, state: Mutex::default() }
    }

    fn with(host: &Arc<Host>, role: Role, state: FileState) -> Self {
        host.state.lock().used += state.allocated.len() as u64 * SECTOR;
        Self { host: Arc::clone(host), role, state: Mutex::new(state) }
    }

    /// Returns a possible state of the file after a power cut now, chosen by `seed`, on `host`.
    #[must_use]
    pub(crate) fn after_power_cut(&self, host: &Arc<Host>, seed: u64) -> Self {
        self.crash(host, &mut Chance(seed))
    }

    /// Returns the state of the file on `host` after the daemon alone is killed.
    #[must_use]
    pub(crate) fn after_kill(&self, host: &Arc<Host>) -> Self {
        self.copy(host)
    }

    /// Returns the file as the disk would hold it after a power cut now.
    fn crash(&self, host: &Arc<Host>, chance: &mut Chance) -> Self {
        Self::with(host, self.role, self.state.lock().crash(self.role, chance))
    }

    /// Copies the file with its cache to another host.
    fn copy(&self, host: &Arc<Host>) -> Self {
        Self::with(host, self.role, self.state.lock().clone())
    }

    /// Whether any byte of `range` is allocated.
    pub(crate) fn is_allocated(&self, range: &Range<u64>) -> bool {
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        self.state.lock().allocated.range(sectors).next().is_some()
    }

    /// Returns all bytes as a read would.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let state = self.state.lock();
        let mut bytes = vec![0; state.len as usize];
        fill(&state, &mut bytes, 0);
        bytes
    }

    /// Damages the file: overwrites bytes durably, past all checks and counters.
    pub(crate) fn damage(&self, offset: u64, bytes: &[u8]) {
        let mut state = self.state.lock();
        for (at, byte) in (offset..).zip(bytes) {
            let content = state.sectors.entry(at / SECTOR).or_insert(Content::BLANK);
            let place = (at % SECTOR) as usize;
            content.durable[place] = *byte;
            for version in content.versions.iter_mut().chain(&mut content.stale) {
                version[place] = *byte;
            }
        }
        let end = offset + bytes.len() as u64;
        state.len = state.len.max(end);
        state.durable_len = state.durable_len.max(end);
    }

    /// Damages the file: truncates it durably to `len` bytes.
    pub(crate) fn cut(&self, len: u64) {
        let mut state = self.state.lock();
        state.sync();
        state.sectors.retain(|sector, _| sector * SECTOR < len);
        if let Some(last) = state.sectors.get_mut(&(len / SECTOR)) {
            last.durable[(len % SECTOR) as usize..].fill(0);
        }
        (state.len, state.durable_len) = (len, len);
    }
}

fn fill(state: &FileState, buf: &mut [u8], offset: u64) {
    buf.fill(0);
    let end = offset + buf.len() as u64;
    for (&sector, content) in state.sectors.range(offset / SECTOR..end.div_ceil(SECTOR)) {
        let from = (sector * SECTOR).max(offset);
        let to = ((sector + 1) * SECTOR).min(end).min(state.len);
        if from < to {
            let inside = (from - sector * SECTOR) as usize..(to - sector * SECTOR) as usize;
            let place = (from - offset) as usize..(to - offset) as usize;
            buf[place].copy_from_slice(&content.newest()[inside]);
        }
    }
}

impl Storage for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64, _: Wait) -> io::Result<()> {
        self.host.step(self.role, Deed::Read)?;
        fill(&self.state.lock(), buf, offset);
        Ok(())
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.host.step(self.role, Deed::Write)?;
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let mut state = self.state.lock();
        let mut at = 0;
        while at < bytes.len() {
            let place = offset + at as u64;
            let (sector, inside) = (place / SECTOR, (place % SECTOR) as usize);
            let len = (LEN - inside).min(bytes.len() - at);
            if !state.allocated.contains(&sector) {
                // A full host keeps the sectors written so far.
                self.host.take()?;
                state.allocated.insert(sector);
            }
            state.put(sector, |next| {
                next[inside..inside + len].copy_from_slice(&bytes[at..at + len]);
            });
            at += len;
            state.grow(offset + at as u64);
        }
        Ok(())
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.host.step(self.role, Deed::Punch)?;
        let mut state = self.state.lock();
        // Like ext4, which frees nothing past the end of a file.
        let end = range.end.min(state.len.next_multiple_of(SECTOR));
        let range = range.start.min(end)..end;
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let touched: Vec<u64> = state.sectors.range(sectors).map(|(sector, _)| *sector).collect();
        for sector in touched {
            let floor = sector * SECTOR;
            let from = range.start.saturating_sub(floor) as usize;
            let to = (range.end - floor).min(SECTOR) as usize;
            state.put(sector, |next| next[from..to].fill(0));
        }
        let whole =
            range.start.div_ceil(SECTOR)..(range.end / SECTOR).max(range.start.div_ceil(SECTOR));
        let freed: Vec<u64> = state.allocated.range(whole).copied().collect();
        freed.iter().for_each(|sector| {
            state.allocated.remove(sector);
        });
        self.host.give_back(freed.len() as u64);
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.host.step(self.role, Deed::Allocate)?;
        let mut state = self.state.lock();
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            if !state.allocated.contains(&sector) {
                self.host.take()?;
                state.allocated.insert(sector);
            }
            // A full host keeps the sectors reserved so far, inside the length.
            state.grow(range.end.min((sector + 1) * SECTOR));
        }
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        // Of data it is unknown, as on some hosts.
        match self.role {
            Role::Log => Ok(self.state.lock().allocated.len() as u64 * SECTOR),
            _ => Ok(0),
        }
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.host.step(self.role, Deed::Truncate)?;
        let freed = self.state.lock().truncate(len);
        self.host.give_back(freed);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().len)
    }

    fn sync(&self) -> io::Result<()> {
        // While the sync is held, concurrent writes may or may not become part of it.
        let done = self.host.step(self.role, Deed::Sync);
        let mut state = self.state.lock();
        match &done {
            Ok(()) => state.sync(),
            // Without power the disk does not change any more.
            Err(_) if self.host.is_off() => {}
            Err(_) => {
                let seed = state.len ^ self.host.steps();
                state.fail_sync(&mut Chance(seed));
            }
        }
        done
    }

    fn next_allocated(&self, range: Range<u64>) -> Option<u64> {
        let state = self.state.lock();
        let sectors = range.start / SECTOR..range.end.div_ceil(SECTOR);
        let next = state.allocated.range(sectors).next();
        next.map(|sector| (sector * SECTOR).max(range.start))
    }

    fn drop_cache(&self) {
        for content in self.state.lock().sectors.values_mut() {
            content.stale = None;
        }
    }

    fn host_fd(&self, _: Range<u64>) -> Option<BorrowedFd<'_>> {
        None
    }

    fn host_file(&self) -> Option<&HostFile> {
        None
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.host.give_back(self.state.lock().allocated.len() as u64);
    }
}

/// The directory of a log: the file that the log's name refers to, in the cache and on the disk.
pub(crate) struct SimHome {
    host: Arc<Host>,
    names: Mutex<Names>,
    journal: Mutex<Option<SimJournal>>,
}

/// The journal's file, and whether its directory entry is durable.
struct SimJournal {
    file: Arc<SimFile>,
    is_placed: bool,
}

struct Names {
    durable: Arc<SimFile>,
    /// Files renamed over the durable one since, oldest first.
    since: Vec<Arc<SimFile>>,
}

impl SimHome {
    /// Returns the file that has the log's name now.
    pub(crate) fn log(&self) -> Arc<SimFile> {
        let names = self.names.lock();
        Arc::clone(names.since.last().unwrap_or(&names.durable))
    }

    /// Whether a journal exists and is not empty.
    pub(crate) fn has_journal(&self) -> bool {
        self.journal.lock().as_ref().is_some_and(|found| found.file.len().unwrap() > 0)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.host.step(Role::Dir, Deed::Sync)?;
        let mut names = self.names.lock();
        if let Some(newest) = names.since.pop() {
            names.durable = newest;
            names.since.clear();
        }
        if let Some(journal) = &mut *self.journal.lock() {
            journal.is_placed = true;
        }
        Ok(())
    }
}

impl LogDir for SimHome {
    fn replace_log(
        &self,
        fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<ReplacedLog> {
        let file = Arc::new(SimFile::new(&self.host, Role::Log));
        fill(&*file)?;
        file.sync()?;
        self.host.step(Role::Dir, Deed::Rename)?;
        self.names.lock().since.push(Arc::clone(&file));
        Ok(ReplacedLog { file, dir_synced: self.sync_dir() })
    }

    fn journal(&self, create: Create) -> io::Result<Option<Arc<dyn Storage>>> {
        if self.journal.lock().is_none() && create == Create::IfMissing {
            let file = Arc::new(SimFile::new(&self.host, Role::Journal));
            *self.journal.lock() = Some(SimJournal { file, is_placed: false });
            self.sync_dir()?;
        }
        let journal = self.journal.lock();
        Ok(journal.as_ref().map(|journal| Arc::clone(&journal.file) as Arc<dyn Storage>))
    }
}

/// The files of one layer on one host.
#[derive(Clone)]
pub(crate) struct SimLayer {
    pub host: Arc<Host>,
    pub data: Arc<SimFile>,
    pub home: Arc<SimHome>,
    pub uuid: Uuid,
    pub block: u32,
}

impl SimLayer {
    /// Creates the empty files of a layer with blocks of `block` bytes.
    #[must_use]
    pub(crate) fn new(block: u32) -> Self {
        let host = Arc::<Host>::default();
        let data = SimFile::new(&host, Role::Data);
        let log = SimFile::new(&host, Role::Log);
        Self::of(host, data, log, None, block)
    }

    fn of(
        host: Arc<Host>,
        data: SimFile,
        log: SimFile,
        journal: Option<SimFile>,
        block: u32,
    ) -> Self {
        let names = Mutex::new(Names { durable: Arc::new(log), since: Vec::new() });
        let journal = journal.map(|file| SimJournal { file: Arc::new(file), is_placed: true });
        let journal = Mutex::new(journal);
        let home = Arc::new(SimHome { host: Arc::clone(&host), names, journal });
        Self { host, data: Arc::new(data), home, uuid: Uuid::from_u128(0xC0), block }
    }

    /// Returns the files in the form that [`Overlay::open`](cowslip::overlay::Overlay::open) takes.
    #[must_use]
    pub(crate) fn files(&self) -> LayerFiles {
        LayerFiles {
            data: Arc::clone(&self.data) as Arc<dyn Storage>,
            log: self.home.log(),
            log_dir: Arc::clone(&self.home) as Arc<dyn LogDir>,
            uuid: self.uuid,
            block_size: self.block,
        }
    }

    /// Returns a possible state of the files after a power cut now, chosen by `seed`. These files
    /// are not changed.
    #[must_use]
    pub(crate) fn power_cut(&self, seed: u64) -> Self {
        let mut chance = Chance(seed);
        let host = Arc::<Host>::default();
        let log = {
            let names = self.home.names.lock();
            match chance.below(names.since.len() + 1) {
                0 => names.durable.crash(&host, &mut chance),
                which => names.since[which - 1].crash(&host, &mut chance),
            }
        };
        let data = self.data.crash(&host, &mut chance);
        let journal = self.home.journal.lock();
        let journal = journal.as_ref().filter(|found| found.is_placed || chance.below(2) == 0);
        let journal = journal.map(|found| found.file.crash(&host, &mut chance));
        Self::of(host, data, log, journal, self.block)
    }

    /// Returns the state of the files after the daemon alone is killed: everything, including the
    /// cache.
    ///
    /// The log's name counts as durable in the result. A power cut that brings an older log back is
    /// simulated by [`power_cut`](Self::power_cut) on the original files.
    #[must_use]
    pub(crate) fn kill(&self) -> Self {
        let host = Arc::<Host>::default();
        let log = self.home.log().copy(&host);
        let data = self.data.copy(&host);
        let journal = self.home.journal.lock();
        let journal = journal.as_ref().map(|found| found.file.copy(&host));
        Self::of(host, data, log, journal, self.block)
    }
}
