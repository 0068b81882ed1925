//! Signals that end a mount, taken from before there is anything that would have to be undone.
//!
//! ```text
//!   parent:  block ── fork ── note them, unblock        passes the first on to the daemon
//!   child:            │ (still blocked)
//!                     └─ Signals::listen: handlers, unblock ── start ── serve
//! ```
//!
//! While a mount starts, the first signal has it undone at the next step, and a second one ends the
//! process at once. When it serves, the first one takes the mount away, and the others change
//! nothing about that.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Handle;

use crate::pool::Cancellable;

/// The signals that end a mount.
pub(super) const TERMINATING_SIGNALS: [i32; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

/// A signal that comes this long after another was sent by somebody who does not want to wait. One
/// that comes earlier may be the same one on another way: a service manager tells command and
/// daemon, and the command tells the daemon.
const SECOND_SIGNAL_DELAY: Duration = Duration::from_secs(1);

/// How a signal is called; those that we do not handle by their number.
pub(super) fn signal_name(signal: i32) -> String {
    match signal {
        SIGTERM => "SIGTERM".to_owned(),
        SIGINT => "SIGINT".to_owned(),
        SIGHUP => "SIGHUP".to_owned(),
        other => format!("signal {other}"),
    }
}

/// Whether signals are let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalMask {
    /// They wait.
    Blocked,
    /// They come.
    Unblocked,
}

/// Has [`TERMINATING_SIGNALS`] wait, or come, in this thread and those that it starts.
pub(super) fn set_signal_mask(gate: SignalMask) -> io::Result<()> {
    let how = match gate {
        SignalMask::Blocked => libc::SIG_BLOCK,
        SignalMask::Unblocked => libc::SIG_UNBLOCK,
    };
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset fills the set before anything reads it; the old one is not asked for.
    let failed = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in TERMINATING_SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut())
    };
    match failed {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The signals of a daemon.
pub(super) struct Signals {
    /// The first that came; 0 while there is none.
    first: Arc<AtomicI32>,
    serving: Arc<AtomicBool>,
    handle: Handle,
    listener: JoinHandle<()>,
}

impl Signals {
    /// Takes them from now on, also those that had to wait since the fork.
    ///
    /// # Errors
    /// The host's errno: no descriptors, no thread.
    pub(super) fn listen() -> io::Result<Self> {
        let mut signals = signal_hook::iterator::Signals::new(TERMINATING_SIGNALS)?;
        set_signal_mask(SignalMask::Unblocked)?;
        let handle = signals.handle();
        let (first, serving) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicBool::new(false)));
        let (came, is_serving) = (Arc::clone(&first), Arc::clone(&serving));
        let listen = move || {
            let mut since = None;
            for signal in signals.forever() {
                let since = *since.get_or_insert_with(Instant::now);
                let seen = came.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
                let insists = seen.is_err() && since.elapsed() >= SECOND_SIGNAL_DELAY;
                if insists && !is_serving.load(Ordering::SeqCst) {
                    // Whatever the start waits for is not worth it.
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        };
        let listener = thread::Builder::new().name("cowslip-signal".to_owned()).spawn(listen)?;
        Ok(Self { first, serving, handle, listener })
    }

    /// The first signal, once one has come.
    pub(super) fn received(&self) -> Option<i32> {
        Some(self.first.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// `cancellable`, given up once a signal has come, too.
    pub(super) fn cancellable(
        &self,
        request: impl Cancellable + 'static,
    ) -> impl Cancellable + 'static {
        StartRequest { request, first: Arc::clone(&self.first) }
    }

    /// # Errors
    /// A line, once a signal has come.
    pub(super) fn check_interrupted(&self) -> Result<(), String> {
        match self.received() {
            Some(signal) => {
                Err(format!("interrupted by {}: nothing is mounted", signal_name(signal)))
            }
            None => Ok(()),
        }
    }

    /// The start is over: a second signal ends nothing any more.
    pub(super) fn set_serving(&self) {
        self.serving.store(true, Ordering::SeqCst);
    }

    /// Listens no more; signals have no effect from now on.
    pub(super) fn close(self) {
        self.handle.close();
        // It ends with its handle; a panic in it has ended the process already.
        let _ = self.listener.join();
    }
}

/// What a start does for somebody.
struct StartRequest<R> {
    request: R,
    first: Arc<AtomicI32>,
}

impl<R: Cancellable> Cancellable for StartRequest<R> {
    fn is_cancelled(&self) -> bool {
        self.first.load(Ordering::SeqCst) != 0 || self.request.is_cancelled()
    }

    fn hold(&self) -> bool {
        !self.is_cancelled()
    }

    fn release(&self) {}
}
