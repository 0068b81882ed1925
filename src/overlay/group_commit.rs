//! Group commit, in the sense of databases: callers share one sync of a layer (a commit into the
//! base is `commit`). Syncs run one at a time, and each caller waits for one that began after its
//! call.

use std::io;

use parking_lot::{Condvar, Mutex};

use crate::host;

/// Lets callers share a sync that has not begun yet.
///
/// A running sync may already have passed the caller's data, so a caller never joins it. Instead
/// the caller waits for the next sync, and one of the waiting callers runs it for all of them.
#[derive(Default)]
pub struct GroupCommit {
    state: Mutex<GroupCommitState>,
    done: Condvar,
}

#[derive(Default)]
struct GroupCommitState {
    running: bool,
    begun: u64,
    ended: u64,
    /// The errno of the last sync that ended, if it failed.
    failed: Option<i32>,
}

impl GroupCommit {
    /// Returns whether a sync would begin at once.
    pub fn is_idle(&self) -> bool {
        !self.state.lock().running
    }

    /// Runs `sync`, or waits for another caller's run that began after this call.
    ///
    /// # Errors
    /// The error of that run, by its errno.
    pub fn run(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = self.state.lock();
        let wanted = state.begun + 1;
        while state.running && state.ended < wanted {
            self.done.wait(&mut state);
        }
        if state.ended >= wanted {
            return match state.failed {
                None => Ok(()),
                Some(code) => Err(host::os_error(code)),
            };
        }
        state.running = true;
        state.begun += 1;
        drop(state);
        let result = sync();
        let mut state = self.state.lock();
        state.running = false;
        state.ended = state.begun;
        state.failed = result.as_ref().err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        self.done.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn callers_during_a_sync_share_the_next_one() {
        let turns = Arc::new(GroupCommit::default());
        let runs = Arc::new(AtomicUsize::new(0));
        let (entered, is_entered) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let first = thread::spawn({
            let turns = Arc::clone(&turns);
            move || {
                turns.run(|| {
                    entered.send(()).unwrap();
                    released.recv().unwrap();
                    Err(host::os_error(libc::ENOSPC))
                })
            }
        });
        is_entered.recv().unwrap();
        let others: Vec<_> = (0..4)
            .map(|_| {
                let (turns, runs) = (Arc::clone(&turns), Arc::clone(&runs));
                thread::spawn(move || {
                    turns.run(|| {
                        runs.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    })
                })
            })
            .collect();
        thread::sleep(std::time::Duration::from_millis(50));
        release.send(()).unwrap();
        assert!(first.join().unwrap().is_err());
        for other in others {
            other.join().unwrap().unwrap();
        }
        assert!(runs.load(Ordering::SeqCst) >= 1);
    }
}
