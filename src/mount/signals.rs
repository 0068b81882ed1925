//! Signals that end a mount, handled from before there is anything that would have to be undone.
//!
//! ```text
//!   parent:  block ── fork ── record them, unblock      passes the first on to the daemon
//!   child:            │ (still blocked)
//!                     └─ Signals::listen: handlers, unblock ── start ── serve
//! ```
//!
//! While a mount starts, the first signal makes the start fail at its next step, which undoes it,
//! and a second one ends the process at once. While the mount serves, the first signal unmounts it,
//! and later ones have no effect.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXCPU};
use signal_hook::iterator::Handle;

use crate::pool::Cancellable;

/// The signals that end a mount; `SIGXCPU` comes every second once the CPU time is used up
/// (`RLIMIT_CPU`).
pub(super) const TERMINATING_SIGNALS: [i32; 5] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGXCPU];

/// Time after the first signal from which a second one means that its sender does not want to wait.
/// An earlier one may be the same signal by another route: a service manager signals command and
/// daemon, and the command signals the daemon.
const SECOND_SIGNAL_DELAY: Duration = Duration::from_secs(1);

/// Returns the name of a signal; of one that this process does not handle, its number.
pub(super) fn signal_name(signal: i32) -> String {
    match signal {
        SIGTERM => "SIGTERM".to_owned(),
        SIGINT => "SIGINT".to_owned(),
        SIGHUP => "SIGHUP".to_owned(),
        SIGXCPU => "SIGXCPU (its CPU time is used up: ulimit -t)".to_owned(),
        other => format!("signal {other}"),
    }
}

/// Whether [`TERMINATING_SIGNALS`] are delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalMask {
    /// They stay pending.
    Blocked,
    /// They are delivered.
    Unblocked,
}

/// Blocks or unblocks [`TERMINATING_SIGNALS`] in this thread and those that it starts.
///
/// # Errors
/// The errno of pthread_sigmask(3).
pub(super) fn set_signal_mask(mask: SignalMask) -> io::Result<()> {
    let action = match mask {
        SignalMask::Blocked => libc::SIG_BLOCK,
        SignalMask::Unblocked => libc::SIG_UNBLOCK,
    };
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset fills the set before anything reads it; the old set is not requested.
    let failed = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in TERMINATING_SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(action, set.as_ptr(), std::ptr::null_mut())
    };
    match failed {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// The listener for signals of a daemon.
pub(super) struct Signals {
    /// Number of the first signal; 0 while there is none.
    first: Arc<AtomicI32>,
    /// The mount answers.
    serving: Arc<AtomicBool>,
    handle: Handle,
    listener: JoinHandle<()>,
}

impl Signals {
    /// Handles signals from now on, also those that were blocked since the fork.
    ///
    /// # Errors
    /// The host's errno: no descriptors, no thread.
    pub(super) fn listen() -> io::Result<Self> {
        let mut signals = signal_hook::iterator::Signals::new(TERMINATING_SIGNALS)?;
        set_signal_mask(SignalMask::Unblocked)?;
        let handle = signals.handle();
        let (first, serving) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicBool::new(false)));
        let (received, is_serving) = (Arc::clone(&first), Arc::clone(&serving));
        let listen = move || {
            let mut first_at = None;
            for signal in signals.forever() {
                let first_at = *first_at.get_or_insert_with(Instant::now);
                let stored =
                    received.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
                let is_second = stored.is_err() && first_at.elapsed() >= SECOND_SIGNAL_DELAY;
                if is_second && !is_serving.load(Ordering::SeqCst) {
                    // The start may be waiting for something that never comes.
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        };
        let listener = thread::Builder::new().name("cowslip-signal".to_owned()).spawn(listen)?;
        Ok(Self { first, serving, handle, listener })
    }

    /// Returns the first signal, once one was received.
    pub(super) fn received(&self) -> Option<i32> {
        Some(self.first.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
    }

    /// Wraps `request` such that it is cancelled once a signal was received, too.
    pub(super) fn cancellable(
        &self,
        request: impl Cancellable + 'static,
    ) -> impl Cancellable + 'static {
        StartRequest { request, first: Arc::clone(&self.first) }
    }

    /// Fails once a signal was received, so that the start goes no further.
    ///
    /// # Errors
    /// A line for the user.
    pub(super) fn check_interrupted(&self) -> Result<(), String> {
        match self.received() {
            Some(signal) => {
                Err(format!("interrupted by {}: nothing is mounted", signal_name(signal)))
            }
            None => Ok(()),
        }
    }

    /// Notes that the start is over: from now on a second signal does not end the process.
    pub(super) fn set_serving(&self) {
        self.serving.store(true, Ordering::SeqCst);
    }

    /// Stops listening; signals have no effect from now on.
    pub(super) fn close(self) {
        self.handle.close();
        // The listener ends with its handle; a panic in it has aborted the process already.
        let _ = self.listener.join();
    }
}

/// The request to start a mount, cancelled with `request` or by a signal.
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
