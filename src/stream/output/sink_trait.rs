//! The interface between an output stream and its sink.

use std::io::{self, IoSlice};
use std::ops::Range;

/// An event that a sink reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkEvent {
    /// The sink has failed.
    Failed(String),
    /// The reader is gone, which is a failure if there is more to send.
    Gone(String),
}

/// A callback for sink events, called in a thread of the sink.
pub type SinkCallback = Box<dyn Fn(SinkEvent) + Send>;

/// The target of an output stream. One thread calls it, in the order of the disk. A call may block
/// without limit, and returns `ECANCELED` once the stream is stopped.
pub trait Sink: Send {
    /// Prepares the sink, and waits for a reader if it needs one.
    ///
    /// # Errors
    /// `ECANCELED` once stopped; otherwise the host's errno.
    fn prepare(&mut self) -> io::Result<()>;

    /// Makes the sink call `on_event` when it fails or goes away while nothing is being sent. Called
    /// once, after [`prepare`](Self::prepare).
    fn watch(&mut self, on_event: SinkCallback);

    /// Sends `parts`, the bytes of the disk from `offset` on.
    ///
    /// # Errors
    /// `ECANCELED` once stopped; otherwise the host's errno, `EPIPE` if there is no reader.
    fn send_data(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Sends a range that was written as zeros.
    ///
    /// # Errors
    /// As for [`send_data`](Self::send_data).
    fn send_zeros(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Sends a range that was never written.
    ///
    /// # Errors
    /// As for [`send_data`](Self::send_data).
    fn send_hole(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Returns whether the sink accepts bytes for an offset that was already sent.
    fn can_rewrite(&self) -> bool;

    /// Explains an error of the calls above to the user.
    fn explain(&self, error: &io::Error) -> String;

    /// Completes the stream, which is `end` bytes long.
    ///
    /// # Errors
    /// A line for the user: not everything was accepted, or a program failed.
    fn finish(self: Box<Self>, end: u64) -> Result<(), String>;

    /// Aborts the stream, which will never be complete.
    fn abort(self: Box<Self>);
}
