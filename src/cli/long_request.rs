//! Requests that take long: the progress is shown, and ^C reports what becomes of the request.
//!
//! When nobody waits any more, the daemon continues some operations and stops others. The disk's
//! status tells which, so that the client does not have to guess.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::CliError;
use super::client::{AskError, Endpoint};
use super::progress::{ProgressDisplay, Verbosity};
use crate::control::api::{DiskRequest, DiskStatus, Line, StreamState};

/// Time limit for the daemon to notice that nobody waits, and to finish the step in progress.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which the status is asked.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Exit code of a command ended by ^C, as in shells.
const EXIT_INTERRUPTED: u8 = 130;

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LongRequest {
    Commit,
    Hydrate,
    Prefetch,
    Keep,
    Finish,
}

/// Sends `request` to the disk, and shows its progress.
///
/// # Errors
/// [`AskError`]; on a signal, a line that says what continues, with exit code 130.
pub(super) fn ask(
    disk: &Endpoint,
    request: &DiskRequest,
    operation: LongRequest,
    verbosity: Verbosity,
) -> anyhow::Result<Line> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // A second signal exits at once, without waiting for the report on the first.
        flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED.into(), Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    let mut display = ProgressDisplay::new(verbosity);
    let answer = disk.ask_until(&stop, request, |progress| display.show(progress));
    display.end();
    match answer {
        Err(AskError::Interrupted) => {
            let line = interrupted_line(disk, operation);
            Err(CliError { code: EXIT_INTERRUPTED, line }.into())
        }
        answer => Ok(answer?),
    }
}

/// Returns a line about what became of the request after an interruption.
fn interrupted_line(disk: &Endpoint, operation: LongRequest) -> String {
    let path = disk.mountpoint.join(disk.disk.as_deref().unwrap_or_default());
    let path = path.display();
    let deadline = Instant::now() + STATUS_TIMEOUT;
    loop {
        let Ok(status) = disk.disk_status() else {
            return format!(
                "interrupted; the mount does not say what became of it: cowslip log '{path}'"
            );
        };
        if let Some(line) = outcome_line(&status, operation) {
            return line.replace("FILE", &format!("'{path}'"));
        }
        if Instant::now() >= deadline {
            return format!(
                "goes on in the background: cowslip status '{path}' shows how far it is"
            );
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the outcome according to the disk's status; `None` while the daemon may not have noticed
/// yet.
fn outcome_line(status: &DiskStatus, operation: LongRequest) -> Option<&'static str> {
    let overlay = status.overlay.as_ref();
    let blocks = overlay.and_then(|overlay| overlay.blocks.as_ref());
    let is_at_work = blocks.is_some_and(|blocks| blocks.doing.is_some());
    match operation {
        LongRequest::Commit if is_at_work => None,
        LongRequest::Commit if blocks.is_some_and(|blocks| blocks.committing) => Some(
            "stopped: its base holds a part of the changes, and the disk reads as before: \
             cowslip commit FILE finishes it",
        ),
        LongRequest::Commit if overlay.is_some_and(|overlay| overlay.changed == 0) => {
            Some("it was at its end: all changes are in the base")
        }
        LongRequest::Commit => Some("stopped before anything was written to the base"),
        LongRequest::Prefetch if is_at_work => None,
        LongRequest::Prefetch => Some("stopped: what was brought in stays"),
        LongRequest::Hydrate if is_at_work => Some(
            "goes on in the background: cowslip status FILE shows how far it is, \
             cowslip hydrate --cancel FILE ends it",
        ),
        LongRequest::Hydrate => Some("it has ended: cowslip log says how"),
        LongRequest::Keep if overlay.is_some_and(|overlay| !overlay.temporary) => {
            Some("it was at its end: the changes are kept")
        }
        LongRequest::Keep => {
            Some("goes on in the background: cowslip log tells when the changes are kept")
        }
        LongRequest::Finish if is_finishing(status) => Some(
            "goes on in the background: cowslip finish FILE waits for it again, \
             cowslip abort FILE gives it up",
        ),
        LongRequest::Finish => {
            Some("interrupted: cowslip status FILE shows the state of the stream")
        }
    }
}

fn is_finishing(status: &DiskStatus) -> bool {
    status.stream.as_ref().is_some_and(|stream| stream.state == StreamState::Finishing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{BlockOverlayStatus, OverlayStatus, StreamStatus};

    #[test]
    fn outcome_line_follows_the_daemons_status() {
        let overlay = |doing: Option<&str>, committing: bool, changed: u64| {
            let doing = doing.map(str::to_owned);
            let blocks = Some(BlockOverlayStatus { doing, committing, ..Default::default() });
            let overlay = Some(OverlayStatus { changed, blocks, ..Default::default() });
            DiskStatus { overlay, ..Default::default() }
        };
        let begins = |status: &DiskStatus, operation, with: &str| {
            let line = outcome_line(status, operation).unwrap();
            assert!(line.starts_with(with), "{status:?} {operation:?}: {line}");
        };
        assert_eq!(outcome_line(&overlay(Some("a commit"), true, 5), LongRequest::Commit), None);
        begins(&overlay(None, true, 5), LongRequest::Commit, "stopped: its base holds a part");
        begins(&overlay(None, false, 0), LongRequest::Commit, "it was at its end");
        begins(&overlay(None, false, 5), LongRequest::Commit, "stopped before");
        begins(&overlay(Some("a hydration"), false, 5), LongRequest::Hydrate, "goes on");
        begins(&overlay(None, false, 5), LongRequest::Hydrate, "it has ended");
        let stream = Some(StreamStatus { state: StreamState::Finishing, ..Default::default() });
        let finishing = DiskStatus { stream, ..Default::default() };
        begins(&finishing, LongRequest::Finish, "goes on");
        assert!(outcome_line(&DiskStatus::default(), LongRequest::Keep).is_some());
    }
}
