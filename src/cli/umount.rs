//! `cowslip umount`: waits for the last user, has everything made durable, unmounts, and returns
//! when the daemon has ended.
//!
//! ```text
//!   users left? ──grace──> drain ──> unmount ──busy? again within the grace──> daemon has ended
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::client::{AskError, Endpoint};
use super::progress::{ProgressDisplay, Verbosity};
use super::{EXIT_OK, print_line, timeout};
use crate::host::mountinfo;
use crate::host::{ProcessState, wait_for_exit};
use crate::mount::kernel::{MountHandle, MountHealth, UnmountMode};
use crate::mount::openers::{self, Opener};

/// RELEASE and `losetup -d` come after close has returned, so a mount may look used for a moment.
pub(super) const OPENERS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the daemon may take to end: it syncs first, and disks are slow.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(60);

/// How often is looked whether the mount is still used. A look takes some milliseconds.
pub(super) const OPENERS_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Users that are named in the message; the rest is counted.
const MAX_NAMED_OPENERS: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub(super) struct UmountArgs {
    /// Take the name away at once, the mount when its last user has left
    #[arg(short = 'l', long = "lazy")]
    lazy: bool,
    /// How long to wait for users of the mount (5s), and then for the daemon (60s): 10s, 2m
    #[arg(long, value_name = "T", value_parser = timeout::parse)]
    timeout: Option<Duration>,
    /// Where it is mounted
    mountpoint: PathBuf,
}

/// What becomes of streams that are not finished yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UnfinishedStreams {
    /// Those that end with the mount are finished, the others given up.
    Settle,
    /// All are finished.
    Finish,
    /// All are given up.
    Abort,
    /// They go on for those who have them open.
    Leave,
}

impl UnfinishedStreams {
    fn word(self) -> &'static str {
        match self {
            Self::Settle => "settle",
            Self::Finish => "finish",
            Self::Abort => "abort",
            Self::Leave => "leave",
        }
    }
}

/// How a mount is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndMode {
    /// When nobody uses it any more; otherwise it stays.
    WhenUnused,
    /// At once, whoever uses it.
    Lazy,
}

impl UmountArgs {
    /// As the command line would have it, without a time-out.
    pub(super) fn new(mountpoint: PathBuf, how: EndMode) -> Self {
        Self { lazy: how == EndMode::Lazy, timeout: None, mountpoint }
    }
}

pub(super) fn run(args: &UmountArgs) -> anyhow::Result<u8> {
    let held = find_mount(&args.mountpoint)?;
    if clear_dead_mount(&held)? {
        return Ok(EXIT_OK);
    }
    let grace = args.timeout.unwrap_or(OPENERS_TIMEOUT);
    let ended = if args.lazy {
        end_mount(
            &held,
            EndMode::Lazy,
            Duration::ZERO,
            DrainRequest::new(UnfinishedStreams::Leave),
        )?
    } else {
        wait_for_users(&held, grace)?;
        let request = DrainRequest { streams: UnfinishedStreams::Settle, timeout: args.timeout };
        end_mount(&held, EndMode::WhenUnused, grace, request)?
    };
    ended.lines.iter().for_each(|line| print_line(line));
    if !args.lazy {
        ended.wait_for_daemon(args.timeout.unwrap_or(DAEMON_TIMEOUT))?;
    }
    ended.check_failures()?;
    Ok(EXIT_OK)
}

/// The cowslip mount at `path`, held: seconds may pass until it is unmounted.
fn find_mount(path: &Path) -> anyhow::Result<MountHandle> {
    let shown = path.display();
    match mountinfo::entry_at(path) {
        Some(entry) if entry.is_cowslip() => {
            MountHandle::of(entry).with_context(|| format!("cannot look at the mount at '{shown}'"))
        }
        Some(entry) => anyhow::bail!(
            "'{shown}' is a mount of type {}, not cowslip's: unmount it with umount '{shown}'",
            entry.fstype
        ),
        None => match mountinfo::enclosing_mount(path) {
            Some(found) => anyhow::bail!(
                "'{shown}' lies in the mount at '{at}': cowslip umount '{at}'",
                at = found.mount.mountpoint.display()
            ),
            None => anyhow::bail!("'{shown}' is not mounted: cowslip status lists what is"),
        },
    }
}

/// Clears a mount whose daemon is gone, and says so.
fn clear_dead_mount(held: &MountHandle) -> anyhow::Result<bool> {
    if held.health() != MountHealth::Dead {
        return Ok(false);
    }
    let shown = held.mountpoint().display();
    held.unmount(UnmountMode::Lazy).map_err(|error| {
        let remedy = format!("run umount -l '{shown}' as root");
        anyhow::anyhow!("cannot clear the dead mount at '{shown}': {error}: {remedy}")
    })?;
    print_line(&format!("{shown}: the daemon was gone, the dead mount is cleared away"));
    Ok(true)
}

