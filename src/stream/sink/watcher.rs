//! A thread that notices when a sink goes away by itself: a command ends, or a reader closes its
//! end. The sending thread would notice only when it has something to send.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::host::os_error;
use crate::program::stop::Stop;
use crate::stream::command::Pipeline;
use crate::stream::monitor::Monitor;
use crate::stream::output::{SinkCallback, SinkEvent};

/// A running watcher. Dropping it ends the thread and releases all descriptors.
#[derive(Debug)]
pub(super) struct Watcher {
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts watching the readers of `wire` and the commands of `monitor`.
    ///
    /// # Errors
    /// The errno of eventfd(2), or of creating a thread.
    pub(super) fn start(
        wire: Option<Arc<OwnedFd>>,
        monitor: Monitor,
        on_event: SinkCallback,
    ) -> io::Result<Self> {
        let stop = Stop::new()?;
        let until = stop.clone();
        let thread = Builder::new()
            .name("cowslip-watch".to_owned())
            .spawn(move || watch(wire, &monitor, &until, &on_event))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(mut wire: Option<Arc<OwnedFd>>, monitor: &Monitor, stop: &Stop, on_event: &SinkCallback) {
    let mut running = monitor.pipeline().map_or_else(Vec::new, Pipeline::pidfds);
    while wire.is_some() || !running.is_empty() {
        let Ok((has_readers, ended)) = wait(wire.as_deref(), &running, stop) else { return };
        if ended.iter().any(|ended| *ended)
            && let Some(why) = monitor.failure()
        {
            return on_event(SinkEvent::Failed(why));
        }
        let mut ended = ended.into_iter();
        running.retain(|_| ended.next() != Some(true));
        if !has_readers {
            // Waits for a command that is about to exit with a reason.
            let why = monitor.explain(&os_error(libc::EPIPE));
            wire = None;
            on_event(SinkEvent::Gone(why));
        }
    }
}

/// Waits for an event; returns whether the wire has readers, and for each program whether it has
/// ended.
///
/// # Errors
/// `ECANCELED` once stopped; otherwise the errno of poll(2).
fn wait(wire: Option<&OwnedFd>, running: &[OwnedFd], stop: &Stop) -> io::Result<(bool, Vec<bool>)> {
    let mut fds = vec![PollFd::from_borrowed_fd(stop.fd(), PollFlags::IN)];
    fds.extend(running.iter().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
    // Without requested events, poll(2) still reports the loss of all readers.
    fds.extend(wire.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::empty())));
    while let Err(error) = poll(&mut fds, None) {
        if error != Errno::INTR {
            return Err(error.into());
        }
    }
    if stop.is_stopped() {
        return Err(os_error(libc::ECANCELED));
    }
    let is_told = |fd: &PollFd<'_>| !fd.revents().is_empty();
    let ended = fds[1..=running.len()].iter().map(is_told).collect();
    let has_readers = !fds[1 + running.len()..].iter().any(is_told);
    Ok((has_readers, ended))
}
