//! Disks that are streams: writing, finishing and the periodic work.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;

use super::Disk;
use super::layers::Top;
use crate::config::FinishWhen;
use crate::host::is_being_killed;
use crate::stream::output::{DrainTimeout, Output};
use crate::stream::{Stream, UnmountPolicy};

/// Checks each process only once for whether it is being killed: hundreds of requests may come from
/// one.
fn cached_kill_check() -> impl Fn(u32) -> bool {
    let known = RefCell::new(HashMap::new());
    move |pid| *known.borrow_mut().entry(pid).or_insert_with(|| is_being_killed(pid))
}

impl Disk {
    /// The stream, if the disk is one.
    #[must_use]
    pub fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    /// Whether writes and closes fail with `EIO`.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.is_latched()
            || matches!(&self.stream, Some(Stream::Output(output)) if output.sync().is_err())
    }

    /// Writes to the output stream `output` of this disk; `reply` is called once. `client` is the
    /// thread that waits for the reply; `None` for the kernel's page cache.
    ///
    /// The errors passed to `reply` are those of [`Output::write`].
    pub fn stream_write(
        &self,
        output: &Output,
        buf: &[u8],
        offset: u64,
        client: Option<u32>,
        reply: Box<dyn FnOnce(io::Result<()>) + Send>,
    ) {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_some_and(|end| end <= output.size()) {
            self.touch_times(&Top::Nothing);
        }
        match client {
            Some(client) => output.write(offset, buf, client, reply),
            None => output.write_back(offset, buf, reply),
        }
    }

    /// Ends a stream when its mount ends; returns a line for the user, if there is one.
    ///
    /// # Errors
    /// A line for the user when the stream is incomplete.
    pub fn end_stream(
        &self,
        policy: UnmountPolicy,
        timeout: DrainTimeout,
    ) -> Result<Option<String>, String> {
        match &self.stream {
            None => Ok(None),
            Some(stream) => stream.end_stream(policy, &|| self.has_writers(), timeout),
        }
    }

    /// Maintains a stream; called every second.
    pub fn tick_stream(&self) {
        match &self.stream {
            Some(Stream::Output(output)) => output.tick(cached_kill_check()),
            Some(Stream::Input { input, .. }) => input.release_killed(cached_kill_check()),
            None => {}
        }
    }

    /// Finishes a stream that ends with its last writer; called when a handle that may write was
    /// released.
    pub fn finish_after_last_writer(&self) {
        if let Some(Stream::Output(output)) = &self.stream
            && output.finish_when() == FinishWhen::Close
            && !self.has_writers()
        {
            output.finish_in_background();
        }
    }
}