/// Waits until nobody uses the mount.
fn wait_for_users(held: &MountHandle, grace: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + grace;
    loop {
        let users = openers::find_openers(held.entry());
        if users.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(in_use_error(held.mountpoint(), &users));
        }
        thread::sleep(OPENERS_POLL_INTERVAL);
    }
}

/// Ends a mount as soon as nobody uses it, within the usual grace.
///
/// # Errors
/// A line; it is still mounted then.
pub(super) fn end_when_unused(
    held: &MountHandle,
    streams: UnfinishedStreams,
) -> anyhow::Result<EndedMount> {
    wait_for_users(held, OPENERS_TIMEOUT)?;
    end_mount(held, EndMode::WhenUnused, OPENERS_TIMEOUT, DrainRequest::new(streams))
}

/// What the daemon is asked to do before it is unmounted.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrainRequest {
    streams: UnfinishedStreams,
    /// How long a sink may take.
    timeout: Option<Duration>,
}

impl DrainRequest {
    /// Sinks may take as long as they do.
    pub(super) fn new(streams: UnfinishedStreams) -> Self {
        Self { streams, timeout: None }
    }
}

/// Why it was not unmounted: who has it.
fn in_use_error(mountpoint: &Path, users: &[Opener]) -> anyhow::Error {
    let named = users.iter().take(MAX_NAMED_OPENERS).map(ToString::to_string);
    let mut named: Vec<String> = named.collect();
    if users.len() > MAX_NAMED_OPENERS {
        named.push(format!("and {} more", users.len() - MAX_NAMED_OPENERS));
    }
    // Users that may not be seen, or who came and went.
    if named.is_empty() {
        named.push("processes that you may not see: ask as root".to_owned());
    }
    let shown = mountpoint.display();
    anyhow::anyhow!(
        "'{shown}' is in use: {}: close it there, or cowslip umount -l '{shown}'",
        named.join("; ")
    )
}

/// A mount that is gone, and what its daemon said before.
#[derive(Debug)]
pub(super) struct EndedMount {
    mountpoint: PathBuf,
    /// The device number of its file system.
    dev: (u32, u32),
    /// What became of the changes, a line each.
    pub(super) lines: Vec<String>,
    /// What could not be made durable.
    failed: Vec<String>,
    /// The daemon, if it told.
    pid: Option<u32>,
}

/// Has everything made durable and unmounts; a mount that is busy is tried again for `grace`.
///
/// # Errors
/// A line; it is still mounted then.
pub(super) fn end_mount(
    held: &MountHandle,
    how: EndMode,
    grace: Duration,
    request: DrainRequest,
) -> anyhow::Result<EndedMount> {
    let (pid, drained) = match drain(held, request) {
        Ok(told) => told,
        // Without an answer there is nothing to wait for; what can be done is to let go.
        Err(AskError::Denied(_) | AskError::Foreign { .. }) => (None, Value::Null),
        Err(error) if how == EndMode::Lazy => {
            log::debug!("unmounting all the same: {error}");
            (None, Value::Null)
        }
        Err(error) => return Err(error.into()),
    };
    unmount(held, how, grace)?;
    Ok(EndedMount {
        mountpoint: held.mountpoint().to_owned(),
        dev: held.entry().dev,
        lines: string_list(&drained["lines"]),
        failed: string_list(&drained["failed"]),
        pid,
    })
}

/// The daemon's process id, and what it says to a drain.
fn drain(held: &MountHandle, request: DrainRequest) -> Result<(Option<u32>, Value), AskError> {
    let place = Endpoint::of_handle(held);
    let status = place.status()?;
    let pid = status["mounts"][0]["pid"].as_u64();
    let pid = pid.and_then(|pid| u32::try_from(pid).ok());
    let timeout = request.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let request =
        json!({ "op": "drain", "streams": request.streams.word(), "timeout_ms": timeout });
    let mut progress = ProgressDisplay::new(Verbosity::default());
    let answer = place.ask(&request, |now| progress.show(now));
    progress.end();
    match answer {
        // Nothing has changed there.
        Err(AskError::ReadOnly(_)) => Ok((pid, Value::Null)),
        drained => Ok((pid, drained?)),
    }
}

