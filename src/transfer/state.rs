//! The saved state of a partial receive: the offset up to which the part is complete and durable.
//!
//! A separate thread replaces `NAME.part.state` as a whole after syncing the data that the state
//! describes. The stream continues meanwhile, and when the disk is slow, only the newest state is
//! written. A state contains the inode of its part, so a stale state has no effect on another file.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::confined;
use crate::host::sync_dir;
use crate::part_file::FileSlot;

/// The largest accepted state in bytes: a snapshot name of 255 bytes, each escaped, and a few
/// numbers.
const MAX_STATE_SIZE: u64 = 8 << 10;

/// The state of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiveState {
    /// The version of this format.
    pub(super) version: u32,
    /// The inode number of the part.
    pub(super) inode: u64,
    /// The offset in bytes before which everything is correct and durable.
    pub(super) offset: u64,
    /// The size of the complete file in bytes.
    pub(super) size: u64,
    /// The identity of the source; 0 if unknown.
    pub(super) identity: u64,
    /// The snapshot on which the stream is based, if it contains only changes.
    pub(super) since: Option<String>,
    /// Whether the finished file may replace another.
    pub(super) overwrite: bool,
}

/// The current value of [`ReceiveState::version`].
pub(super) const STATE_VERSION: u32 = 1;

impl ReceiveState {
    /// Loads the state of `file`, the part of `slot`; returns `None` if there is no trustworthy
    /// state.
    pub(super) fn load(slot: &FileSlot, file: &File) -> Option<Self> {
        let text =
            confined::read_file(slot.dir(), slot.with_suffix(STATE_SUFFIX), MAX_STATE_SIZE).ok()?;
        let state = Self::decode(&text)?;
        let meta = file.metadata().ok()?;
        // A second link to the part would be written to as well.
        let is_its = state.inode == meta.ino()
            && meta.nlink() == 1
            && state.offset <= meta.len()
            && state.offset > 0;
        is_its.then_some(state)
    }

    /// Decodes `text` if it is a state of this version.
    pub(super) fn decode(text: &[u8]) -> Option<Self> {
        let state: Self = serde_json::from_slice(text).ok()?;
        (state.version == STATE_VERSION).then_some(state)
    }

    /// Replaces the state of the part of `slot`.
    fn store(&self, slot: &FileSlot) -> io::Result<()> {
        let (name, new) = (slot.with_suffix(STATE_SUFFIX), slot.with_suffix(NEW_STATE_SUFFIX));
        confined::replace_file(slot.dir(), name, new, &serde_json::to_vec(self)?)
    }

    /// Removes the state durably: after a power cut an old state must not reappear beside a part
    /// that is being rewritten.
    pub(super) fn remove(slot: &FileSlot) -> io::Result<()> {
        let name = slot.with_suffix(STATE_SUFFIX);
        match rustix::fs::unlinkat(slot.dir(), name, rustix::fs::AtFlags::empty()) {
            // Another receiver may have removed it and failed to make that durable.
            Ok(()) | Err(rustix::io::Errno::NOENT) => sync_dir(slot.dir()),
            Err(error) => Err(error.into()),
        }
    }
}

/// The suffix added to the name of the received file.
pub(super) const STATE_SUFFIX: &str = ".part.state";
/// The suffix of the new state file until it is complete.
const NEW_STATE_SUFFIX: &str = ".part.state.new";

/// A thread that syncs data and then stores the state that describes it.
pub(super) struct StateWriter {
    mailbox: Arc<StateMailbox>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// The work for the thread: only the newest state counts, so there is room for one.
#[derive(Default)]
struct StateMailbox {
    pending: Mutex<PendingState>,
    changed: Condvar,
}

#[derive(Default)]
struct PendingState {
    state: Option<ReceiveState>,
    is_closed: bool,
}

impl StateWriter {
    /// Starts the thread for `file`, the part of `slot`.
    pub(super) fn start(slot: &FileSlot, file: &Arc<File>) -> io::Result<Self> {
        let mailbox = Arc::<StateMailbox>::default();
        let (slot, file, of_thread) = (slot.clone(), Arc::clone(file), Arc::clone(&mailbox));
        let thread = Builder::new().name("cowslip-state".to_owned());
        let thread = thread.spawn(move || write_states(&slot, &file, &of_thread))?;
        Ok(Self { mailbox, thread: Some(thread) })
    }

