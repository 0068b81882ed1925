//! A check, before mounting, that the resource limits of this process suffice for a mount.
//!
//! If the limits are found too low only when the workers start, the mount has to be undone, and
//! undoing may need the very resources that are missing: without root, unmounting starts a program,
//! and so needs another process.

use std::fs::File;
use std::sync::Arc;
use std::thread;

use crate::pool::reserve;
use parking_lot::RwLock;
use rustix::process::{Resource, getrlimit};

/// Threads besides the workers: one that waits for them, the ticker, those in reserve, and some for
/// work on the disks.
const EXTRA_THREADS: usize = 6 + reserve::THREADS;

/// Descriptors besides one per worker: for inspecting a mount, undoing it, and serving requests.
const EXTRA_FILES: usize = 12;

/// Descriptors needed to undo a mount: removing a directory takes one for each level.
const UNDO_FILES: usize = 4;

/// Descriptors held in reserve, and closed when there is something to undo.
pub(super) struct FdReserve(#[expect(dead_code, reason = "held, not used")] Vec<File>);

/// Reserves the descriptors that undoing a mount needs: a lack of them may be the reason for
/// undoing. The mount will have `workers`.
///
/// # Errors
/// The same as [`check`].
pub(super) fn reserve_fds(workers: usize) -> Result<FdReserve, String> {
    probe_files(UNDO_FILES, workers + EXTRA_FILES).map(FdReserve)
}

/// Checks that `workers` and the threads and descriptors that go with them are available.
///
/// # Errors
/// A line for the user when a limit is too low.
pub(super) fn check(workers: usize) -> Result<(), String> {
    probe_files(workers + EXTRA_FILES, 0).map(drop)?;
    probe_threads(workers + EXTRA_THREADS)
}

/// Opens `wanted` files; `later` more are needed beside them, for the message.
fn probe_files(wanted: usize, later: usize) -> Result<Vec<File>, String> {
    let mut opened = Vec::with_capacity(wanted);
    while opened.len() < wanted {
        match (File::open("/dev/null"), getrlimit(Resource::Nofile).current) {
            (Ok(file), _) => opened.push(file),
            (Err(error), Some(limit)) if error.raw_os_error() == Some(libc::EMFILE) => {
                let missing = (wanted - opened.len() + later) as u64;
                return Err(format!(
                    "{limit} open files are too few: a mount needs {} and two more for each disk: \
                     raise the limit (ulimit -n)",
                    limit.saturating_add(missing)
                ));
            }
            (Err(error), _) => return Err(format!("no open files left: {error}")),
        }
    }
    Ok(opened)
}

fn probe_threads(wanted: usize) -> Result<(), String> {
    let gate = Arc::new(RwLock::new(()));
    // Hold the lock until all threads are started: they have to exist at the same time.
    let closed = gate.write();
    let start = |_| {
        let gate = Arc::clone(&gate);
        let wait = move || drop(gate.read());
        thread::Builder::new().name("cowslip-room".to_owned()).spawn(wait)
    };
    let started: Result<Vec<_>, _> = (0..wanted).map(start).collect();
    drop(closed);
    match started {
        Ok(threads) => {
            threads.into_iter().for_each(|thread| drop(thread.join()));
            Ok(())
        }
        Err(error) => Err(format!(
            "cannot start {wanted} threads: {error}: raise the limits of processes (ulimit -u, \
             TasksMax= of a unit) and of memory (ulimit -v)"
        )),
    }
}
