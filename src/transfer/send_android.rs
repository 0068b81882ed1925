//! Sending a whole file as an Android sparse image.
//!
//! The header of the format counts the chunks, so the runs are found first, from the source's map
//! of holes: holes are sent as zeros, everything else as data.

use std::io::{self, Write};

use super::send_error::SendError;
use super::source::TransferSource;
use super::{BUFFER_SIZE, TransferError, TransferProgress};
use crate::formats::android::{
    AndroidContent, AndroidPlan, AndroidRun, AndroidWriter, whole_blocks,
};
use crate::host::os_message;

/// Sends all of `source` as an Android sparse image.
///
/// # Errors
/// A line for the user: `source` is a pipe, whose runs are unknown; its size is not representable
/// in the format; or a read or write failed.
pub(super) fn send<W: Write>(
    source: &TransferSource,
    out: W,
    on_progress: &mut dyn FnMut(&TransferProgress),
) -> Result<TransferProgress, TransferError> {
    let Some(size) = source.size() else {
        return Err(TransferError::Refused(
            "an Android sparse image begins with what it will hold, which nobody knows of a pipe: \
             name a file"
                .to_owned(),
        ));
    };
    let (runs, plan) = plan_image(source, size)?;
    let mut progress = TransferProgress { size: Some(size), ..TransferProgress::default() };
    let write = || -> Result<(), SendError> {
        let mut writer = AndroidWriter::new(out, plan).map_err(SendError::Output)?;
        let mut buffer = vec![0; BUFFER_SIZE];
        for run in &runs {
            writer.start_run(run).map_err(SendError::Output)?;
            let len = run.range.end - run.range.start;
            if run.content == AndroidContent::Data {
                send_data(source, run, &mut writer, &mut buffer, &mut |len| {
                    progress.data += len;
                    progress.reached += len;
                    on_progress(&progress);
                })?;
            } else {
                progress.holes += len;
                progress.reached += len;
                on_progress(&progress);
            }
        }
        writer.finish().map(drop).map_err(SendError::Output)
    };
    match write() {
        Ok(()) if source.has_shrunk() => Err(source.shrunk_error()),
        Ok(()) => Ok(progress),
        Err(failed) => Err(failed.explain(source)),
    }
}

/// Finds the runs to send and computes the header.
fn plan_image(
    source: &TransferSource,
    size: u64,
) -> Result<(Vec<AndroidRun>, AndroidPlan), TransferError> {
    let path = source.path();
    let refused = |error: io::Error| {
        let line = format!("'{}': {}", path.display(), os_message(&error));
        TransferError::Refused(line)
    };
    let found =
        source_runs(source, size).map_err(|error| TransferError::host("read", path, &error))?;
    let runs = whole_blocks(size, found).map_err(refused)?;
    let plan = AndroidPlan::new(size, &runs).map_err(refused)?;
    Ok((runs, plan))
}

/// Finds the runs of `source`, which is a file or a device.
fn source_runs(source: &TransferSource, size: u64) -> io::Result<Vec<AndroidRun>> {
    let mut runs = Vec::new();
    let mut left = 0..size;
    while !left.is_empty() {
        let (range, content) = source.extent_at(&left)?;
        left.start = range.end;
        runs.push(AndroidRun { range, content: content.into() });
    }
    Ok(runs)
}

fn send_data<W: Write>(
    source: &TransferSource,
    run: &AndroidRun,
    writer: &mut AndroidWriter<W>,
    buffer: &mut [u8],
    sent: &mut dyn FnMut(u64),
) -> Result<(), SendError> {
    let mut at = run.range.start;
    while at < run.range.end {
        let len = usize::try_from(run.range.end - at).unwrap_or(BUFFER_SIZE).min(BUFFER_SIZE);
        source.read_at(&mut buffer[..len], at).map_err(SendError::Source)?;
        writer.write_bytes(&buffer[..len]).map_err(SendError::Output)?;
        at += len as u64;
        sent(len as u64);
    }
    Ok(())
}
