//! Requests that take long: the progress is shown, and ^C reports what becomes of the request.
//!
//! When nobody waits any more, the daemon continues some operations and stops others. The disk's
//! status tells which, so that the client does not have to guess.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::CliError;
use super::client::{AskError, Endpoint};
use super::progress::{ProgressDisplay, Verbosity};

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

/// Sends the request for `work`, and shows its progress.
///
/// # Errors
/// [`AskError`]; on a signal, a line that says what continues, with exit code 130.
pub(super) fn ask(
    place: &Endpoint,
    request: &Value,
    work: LongRequest,
    verbosity: Verbosity,
) -> Result<Value, anyhow::Error> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // A second signal exits at once, without waiting for the report on the first.
        flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED.into(), Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    let mut progress = ProgressDisplay::new(verbosity);
    let done = place.ask_until(&stop, request, |now| progress.show(now));
    progress.end();
    match done {
        Err(AskError::Interrupted) => {
            let line = interrupted_line(place, work);
            Err(CliError { code: EXIT_INTERRUPTED, line }.into())
        }
        done => Ok(done?),
    }
}

/// Returns a line about what became of the request after an interruption.
fn interrupted_line(place: &Endpoint, work: LongRequest) -> String {
    let path = place.mountpoint.join(place.disk.as_deref().unwrap_or_default());
    let path = path.display();
    let until = Instant::now() + STATUS_TIMEOUT;
    loop {
        let Ok(status) = place.status() else {
            return format!(
                "interrupted; the mount does not say what became of it: cowslip log '{path}'"
            );
        };
        if let Some(said) = outcome_line(&status, work) {
            return said.replace("FILE", &format!("'{path}'"));
        }
        if Instant::now() >= until {
            return format!(
                "goes on in the background: cowslip status '{path}' shows how far it is"
            );
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Returns the outcome according to the disk's status; `None` while the daemon may not have noticed
/// yet.
fn outcome_line(status: &Value, work: LongRequest) -> Option<&'static str> {
    let overlay = &status["overlay"];
    let is_at_work = overlay["doing"].is_string();
    match work {
        LongRequest::Commit if is_at_work => None,
        LongRequest::Commit if overlay["committing"] == true => Some(
            "stopped: its base holds a part of the changes, and the disk reads as before: \
             cowslip commit FILE finishes it",
        ),
        LongRequest::Commit if overlay["changed"] == 0 => {
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
        LongRequest::Keep if overlay["temporary"] == false => {
            Some("it was at its end: the changes are kept")
        }
        LongRequest::Keep => {
            Some("goes on in the background: cowslip log tells when the changes are kept")
        }
        LongRequest::Finish if status["stream"]["state"] == "finishing" => Some(
            "goes on in the background: cowslip finish FILE waits for it again, \
             cowslip abort FILE gives it up",
        ),
        LongRequest::Finish => {
            Some("interrupted: cowslip status FILE shows the state of the stream")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn outcome_line_follows_the_daemons_status() {
        let overlay = |doing: Option<&str>, committing: bool, changed: u64| json!({ "overlay": { "doing": doing, "committing": committing, "changed": changed } });
        let begins = |status: &Value, work, with: &str| {
            assert!(outcome_line(status, work).unwrap().starts_with(with), "{status} {work:?}");
        };
        assert_eq!(outcome_line(&overlay(Some("a commit"), true, 5), LongRequest::Commit), None);
        begins(&overlay(None, true, 5), LongRequest::Commit, "stopped: its base holds a part");
        begins(&overlay(None, false, 0), LongRequest::Commit, "it was at its end");
        begins(&overlay(None, false, 5), LongRequest::Commit, "stopped before");
        begins(&overlay(Some("a hydration"), false, 5), LongRequest::Hydrate, "goes on");
        begins(&overlay(None, false, 5), LongRequest::Hydrate, "it has ended");
        begins(&json!({ "stream": { "state": "finishing" } }), LongRequest::Finish, "goes on");
        assert!(outcome_line(&Value::Null, LongRequest::Keep).is_some());
    }
}
