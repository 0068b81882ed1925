//! How far a file that is being received is whole and durable.
//!
//! `NAME.part.state` is replaced as a whole, after the data it speaks of were synced, by a thread
//! of its own: the stream goes on meanwhile, and when the disk is slow only the newest state counts.
//! It names the inode it speaks of, so a state that was left behind means nothing for another file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

use serde::{Deserialize, Serialize};

use crate::host::sync_dir_of;
use crate::part::with_suffix;

/// What is known of a part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
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

/// What [`State::version`] is.
pub(super) const VERSION: u32 = 1;

impl State {
    /// The state of `file`, the part at `part`; `None` when there is none that can be believed.
    pub(super) fn load(part: &Path, file: &File) -> Option<Self> {
        let text = fs::read(path_of(part)).ok()?;
        let state: Self = serde_json::from_slice(&text).ok()?;
        let meta = file.metadata().ok()?;
        let is_its = state.version == VERSION
            && state.inode == meta.ino()
            && state.offset <= meta.len()
            && state.offset > 0;
        is_its.then_some(state)
    }

    /// Replaces the state of `part`.
    fn store(&self, part: &Path) -> io::Result<()> {
        let path = path_of(part);
        let new = with_suffix(&path, ".new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        fs::rename(&new, &path)
    }

    /// There is nothing to go on with, also after a power cut: an old state must not come back
    /// beside a part that is written anew.
    pub(super) fn remove(part: &Path) -> io::Result<()> {
        match fs::remove_file(path_of(part)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_dir_of(part),
        }
    }
}

fn path_of(part: &Path) -> PathBuf {
    with_suffix(part, ".state")
}

/// Makes data durable and then says so.
pub(super) struct Keeper {
    to: Option<Sender<State>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Keeper {
    /// For `file`, the part at `part`.
    pub(super) fn start(part: &Path, file: &Arc<File>) -> io::Result<Self> {
        let (to, states) = channel();
        let (part, file) = (part.to_owned(), Arc::clone(file));
        let thread = Builder::new().name("cowslip-keep".to_owned());
        let thread = thread.spawn(move || keep(&part, &file, &states))?;
        Ok(Self { to: Some(to), thread: Some(thread) })
    }

    /// All that `state` speaks of has been written. When the thread has failed, the end says why.
    pub(super) fn note(&self, state: State) {
        if let Some(to) = &self.to {
            let _ = to.send(state);
        }
    }

    /// Waits until everything noted is durable.
    ///
    /// # Errors
    /// What syncing or storing failed with.
    pub(super) fn end(mut self) -> io::Result<()> {
        self.to = None;
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.to = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn keep(part: &Path, file: &File, states: &Receiver<State>) -> io::Result<()> {
    while let Ok(mut state) = states.recv() {
        while let Ok(newer) = states.try_recv() {
            state = newer;
        }
        file.sync_data()?;
        state.store(part)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(inode: u64, offset: u64) -> State {
        let since = Some("before".to_owned());
        State { version: VERSION, inode, offset, size: 99, identity: 7, since, overwrite: false }
    }

    #[test]
    fn the_newest_state_is_there_when_the_keeper_has_ended() {
        let home = tempfile::tempdir().unwrap();
        let part = home.path().join("x.part");
        fs::write(&part, [1; 50]).unwrap();
        let file = Arc::new(File::open(&part).unwrap());
        let inode = file.metadata().unwrap().ino();
        let keeper = Keeper::start(&part, &file).unwrap();
        for offset in 1..=50 {
            keeper.note(state(inode, offset));
        }
        keeper.end().unwrap();
        assert_eq!(State::load(&part, &file), Some(state(inode, 50)));
    }

    #[test]
    fn a_state_of_another_file_or_of_a_longer_one_is_none() {
        let home = tempfile::tempdir().unwrap();
        let part = home.path().join("x.part");
        fs::write(&part, [1; 50]).unwrap();
        let file = File::open(&part).unwrap();
        let inode = file.metadata().unwrap().ino();
        assert_eq!(State::load(&part, &file), None);
        for (wrong, right) in [(state(inode + 1, 50), false), (state(inode, 51), false)]
            .into_iter()
            .chain([(state(inode, 50), true)])
        {
            wrong.store(&part).unwrap();
            assert_eq!(State::load(&part, &file).is_some(), right, "{wrong:?}");
        }
        State::remove(&part).unwrap();
        State::remove(&part).unwrap();
        assert_eq!(State::load(&part, &file), None);
    }
}
