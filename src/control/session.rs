//! An open `ctl` file: takes requests and hands out answers and progress.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::api::{AnswerLine, Progress};
use super::node::ControlNode;
use super::{Control, json_line};
use crate::host::os_error;

/// Longest time between two progress lines while a request is in progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// Longest request in bytes: a disk with all its keys, and paths, need a few kilobytes.
const MAX_REQUEST_LEN: usize = 64 << 10;
/// Bytes of unread answers above which another request is refused. A single answer may be longer.
const MAX_UNREAD: usize = 64 << 10;
/// The most requests in progress at a time in a mount, each on a thread: a `finish` waits as long
/// as its sink takes and a `commit` copies as long as there is data, and other requests do not wait
/// behind them.
const MAX_RUNNING: usize = 64;
/// Threads for requests: one for each request in progress, and one for each reader of an answer.
pub const REQUEST_THREADS: usize = 2 * MAX_RUNNING;

/// Reports the progress of a request.
pub(super) type ProgressFn = Box<dyn Fn() -> Progress + Send>;

/// An open `ctl` file: requests in, lines out. Dropped when the file is closed and no reader waits.
#[derive(Default)]
pub struct ControlSession {
    shared: Arc<SharedSession>,
}

/// The part of a session that a request in progress uses, too.
#[derive(Default)]
struct SharedSession {
    state: Mutex<SessionState>,
    ready: Condvar,
    /// The file has been closed: nobody will read an answer.
    is_closed: AtomicBool,
}

#[derive(Default)]
struct SessionState {
    unread: Vec<u8>,
    busy: bool,
    /// A reader waits for the answer.
    has_reader: bool,
    /// The progress of the current request.
    progress: Option<ProgressFn>,
}

impl ControlSession {
    /// Takes a request for `node` and passes it to `run` as a job.
    ///
    /// # Errors
    /// `EBUSY` while another request of this session is in progress; `ENOBUFS` while there are too
    /// many unread answers; `EMSGSIZE` for a request that is too long; `EAGAIN` while the mount has
    /// the most requests in progress.
    pub fn submit(
        &self,
        control: &Arc<Control>,
        node: ControlNode,
        request: &[u8],
        run: impl FnOnce(crate::pool::Job),
    ) -> io::Result<()> {
        if request.len() > MAX_REQUEST_LEN {
            return Err(os_error(libc::EMSGSIZE));
        }
        let mut state = self.shared.state.lock();
        if state.busy {
            return Err(os_error(libc::EBUSY));
        }
        if state.unread.len() >= MAX_UNREAD {
            return Err(os_error(libc::ENOBUFS));
        }
        let permit = RequestPermit::acquire(control).ok_or_else(|| os_error(libc::EAGAIN))?;
        state.busy = true;
        drop(state);
        let progress = control.progress_of(node);
        self.shared.state.lock().progress = progress;
        let (shared, control) = (Arc::clone(&self.shared), Arc::clone(control));
        let request = request.to_vec();
        run(Box::new(move || {
            let is_gone = || shared.is_closed.load(Ordering::SeqCst);
            let answer = match node {
                ControlNode::DiskCtl(slot) => control.answer_disk(slot, &request, &is_gone),
                _ => control.answer_mount(&request),
            };
            drop(permit);
            shared.end_request(&json_line(&match &answer {
                Ok(outcome) => AnswerLine::Ok(outcome),
                Err(refusal) => AnswerLine::Refused(refusal),
            }));
        }));
        Ok(())
    }

