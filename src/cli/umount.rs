//! `cowslip umount`: waits for the last user, makes everything durable, unmounts, and returns when
//! the daemon has ended.
//!
//! ```text
//!   no users left ---> drain ---> unmount ---> daemon has ended
//!     timeout                   again while busy, timeout
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use super::client::{AskError, Endpoint};
use super::in_use::{OPENERS_POLL_INTERVAL, OPENERS_TIMEOUT, mount_in_use_error};
use super::progress::{ProgressDisplay, Verbosity};
use super::{EXIT_OK, print_line, timeout};
use crate::control::api::{Lines, MountRequest, MountStatus, StatusDocument};
use crate::host::{ProcessState, mountinfo, wait_for_exit};
use crate::mount::kernel::{MountHandle, MountHealth, UnmountMode};
use crate::mount::openers;
use crate::stream::UnmountPolicy;

/// The least time that a daemon has to say who it is, however short `--timeout` is.
const MIN_ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit for the daemon to end: it syncs first, and disks are slow.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(60);

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

/// When a mount is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EndMode {
    /// Once nobody uses the mount any more; a mount that stays in use stays mounted.
    WhenUnused,
    /// At once, whoever uses the mount.
    Lazy,
}

impl UmountArgs {
    /// Creates the arguments of a command line without a time-out.
    pub(super) fn new(mountpoint: PathBuf, mode: EndMode) -> Self {
        Self { lazy: mode == EndMode::Lazy, timeout: None, mountpoint }
    }
}

pub(super) fn run(args: &UmountArgs) -> anyhow::Result<u8> {
    let mount = find_mount(&args.mountpoint)?;
    if clear_dead_mount(&mount)? {
        return Ok(EXIT_OK);
    }
    let openers_timeout = args.timeout.unwrap_or(OPENERS_TIMEOUT);
    let ended = if args.lazy {
        let request = DrainRequest::new(UnmountPolicy::Leave);
        end_mount(&mount, EndMode::Lazy, Duration::ZERO, request)?
    } else {
        wait_for_openers(&mount, openers_timeout)?;
        let request = DrainRequest { streams: UnmountPolicy::Settle, timeout: args.timeout };
        end_mount(&mount, EndMode::WhenUnused, openers_timeout, request)?
    };
    ended.lines.iter().for_each(|line| print_line(line));
    if !args.lazy {
        ended.wait_for_daemon(args.timeout.unwrap_or(DAEMON_TIMEOUT))?;
    }
    ended.check_failures()?;
    Ok(EXIT_OK)
}

/// Returns the cowslip mount at `path`, held open: seconds may pass until it is unmounted.
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

/// Unmounts a mount whose daemon is gone, and reports that. Returns `false` for any other mount.
fn clear_dead_mount(mount: &MountHandle) -> anyhow::Result<bool> {
    if mount.health() != MountHealth::Dead {
        return Ok(false);
    }
    let shown = mount.mountpoint().display();
    match mount.unmount(UnmountMode::Lazy) {
        Err(error) if mount.is_mounted() => anyhow::bail!(
            "cannot clear the dead mount at '{shown}': {error}: run umount -l '{shown}' as root"
        ),
        // An error now means that another process was faster.
        Ok(()) | Err(_) => {}
    }
    print_line(&format!("{shown}: the daemon was gone, the dead mount is cleared away"));
    Ok(true)
}

/// Waits until nobody uses the mount.
fn wait_for_openers(mount: &MountHandle, timeout: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let users = openers::find_openers(mount.entry());
        // Those who use a later mount at this place do not matter.
        if users.is_empty() || !mount.is_mounted() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(mount_in_use_error(mount.mountpoint(), &users));
        }
        thread::sleep(OPENERS_POLL_INTERVAL);
    }
}

/// Ends a mount as soon as nobody uses it, if that is within [`OPENERS_TIMEOUT`].
///
/// # Errors
/// A line for the user; the mount is still there then.
pub(super) fn end_when_unused(
    mount: &MountHandle,
    streams: UnmountPolicy,
) -> anyhow::Result<EndedMount> {
    wait_for_openers(mount, OPENERS_TIMEOUT)?;
    end_mount(mount, EndMode::WhenUnused, OPENERS_TIMEOUT, DrainRequest::new(streams))
}

