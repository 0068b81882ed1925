//! Whether the limits of this process leave room for a mount, asked before there is one.
//!
//! A mount that finds out when its workers start has to be undone, and undoing it may need what is
//! not there: a user unmounts by a program, and that is a process more.

use std::fs::File;
use std::sync::Arc;
use std::thread;

use parking_lot::RwLock;
use rustix::process::{Resource, getrlimit};

/// Threads beside the workers: one that waits for them, the clock, and some for work on the disks.
const EXTRA_THREADS: usize = 6;

/// Descriptors beside one for each worker: looking at a mount, undoing it, and answering for it.
const EXTRA_FILES: usize = 12;

/// Descriptors that undoing a mount needs: removing a directory takes one for each level.
const UNDO_FILES: usize = 4;

/// Descriptors that are let go when there is something to undo.
pub(super) struct FdReserve(#[expect(dead_code, reason = "held, not used")] Vec<File>);

/// Sets aside what undoing a mount may need: the want of it may be why that has to be.
///
/// # Errors
/// As [`check`].
pub(super) fn reserve_fds() -> Result<FdReserve, String> {
    probe_files(UNDO_FILES).map(FdReserve)
}

/// # Errors
/// A line when there is no room for `workers` and what goes with them.
pub(super) fn check(workers: usize) -> Result<(), String> {
    probe_files(workers + EXTRA_FILES).map(drop)?;
    probe_threads(workers + EXTRA_THREADS)
}

fn probe_files(wanted: usize) -> Result<Vec<File>, String> {
    let opened: Result<Vec<File>, _> = (0..wanted).map(|_| File::open("/dev/null")).collect();
    opened.map_err(|error| match (error.raw_os_error(), getrlimit(Resource::Nofile).current) {
        (Some(libc::EMFILE), Some(limit)) => format!(
            "{limit} open files are too few: a mount needs {wanted} and two more for each disk: \
             raise the limit (ulimit -n)"
        ),
        _ => format!("no open files left: {error}"),
    })
}

fn probe_threads(wanted: usize) -> Result<(), String> {
    let gate = Arc::new(RwLock::new(()));
    // All have to be there at the same moment.
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
