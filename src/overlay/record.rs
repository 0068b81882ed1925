//! The records of a layer's log: their encoding, and the map that a sequence of them adds up to. No
//! I/O.
//!
//! A record is 32 bytes, little-endian, at a multiple of 32, so none ever straddles a sector:
//!
//! ```text
//!   0        4      5        6        8          16        24        32
//!   +--------+------+--------+--------+----------+---------+---------+
//!   | crc32c | kind | detail |   0    | sequence |    a    |    b    |
//!   +--------+------+--------+--------+----------+---------+---------+
//! ```
//!
//! The checksum covers bytes 4..32 and is seeded with the layer's uuid, so a record of another
//! layer is never mistaken for one of this layer.

use crate::checksum;
use std::ops::Range;

use uuid::Uuid;

use super::MAX_DISK_SIZE;
use super::blocks::BlockMap;
use super::state::{BlockIndex, BlockState};

/// The length of a record in bytes: a power of two, so records never straddle a sector.
pub const RECORD_LEN: usize = 32;
/// The number of blocks of the largest disk with the smallest block size, 512 bytes.
const MAX_BLOCKS: u64 = MAX_DISK_SIZE.div_ceil(512);
/// The highest sequence accepted: at a million records a second it is reached after 146,000 years,
/// and sums of a few sequences never overflow.
pub(super) const MAX_SEQUENCE: u64 = 1 << 62;

/// Identifies one boot of the host and one instance of the file system under an overlay
/// ([`boot_tag::current`](super::boot_tag::current)). While the tag stays the same, written data is still in the page cache or on the disk; a different tag is
/// treated as a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootTag(pub [u64; 2]);

/// A point in time: nanoseconds since the epoch.
pub type Nanos = i64;

/// Whether a modification time was set by a user (`utimes`) or by a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtimeOrigin {
    /// Set by a write; after a crash the data file's own time may be more accurate.
    Written,
    /// Set by a user; stays until the next write.
    SetByUser,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogRecord {
    /// A daemon opened the layer for writing under this tag.
    Open {
        /// The boot and the instance of the file system under which the layer was opened.
        tag: BootTag,
    },
    /// The blocks of `range` are in `state` from now on.
    Set {
        /// Half-open, in blocks.
        range: Range<BlockIndex>,
        /// Their new state.
        state: BlockState,
    },
    /// The disk's size changed; blocks at or past the smaller of the old and new size are Lower.
    Size {
        /// The new size in bytes.
        size: u64,
        /// Lower bytes at or past this offset read as zeros.
        lower_limit: u64,
    },
    /// The modification time.
    Attr {
        /// The time.
        mtime: Nanos,
        /// The origin of the time.
        origin: MtimeOrigin,
    },
    /// The data behind every record up to and including `upto` is durable.
    Vouch {
        /// A sequence number.
        upto: u64,
        /// The highest `upto` known to be durable itself when this was appended.
        durable: u64,
    },
    /// A sync failed; only records covered by `durable` may be trusted.
    Poisoned {
        /// The highest durable sequence.
        durable: u64,
        /// The `upto` of the last durable `Vouch`: the journal's generation.
        vouched: u64,
    },
    /// The layer was synced and closed; everything before this record is durable.
    Close,
    /// A commit into the base begins; from here on the base changes.
    Intent,
    /// The commit has ended, and the `stack` holds the base's new identity.
    Done,
}

/// The result of decoding 32 bytes of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodedRecord {
    /// A whole record and its sequence number.
    Good(u64, LogRecord),
    /// All zeros: never written (or lost before it reached the disk).
    Blank,
    /// Anything else: the checksum does not match.
    Bad,
    /// The checksum matches, but this version does not know the meaning: an unknown kind, numbers
    /// that no disk has, or a sequence that the record names and that comes after its own.
    Unknown(u8),
}

