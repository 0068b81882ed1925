//! Decoding of what the kernel sends as bare numbers, and of times.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{OpenFlags, TimeOrNow};

use crate::disk::{FallocateMode, HandleAccess, SizeMode, Whence};

/// Decodes the access mode of open(2).
pub(super) fn access_mode(flags: OpenFlags) -> HandleAccess {
    match flags.0 & libc::O_ACCMODE {
        libc::O_RDONLY => HandleAccess::Read,
        libc::O_WRONLY => HandleAccess::Write,
        _ => HandleAccess::ReadWrite,
    }
}

/// Whether each write through a handle with these flags has to be durable (open(2)).
pub(super) fn is_sync(flags: OpenFlags) -> bool {
    // O_SYNC includes the bit of O_DSYNC.
    flags.0 & libc::O_DSYNC != 0
}

/// Decodes the mode of fallocate(2); `None` if unsupported.
pub(super) fn fallocate_mode(mode: i32) -> Option<(FallocateMode, SizeMode)> {
    let size_mode =
        if mode & libc::FALLOC_FL_KEEP_SIZE != 0 { SizeMode::Keep } else { SizeMode::Grow };
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Some((FallocateMode::Allocate, size_mode)),
        libc::FALLOC_FL_PUNCH_HOLE if size_mode == SizeMode::Keep => {
            Some((FallocateMode::Punch, size_mode))
        }
        libc::FALLOC_FL_ZERO_RANGE => Some((FallocateMode::Zero, size_mode)),
        _ => None,
    }
}

/// Decodes the whence of lseek(2). The kernel sends only those that ask for data and holes.
pub(super) fn whence(whence: i32) -> Option<Whence> {
    match whence {
        libc::SEEK_DATA => Some(Whence::Data),
        libc::SEEK_HOLE => Some(Whence::Hole),
        _ => None,
    }
}

/// Decodes a time of utimensat(2).
pub(super) fn system_time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => fix_pre_epoch(time),
        TimeOrNow::Now => SystemTime::now(),
    }
}

/// Recovers the time that the kernel sent from fuser's decoding. A time before 1970 is sent as
/// negative seconds and positive nanoseconds: half a second before is -1 and 500,000,000. fuser
/// (0.18) subtracts both from the epoch, so the fraction must be added back twice.
fn fix_pre_epoch(time: SystemTime) -> SystemTime {
    let Err(before) = time.duration_since(UNIX_EPOCH) else { return time };
    let fraction = Duration::from_nanos(before.duration().subsec_nanos().into());
    time.checked_add(2 * fraction).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes a time as fuser 0.18 does.
    fn decoded(secs: i64, nanos: u32) -> SystemTime {
        match u64::try_from(secs) {
            Ok(secs) => UNIX_EPOCH + Duration::new(secs, nanos),
            Err(_) => UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos),
        }
    }

    #[test]
    fn times_before_1970_match_what_the_kernel_sent() {
        for (secs, nanos) in
            [(-1, 750_000_000), (-2, 500_000_000), (-2, 0), (-1, 1), (0, 5), (7, 9)]
        {
            let time = fix_pre_epoch(decoded(secs, nanos));
            let meant = i128::from(secs) * 1_000_000_000 + i128::from(nanos);
            let found = match time.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos().cast_signed(),
                Err(before) => -before.duration().as_nanos().cast_signed(),
            };
            assert_eq!(found, meant, "{secs} s and {nanos} ns");
        }
    }
}
