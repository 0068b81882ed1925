//! Mounting through `fusermount3`, the set-uid helper by which users may mount.

use std::fmt::Write;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, Output, Stdio};

use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use super::error::MountError;
use super::{FLAG_WORDS, MAX_READ, MountAccess, MountParams};
use crate::host::mountinfo::FSTYPE;

/// Returns the `-o` list for fusermount3.
fn fusermount_options(req: &MountParams<'_>) -> String {
    let subtype = FSTYPE.trim_start_matches("fuse.");
    let source = escape_option(req.source());
    let mut list = format!("fsname={source},subtype={subtype},default_permissions");
    let _ = write!(list, ",max_read={MAX_READ}");
    if req.access == MountAccess::Everybody {
        list.push_str(",allow_other");
    }
    for (word, _, flag) in FLAG_WORDS {
        if req.flags.contains(flag) {
            list.push(',');
            list.push_str(word);
        }
    }
    list
}

/// Escapes a value for fusermount3's `-o`, as libfuse does: a backslash before `,` and `\`.
fn escape_option(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ',' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Mounts through fusermount3, which sends the connection back over a socket.
pub(super) fn mount_by_fusermount(req: &MountParams<'_>) -> Result<OwnedFd, MountError> {
    let broken = |error: Errno| req.refused(io::Error::from(error).to_string());
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(broken)?;
    // Not on stdin: newer helpers accept no descriptor below 3 for this.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(broken)?;
    let helper = spawn_fusermount(|helper| {
        helper.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
        helper.arg("-o").arg(fusermount_options(req)).arg("--").arg(req.mountpoint);
    })
    .map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoFusermount,
        _ => req.refused(format!("fusermount3: {error}")),
    })?;
    let output = helper.wait_with_output().map_err(|error| req.refused(error.to_string()))?;
    // Only now, and without waiting: the socket keeps the message, but end-of-file might never come
    // if another thread has forked in between and its child holds `theirs`.
    let received = receive_fd(ours.as_fd());
    let message = error_line(&output);
    match received {
        Ok(Some(device)) if output.status.success() => {
            if !message.is_empty() {
                log::warn!("{message}");
            }
            Ok(device)
        }
        _ if message.contains("allow_other") => Err(MountError::AllowOther),
        _ if message.contains("/dev/fuse: Permission denied") => Err(MountError::DeviceRootOnly),
        _ if message.contains("device not found") => Err(MountError::NoDevice),
        Err(error) if output.status.success() => Err(broken(error)),
        _ => Err(req.refused(message)),
    }
}

/// Starts fusermount3 with the arguments that `prepare` adds.
pub(super) fn spawn_fusermount(prepare: impl Fn(&mut Command)) -> io::Result<Child> {
    let spawn = |program: &str| {
        let mut helper = Command::new(program);
        // Its messages are matched, so they must not be translated.
        helper.env("LC_ALL", "C");
        helper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut helper);
        helper.spawn()
    };
    match spawn("fusermount3") {
        // A service's PATH may be short.
        Err(error) if error.kind() == io::ErrorKind::NotFound => spawn("/usr/bin/fusermount3"),
        spawned => spawned,
    }
}

/// Returns the helper's messages in one line, or its exit status if it failed without any.
pub(super) fn error_line(output: &Output) -> String {
    let messages = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> =
        messages.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.is_empty() && !output.status.success() {
        true => format!("fusermount3: {}", output.status),
        false => lines.join("; "),
    }
}

/// Receives the descriptor that was sent to `socket`, if there is one. Does not wait.
fn receive_fd(socket: std::os::fd::BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut data = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(
            socket,
            &mut data,
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )
    })?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mountinfo::entry_at;
    use crate::mount::kernel::testing::{TestMountpoint, request};
    use std::path::Path;

    #[test]
    fn commas_and_backslashes_are_escaped_for_the_helper() {
        let at = TestMountpoint::new();
        let request = request(&at, r"/srv/a,b\c.img");
        assert_eq!(
            fusermount_options(&request),
            r"fsname=/srv/a\,b\\c.img,subtype=cowslip,default_permissions,max_read=262144,nosuid,nodev"
        );
    }

    #[test]
    fn a_mount_through_the_helper_has_the_same_type_and_source() {
        let at = TestMountpoint::new();
        let source = r"/srv/a,b\c d.img";
        let connection = mount_by_fusermount(&request(&at, source)).unwrap();
        let entry = entry_at(&at.path).unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.to_str()), (FSTYPE, Some(source)));
        assert!(rustix::io::fcntl_getfd(&connection).unwrap().contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn a_refusal_by_the_helper_is_one_line() {
        let at = TestMountpoint::new();
        let mut request = request(&at, "s");
        request.mountpoint = Path::new("/nowhere/at/all");
        let error = mount_by_fusermount(&request).unwrap_err().to_string();
        assert!(error.starts_with("cannot mount on '/nowhere/at/all': fusermount3: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
