//! Disks that are streams: connects the stream to its sink or source and starts it.

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::context::OpenContext;
use super::error::OpenError;
use super::opened::OpenedDisk;
use super::owner::initial_owner;
use crate::config::{
    DiskMode, DiskSpec, FinishWhen, Flow, Resize, SinkSpec, SourceSpec, Spool, StreamSpec,
    format_size,
};
use crate::disk::Disk;
use crate::disk::base_description::BaseDescription;
use crate::disk::layers::{LayerStack, Top};
use crate::host::temporary_dir;
use crate::layer::{Layer, WritableLayer};
use crate::program::stop::Stop;
use crate::stream::Stream;
use crate::stream::context::StreamContext;
use crate::stream::input::Input;
use crate::stream::output::Output;
use crate::stream::sink::{HostSink, StreamOpenError};
use crate::stream::source::HostSource;

/// A started stream, its layers and a summary for the user.
struct StartedStream {
    stream: Stream,
    layers: LayerStack,
    summary: String,
}

/// Opens and starts the stream `stream` of the disk `spec`.
///
/// # Errors
/// [`OpenError`]; nothing is left running then.
pub(super) fn open(
    spec: &DiskSpec,
    stream: &StreamSpec,
    context: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    let streams = StreamContext {
        mountpoint: context.mountpoint,
        mount_dev: context.mount_dev,
        stdio: context.stdio,
    };
    let stop = Stop::new().map_err(failed)?;
    let mut spec = spec.clone();
    spec.resize = Resize::Fixed;
    let StartedStream { stream: started, layers, summary } = match &stream.flow {
        Flow::Out(target) => {
            spec.mode = DiskMode::ReadWrite;
            start_output(&spec.name, stream, target, &streams, stop)?
        }
        Flow::In { source, spool } => {
            spec.mode = DiskMode::ReadOnly;
            start_input(&spec.name, stream, (source, *spool), &streams, stop)?
        }
    };
    let description = BaseDescription::Blank(stream.size);
    let owner = initial_owner(&spec, &description, context);
    let mut disk = Disk::new(&spec, Uuid::new_v4(), layers, description, owner);
    disk.source = started.describe();
    disk.stream = Some(started);
    Ok(OpenedDisk { disk, summary, notes: Vec::new() })
}

fn start_output(
    name: &str,
    stream: &StreamSpec,
    target: &SinkSpec,
    streams: &StreamContext<'_>,
    stop: Stop,
) -> Result<StartedStream, OpenError> {
    let sink = HostSink::open(stream, target, streams, stop.clone()).map_err(refused)?;
    let monitor = sink.monitor();
    let sink_name = monitor.describe();
    let output = Output::start(name, stream, Box::new(sink), monitor, stop, temporary_dir());
    let output = output.map_err(failed)?;
    let bottom = Arc::clone(&output) as Arc<dyn Layer>;
    let top = Top::Writable(Arc::clone(&output) as Arc<dyn WritableLayer>);
    let complete = match stream.finish {
        FinishWhen::Explicit => "after 'cowslip finish'",
        FinishWhen::Umount => "at umount",
        FinishWhen::Close => "after its last writer",
    };
    let size = format_size(stream.size);
    Ok(StartedStream {
        stream: Stream::Output(output),
        layers: LayerStack::new(top, Vec::new(), Some(bottom)),
        summary: format!("{size}, stream to {sink_name}: complete {complete}"),
    })
}

fn start_input(
    name: &str,
    stream: &StreamSpec,
    (source, spool): (&SourceSpec, Spool),
    streams: &StreamContext<'_>,
    stop: Stop,
) -> Result<StartedStream, OpenError> {
    let source = HostSource::open(stream, source, streams, stop.clone()).map_err(refused)?;
    let monitor = source.monitor();
    let source_name = monitor.describe();
    let (size, read_window) = (stream.size, stream.read_window);
    let input = Input::start(name, size, read_window, spool, Box::new(source), stop);
    let input = input.map_err(failed)?;
    let bottom = Arc::clone(&input) as Arc<dyn Layer>;
    Ok(StartedStream {
        stream: Stream::Input { input, monitor },
        layers: LayerStack::read_only(Vec::new(), Some(bottom)),
        summary: format!("{}, stream from {source_name}", format_size(size)),
    })
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn refused(error: StreamOpenError) -> OpenError {
    OpenError::Stream(error.to_string())
}

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn failed(error: io::Error) -> OpenError {
    OpenError::Stream(error.to_string())
}
