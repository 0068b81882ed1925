//! Writing records one after the other: a new log, or a part of an old one.

use std::io::{self, IoSlice};

use uuid::Uuid;

use super::BATCH_RECORDS;
use crate::overlay::record::{LogRecord, RECORD_LEN};
use crate::overlay::storage::Storage;

/// Writes records one after the other, a batch at a time.
pub(super) struct LogWriter<'a> {
    file: &'a dyn Storage,
    uuid: Uuid,
    pub(super) sequence: u64,
    offset: u64,
    buf: Vec<u8>,
}

impl<'a> LogWriter<'a> {
    pub(super) fn new(file: &'a dyn Storage, uuid: Uuid, first: u64) -> Self {
        Self::at(file, uuid, first, 0)
    }

    /// Writes from byte `offset` of an existing log on.
    pub(super) fn at(file: &'a dyn Storage, uuid: Uuid, sequence: u64, offset: u64) -> Self {
        Self { file, uuid, sequence, offset, buf: Vec::new() }
    }

    pub(super) fn write_record(&mut self, record: &LogRecord) -> io::Result<()> {
        let bytes = record.encode(&self.uuid, self.sequence);
        self.sequence += 1;
        self.write_raw(&bytes)
    }

    pub(super) fn write_raw(&mut self, bytes: &[u8; RECORD_LEN]) -> io::Result<()> {
        self.buf.extend_from_slice(bytes);
        if self.buf.len() >= BATCH_RECORDS * RECORD_LEN {
            self.flush()?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.file.write_at(&[IoSlice::new(&self.buf)], self.offset)?;
        self.offset += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }
}
