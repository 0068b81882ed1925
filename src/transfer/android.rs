//! Sending a whole file as an Android sparse image.
//!
//! Its header counts what follows, so the runs are found first, by the map of the source: holes are
//! zeros, all else is bytes.

use std::io::{self, Write};

use super::source::Source;
use super::zeros::Holds;
use super::{BUFFER, Told, TransferError};
use crate::formats::android::{Content, Plan, Run, Writer, whole_blocks};
use crate::host::said;

/// Why it failed.
enum Failed {
    In(io::Error),
    Out(io::Error),
}

/// Sends all of `source`.
///
/// # Errors
/// A line: a pipe, which nobody knows the runs of; a size that the format has no blocks for; what
/// cannot be read or written.
pub(super) fn send<W: Write>(
    source: &Source,
    out: W,
    tell: &mut dyn FnMut(&Told),
) -> Result<Told, TransferError> {
    let Some(size) = source.size() else {
        return Err(TransferError::Refused(
            "an Android sparse image begins with what it will hold, which nobody knows of a pipe: \
             name a file"
                .to_owned(),
        ));
    };
    let (runs, plan) = plan(source, size)?;
    let mut told = Told { size: Some(size), ..Told::default() };
    let write = || -> Result<(), Failed> {
        let mut writer = Writer::new(out, plan).map_err(Failed::Out)?;
        let mut buffer = vec![0; BUFFER];
        for run in &runs {
            writer.run(run).map_err(Failed::Out)?;
            let len = run.range.end - run.range.start;
            if run.content == Content::Data {
                data(source, run, &mut writer, &mut buffer, &mut |len| {
                    told.data += len;
                    told.reached += len;
                    tell(&told);
                })?;
            } else {
                told.holes += len;
                told.reached += len;
                tell(&told);
            }
        }
        writer.finish().map(drop).map_err(Failed::Out)
    };
    match write() {
        Ok(()) if source.is_shorter() => Err(source.got_shorter()),
        Ok(()) => Ok(told),
        Err(Failed::Out(error)) => Err(TransferError::Output(said(&error))),
        Err(Failed::In(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(source.got_shorter())
        }
        Err(Failed::In(error)) => Err(TransferError::host("read", source.path(), &error)),
    }
}

/// What there is to send, and the header of that.
fn plan(source: &Source, size: u64) -> Result<(Vec<Run>, Plan), TransferError> {
    let path = source.path();
    let refused = |error: io::Error| {
        let line = format!("'{}': {}", path.display(), said(&error));
        TransferError::Refused(line)
    };
    let found = map(source, size).map_err(|error| TransferError::host("read", path, &error))?;
    let runs = whole_blocks(size, found).map_err(refused)?;
    let plan = Plan::new(size, &runs).map_err(refused)?;
    Ok((runs, plan))
}

/// What `source`, a file or a device, holds where.
fn map(source: &Source, size: u64) -> io::Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut left = 0..size;
    while !left.is_empty() {
        let (range, holds) = source.run(&left)?;
        left.start = range.end;
        let content = match holds {
            Holds::Data => Content::Data,
            Holds::Zeros => Content::Zeros,
        };
        runs.push(Run { range, content });
    }
    Ok(runs)
}

fn data<W: Write>(
    source: &Source,
    run: &Run,
    writer: &mut Writer<W>,
    buffer: &mut [u8],
    sent: &mut dyn FnMut(u64),
) -> Result<(), Failed> {
    let mut at = run.range.start;
    while at < run.range.end {
        let len = usize::try_from(run.range.end - at).unwrap_or(BUFFER).min(BUFFER);
        source.read_at(&mut buffer[..len], at).map_err(Failed::In)?;
        writer.bytes(&buffer[..len]).map_err(Failed::Out)?;
        at += len as u64;
        sent(len as u64);
    }
    Ok(())
}