/// The lines of an answer.
pub(super) fn string_list(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn unmount(held: &MountHandle, how: EndMode, grace: Duration) -> anyhow::Result<()> {
    let flags = match how {
        EndMode::WhenUnused => UnmountMode::Plain,
        EndMode::Lazy => UnmountMode::Lazy,
    };
    let deadline = Instant::now() + grace;
    let mountpoint = held.mountpoint();
    let shown = mountpoint.display();
    loop {
        let Err(error) = held.unmount(flags) else {
            return Ok(());
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if Instant::now() < deadline => thread::sleep(OPENERS_POLL_INTERVAL),
            Some(libc::EBUSY) => {
                return Err(in_use_error(mountpoint, &openers::find_openers(held.entry())));
            }
            Some(libc::EPERM) => anyhow::bail!(
                "cannot unmount '{shown}': it is another user's: do it as that user or as root"
            ),
            // Somebody else was faster.
            Some(libc::EINVAL) if !held.is_mounted() => return Ok(()),
            _ => return Err(unmount_error(mountpoint, &error)),
        }
    }
}

fn unmount_error(mountpoint: &Path, error: &io::Error) -> anyhow::Error {
    let shown = mountpoint.display();
    anyhow::anyhow!("cannot unmount '{shown}': {error}: try cowslip umount -l '{shown}'")
}

impl EndedMount {
    /// Waits until the daemon has ended.
    ///
    /// # Errors
    /// A line when it has not in `patience`, or when it cannot: another mount namespace has the
    /// mount.
    pub(super) fn wait_for_daemon(&self, patience: Duration) -> anyhow::Result<()> {
        let Some(pid) = self.pid else {
            return Ok(());
        };
        // A namespace that is about to end has as long as any other user of the mount.
        let grace = patience.min(OPENERS_TIMEOUT);
        // No such number here: it lives in another container.
        let is_there = |patience| matches!(wait_for_exit(pid, patience), Ok(ProcessState::Running));
        if !is_there(grace) {
            return Ok(());
        }
        let at = self.mountpoint.display();
        if let Some(elsewhere) = openers::find_namespace_copy(self.dev) {
            let there = elsewhere.mountpoint.display();
            anyhow::bail!(
                "'{at}' is unmounted here, but {elsewhere}: its daemon (pid {pid}) works on for that: end it, \
                 or unmount it there: nsenter -t {} -m umount '{there}'",
                elsewhere.pid
            );
        }
        if is_there(patience - grace) {
            anyhow::bail!(
                "'{at}' is unmounted, and its daemon (pid {pid}) still works after {}: \
                 wait for it before you touch its files",
                timeout::format_timeout(patience)
            );
        }
        Ok(())
    }

    /// As [`wait_for_daemon`](Self::wait_for_daemon), for as long as a daemon usually takes at most.
    ///
    /// # Errors
    /// As there.
    pub(super) fn wait_default(&self) -> anyhow::Result<()> {
        self.wait_for_daemon(DAEMON_TIMEOUT)
    }

    /// # Errors
    /// A line with everything that could not be made durable.
    pub(super) fn check_failures(&self) -> anyhow::Result<()> {
        if self.failed.is_empty() {
            return Ok(());
        }
        anyhow::bail!(
            "'{}' is unmounted, but {}",
            self.mountpoint.display(),
            self.failed.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_named_and_the_many_are_counted() {
        let user = |number: usize| Opener::Loop {
            device: format!("/dev/loop{number}").into(),
            path: "vm.img".into(),
        };
        let users: Vec<Opener> = (0..10).map(user).collect();
        let line = in_use_error(Path::new("/m"), &users).to_string();
        assert!(line.starts_with("'/m' is in use: /dev/loop0 is attached to vm.img; /dev/loop1"));
        assert!(line.contains("; and 2 more: close it there"), "{line}");
        assert!(line.ends_with("or cowslip umount -l '/m'"), "{line}");
        let unseen = in_use_error(Path::new("/m"), &[]).to_string();
        assert!(unseen.contains("ask as root"), "{unseen}");
    }

    #[test]
    fn what_is_no_cowslip_mount_is_left_alone() {
        let line = |path: &str| find_mount(Path::new(path)).unwrap_err().to_string();
        assert!(line("/proc").contains("is a mount of type proc, not cowslip's"));
        assert!(line("/nowhere").contains("'/nowhere' is not mounted"));
    }

    #[test]
    fn what_failed_is_one_line() {
        let mut ended = EndedMount {
            mountpoint: "/m".into(),
            lines: Vec::new(),
            failed: string_list(&json!(["a: EIO", "b: EIO"])),
            dev: (0, 0),
            pid: None,
        };
        let line = ended.check_failures().unwrap_err().to_string();
        assert_eq!(line, "'/m' is unmounted, but a: EIO; b: EIO");
        ended.failed.clear();
        assert!(ended.check_failures().is_ok() && ended.wait_for_daemon(Duration::ZERO).is_ok());
    }
}
