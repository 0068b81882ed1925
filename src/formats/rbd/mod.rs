//! rbd diffs: the changes of a disk, or all of it, as records that carry offsets.
//!
//! ```text
//!   version 1                version 2
//!   "rbd diff v1\n"          "rbd diff v2\n"
//!                            'f' len=4+n    n u32  name       the snapshot before the changes
//!   's' size                 's' len=8      size              the size of the disk
//!   'w' offset n  bytes...   'w' len=16+n   offset n  bytes   data
//!   'z' offset n             'z' len=16     offset n          zeros, or a hole: no difference is made
//!   'e'                      'e'                              the end; without it the diff was cut short
//! ```
//!
//! All numbers are little-endian u64. `len` counts the bytes that follow it, so a reader of version
//! 2 can skip tags that it does not know. A range without a record keeps its content, which in a new
//! image is zeros. Source: Ceph, doc/dev/rbd-diff.rst.
//!
//! `rbd import-diff` and `rbd merge-diff` accept only [`v1`], and `merge-diff` only rising offsets
//! and no empty record. `rbd` itself writes [`v2`] inside its export format 2. [`checkpoint`] is a record
//! of our own in version 2, with which `recv` verifies a stream ([`checked_reader`]).

mod checked_reader;
pub mod checkpoint;
mod decoder;
pub mod v1;
pub mod v2;

pub(crate) use checked_reader::{CheckedReader, CheckedRecord};
pub use decoder::{RbdDecoder, RbdRecord};

/// The last byte of a complete diff of either version.
pub const END_RECORD: [u8; 1] = *b"e";
