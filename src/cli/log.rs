//! `cowslip log`: prints the daemon's log.
//!
//! The log is not held open while following, since that would keep the mount busy. The daemon keeps
//! only the end of its log, so every poll has to find where the last one ended.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::client::{AskError, Endpoint};
use super::{EXIT_OK, print, restore_sigpipe};
use crate::host::mountinfo;

/// Interval at which a followed log is read.
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
    let mount = Endpoint::mount(&mountpoint);
    let entry = mountinfo::mount_at(&mountpoint);
    let mut seen = mount.read("log")?;
    print_log(&seen)?;
    if !args.follow {
        return Ok(EXIT_OK);
    }
    loop {
        thread::sleep(FOLLOW_INTERVAL);
        if mountinfo::mount_at(&mountpoint) != entry {
            return Ok(EXIT_OK);
        }
        let now = match mount.read("log") {
            // The mount ended between the two requests.
            Err(AskError::Dead(_) | AskError::Host { .. }) => return Ok(EXIT_OK),
            now => now?,
        };
        print_log(&now[new_text_start(&seen, &now)..])?;
        seen = now;
    }
}

/// Prints a part of the log. Its first line may be incomplete.
fn print_log(text: &[u8]) -> anyhow::Result<()> {
    print(&String::from_utf8_lossy(text))
}

/// Returns the offset in `now` of the text that is not in `seen`, where bytes were appended and
/// perhaps dropped at the front.
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
    fn only_appended_text_is_new() {
        assert_eq!(new_text_start(b"", b"a\nb\n"), 0);
        assert_eq!(new_text_start(b"a\nb\n", b"a\nb\n"), 4);
        assert_eq!(new_text_start(b"a\nb\n", b"a\nb\nc\n"), 4);
        assert_eq!(new_text_start(b"a\nb\n", b"b\nc\n"), 2);
        assert_eq!(new_text_start(b"a\nb\n", b"x\ny\n"), 0);
    }

    proptest! {
        #[test]
        fn no_text_is_repeated_or_lost(lines in 1usize..50, dropped in 0usize..40, added in 0usize..9) {
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
