//! `cowslip log`: what the daemon has logged.
//!
//! Following does not hold the log open between two looks, which would keep the mount busy. The
//! daemon keeps the end of its log only, so each look finds out where the last one ended.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::client::{AskError, Endpoint};
use super::{EXIT_OK, print, restore_sigpipe};
use crate::mount::kernel;

/// How often a log that is followed is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct LogArgs {
    /// Go on until the mount is gone
    #[arg(short = 'f', long)]
    follow: bool,
    /// Where it is mounted, or a file in it
    mountpoint: PathBuf,
}

pub(super) fn run(args: &LogArgs) -> anyhow::Result<u8> {
    restore_sigpipe();
    let mountpoint = Endpoint::of(&args.mountpoint)?.mountpoint;
    let place = Endpoint::mount(&mountpoint);
    let mount = kernel::entry_at(&mountpoint);
    let mut seen = place.read("log")?;
    print_log(&seen)?;
    if !args.follow {
        return Ok(EXIT_OK);
    }
    loop {
        thread::sleep(FOLLOW_INTERVAL);
        if kernel::entry_at(&mountpoint) != mount {
            return Ok(EXIT_OK);
        }
        let now = match place.read("log") {
            // It ended between the two questions.
            Err(AskError::Dead(_) | AskError::Host { .. }) => return Ok(EXIT_OK),
            now => now?,
        };
        print_log(&now[new_text_start(&seen, &now)..])?;
        seen = now;
    }
}

/// Prints a piece of it. Its first line may be cut.
fn print_log(text: &[u8]) -> anyhow::Result<()> {
    print(&String::from_utf8_lossy(text))
}

/// Where in `now` begins what `seen` does not hold, when bytes were added behind and perhaps
/// dropped in front.
///
/// ```text
///   seen  |--dropped--|--- still there ---|
///   now               |--- still there ---|--- new ---|
/// ```
fn new_text_start(seen: &[u8], now: &[u8]) -> usize {
    let kept = (0..seen.len()).map(|dropped| &seen[dropped..]);
    kept.into_iter().find(|kept| now.starts_with(kept)).map_or(0, <[u8]>::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_what_was_added_is_new() {
        assert_eq!(new_text_start(b"", b"a\nb\n"), 0);
        assert_eq!(new_text_start(b"a\nb\n", b"a\nb\n"), 4);
        assert_eq!(new_text_start(b"a\nb\n", b"a\nb\nc\n"), 4);
        assert_eq!(new_text_start(b"a\nb\n", b"b\nc\n"), 2);
        assert_eq!(new_text_start(b"a\nb\n", b"x\ny\n"), 0);
    }

    proptest! {
        #[test]
        fn nothing_is_shown_twice_or_lost(lines in 1usize..50, dropped in 0usize..40, added in 0usize..9) {
            let text = |range: std::ops::Range<usize>| -> Vec<u8> {
                range.map(|number| format!("line {number}\n")).collect::<String>().into_bytes()
            };
            let dropped = dropped.min(lines - 1);
            let seen = text(0..lines);
            let now = text(dropped..lines + added);
            prop_assert_eq!(&now[new_text_start(&seen, &now)..], text(lines..lines + added));
        }
    }
}
