//! The checkpoint: a record that vouches for the stream before it.
//!
//! ```text
//!   'C'  len=56 or 72
//!   'C'  len=56 or 72
//!        "cowslip\x01"        8   the owner of the record and its version
//!        start                8   the piece vouched for: all of the disk from here ...
//!        end                  8   ... to here has been described
//!        identity             8   of the source as it was when the transfer began; 0: unknown
//!        origin               8   the offset at which the stream began (`send --from`)
//!        piece               16   XXH3-128 of the wire since the last checkpoint
//!        whole               16   only in the last one: XXH3-128 of all `piece` values
//! ```
//!
//! Numbers are little-endian, hashes are in XXH3's canonical (big-endian) form. `piece` covers
//! every byte on the wire after the previous checkpoint, or after the beginning of the stream, up
//! to `piece` itself: banner, headers and data, and this record's own fields. So no range, kind or
//! size can change unnoticed. The first checkpoint directly follows the size and has an empty
//! piece: it announces to a receiver that checkpoints will follow, and identifies the source.
//!
//! For other readers of rbd diffs, a checkpoint is a record with an unknown tag, which version 2
//! lets them skip by its length.

use xxhash_rust::xxh3::Xxh3;

/// The tag of a checkpoint record.
pub const CHECKPOINT_TAG: u8 = b'C';
/// The first bytes of the payload.
pub const CHECKPOINT_MAGIC: [u8; 8] = *b"cowslip\x01";
/// The length of the payload without `whole`, in bytes.
pub const PAYLOAD_LEN: u64 = 56;
/// The length of the payload with `whole`, in bytes.
pub const LAST_PAYLOAD_LEN: u64 = 72;
/// Bytes of data between two checkpoints: 64 MiB. An interruption costs at most this much, and one
/// sync per interval costs next to nothing.
pub const CHECKPOINT_INTERVAL: u64 = 64 << 20;
/// The length in bytes of tag, length, magic and numbers, that is, of everything before `piece`.
pub const HEAD_LEN: usize = 9 + 8 + 4 * 8;

/// The content of a checkpoint except its hashes; all offsets are bytes of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// The start of the piece, in bytes of the disk.
    pub start: u64,
    /// The end of the piece.
    pub end: u64,
    /// A number that distinguishes this state of the source from others; 0 if unknown.
    pub identity: u64,
    /// The offset at which the stream began.
    pub origin: u64,
}

/// The position of a checkpoint in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointKind {
    /// More data follows.
    Middle,
    /// Only the end record follows.
    Last,
}

impl Checkpoint {
    /// Encodes the record up to `piece`.
    #[must_use]
    pub fn encode_head(&self, kind: CheckpointKind) -> [u8; HEAD_LEN] {
        let len = if kind == CheckpointKind::Last { LAST_PAYLOAD_LEN } else { PAYLOAD_LEN };
        let mut bytes = [CHECKPOINT_TAG; HEAD_LEN];
        bytes[1..9].copy_from_slice(&len.to_le_bytes());
        bytes[9..17].copy_from_slice(&CHECKPOINT_MAGIC);
        let numbers = [self.start, self.end, self.identity, self.origin];
        for (field, number) in bytes[17..].chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// Decodes the four numbers after the magic.
    #[must_use]
    pub fn decode(numbers: &[u8; 32]) -> Self {
        let [mut start, mut end, mut identity, mut origin] = [[0; 8]; 4];
        for (to, from) in [&mut start, &mut end, &mut identity, &mut origin]
            .into_iter()
            .zip(numbers.chunks_exact(8))
        {
            to.copy_from_slice(from);
        }
        Self {
            start: u64::from_le_bytes(start),
            end: u64::from_le_bytes(end),
            identity: u64::from_le_bytes(identity),
            origin: u64::from_le_bytes(origin),
        }
    }
}

/// The hashes of a stream, kept by the sender and by the receiver.
#[derive(Clone, Default)]
pub struct HashChain {
    piece: Xxh3,
    whole: Xxh3,
}

impl HashChain {
    /// Adds the next bytes on the wire.
    pub fn update(&mut self, bytes: &[u8]) {
        self.piece.update(bytes);
    }

    /// Ends the current piece and begins the next; returns the hash of the piece and that of all
    /// pieces so far.
    pub fn end_piece(&mut self) -> ([u8; 16], [u8; 16]) {
        let piece = self.piece.digest128().to_be_bytes();
        self.whole.update(&piece);
        self.piece.reset();
        (piece, self.whole.digest128().to_be_bytes())
    }

    /// Returns the record for `checkpoint`, whose piece it ends.
    pub fn checkpoint_record(&mut self, checkpoint: &Checkpoint, kind: CheckpointKind) -> Vec<u8> {
        let mut bytes = checkpoint.encode_head(kind).to_vec();
        self.update(&bytes);
        let (piece, whole) = self.end_piece();
        bytes.extend(piece);
        if kind == CheckpointKind::Last {
            bytes.extend(whole);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_record_has_the_documented_layout() {
        let checkpoint = Checkpoint { start: 1, end: 2, identity: 3, origin: 4 };
        let mut chain = HashChain::default();
        chain.update(b"rbd diff v2\n");
        let bytes = chain.checkpoint_record(&checkpoint, CheckpointKind::Last);
        assert_eq!(bytes.len() as u64, 9 + LAST_PAYLOAD_LEN);
        assert_eq!(&bytes[..17], b"C\x48\0\0\0\0\0\0\0cowslip\x01");
        assert_eq!(&bytes[17..25], b"\x01\0\0\0\0\0\0\0");
        assert_eq!(&bytes[41..49], b"\x04\0\0\0\0\0\0\0");
        let covered = [b"rbd diff v2\n", &bytes[..49]].concat();
        let piece = xxhash_rust::xxh3::xxh3_128(&covered).to_be_bytes();
        assert_eq!(&bytes[49..65], piece);
        assert_eq!(&bytes[65..], xxhash_rust::xxh3::xxh3_128(&piece).to_be_bytes());
        let middle = chain.checkpoint_record(&checkpoint, CheckpointKind::Middle);
        assert_eq!(middle.len() as u64, 9 + PAYLOAD_LEN);
    }

    proptest! {
        #[test]
        fn an_encoded_checkpoint_is_decoded_unchanged(numbers in any::<[u64; 4]>()) {
            let [start, end, identity, origin] = numbers;
            let checkpoint = Checkpoint { start, end, identity, origin };
            let head = checkpoint.encode_head(CheckpointKind::Middle);
            prop_assert_eq!(Checkpoint::decode(&head[17..].try_into().unwrap()), checkpoint);
        }

        #[test]
        fn a_piece_hash_covers_every_byte_since_the_last_checkpoint(
            before in prop::collection::vec(any::<u8>(), 0..300),
            after in prop::collection::vec(any::<u8>(), 1..300),
            at in any::<prop::sample::Index>(),
            bit in 0..8u8,
        ) {
            let hashes = |after: &[u8]| {
                let mut chain = HashChain::default();
                chain.update(&before);
                let first = chain.end_piece();
                // The split of the bytes into calls makes no difference.
                let (one, two) = after.split_at(after.len() / 2);
                chain.update(one);
                chain.update(two);
                (first, chain.end_piece())
            };
            let mut other = after.clone();
            let at = at.index(after.len());
            other[at] ^= 1u8 << bit;
            let (here, there) = (hashes(&after), hashes(&other));
            prop_assert_eq!(here.0, there.0);
            prop_assert_ne!(here.1.0, there.1.0);
            prop_assert_ne!(here.1.1, there.1.1);
        }
    }
}
