//! The numbers of the NBD protocol, and a reader of its big-endian fields.
//!
//! Every section named here is one of doc/proto.md of the NBD project; "ext-header" is the same file
//! on its branch `extension-ext-header`.

/// "Newstyle negotiation": `NBDMAGIC`, the first word of a server.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "Newstyle negotiation": `IHAVEOPT`, the second word of a server, and the first of an option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// "Oldstyle negotiation": the second word of a server that knows no options.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// "Fixed newstyle negotiation": the start of a reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// "Handshake flags": bit 0, the server knows the fixed newstyle.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// "Handshake flags": bit 1, the server can leave out the zeros after `NBD_OPT_EXPORT_NAME`.
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;
/// "Newstyle negotiation": the zeros that follow the answer to `NBD_OPT_EXPORT_NAME`.
pub(super) const EXPORT_NAME_ZEROES: usize = 124;

/// "Transmission flags": bit 0, the other bits have a meaning.
pub(super) const HAS_FLAGS: u16 = 1 << 0;
/// "Transmission flags": bit 1.
pub(super) const READ_ONLY: u16 = 1 << 1;
/// "Transmission flags": bit 2, `NBD_CMD_FLUSH` is known.
pub(super) const SEND_FLUSH: u16 = 1 << 2;
/// "Transmission flags": bit 3, `NBD_CMD_FLAG_FUA` is known.
pub(super) const SEND_FUA: u16 = 1 << 3;
/// "Transmission flags": bit 6, `NBD_CMD_WRITE_ZEROES` is known.
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
/// "Transmission flags": bit 8, a flush covers all connections.
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

/// "Option types".
pub(super) const OPT_EXPORT_NAME: u32 = 1;
/// "Option types".
pub(super) const OPT_STARTTLS: u32 = 5;
/// "Option types".
pub(super) const OPT_GO: u32 = 7;
/// "Option types".
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
/// "Option types".
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;
/// "Option types" of ext-header.
pub(super) const OPT_EXTENDED_HEADERS: u32 = 11;

/// "Option reply types".
pub(super) const REP_ACK: u32 = 1;
/// "Option reply types".
pub(super) const REP_INFO: u32 = 3;
/// "Option reply types".
pub(super) const REP_META_CONTEXT: u32 = 4;
/// "Option reply types": bit 31 marks an error.
pub(super) const REP_ERROR: u32 = 1 << 31;
/// "Option reply types".
pub(super) const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
/// "Option reply types".
pub(super) const REP_ERR_POLICY: u32 = REP_ERROR + 2;
/// "Option reply types".
pub(super) const REP_ERR_TLS_REQD: u32 = REP_ERROR + 5;
/// "Option reply types".
pub(super) const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;
/// "Option reply types".
pub(super) const REP_ERR_SHUTDOWN: u32 = REP_ERROR + 7;

/// "Option reply types", `NBD_REP_INFO`: size and transmission flags.
pub(super) const INFO_EXPORT: u16 = 0;
/// "Option reply types", `NBD_REP_INFO`: the export's own name.
pub(super) const INFO_NAME: u16 = 1;
/// "Option reply types", `NBD_REP_INFO`: smallest block, preferred block, largest payload.
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// "The `base:` metadata namespace".
pub(super) const BASE_ALLOCATION: &[u8] = b"base:allocation";
/// "`base:allocation` metadata context": bit 0, nothing is allocated; says nothing of the content.
pub(super) const STATE_HOLE: u64 = 1 << 0;
/// "`base:allocation` metadata context": bit 1, the range reads as zeros.
pub(super) const STATE_ZERO: u64 = 1 << 1;

/// "Request message".
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// "Request message" of ext-header.
pub(super) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// "Simple reply message".
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// "Structured reply chunk message".
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// "Extended reply chunk message" of ext-header.
pub(super) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// "Request types".
pub(super) const CMD_READ: u16 = 0;
/// "Request types".
pub(super) const CMD_WRITE: u16 = 1;
/// "Request types".
pub(super) const CMD_DISC: u16 = 2;
/// "Request types".
pub(super) const CMD_FLUSH: u16 = 3;
/// "Request types".
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
/// "Request types".
pub(super) const CMD_BLOCK_STATUS: u16 = 7;
/// "Command flags": bit 0, durable before it is answered.
pub(super) const CMD_FLAG_FUA: u16 = 1 << 0;
/// "Command flags": bit 1, zeros that stay allocated.
pub(super) const CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// "Command flags" of ext-header: bit 5, a payload follows; every write has it.
pub(super) const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// "Structured reply flags": bit 0, the last chunk of a reply.
pub(super) const REPLY_FLAG_DONE: u16 = 1 << 0;
/// "Structured reply types".
pub(super) const REPLY_NONE: u16 = 0;
/// "Structured reply types".
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
/// "Structured reply types".
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
/// "Structured reply types".
pub(super) const REPLY_BLOCK_STATUS: u16 = 5;
/// "Structured reply types" of ext-header.
pub(super) const REPLY_BLOCK_STATUS_EXT: u16 = 6;
/// "Structured reply types": bit 15 marks an error.
pub(super) const REPLY_ERROR_BIT: u16 = 1 << 15;

/// "Request types", `NBD_CMD_BLOCK_STATUS`: a chunk should not have more descriptors.
pub(super) const MAX_DESCRIPTORS: u64 = 1 << 20;
/// "Size constraints": the largest minimum block.
pub(super) const MAX_MIN_BLOCK: u32 = 1 << 16;
/// "Size constraints": the largest payload where the server names none.
pub(super) const DEFAULT_MAX_PAYLOAD: u32 = 1 << 25;
/// "Conventions": the longest string.
pub(crate) const MAX_STRING: usize = 4096;

/// Returns the errno of an error value ("Error values"): an unknown one counts as `NBD_EINVAL`.
pub(super) fn errno_of(value: u32) -> i32 {
    match value {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    }
}

/// The fields of a message, taken one after the other; `None` where the message is too short.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// Takes the next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    /// Takes 16 bits.
    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Takes 32 bits.
    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Takes 64 bits.
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