/// The request to the daemon before its mount is unmounted.
#[derive(Clone, Copy, Debug)]
pub(super) struct DrainRequest {
    streams: UnmountPolicy,
    /// Time limit for a sink.
    timeout: Option<Duration>,
}

impl DrainRequest {
    /// Creates a request without a time limit for sinks.
    pub(super) fn new(streams: UnmountPolicy) -> Self {
        Self { streams, timeout: None }
    }
}

/// A mount that is gone, and what its daemon reported before.
#[derive(Debug)]
pub(super) struct EndedMount {
    mountpoint: PathBuf,
    /// The device number of its file system.
    dev: (u32, u32),
    /// Changes that were kept or discarded, a line each.
    pub(super) lines: Vec<String>,
    /// Failures to make data durable, a line each.
    failed: Vec<String>,
    /// The daemon's process ID, if the mount told it.
    pid: Option<u32>,
}

/// Makes everything durable and unmounts. Unmounting a busy mount is tried again for `timeout`. When
/// another process was faster, nothing is asked of the mount that may be there by then.
///
/// # Errors
/// A line for the user; the mount is still there then.
pub(super) fn end_mount(
    mount: &MountHandle,
    mode: EndMode,
    timeout: Duration,
    request: DrainRequest,
) -> anyhow::Result<EndedMount> {
    let mut pid = None;
    let drained = match drain(mount, request, &mut pid) {
        Ok(drained) => drained,
        // Without an answer there is nothing to wait for: unmounting is all that can be done.
        Err(AskError::Denied(_) | AskError::Foreign { .. }) => Lines::default(),
        // Another process was faster, and reports what the daemon told it. Only who has to know that
        // all streams were finished cannot do without the answer.
        Err(AskError::Host { .. } | AskError::Dead(_))
            if request.streams != UnmountPolicy::Finish && !mount.is_mounted() =>
        {
            Lines::default()
        }
        Err(error) if mode == EndMode::Lazy => {
            log::debug!("unmounting all the same: {error}");
            Lines::default()
        }
        Err(error) => return Err(error.into()),
    };
    if unmount(mount, mode, timeout)? == UnmountedBy::Another && mount.ids().unique.is_none() {
        // The answer may have been that of a later mount, which the kernel gave the same id.
        pid = None;
    }
    Ok(EndedMount {
        mountpoint: mount.mountpoint().to_owned(),
        dev: mount.entry().dev,
        lines: drained.lines,
        failed: drained.failed.unwrap_or_default(),
        pid,
    })
}

/// Makes everything durable. Returns the daemon's report, and sets `pid` to its process ID, once that
/// is known, also when the rest fails.
fn drain(
    mount: &MountHandle,
    request: DrainRequest,
    pid: &mut Option<u32>,
) -> Result<Lines, AskError> {
    let mount = Endpoint::of_handle(mount);
    *pid = daemon_pid(&mount, request.timeout)?;
    let timeout_ms = request.timeout.map(timeout::to_millis);
    let request = MountRequest::Drain { streams: request.streams, timeout_ms };
    let mut display = ProgressDisplay::new(Verbosity::default());
    let answer = mount.ask(&request, |progress| display.show(progress));
    display.end();
    match answer {
        // Nothing has changed in such a mount.
        Err(AskError::ReadOnly(_)) => Ok(Lines::default()),
        answer => answer,
    }
}

/// Returns the process ID of the daemon. A mount whose status is not understood can be unmounted, too,
/// but its daemon is not waited for. A user who has little time waits no longer for the answer.
fn daemon_pid(mount: &Endpoint, timeout: Option<Duration>) -> Result<Option<u32>, AskError> {
    let timeout = timeout.map_or(Duration::MAX, |time| time.max(MIN_ANSWER_TIMEOUT));
    let status: Value = mount.status_within(timeout)?;
    let status = StatusDocument::<MountStatus>::deserialize(status).unwrap_or_default();
    Ok(status.mounts.first().and_then(|mount| mount.pid))
}