impl LogRecord {
    /// Encodes the record under `sequence` for the layer `uuid`.
    #[must_use]
    pub fn encode(&self, uuid: &Uuid, sequence: u64) -> [u8; RECORD_LEN] {
        let (kind, detail, a, b) = match self {
            Self::Open { tag } => (1, 0, tag.0[0], tag.0[1]),
            Self::Set { range, state } => (2, u8::from(*state), range.start.0, range.end.0),
            Self::Size { size, lower_limit } => (3, 0, *size, *lower_limit),
            Self::Attr { mtime, origin } => {
                (4, u8::from(*origin == MtimeOrigin::SetByUser), mtime.cast_unsigned(), 0)
            }
            Self::Vouch { upto, durable } => (5, 0, *upto, *durable),
            Self::Poisoned { durable, vouched } => (6, 0, *durable, *vouched),
            Self::Close => (7, 0, 0, 0),
            Self::Intent => (8, 0, 0, 0),
            Self::Done => (9, 0, 0, 0),
        };
        let mut bytes = [0; RECORD_LEN];
        bytes[4] = kind;
        bytes[5] = detail;
        bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
        bytes[16..24].copy_from_slice(&a.to_le_bytes());
        bytes[24..32].copy_from_slice(&b.to_le_bytes());
        let crc = checksum(uuid, &bytes);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes one record of the layer `uuid`.
    #[must_use]
    pub fn decode(bytes: &[u8; RECORD_LEN], uuid: &Uuid) -> DecodedRecord {
        if bytes == &[0; RECORD_LEN] {
            return DecodedRecord::Blank;
        }
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let crc = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if crc != checksum(uuid, bytes) {
            return DecodedRecord::Bad;
        }
        let (kind, detail, sequence, a, b) = (bytes[4], bytes[5], word(8), word(16), word(24));
        let record = match kind {
            1 => Self::Open { tag: BootTag([a, b]) },
            2 => match BlockState::try_from(detail) {
                Ok(state) if a < b && b <= MAX_BLOCKS => {
                    Self::Set { range: BlockIndex(a)..BlockIndex(b), state }
                }
                _ => return DecodedRecord::Unknown(kind),
            },
            3 if a.max(b) <= MAX_DISK_SIZE => Self::Size { size: a, lower_limit: b },
            4 => Self::Attr {
                mtime: a.cast_signed(),
                origin: if detail == 1 { MtimeOrigin::SetByUser } else { MtimeOrigin::Written },
            },
            // A record speaks of itself at the most: what it says of later ones cannot be known.
            5 if a.max(b) <= sequence => Self::Vouch { upto: a, durable: b },
            6 if a.max(b) <= sequence => Self::Poisoned { durable: a, vouched: b },
            7 => Self::Close,
            8 => Self::Intent,
            9 => Self::Done,
            _ => return DecodedRecord::Unknown(kind),
        };
        match sequence {
            0..=MAX_SEQUENCE => DecodedRecord::Good(sequence, record),
            _ => DecodedRecord::Unknown(kind),
        }
    }
}

fn checksum(uuid: &Uuid, bytes: &[u8; RECORD_LEN]) -> u32 {
    checksum::crc32c_append(checksum::crc32c(uuid.as_bytes()), &bytes[4..])
}

/// The state of a layer that its records add up to.
#[derive(Clone, Debug)]
pub struct LayerMap {
    /// The state of every block.
    pub blocks: BlockMap,
    /// The disk's size in bytes.
    pub size: u64,
    /// Lower bytes at or past this offset read as zeros: the smallest size this layer ever had.
    pub lower_limit: u64,
    /// The last modification time, if one was recorded.
    pub mtime: Option<(Nanos, MtimeOrigin)>,
    /// Whether a commit into the base has begun and not ended.
    pub is_committing: bool,
}

impl LayerMap {
    /// Creates the map of a layer of `size` bytes that holds no block and shows the layers below up
    /// to `lower_limit` (bytes).
    #[must_use]
    pub fn new(size: u64, lower_limit: u64) -> Self {
        Self { blocks: BlockMap::new(), size, lower_limit, mtime: None, is_committing: false }
    }

