//! Locks of whole files and directories: flock(2).

use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How often a lock is tried while others hold it.
pub const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Locks `file` by `operation`, one of those that do not block, and tries again for `patience` while
/// others hold it. Returns whether it is locked.
///
/// Others can hold a lock although nobody uses the file any more: the threads of a process that was
/// killed end one after another, and a child has its parent's files until it executes its program.
///
/// # Errors
/// The host's errno.
pub fn lock_within(
    file: impl AsFd,
    operation: FlockOperation,
    patience: Duration,
) -> io::Result<bool> {
    let start = Instant::now();
    loop {
        match flock(&file, operation) {
            Err(Errno::WOULDBLOCK) if start.elapsed() < patience => {
                thread::sleep(LOCK_POLL_INTERVAL);
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            locked => return Ok(locked.map(|()| true)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_awaited_for_as_long_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        let open = || std::fs::File::open(dir.path()).unwrap();
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        let held = open();
        assert!(lock_within(&held, exclusive, Duration::ZERO).unwrap());
        assert!(!lock_within(open(), exclusive, Duration::ZERO).unwrap());
        thread::scope(|scope| {
            let other = open();
            let waiting =
                scope.spawn(move || lock_within(other, exclusive, Duration::from_secs(60)));
            drop(held);
            assert!(waiting.join().unwrap().unwrap());
        });
    }
}