/// Who has unmounted a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum UnmountedBy {
    Us,
    /// Another process, which was faster.
    Another,
}

fn unmount(mount: &MountHandle, mode: EndMode, timeout: Duration) -> anyhow::Result<UnmountedBy> {
    let unmount_mode = match mode {
        EndMode::WhenUnused => UnmountMode::Plain,
        EndMode::Lazy => UnmountMode::Lazy,
    };
    let deadline = Instant::now() + timeout;
    let mountpoint = mount.mountpoint();
    let shown = mountpoint.display();
    loop {
        let Err(error) = mount.unmount(unmount_mode) else {
            return Ok(UnmountedBy::Us);
        };
        match error.raw_os_error() {
            Some(libc::EBUSY) if Instant::now() < deadline => thread::sleep(OPENERS_POLL_INTERVAL),
            Some(libc::EBUSY) => {
                return Err(mount_in_use_error(mountpoint, &openers::find_openers(mount.entry())));
            }
            Some(libc::EPERM) => anyhow::bail!(
                "cannot unmount '{shown}': it is another user's: do it as that user or as root"
            ),
            Some(libc::EINVAL) if !mount.is_mounted() => return Ok(UnmountedBy::Another),
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
    /// A line for the user when the daemon is still there after `timeout`, or when it has to stay
    /// because another mount namespace has the mount.
    pub(super) fn wait_for_daemon(&self, timeout: Duration) -> anyhow::Result<()> {
        let Some(pid) = self.pid else {
            return Ok(());
        };
        // A namespace that is about to end has as long as any other user of the mount.
        let namespace_timeout = timeout.min(OPENERS_TIMEOUT);
        // An error means that there is no such process here: the daemon lives in another container.
        let is_running = |timeout| matches!(wait_for_exit(pid, timeout), Ok(ProcessState::Running));
        if !is_running(namespace_timeout) {
            return Ok(());
        }
        let at = self.mountpoint.display();
        if let Some(copy) = openers::find_namespace_copy(self.dev) {
            let there = copy.mountpoint.display();
            anyhow::bail!(
                "'{at}' is unmounted here, but {copy}: its daemon (pid {pid}) works on for that: end it, \
                 or unmount it there: nsenter -t {} -m umount '{there}'",
                copy.pid
            );
        }
        if is_running(timeout - namespace_timeout) {
            anyhow::bail!(
                "'{at}' is unmounted, and its daemon (pid {pid}) still works after {}: \
                 wait for it before you touch its files",
                timeout::format_timeout(timeout)
            );
        }
        Ok(())
    }

    /// Waits until the daemon has ended, like [`wait_for_daemon`](Self::wait_for_daemon), for at most
    /// [`DAEMON_TIMEOUT`].
    ///
    /// # Errors
    /// The errors of [`wait_for_daemon`](Self::wait_for_daemon).
    pub(super) fn wait_default(&self) -> anyhow::Result<()> {
        self.wait_for_daemon(DAEMON_TIMEOUT)
    }

    /// Reports what could not be made durable.
    ///
    /// # Errors
    /// A line for the user with all of it.
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
    fn find_mount_rejects_any_other_path() {
        let line = |path: &str| find_mount(Path::new(path)).unwrap_err().to_string();
        assert!(line("/proc").contains("is a mount of type proc, not cowslip's"));
        assert!(line("/nowhere").contains("'/nowhere' is not mounted"));
    }

    #[test]
    fn failures_are_reported_in_one_line() {
        let mut ended = EndedMount {
            mountpoint: "/m".into(),
            lines: Vec::new(),
            failed: vec!["a: EIO".to_owned(), "b: EIO".to_owned()],
            dev: (0, 0),
            pid: None,
        };
        let line = ended.check_failures().unwrap_err().to_string();
        assert_eq!(line, "'/m' is unmounted, but a: EIO; b: EIO");
        ended.failed.clear();
        assert!(ended.check_failures().is_ok() && ended.wait_for_daemon(Duration::ZERO).is_ok());
    }
}
