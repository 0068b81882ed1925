//! One open `ctl` file: who asks, waits, and is told how far it has come.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use super::node::ControlNode;
use super::{Control, json_line};
use crate::host::os_error;

/// A client is told at least this often that its request is still being worked on.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// The longest request: a disk with all its keys, and paths, need a few kilobytes.
const MAX_REQUEST_LEN: usize = 64 << 10;
/// Answers that may lie unread when another request comes. Each may be as long as it is.
const MAX_UNREAD: usize = 64 << 10;
/// Requests that are worked on at a time in a mount, each by a thread: a `finish` waits as long as
/// its sink takes, a `commit` copies as long as there is something, and what else is asked does
/// not wait behind them.
const MAX_RUNNING: usize = 64;
/// Threads for requests: as many as there may be, and one more each who waits for the answer.
pub const REQUEST_THREADS: usize = 2 * MAX_RUNNING;

/// How far something has come, in bytes, and of how many.
pub(super) type ProgressFn = Box<dyn Fn() -> Option<(u64, u64)> + Send>;

/// One open `ctl` file: requests in, lines out.
#[derive(Default)]
pub struct ControlSession {
    state: Mutex<SessionState>,
    ready: Condvar,
}

#[derive(Default)]
struct SessionState {
    unread: Vec<u8>,
    busy: bool,
    /// Somebody waits for what comes.
    has_reader: bool,
    /// What is told meanwhile.
    progress: Option<ProgressFn>,
}

impl ControlSession {
    /// Takes a request for `node` and has `run` do it.
    ///
    /// # Errors
    /// `EBUSY` while another one is worked on; `ENOBUFS` while there are answers that nobody has
    /// read; `EMSGSIZE` for a request longer than any; `EAGAIN` while as many as there may be are
    /// worked on.
    pub fn submit(
        self: &Arc<Self>,
        control: &Arc<Control>,
        spot: ControlNode,
        request: &[u8],
        run: impl FnOnce(crate::pool::Job),
    ) -> io::Result<()> {
        if request.len() > MAX_REQUEST_LEN {
            return Err(os_error(libc::EMSGSIZE));
        }
        let mut state = self.state.lock();
        if state.busy {
            return Err(os_error(libc::EBUSY));
        }
        if state.unread.len() >= MAX_UNREAD {
            return Err(os_error(libc::ENOBUFS));
        }
        let turn = RequestPermit::acquire(control).ok_or_else(|| os_error(libc::EAGAIN))?;
        state.busy = true;
        drop(state);
        let progress = control.progress_of(spot);
        self.state.lock().progress = progress;
        let (session, control, request) = (Arc::clone(self), Arc::clone(control), request.to_vec());
        run(Box::new(move || {
            let there = Arc::clone(&session);
            // The handle, this job and the question itself: without the first nobody waits.
            let is_gone = move || Arc::strong_count(&there) < 3;
            let answer = match spot {
                ControlNode::DiskCtl(slot) => control.answer_disk(slot, &request, &is_gone),
                _ => control.answer_mount(&request),
            };
            drop(turn);
            let mut state = session.state.lock();
            state.unread.extend(json_line(&answer));
            state.busy = false;
            state.progress = None;
            session.ready.notify_all();
        }));
        Ok(())
    }

    /// The next bytes of the answer: waits for them, but no longer than a second; then a
    /// progress line. Nothing when no request is being worked on.
    ///
    /// # Errors
    /// `EBUSY` while somebody else waits here for the answer.
    pub fn read(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        if state.unread.is_empty() && state.busy {
            if std::mem::replace(&mut state.has_reader, true) {
                return Err(os_error(libc::EBUSY));
            }
            let waiting = |state: &mut SessionState| state.unread.is_empty() && state.busy;
            self.ready.wait_while_for(&mut state, waiting, PROGRESS_INTERVAL);
            state.has_reader = false;
            if state.unread.is_empty() && state.busy {
                let far = state.progress.as_ref().and_then(|progress| progress());
                state.unread = json_line(&match far {
                    Some((done, total)) => json!({ "progress": { "done": done, "total": total } }),
                    None => json!({ "progress": {} }),
                });
            }
        }
        let len = len.min(state.unread.len());
        let rest = state.unread.split_off(len);
        Ok(std::mem::replace(&mut state.unread, rest))
    }
}

/// One of the requests that may be worked on at a time.
struct RequestPermit(Arc<Control>);

impl RequestPermit {
    fn acquire(control: &Arc<Control>) -> Option<Self> {
        let more = |running| (running < MAX_RUNNING).then_some(running + 1);
        control.running_requests.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        Some(Self(Arc::clone(control)))
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.running_requests.fetch_sub(1, Ordering::SeqCst);
    }
}
