//! What an output stream asks of its sink.

use std::io::{self, IoSlice};
use std::ops::Range;

/// What becomes of a sink by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkEvent {
    /// It has failed.
    Failed(String),
    /// Nobody takes any more bytes, which is a failure if there are more.
    Gone(String),
}

/// Hears of it, in a thread of the sink's.
pub type SinkCallback = Box<dyn Fn(SinkEvent) + Send>;

/// Where the bytes go. One thread calls, in the order of the disk; a call takes as long as it
/// takes and is `ECANCELED` once the stream is stopped.
pub trait Sink: Send {
    /// Gets ready, and waits for a reader.
    ///
    /// # Errors
    /// `ECANCELED`; the host's errno.
    fn prepare(&mut self) -> io::Result<()>;

    /// Has `tell` called when the sink fails or goes away while nothing is sent; called once, after
    /// [`prepare`](Self::prepare).
    fn watch(&mut self, tell: SinkCallback);

    /// Sends `parts`, the disk's bytes from `offset` on.
    ///
    /// # Errors
    /// `ECANCELED`; the host's errno, `EPIPE` when nobody reads.
    fn send_data(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Sends what was written as zeros.
    ///
    /// # Errors
    /// As [`send_data`](Self::send_data).
    fn send_zeros(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Sends what was never written.
    ///
    /// # Errors
    /// As [`send_data`](Self::send_data).
    fn send_hole(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Whether it takes bytes for an offset that was sent before.
    fn can_rewrite(&self) -> bool;

    /// An error of the calls above, for the user.
    fn explain(&self, error: &io::Error) -> String;

    /// The stream is whole, and `end` bytes long.
    ///
    /// # Errors
    /// A line: it was not all accepted, or a program failed.
    fn finish(self: Box<Self>, end: u64) -> Result<(), String>;

    /// The stream never gets whole.
    fn abort(self: Box<Self>);
}

/// Looks at a sink from other threads.
pub trait SinkMonitor: Send + Sync {
    /// `file`, `cmd` and the like.
    fn kind(&self) -> &'static str;
    /// As the user wrote it.
    fn describe(&self) -> String;
    /// The disk's bytes before this offset were accepted.
    fn accepted(&self) -> u64;
    /// Why it cannot work any more, if that is known already.
    fn failure(&self) -> Option<String>;
    /// Ends its programs at once.
    fn kill(&self);
}
