//! Disks that are streams: opening one, and its handling by the mount.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::bottom::Bottom;
use super::open::{OpenContext, OpenError, OpenedDisk, initial_owner, new_disk};
use super::{Disk, LayerStack, Top};
use crate::config::{DiskMode, DiskSpec, FinishWhen, Flow, Resize, StreamSpec, format_size};
use crate::host::is_being_killed;
use crate::layer::{Layer, WritableLayer};
use crate::overlay::keep::temporary_dir;
use crate::stream::input::Input;
use crate::stream::output::{DrainTimeout, Output};
use crate::stream::sink::{HostSink, StreamContext};
use crate::stream::source::HostSource;
use crate::stream::stop::Stop;
use crate::stream::{Stream, UnmountPolicy};

/// Opens and starts the stream `stream` of the disk `spec`.
///
/// # Errors
/// [`OpenError`]; nothing is left running then.
pub(super) fn open(
    spec: &DiskSpec,
    stream: &StreamSpec,
    setting: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    let place = StreamContext {
        mountpoint: setting.mountpoint,
        mount_dev: setting.mount_dev,
        stdio: setting.stdio,
    };
    let refused = |why: String| OpenError::Stream(why);
    let failed = |error: io::Error| OpenError::Stream(error.to_string());
    let stop = Stop::new().map_err(failed)?;
    let mut spec = spec.clone();
    spec.resize = Resize::Fixed;
    let size = format_size(stream.size);
    let (started, layers, summary) = match &stream.flow {
        Flow::Out(target) => {
            spec.mode = DiskMode::ReadWrite;
            let sink = HostSink::open(stream, target, &place, stop.clone());
            let sink = sink.map_err(|error| refused(error.to_string()))?;
            let watch = sink.monitor();
            let goes_to = watch.describe();
            let output = Output::start(
                &spec.name,
                stream,
                Box::new(sink),
                Box::new(watch),
                stop,
                temporary_dir(),
            );
            let output = output.map_err(failed)?;
            let bottom = Arc::clone(&output) as Arc<dyn Layer>;
            let top = Top::Base(Arc::clone(&output) as Arc<dyn WritableLayer>);
            let complete = match stream.finish {
                FinishWhen::Explicit => "after 'cowslip finish'",
                FinishWhen::Umount => "at umount",
                FinishWhen::Close => "after its last writer",
            };
            let summary = format!("{size}, stream to {goes_to}: complete {complete}");
            (Stream::Output(output), LayerStack::new(top, None, Some(bottom)), summary)
        }
        Flow::In { source: supply, spool } => {
            spec.mode = DiskMode::ReadOnly;
            let source = HostSource::open(stream, supply, &place, stop.clone());
            let source = source.map_err(|error| refused(error.to_string()))?;
            let comes_from = source.monitor();
            let described = comes_from.describe();
            let input = Input::start(
                &spec.name,
                stream.size,
                stream.read_window,
                *spool,
                Box::new(source),
                stop,
            );
            let input = input.map_err(failed)?;
            let bottom = Arc::clone(&input) as Arc<dyn Layer>;
            let summary = format!("{size}, stream from {described}");
            let started = Stream::Input { input, monitor: comes_from };
            (started, LayerStack::new(Top::Nothing, None, Some(bottom)), summary)
        }
    };
    let bottom = Bottom::Blank(stream.size);
    let owner = initial_owner(&spec, &bottom, setting);
    let mut disk = new_disk(&spec, Uuid::new_v4(), layers, bottom, owner);
    disk.source = started.describe();
    disk.stream = Some(started);
    Ok(OpenedDisk { disk, summary, notes: Vec::new() })
}

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

    /// Writes to the output stream `output` of this disk; `reply` is called once.
    ///
    /// The errors passed to `reply` are those of [`Output::write`], and `ENOSPC` past the end.
    pub fn stream_write(
        &self,
        output: &Output,
        buf: &[u8],
        offset: u64,
        client: u32,
        reply: Box<dyn FnOnce(io::Result<()>) + Send>,
    ) {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > output.size()) {
            return reply(Err(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        self.touch_times(&Top::Nothing);
        output.write(offset, buf, client, reply);
    }

    /// Ends a stream when its mount ends; returns a line for the user, if there is one.
    ///
    /// # Errors
    /// A line for the user when the stream is incomplete.
    pub fn end_stream(
        &self,
        ending: UnmountPolicy,
        patience: DrainTimeout,
    ) -> Result<Option<String>, String> {
        match &self.stream {
            None => Ok(None),
            Some(stream) => stream.end_stream(ending, &|| self.has_writers(), patience),
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
