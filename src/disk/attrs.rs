//! Attributes of a mounted disk: owner, mode and times.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::Disk;
use super::layers::Top;
use crate::host::os_error;
use crate::overlay::Overlay;
use crate::overlay::record::{MtimeOrigin, Nanos};

/// Owner and mode of the mounted file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOwner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits.
    pub perm: u16,
}

/// The answer of stat(2) for a disk.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Size in bytes.
    pub size: u64,
    /// Bytes that hold data, in any layer.
    pub allocated: u64,
    /// Owner and mode.
    pub owner: DiskOwner,
    /// Access time: the one that a user set, else the mtime at opening. Reads do not move it.
    pub atime: SystemTime,
    /// Last write, or the time that a user set.
    pub mtime: SystemTime,
    /// Last change of bytes or attributes.
    pub ctime: SystemTime,
    /// Preferred unit of I/O in bytes: no hole begins or ends inside one.
    pub blksize: u32,
    /// Number of names: 1, or 0 once the disk is unlinked.
    pub nlink: u32,
}

/// The attributes that a disk keeps itself.
pub(super) struct Attrs {
    owner: Mutex<DiskOwner>,
    pub(super) times: Times,
}

impl Attrs {
    pub(super) fn new(owner: DiskOwner, times: Times) -> Self {
        Self { owner: Mutex::new(owner), times }
    }

    /// Owner and mode.
    pub(super) fn owner(&self) -> DiskOwner {
        *self.owner.lock()
    }

    /// Changes owner and mode, and moves ctime.
    pub(super) fn set_owner(&self, owner: DiskOwner) {
        *self.owner.lock() = owner;
        self.times.touch_ctime();
    }

    /// Returns the attributes of a file of `size` bytes that shows the disk.
    pub(super) fn stat(&self, size: u64, allocated: u64, blksize: u32, nlink: u32) -> Attributes {
        let time = |cell: &AtomicI64| to_system_time(cell.load(Ordering::Relaxed));
        let Times { atime, mtime, ctime, .. } = &self.times;
        Attributes {
            size,
            allocated,
            owner: self.owner(),
            atime: time(atime),
            mtime: time(mtime),
            ctime: time(ctime),
            blksize,
            nlink,
        }
    }
}

/// The times of a disk, in nanoseconds since the epoch.
pub(super) struct Times {
    atime: AtomicI64,
    mtime: AtomicI64,
    ctime: AtomicI64,
    /// The mtime was set by a user, and no write has happened since.
    is_chosen: AtomicBool,
    /// The mtime recorded in the log.
    logged_mtime: AtomicI64,
}

impl Times {
    /// Creates the times of a new disk. `is_chosen` says whether a user set `mtime`; `recorded` is
    /// the mtime in the log, if there is one.
    pub(super) fn new(mtime: Nanos, is_chosen: bool, recorded: Option<Nanos>) -> Self {
        Self {
            atime: mtime.into(),
            mtime: mtime.into(),
            ctime: mtime.into(),
            is_chosen: is_chosen.into(),
            logged_mtime: recorded.unwrap_or(Nanos::MIN).into(),
        }
    }

    /// The last change of bytes or attributes.
    pub(super) fn ctime(&self) -> Nanos {
        self.ctime.load(Ordering::Relaxed)
    }

    /// Moves ctime after a change of attributes.
    pub(super) fn touch_ctime(&self) {
        self.ctime.store(coarse_now(), Ordering::Relaxed);
    }

    /// Moves mtime and ctime after a change of bytes. Returns whether this has replaced an mtime
    /// that a user set, which the log has to learn, so that a crash does not bring it back.
    pub(super) fn touch(&self) -> bool {
        let now = coarse_now();
        self.mtime.store(now, Ordering::Relaxed);
        self.ctime.store(now, Ordering::Relaxed);
        self.is_chosen.load(Ordering::Relaxed) && self.is_chosen.swap(false, Ordering::SeqCst)
    }

    /// Sets the given times, as a user's choice.
    pub(super) fn set(&self, atime: Option<SystemTime>, mtime: Option<SystemTime>) {
        if let Some(atime) = atime {
            self.atime.store(from_system_time(atime), Ordering::Relaxed);
        }
        if let Some(mtime) = mtime {
            self.mtime.store(from_system_time(mtime), Ordering::Relaxed);
            self.is_chosen.store(true, Ordering::SeqCst);
        }
    }

    /// Records the mtime in the log of `overlay`, unless the log has it already.
    ///
    /// # Errors
    /// The errors of [`Overlay::record_mtime`].
    pub(super) fn record_mtime(&self, overlay: &Overlay) -> io::Result<()> {
        let mtime = self.mtime.load(Ordering::SeqCst);
        if self.logged_mtime.swap(mtime, Ordering::SeqCst) == mtime {
            return Ok(());
        }
        let is_chosen = self.is_chosen.load(Ordering::SeqCst);
        let origin = if is_chosen { MtimeOrigin::SetByUser } else { MtimeOrigin::Written };
        overlay.record_mtime(mtime, origin)
    }

    /// Notes that the disk has a new log, which has no mtime yet.
    pub(super) fn forget_recorded(&self) {
        self.logged_mtime.store(Nanos::MIN, Ordering::SeqCst);
    }
}

impl Disk {
    /// Moves mtime and ctime after a change of bytes.
    pub(super) fn touch_times(&self, top: &Top) {
        if self.attrs.times.touch()
            && let Some(overlay) = top.overlay()
        {
            self.record_mtime(overlay);
        }
    }

    /// Records the modification time in the log, unless the log has it already.
    pub(super) fn record_mtime(&self, overlay: &Overlay) {
        if let Err(error) = self.attrs.times.record_mtime(overlay) {
            log::warn!("the time of {} is not recorded: {error}", self.source);
        }
    }

    /// Sets the given times (utimensat(2)) and moves ctime.
    pub fn set_times(&self, atime: Option<SystemTime>, mtime: Option<SystemTime>) {
        self.attrs.times.set(atime, mtime);
        self.set_single_file_times(atime, mtime);
        if mtime.is_some()
            && let Some(overlay) = self.overlay()
        {
            self.record_mtime(&overlay);
        }
        self.attrs.times.touch_ctime();
    }

    /// Changes owner and mode; a persistent overlay stores them.
    ///
    /// # Errors
    /// `EIO` when the overlay's `stack` cannot be written; nothing has changed then.
    pub fn set_owner(&self, owner: DiskOwner) -> io::Result<()> {
        if let Some(dir) = self.overlay_location.lock().as_persistent() {
            let mut stack = dir.stack.clone();
            (stack.uid, stack.gid, stack.perm) = (owner.uid, owner.gid, owner.perm);
            self.replace_stack(dir, stack, None).map_err(|error| {
                log::error!("{}: the new owner or mode is not kept: {error}", self.source);
                os_error(libc::EIO)
            })?;
        }
        self.attrs.set_owner(owner);
        Ok(())
    }
}

/// Returns the time of the kernel's coarse clock, which takes a few nanoseconds to read and is
/// exact to a few milliseconds.
pub(super) fn coarse_now() -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

pub(super) fn to_system_time(nanos: Nanos) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}

pub(super) fn from_system_time(time: SystemTime) -> Nanos {
    let clamp = |distance: Duration| Nanos::try_from(distance.as_nanos()).unwrap_or(Nanos::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => clamp(after),
        Err(before) => -clamp(before.duration()),
    }
}

/// Returns the modification time of a host file in nanoseconds since the epoch.
pub(super) fn mtime_of(found: &Metadata) -> Nanos {
    found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())
}
