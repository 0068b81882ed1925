//! Requests that take long: how far they are is shown, and ^C says what becomes of them.
//!
//! A daemon goes on with some work when nobody waits for it any more, and stops other. Which of the
//! two it was is asked, not guessed: the disk's status tells.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::Failure;
use super::client::{AskError, Place};
use super::progress::{Progress, Verbosity};

/// How long the daemon may take to see that nobody waits, and to end a piece that it has begun.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked.
const LOOK: Duration = Duration::from_millis(200);
/// The exit code of a command that ^C has ended, as shells have it.
const INTERRUPTED: u8 = 130;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Long {
    Commit,
    Hydrate,
    Prefetch,
    Keep,
    Finish,
}

/// Asks for `work` and shows how far it is.
///
/// # Errors
/// [`AskError`]; on a signal a line that says what goes on, with exit code 130.
pub(super) fn ask(
    place: &Place,
    request: &Value,
    work: Long,
    verbosity: Verbosity,
) -> Result<Value, anyhow::Error> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second one does not wait for what is to be said of the first.
        flag::register_conditional_shutdown(signal, INTERRUPTED.into(), Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    let mut progress = Progress::new(verbosity);
    let done = place.ask_until(&stop, request, |now| progress.show(now));
    progress.end();
    match done {
        Err(AskError::Interrupted) => {
            let line = what_goes_on(place, work);
            Err(Failure { code: INTERRUPTED, line }.into())
        }
        done => Ok(done?),
    }
}

/// What became of it, now that nobody waits for it any more.
fn what_goes_on(place: &Place, work: Long) -> String {
    let path = place.mountpoint.join(place.disk.as_deref().unwrap_or_default());
    let path = path.display();
    let until = Instant::now() + PATIENCE;
    loop {
        let Ok(status) = place.status() else {
            return format!(
                "interrupted; the mount does not say what became of it: cowslip log '{path}'"
            );
        };
        if let Some(said) = said(&status, work) {
            return said.replace("FILE", &format!("'{path}'"));
        }
        if Instant::now() >= until {
            return format!(
                "goes on in the background: cowslip status '{path}' shows how far it is"
            );
        }
        thread::sleep(LOOK);
    }
}

/// What is to be said, by the status of the disk; `None` while the daemon may not have seen it yet.
fn said(status: &Value, work: Long) -> Option<&'static str> {
    let overlay = &status["overlay"];
    let is_at_work = overlay["doing"].is_string();
    match work {
        Long::Commit if is_at_work => None,
        Long::Commit if overlay["committing"] == true => Some(
            "stopped: its base holds a part of the changes, and the disk reads as before: \
             cowslip commit FILE finishes it",
        ),
        Long::Commit if overlay["changed"] == 0 => {
            Some("it was at its end: all changes are in the base")
        }
        Long::Commit => Some("stopped before anything was written to the base"),
        Long::Prefetch if is_at_work => None,
        Long::Prefetch => Some("stopped: what was brought in stays"),
        Long::Hydrate if is_at_work => Some(
            "goes on in the background: cowslip status FILE shows how far it is, \
             cowslip hydrate --cancel FILE ends it",
        ),
        Long::Hydrate => Some("it has ended: cowslip log says how"),
        Long::Keep if overlay["temporary"] == false => {
            Some("it was at its end: the changes are kept")
        }
        Long::Keep => {
            Some("goes on in the background: cowslip log tells when the changes are kept")
        }
        Long::Finish if status["stream"]["state"] == "finishing" => Some(
            "goes on in the background: cowslip finish FILE waits for it again, \
             cowslip abort FILE gives it up",
        ),
        Long::Finish => Some("interrupted: cowslip status FILE shows the state of the stream"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_is_what_the_daemon_tells() {
        let overlay = |doing: Option<&str>, committing: bool, changed: u64| json!({ "overlay": { "doing": doing, "committing": committing, "changed": changed } });
        let begins = |status: &Value, work, with: &str| {
            assert!(said(status, work).unwrap().starts_with(with), "{status} {work:?}");
        };
        assert_eq!(said(&overlay(Some("a commit"), true, 5), Long::Commit), None);
        begins(&overlay(None, true, 5), Long::Commit, "stopped: its base holds a part");
        begins(&overlay(None, false, 0), Long::Commit, "it was at its end");
        begins(&overlay(None, false, 5), Long::Commit, "stopped before");
        begins(&overlay(Some("a hydration"), false, 5), Long::Hydrate, "goes on");
        begins(&overlay(None, false, 5), Long::Hydrate, "it has ended");
        begins(&json!({ "stream": { "state": "finishing" } }), Long::Finish, "goes on");
        assert!(said(&Value::Null, Long::Keep).is_some());
    }
}
