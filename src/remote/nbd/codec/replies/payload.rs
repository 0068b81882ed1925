//! The beginnings of headers, and the payloads of chunks: descriptors of a block status, and errors.

use super::pending::{Content, Failure, ReplyError};
use super::{Chunk, Fields};
use crate::remote::nbd::codec::Headers;
use crate::remote::nbd::codec::handshake::text_of;
use crate::remote::nbd::codec::wire::{
    EXTENDED_REPLY_MAGIC, MAX_DESCRIPTORS, REPLY_BLOCK_STATUS_EXT, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, errno_of,
};

pub(super) fn descriptor_len(kind: u16) -> usize {
    if kind == REPLY_BLOCK_STATUS_EXT { 16 } else { 8 }
}

/// Checks the length of a block status; returns that of its prefix.
pub(super) fn check_descriptors(left: u64, prefix: u64, each: u64) -> Result<usize, ReplyError> {
    let descriptors = left.checked_sub(prefix).ok_or(ReplyError::Length)?;
    match (descriptors % each, descriptors / each) {
        (0, 1..=MAX_DESCRIPTORS) => Ok(usize::try_from(prefix).unwrap_or(8)),
        (0, 1..) => Err(ReplyError::TooManyExtents),
        _ => Err(ReplyError::Length),
    }
}

/// An extended block status says how many descriptors follow.
pub(super) fn check_count(kind: u16, mut fields: Fields<'_>, left: u64) -> Result<(), ReplyError> {
    if kind == REPLY_BLOCK_STATUS_EXT && fields.u32().map(u64::from) != Some(left / 16) {
        return Err(ReplyError::Length);
    }
    Ok(())
}

pub(super) fn push_descriptor(chunk: &mut Chunk, descriptor: &[u8]) -> Result<(), ReplyError> {
    let mut fields = Fields(descriptor);
    let described = match chunk.kind {
        REPLY_BLOCK_STATUS_EXT => fields.u64().zip(fields.u64()),
        _ => fields.u32().zip(fields.u32()).map(|(len, flags)| (len.into(), flags.into())),
    };
    let (len, flags) = described.ok_or(ReplyError::Length)?;
    match &mut chunk.pending.content {
        Content::Extents { builder: Some(builder), .. } => {
            builder.push(len, flags).map_err(|()| ReplyError::Length)
        }
        _ => Ok(()),
    }
}

/// Takes the payload of an error: its value, and a text of the given length.
pub(super) fn failure_of(mut fields: Fields<'_>) -> Result<Failure, ReplyError> {
    let (value, len) = fields.u32().zip(fields.u16()).ok_or(ReplyError::Length)?;
    let text = fields.bytes(usize::from(len)).ok_or(ReplyError::Length)?;
    Ok(Failure { errno: errno_of(value), text: text_of(text) })
}

/// Returns the length of a header with the magic number `magic`, one that was checked.
pub(super) fn header_len(magic: u32) -> usize {
    match magic {
        SIMPLE_REPLY_MAGIC => 16,
        STRUCTURED_REPLY_MAGIC => 20,
        _ => 32,
    }
}

/// Checks that a reply may begin with `magic` where `headers` were agreed on.
pub(super) fn check_magic(magic: u32, headers: Headers) -> Result<(), ReplyError> {
    match (magic, headers) {
        (SIMPLE_REPLY_MAGIC, Headers::Simple | Headers::Structured)
        | (STRUCTURED_REPLY_MAGIC, Headers::Structured)
        | (EXTENDED_REPLY_MAGIC, Headers::Extended) => Ok(()),
        _ => Err(ReplyError::Magic),
    }
}
