//! The users of a mount or a disk that keep it busy: how long they are waited for, and how they are
//! named.

use std::path::Path;
use std::time::Duration;

use super::client::{AskError, Endpoint};
use crate::disk::split_name;
use crate::host::mountinfo;
use crate::mount::openers::{self, Opener};

/// Time limit for users to leave. RELEASE and `losetup -d` come after close has returned, so a mount
/// may look used for a moment.
pub(super) const OPENERS_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval at which the users are looked for, which takes some milliseconds.
pub(super) const OPENERS_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum number of users named in a message; the others are counted.
const MAX_NAMED_OPENERS: usize = 8;

/// Named where nobody is found: the users belong to somebody else, or came and went.
const UNSEEN_OPENERS: &str = "processes that you may not see: ask as root";

/// Creates the error for a mount that is not unmounted because of `users`.
pub(super) fn mount_in_use_error(mountpoint: &Path, users: &[Opener]) -> anyhow::Error {
    let mut named: Vec<String> =
        users.iter().take(MAX_NAMED_OPENERS).map(ToString::to_string).collect();
    if users.len() > MAX_NAMED_OPENERS {
        named.push(format!("and {} more", users.len() - MAX_NAMED_OPENERS));
    }
    if named.is_empty() {
        named.push(UNSEEN_OPENERS.to_owned());
    }
    let shown = mountpoint.display();
    anyhow::anyhow!(
        "'{shown}' is in use: {}: close it there, or cowslip umount -l '{shown}'",
        named.join("; ")
    )
}

/// Adds the users of the disk, and a remedy, to the error for a disk that is in use. Other errors stay
/// as they are.
pub(super) fn name_openers(disk: &Endpoint, error: anyhow::Error, remedy: &str) -> anyhow::Error {
    match error.downcast_ref() {
        Some(AskError::Busy(line)) => {
            anyhow::anyhow!("{line}: {}: {remedy}", describe_openers(disk))
        }
        _ => error,
    }
}

/// Describes the processes that have the disk open.
fn describe_openers(disk: &Endpoint) -> String {
    let name = disk.disk.as_deref().unwrap_or_default();
    let mount = mountinfo::mount_at(&disk.mountpoint);
    let users = mount.map(|mount| openers::find_openers(&mount)).unwrap_or_default();
    // A bind mount keeps the mount busy, but no disk of it: only an open file does.
    let is_of_disk = |path: &Path| {
        let file = path.to_string_lossy();
        file == name || split_name(&file).is_some_and(|(disk, _)| disk == name)
    };
    let users = users.iter().filter(|user| user.path().is_some_and(is_of_disk));
    let named: Vec<String> = users.map(ToString::to_string).collect();
    match named.is_empty() {
        true => UNSEEN_OPENERS.to_owned(),
        false => named.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_users_are_named_and_the_others_counted() {
        let user = |number: usize| Opener::Loop {
            device: format!("/dev/loop{number}").into(),
            path: "vm.img".into(),
        };
        let users: Vec<Opener> = (0..10).map(user).collect();
        let line = mount_in_use_error(Path::new("/m"), &users).to_string();
        assert!(line.starts_with("'/m' is in use: /dev/loop0 is attached to vm.img; /dev/loop1"));
        assert!(line.contains("; and 2 more: close it there"), "{line}");
        assert!(line.ends_with("or cowslip umount -l '/m'"), "{line}");
        let unseen = mount_in_use_error(Path::new("/m"), &[]).to_string();
        assert!(unseen.contains("ask as root"), "{unseen}");
    }
}
