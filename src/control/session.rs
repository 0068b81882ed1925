//! One open `ctl` file: who asks, waits, and is told how far it has come.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use super::spot::Spot;
use super::{Control, lines};
use crate::host::errno;

/// A client is told at least this often that its request is still being worked on.
const PROGRESS: Duration = Duration::from_secs(1);

/// How far something has come, in bytes, and of how many.
pub(super) type Progress = Box<dyn Fn() -> Option<(u64, u64)> + Send>;

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