    /// Submits `state`, all data of which has been written. If the thread has failed,
    /// [`finish`](Self::finish) returns the error.
    pub(super) fn submit(&self, state: ReceiveState) {
        self.mailbox.pending.lock().state = Some(state);
        self.mailbox.changed.notify_one();
    }

    /// Waits until all submitted states are durable.
    ///
    /// # Errors
    /// The error of syncing the data or storing the state.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        self.mailbox.pending.lock().is_closed = true;
        self.mailbox.changed.notify_one();
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        let _ = self.join();
    }
}

fn write_states(slot: &FileSlot, file: &File, mailbox: &StateMailbox) -> io::Result<()> {
    loop {
        let state = {
            let mut pending = mailbox.pending.lock();
            loop {
                match pending.state.take() {
                    Some(state) => break state,
                    None if pending.is_closed => return Ok(()),
                    None => mailbox.changed.wait(&mut pending),
                }
            }
        };
        file.sync_data()?;
        state.store(slot)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(inode: u64, offset: u64) -> ReceiveState {
        let since = Some("before".to_owned());
        ReceiveState {
            version: STATE_VERSION,
            inode,
            offset,
            size: 99,
            identity: 7,
            since,
            overwrite: false,
        }
    }

    /// Creates a part of 50 bytes in a directory of its own.
    fn part() -> (tempfile::TempDir, FileSlot, Arc<File>) {
        let dir = tempfile::tempdir().unwrap();
        let part = dir.path().join("x.part");
        std::fs::write(&part, [1; 50]).unwrap();
        let slot = FileSlot::of(&dir.path().join("x")).unwrap();
        (dir, slot, Arc::new(File::open(&part).unwrap()))
    }

    #[test]
    fn the_newest_state_is_stored_when_finish_returns() {
        let (_home, slot, file) = part();
        let inode = file.metadata().unwrap().ino();
        let writer = StateWriter::start(&slot, &file).unwrap();
        for offset in 1..=50 {
            writer.submit(state(inode, offset));
        }
        writer.finish().unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), Some(state(inode, 50)));
    }

    #[test]
    fn a_state_of_another_or_longer_file_is_ignored() {
        let (_home, slot, file) = part();
        let inode = file.metadata().unwrap().ino();
        assert_eq!(ReceiveState::load(&slot, &file), None);
        for (wrong, right) in [(state(inode + 1, 50), false), (state(inode, 51), false)]
            .into_iter()
            .chain([(state(inode, 50), true)])
        {
            wrong.store(&slot).unwrap();
            assert_eq!(ReceiveState::load(&slot, &file).is_some(), right, "{wrong:?}");
        }
        ReceiveState::remove(&slot).unwrap();
        ReceiveState::remove(&slot).unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), None);
    }

    #[test]
    fn a_state_is_ignored_if_too_long_or_a_symlink_or_if_its_part_has_two_links() {
        let (dir, slot, file) = part();
        let at = |name: &str| dir.path().join(name);
        let inode = file.metadata().unwrap().ino();
        state(inode, 50).store(&slot).unwrap();
        assert!(ReceiveState::load(&slot, &file).is_some());
        std::fs::hard_link(at("x.part"), at("y")).unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), None);
        std::fs::remove_file(at("y")).unwrap();
        std::fs::rename(at("x.part.state"), at("real")).unwrap();
        std::os::unix::fs::symlink("real", at("x.part.state")).unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), None);
        let text = std::fs::read(at("real")).unwrap();
        std::fs::remove_file(at("x.part.state")).unwrap();
        let long = [&text[..], &vec![b' '; 1 << 20]].concat();
        std::fs::write(at("x.part.state"), long).unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), None);
    }

    #[test]
    fn a_symlink_at_the_name_of_the_new_state_is_not_followed() {
        let (dir, slot, file) = part();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "whole").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join("x.part.state.new")).unwrap();
        state(file.metadata().unwrap().ino(), 50).store(&slot).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
        assert!(ReceiveState::load(&slot, &file).is_some());
        let made = std::fs::symlink_metadata(dir.path().join("x.part.state")).unwrap();
        assert_eq!((made.is_file(), made.mode() & 0o777), (true, 0o600));
    }
}