    /// Returns the next bytes of the answer. Waits for them up to a second, then returns a progress
    /// line. Returns nothing when no request is in progress.
    ///
    /// # Errors
    /// `EBUSY` while another reader waits here for the answer.
    pub fn read(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.shared.state.lock();
        if state.unread.is_empty() && state.busy {
            if std::mem::replace(&mut state.has_reader, true) {
                return Err(os_error(libc::EBUSY));
            }
            let waiting = |state: &mut SessionState| state.unread.is_empty() && state.busy;
            self.shared.ready.wait_while_for(&mut state, waiting, PROGRESS_INTERVAL);
            state.has_reader = false;
            if state.unread.is_empty() && state.busy {
                let progress = state.progress.as_ref().map(|progress| progress());
                state.unread = json_line(&AnswerLine::Progress(progress.unwrap_or_default()));
            }
        }
        let len = len.min(state.unread.len());
        let rest = state.unread.split_off(len);
        Ok(std::mem::replace(&mut state.unread, rest))
    }
}

impl Drop for ControlSession {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
    }
}

impl SharedSession {
    /// Ends the request in progress with `answer`.
    fn end_request(&self, answer: &[u8]) {
        let mut state = self.state.lock();
        state.unread.extend_from_slice(answer);
        state.busy = false;
        state.progress = None;
        self.ready.notify_all();
    }
}

/// A permit for one request in progress.
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

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::OnceLock;
    use std::sync::atomic::AtomicUsize;

    use parking_lot::RwLock;

    use super::*;
    use crate::catalog::{Catalog, DiskOrigin};
    use crate::config::{self, CacheMode};
    use crate::disk::{self, OpenContext};

    /// Creates the control of a mount with a blank disk of 64 KiB, and returns it with the disk's
    /// node for requests.
    fn control() -> (Arc<Control>, ControlNode) {
        let catalog = Arc::new(Catalog::new(Path::new("/mnt"), None));
        let spec = config::parse_disk("d=blank:64K", Path::new("/"), &|_| false).unwrap();
        let disk = Arc::new(disk::open(&spec, &OpenContext::unmounted()).unwrap().disk);
        let slot = catalog.add("d", disk, DiskOrigin::Given).unwrap().slot;
        let control = Control {
            catalog,
            source: "d".to_owned(),
            cache: CacheMode::Auto,
            draining: AtomicBool::new(false),
            device: OnceLock::new(),
            invalidator: OnceLock::new(),
            running_requests: AtomicUsize::new(0),
            summarised: RwLock::default(),
        };
        (Arc::new(control), ControlNode::DiskCtl(slot))
    }

    #[test]
    fn answer_can_be_read_in_pieces_and_ends() {
        let (control, node) = control();
        let session = ControlSession::default();
        session.submit(&control, node, br#"{"op":"abort"}"#, |job| job()).unwrap();
        let mut answer = Vec::new();
        loop {
            let piece = session.read(7).unwrap();
            if piece.is_empty() {
                break;
            }
            assert!(piece.len() <= 7);
            answer.extend(piece);
        }
        let expected = "{\"error\":\"d: it is no stream: there is nothing to abort\"}\n";
        assert_eq!(String::from_utf8(answer).unwrap(), expected);
        control.catalog.disks().iter().for_each(|disk| disk.abandon());
    }

    #[test]
    fn reader_of_a_request_in_progress_gets_a_sign_of_life() {
        let (control, node) = control();
        let session = ControlSession::default();
        let mut job = None;
        session.submit(&control, node, br#"{"op":"abort"}"#, |it| job = Some(it)).unwrap();
        assert_eq!(session.read(100).unwrap(), b"{\"progress\":{}}\n");
        let second = session.submit(&control, node, b"{}", |_| ()).unwrap_err();
        assert_eq!(second.raw_os_error(), Some(libc::EBUSY));
        job.unwrap()();
        assert!(session.read(4096).unwrap().starts_with(b"{\"error\":"));
        control.catalog.disks().iter().for_each(|disk| disk.abandon());
    }

    #[test]
    fn request_notices_that_its_file_is_closed() {
        let session = ControlSession::default();
        let shared = Arc::clone(&session.shared);
        assert!(!shared.is_closed.load(Ordering::SeqCst));
        drop(session);
        assert!(shared.is_closed.load(Ordering::SeqCst));
    }
}
