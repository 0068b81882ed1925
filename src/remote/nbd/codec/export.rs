//! An export: what the server says of the image in the handshake.

use super::Headers;
use super::wire::{
    CAN_MULTI_CONN, DEFAULT_MAX_PAYLOAD, HAS_FLAGS, MAX_MIN_BLOCK, READ_ONLY, SEND_FLUSH, SEND_FUA,
    SEND_WRITE_ZEROES,
};
use crate::remote::transport::RequestLimits;

/// The longest read or write that is sent, in bytes: longer ones do not go faster, and the buffers of
/// the requests in flight are memory.
const MAX_REQUEST: u32 = 4 << 20;

/// The number of requests that are sent before the first is answered. Servers work on 16 (nbdkit,
/// QEMU) and read on only then.
const MAX_IN_FLIGHT: u32 = 64;

/// The transmission flags of an export (doc/proto.md, "Transmission flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExportFlags(u16);

impl ExportFlags {
    /// Takes the flags of a server. Without `NBD_FLAG_HAS_FLAGS` the others mean nothing.
    pub(in crate::remote::nbd) fn new(flags: u16) -> Self {
        Self(if flags & HAS_FLAGS == 0 { 0 } else { flags })
    }

    fn has(self, flag: u16) -> bool {
        self.0 & flag != 0
    }

    /// Whether the server refuses changes.
    pub(crate) fn is_read_only(self) -> bool {
        self.has(READ_ONLY)
    }

    /// Whether the server can make changes durable.
    pub(crate) fn can_flush(self) -> bool {
        self.has(SEND_FLUSH)
    }

    /// Whether the server can make one change durable.
    pub(crate) fn can_fua(self) -> bool {
        self.has(SEND_FUA)
    }

    /// Whether the server can write zeros without being sent them.
    pub(crate) fn can_zero(self) -> bool {
        self.has(SEND_WRITE_ZEROES)
    }

    /// Whether several connections see one image: where nothing is changed they always do.
    pub(crate) fn allows_many_connections(self) -> bool {
        self.has(CAN_MULTI_CONN) || self.is_read_only()
    }
}

/// The sizes that a server's requests have (doc/proto.md, "Size constraints"), checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockSizes {
    min: u32,
    max_payload: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { min: 1, max_payload: DEFAULT_MAX_PAYLOAD }
    }
}

impl BlockSizes {
    /// Checks the sizes of a server; `None` when they break the rules.
    pub(super) fn new(min: u32, max_payload: u32) -> Option<Self> {
        let is_valid = min.is_power_of_two() && min <= MAX_MIN_BLOCK && max_payload >= min;
        is_valid.then_some(Self { min, max_payload })
    }
}

/// An image as its server describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Export {
    /// Bytes, at most 2^63 - 1.
    pub(crate) size: u64,
    /// What the server can do.
    pub(crate) flags: ExportFlags,
    /// Which requests it takes.
    pub(crate) blocks: BlockSizes,
    /// The form of messages that was agreed on.
    pub(crate) headers: Headers,
    /// The number of the context `base:allocation`, when the server tells holes.
    pub(crate) allocation: Option<u32>,
    /// The export's own name, when the server says it.
    pub(crate) name: Option<String>,
}

impl Export {
    /// Returns the requests that the server takes.
    pub(crate) fn limits(&self) -> RequestLimits {
        let BlockSizes { min, max_payload } = self.blocks;
        // At least one block, which is less than MAX_REQUEST.
        let max_len = max_payload.min(MAX_REQUEST) / min * min;
        RequestLimits { alignment: min, max_len, max_in_flight: MAX_IN_FLIGHT }
    }

    /// Returns the bytes at the end that are less than a block of the server, so that it may refuse
    /// to read them.
    pub(crate) fn tail(&self) -> u64 {
        self.size % u64::from(self.blocks.min)
    }

    /// Returns whether the requests for `self` are right for `other`, an export of the same image on
    /// another connection.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        (self.flags, self.blocks) == (other.flags, other.blocks)
            && self.allocation.is_some() == other.allocation.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_outside_the_specification_are_refused() {
        for (min, max) in [(0, 1 << 20), (3, 1 << 20), (1 << 17, 1 << 20), (512, 511)] {
            assert_eq!(BlockSizes::new(min, max), None);
        }
    }

    #[test]
    fn limits_are_whole_blocks_and_at_most_4_mib() {
        let with = |min, max| {
            let blocks = BlockSizes::new(min, max).unwrap();
            let flags = ExportFlags::new(1);
            let headers = Headers::Simple;
            Export { size: 70_000, flags, blocks, headers, allocation: None, name: None }
        };
        assert_eq!(with(1, u32::MAX).limits().max_len, 4 << 20);
        assert_eq!(with(512, 1_000_000).limits().max_len, 999_936);
        assert_eq!(with(1 << 16, 1 << 16).limits().max_len, 1 << 16);
        assert_eq!(with(1 << 16, 1 << 16).tail(), 70_000 - 65_536);
    }

    #[test]
    fn flags_without_has_flags_mean_nothing() {
        assert!(ExportFlags::new(0x103).allows_many_connections());
        assert!(!ExportFlags::new(0x102).allows_many_connections());
    }
}
