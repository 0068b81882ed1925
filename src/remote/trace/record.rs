//! The recording of a trace.

use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Trace;
use crate::config::Overwrite;
use crate::host::os_message;
use crate::part_file::UnnamedFile;

/// For how long the reads of a mount are recorded.
const RECORD_TIME: Duration = Duration::from_secs(60);

/// Records what is read of an image in the first minute, or until it is closed.
pub(in crate::remote) struct Recorder {
    /// Absolute path of the trace.
    file: PathBuf,
    end: Instant,
    is_recording: AtomicBool,
    trace: Mutex<Trace>,
}

impl Recorder {
    /// Begins to record into the file at `file`, which does not exist yet.
    pub(super) fn new(file: &Path) -> Self {
        Self {
            file: file.to_owned(),
            end: Instant::now() + RECORD_TIME,
            is_recording: AtomicBool::new(true),
            trace: Mutex::default(),
        }
    }

    /// Whether reads are still recorded.
    pub(super) fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Relaxed)
    }

    /// Notes that `range` was read.
    pub(super) fn note(&self, range: &Range<u64>) {
        if !self.is_recording() || Instant::now() >= self.end {
            return;
        }
        self.trace.lock().add(range);
    }

    /// Writes the trace once its time is over. Waits for the host.
    pub(super) fn maintain(&self) {
        if Instant::now() >= self.end {
            self.finish();
        }
    }

    /// Writes the trace, unless it is written already or nothing was read. A file that somebody else has
    /// made meanwhile stays.
    fn finish(&self) {
        if !self.is_recording.swap(false, Ordering::Relaxed) {
            return;
        }
        let trace = std::mem::take(&mut *self.trace.lock());
        if trace.ranges.is_empty() {
            return;
        }
        if let Err(why) = write(&self.file, trace.to_text().as_bytes()) {
            log::warn!("the trace '{}' is not written: {why}", self.file.display());
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Writes a new file, whole or not at all.
fn write(file: &Path, bytes: &[u8]) -> Result<(), String> {
    let new = UnnamedFile::create(file, 0o644).map_err(|error| error.to_string())?;
    let written: io::Result<()> = new.file().write_all(bytes);
    match written {
        Ok(()) => new.commit(Overwrite::No),
        Err(error) => {
            new.discard();
            Err(os_message(&error))
        }
    }
}
