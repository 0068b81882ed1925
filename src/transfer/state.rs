//! How far a file that is being received is whole and durable.
//!
//! `NAME.part.state` is replaced as a whole, after the data it speaks of were synced, by a thread
//! of its own: the stream goes on meanwhile, and when the disk is slow only the newest state counts.
//! It names the inode it speaks of, so a state that was left behind means nothing for another file.

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

/// The longest state: a snapshot's name of 255 bytes, each escaped, and a few numbers.
const MAX_STATE_SIZE: u64 = 8 << 10;

/// What is known of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiveState {
    /// The version of this format.
    pub(super) version: u32,
    /// The part's inode.
    pub(super) inode: u64,
    /// All before this offset is right and durable.
    pub(super) offset: u64,
    /// The size of the whole.
    pub(super) size: u64,
    /// Of the source; 0: unknown.
    pub(super) identity: u64,
    /// The snapshot that the stream goes on from, if it holds only changes.
    pub(super) since: Option<String>,
    /// Whether the file it becomes may replace another.
    pub(super) overwrite: bool,
}

/// What [`ReceiveState::version`] is.
pub(super) const STATE_VERSION: u32 = 1;

impl ReceiveState {
    /// The state of `file`, the part of `slot`; `None` when there is none that can be believed.
    pub(super) fn load(slot: &FileSlot, file: &File) -> Option<Self> {
        let text =
            confined::read_file(slot.dir(), slot.with_suffix(STATE_SUFFIX), MAX_STATE_SIZE).ok()?;
        let state = Self::decode(&text)?;
        let meta = file.metadata().ok()?;
        // A second name of it would be written to as well.
        let is_its = state.inode == meta.ino()
            && meta.nlink() == 1
            && state.offset <= meta.len()
            && state.offset > 0;
        is_its.then_some(state)
    }

    /// What `text` says, if that is a state of this version.
    pub(super) fn decode(text: &[u8]) -> Option<Self> {
        let state: Self = serde_json::from_slice(text).ok()?;
        (state.version == STATE_VERSION).then_some(state)
    }

    /// Replaces the state of the part of `slot`.
    fn store(&self, slot: &FileSlot) -> io::Result<()> {
        let (name, new) = (slot.with_suffix(STATE_SUFFIX), slot.with_suffix(NEW_STATE_SUFFIX));
        confined::replace_file(slot.dir(), name, new, &serde_json::to_vec(self)?)
    }

    /// There is nothing to go on with, also after a power cut: an old state must not come back
    /// beside a part that is written anew.
    pub(super) fn remove(slot: &FileSlot) -> io::Result<()> {
        let name = slot.with_suffix(STATE_SUFFIX);
        match rustix::fs::unlinkat(slot.dir(), name, rustix::fs::AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(()) => sync_dir(slot.dir()),
        }
    }
}

/// What is added to the name of what is received.
const STATE_SUFFIX: &str = ".part.state";
/// And until it is whole.
const NEW_STATE_SUFFIX: &str = ".part.state.new";

/// Makes data durable and then says so.
pub(super) struct StateWriter {
    mailbox: Arc<StateMailbox>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

/// What the thread is to do: only the newest state counts, so there is room for one.
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
    /// For `file`, the part of `slot`.
    pub(super) fn start(slot: &FileSlot, file: &Arc<File>) -> io::Result<Self> {
        let desk = Arc::<StateMailbox>::default();
        let (slot, file, orders) = (slot.clone(), Arc::clone(file), Arc::clone(&desk));
        let thread = Builder::new().name("cowslip-keep".to_owned());
        let thread = thread.spawn(move || write_states(&slot, &file, &orders))?;
        Ok(Self { mailbox: desk, thread: Some(thread) })
    }

    /// All that `state` speaks of has been written. When the thread has failed, the end says why.
    pub(super) fn submit(&self, state: ReceiveState) {
        self.mailbox.pending.lock().state = Some(state);
        self.mailbox.changed.notify_one();
    }

    /// Waits until everything noted is durable.
    ///
    /// # Errors
    /// What syncing or storing failed with.
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

fn write_states(slot: &FileSlot, file: &File, desk: &StateMailbox) -> io::Result<()> {
    loop {
        let state = {
            let mut order = desk.pending.lock();
            loop {
                match order.state.take() {
                    Some(state) => break state,
                    None if order.is_closed => return Ok(()),
                    None => desk.changed.wait(&mut order),
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

    /// A part of 50 bytes in a directory of its own.
    fn part() -> (tempfile::TempDir, FileSlot, Arc<File>) {
        let home = tempfile::tempdir().unwrap();
        let part = home.path().join("x.part");
        std::fs::write(&part, [1; 50]).unwrap();
        let slot = FileSlot::of(&home.path().join("x")).unwrap();
        (home, slot, Arc::new(File::open(&part).unwrap()))
    }

    #[test]
    fn the_newest_state_is_there_when_the_keeper_has_ended() {
        let (_home, slot, file) = part();
        let inode = file.metadata().unwrap().ino();
        let keeper = StateWriter::start(&slot, &file).unwrap();
        for offset in 1..=50 {
            keeper.submit(state(inode, offset));
        }
        keeper.finish().unwrap();
        assert_eq!(ReceiveState::load(&slot, &file), Some(state(inode, 50)));
    }

    #[test]
    fn a_state_of_another_file_or_of_a_longer_one_is_none() {
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
    fn a_state_is_a_short_file_of_one_name_and_no_link() {
        let (home, slot, file) = part();
        let at = |name: &str| home.path().join(name);
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
    fn what_lies_in_the_way_of_a_new_state_is_not_written_to() {
        let (home, slot, file) = part();
        let victim = home.path().join("victim");
        std::fs::write(&victim, "whole").unwrap();
        std::os::unix::fs::symlink(&victim, home.path().join("x.part.state.new")).unwrap();
        state(file.metadata().unwrap().ino(), 50).store(&slot).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
        assert!(ReceiveState::load(&slot, &file).is_some());
        let made = std::fs::symlink_metadata(home.path().join("x.part.state")).unwrap();
        assert_eq!((made.is_file(), made.mode() & 0o777), (true, 0o600));
    }
}