    /// Applies one record; records must be applied in order. `block_size` is in bytes.
    pub fn apply(&mut self, record: &LogRecord, block_size: u64) {
        match record {
            LogRecord::Set { range, state } => self.blocks.set(range.clone(), *state),
            LogRecord::Size { size, lower_limit } => self.resize(*size, *lower_limit, block_size),
            LogRecord::Attr { mtime, origin } => self.mtime = Some((*mtime, *origin)),
            LogRecord::Intent => self.is_committing = true,
            LogRecord::Done => self.is_committing = false,
            LogRecord::Open { .. }
            | LogRecord::Vouch { .. }
            | LogRecord::Poisoned { .. }
            | LogRecord::Close => {}
        }
    }

    /// Applies a `LogRecord::Size`: blocks at or past the smaller size are Lower again. The block
    /// that contains the smaller size keeps its state; its tail was zeroed before the growth.
    pub fn resize(&mut self, size: u64, lower_limit: u64, block_size: u64) {
        let cut = self.size.min(size).div_ceil(block_size);
        self.blocks.clear_from(BlockIndex(cut));
        self.size = size;
        self.lower_limit = lower_limit;
    }

    /// Returns the shortest sequence of records that adds up to this map, without `Open` and
    /// `Vouch`.
    pub fn records(&self) -> impl Iterator<Item = LogRecord> + '_ {
        let head = LogRecord::Size { size: self.size, lower_limit: self.lower_limit };
        let attr = self.mtime.map(|(mtime, origin)| LogRecord::Attr { mtime, origin });
        let runs = self.blocks.runs(BlockIndex(0)..BlockIndex(u64::MAX));
        let sets = runs.filter(|run| run.state != BlockState::Lower);
        std::iter::once(head)
            .chain(attr)
            .chain(self.is_committing.then_some(LogRecord::Intent))
            .chain(sets.map(|run| LogRecord::Set { range: run.range, state: run.state }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_state() -> impl Strategy<Value = BlockState> {
        prop_oneof![Just(BlockState::Lower), Just(BlockState::Data), Just(BlockState::Zero)]
    }

    /// A record that can have the sequence `own`.
    fn any_record(own: u64) -> impl Strategy<Value = LogRecord> {
        prop_oneof![
            any::<[u64; 2]>().prop_map(|tag| LogRecord::Open { tag: BootTag(tag) }),
            (0u64..1 << 40, 1u64..1 << 20, any_state()).prop_map(|(start, len, state)| {
                LogRecord::Set { range: BlockIndex(start)..BlockIndex(start + len), state }
            }),
            (0..=MAX_DISK_SIZE, 0..=MAX_DISK_SIZE)
                .prop_map(|(size, lower_limit)| LogRecord::Size { size, lower_limit }),
            (any::<i64>(), any::<bool>()).prop_map(|(mtime, chosen)| LogRecord::Attr {
                mtime,
                origin: if chosen { MtimeOrigin::SetByUser } else { MtimeOrigin::Written },
            }),
            (0..=own, 0..=own).prop_map(|(upto, durable)| LogRecord::Vouch { upto, durable }),
            (0..=own, 0..=own)
                .prop_map(|(durable, vouched)| LogRecord::Poisoned { durable, vouched }),
            Just(LogRecord::Close),
            Just(LogRecord::Intent),
            Just(LogRecord::Done),
        ]
    }

    proptest! {
        #[test]
        fn a_record_survives_encoding_and_decoding(
            (record, sequence) in (0..=MAX_SEQUENCE).prop_flat_map(|own| (any_record(own), Just(own))),
            uuid in any::<u128>().prop_map(Uuid::from_u128),
        ) {
            let bytes = record.encode(&uuid, sequence);
            prop_assert_eq!(LogRecord::decode(&bytes, &uuid), DecodedRecord::Good(sequence, record));
        }

        #[test]
        fn a_flipped_bit_is_detected(record in any_record(7), bit in 0usize..256, uuid: u128) {
            let uuid = Uuid::from_u128(uuid);
            let mut bytes = record.encode(&uuid, 7);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(LogRecord::decode(&bytes, &uuid), DecodedRecord::Bad);
        }

        #[test]
        fn decoding_arbitrary_bytes_never_panics(bytes: [u8; RECORD_LEN], uuid: u128) {
            let _ = LogRecord::decode(&bytes, &Uuid::from_u128(uuid));
        }

        #[test]
        fn reduced_records_add_up_to_the_same_map(
            sets in proptest::collection::vec((0u64..300, 1u64..40, any_state()), 0..60),
            size in 0u64..400 * 4096, resized in proptest::option::of(0u64..400 * 4096),
        ) {
            let mut map = LayerMap::new(size, size);
            for (start, len, state) in sets {
                let range = BlockIndex(start)..BlockIndex(start + len);
                map.apply(&LogRecord::Set { range, state }, 4096);
            }
            if let Some(size) = resized {
                let lower_limit = map.lower_limit.min(size);
                map.apply(&LogRecord::Size { size, lower_limit }, 4096);
            }
            let mut again = LayerMap::new(0, 0);
            for record in map.records() {
                again.apply(&record, 4096);
            }
            prop_assert_eq!((again.size, again.lower_limit), (map.size, map.lower_limit));
            for block in 0..400 {
                let block = BlockIndex(block);
                prop_assert_eq!(again.blocks.state(block), map.blocks.state(block));
            }
        }
    }

    #[test]
    fn records_with_numbers_that_no_disk_has_are_unknown() {
        let uuid = Uuid::from_u128(1);
        let range = BlockIndex(0)..BlockIndex(MAX_BLOCKS + 1);
        let state = BlockState::Data;
        let records = [
            LogRecord::Set { range, state },
            LogRecord::Size { size: MAX_DISK_SIZE + 1, lower_limit: 0 },
            LogRecord::Size { size: 0, lower_limit: MAX_DISK_SIZE + 1 },
            // Sequences that come after the record's own, which is 1.
            LogRecord::Vouch { upto: 2, durable: 0 },
            LogRecord::Vouch { upto: u64::MAX, durable: 0 },
            LogRecord::Vouch { upto: 0, durable: 2 },
            LogRecord::Poisoned { durable: 2, vouched: 0 },
            LogRecord::Poisoned { durable: 0, vouched: u64::MAX },
        ];
        for record in records {
            let found = LogRecord::decode(&record.encode(&uuid, 1), &uuid);
            assert!(matches!(found, DecodedRecord::Unknown(_)), "{record:?}: {found:?}");
        }
        for sequence in [MAX_SEQUENCE + 1, u64::MAX] {
            let last = LogRecord::Vouch { upto: 1, durable: 1 }.encode(&uuid, sequence);
            assert_eq!(LogRecord::decode(&last, &uuid), DecodedRecord::Unknown(5));
        }
    }

    #[test]
    fn a_record_of_another_layer_is_bad() {
        let bytes = LogRecord::Close.encode(&Uuid::from_u128(1), 1);
        assert_eq!(LogRecord::decode(&bytes, &Uuid::from_u128(2)), DecodedRecord::Bad);
    }

    #[test]
    fn zeros_decode_as_blank_and_a_later_kind_as_unknown() {
        let uuid = Uuid::from_u128(1);
        assert_eq!(LogRecord::decode(&[0; RECORD_LEN], &uuid), DecodedRecord::Blank);
        let mut bytes = LogRecord::Close.encode(&uuid, 1);
        bytes[4] = 10;
        let crc = checksum(&uuid, &bytes);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(LogRecord::decode(&bytes, &uuid), DecodedRecord::Unknown(10));
    }
}
