//! Requests of the transmission phase, as bytes (doc/proto.md, "Request message").

use super::Headers;
use super::wire::{
    CMD_BLOCK_STATUS, CMD_DISC, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE, CMD_FLAG_PAYLOAD_LEN, CMD_FLUSH,
    CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC,
};

/// A change that the server makes durable before it answers, or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// At a flush.
    AtFlush,
    /// Before the answer (`NBD_CMD_FLAG_FUA`).
    BeforeAnswer,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Bytes.
    Read,
    /// Allocation of a range.
    BlockStatus,
    /// The payload, which follows the request, is to be stored.
    Write(Durability),
    /// Zeros; with `punch` their space may be freed.
    WriteZeroes { punch: bool, durability: Durability },
    /// Answered changes are to be durable.
    Flush,
    /// The end of the session; never answered.
    Disconnect,
}

impl Command {
    fn type_and_flags(self) -> (u16, u16) {
        let fua = |durability| match durability {
            Durability::AtFlush => 0,
            Durability::BeforeAnswer => CMD_FLAG_FUA,
        };
        match self {
            Self::Read => (CMD_READ, 0),
            Self::BlockStatus => (CMD_BLOCK_STATUS, 0),
            Self::Write(durability) => (CMD_WRITE, fua(durability)),
            Self::WriteZeroes { punch, durability } => {
                let keep = if punch { 0 } else { CMD_FLAG_NO_HOLE };
                (CMD_WRITE_ZEROES, fua(durability) | keep)
            }
            Self::Flush => (CMD_FLUSH, 0),
            Self::Disconnect => (CMD_DISC, 0),
        }
    }
}

/// Encodes a request, without the payload of a write. `len` must fit 32 bits for compact headers;
/// `None` when it does not.
pub(crate) fn encode(
    headers: Headers,
    command: Command,
    cookie: u64,
    offset: u64,
    len: u64,
) -> Option<Vec<u8>> {
    let (kind, mut flags) = command.type_and_flags();
    let mut bytes = Vec::with_capacity(32);
    let is_extended = headers == Headers::Extended;
    if is_extended && matches!(command, Command::Write(_)) {
        flags |= CMD_FLAG_PAYLOAD_LEN;
    }
    let magic = if is_extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    bytes.extend(magic.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    match is_extended {
        true => bytes.extend(len.to_be_bytes()),
        false => bytes.extend(u32::try_from(len).ok()?.to_be_bytes()),
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_bytes_of_the_specification() {
        let compact = encode(Headers::Simple, Command::Read, 0x0102, 0x0304, 0x0506).unwrap();
        let expected =
            b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\x03\x04\0\0\x05\x06";
        assert_eq!(compact, expected);
        let write = Command::Write(Durability::BeforeAnswer);
        let extended = encode(Headers::Extended, write, 1, 2, 1 << 32).unwrap();
        let expected =
            b"\x21\xe4\x1c\x71\0\x21\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\x01\0\0\0\0";
        assert_eq!(extended, expected);
        assert_eq!(encode(Headers::Structured, Command::BlockStatus, 1, 2, 1 << 32), None);
    }

    #[test]
    fn zeros_keep_their_space_unless_it_may_go() {
        let zero = |punch| Command::WriteZeroes { punch, durability: Durability::AtFlush };
        assert_eq!(zero(true).type_and_flags(), (6, 0));
        assert_eq!(zero(false).type_and_flags(), (6, 2));
    }
}
