//! Codecs of formats that other tools own: of images, of changes, and of streams.
//!
//! The codecs know no disk: an encoder is given runs and their bytes, and a decoder returns the
//! same. They read from `Read` and write to `Write`, but for qcow2, whose tables need random access;
//! opening files is the callers' work ([`crate::export`], [`crate::transfer`], [`crate::stream`]).
//!
//! | format | encoded for | decoded for |
//! |---|---|---|
//! | [`rbd`] | `frames=rbd`, `send`, `diff -O rbd` | `recv` |
//! | [`android`] | `diff -O android-sparse`, `send` | `recv` |
//! | [`bmap`] | `diff -O bmap` | `bmap=` of an image behind HTTP |
//! | [`qcow2`] | `diff` | by [`crate::base::qcow2`] |

pub mod android;
pub mod bmap;
pub mod qcow2;
pub mod rbd;

use std::ops::Range;

/// The content of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunContent {
    /// Bytes, not all of them zero.
    Data,
    /// Only zeros.
    Zeros,
}

/// A run of bytes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRun {
    /// The position in the image, in bytes.
    pub range: Range<u64>,
    /// The content of the run.
    pub content: RunContent,
}

impl ImageRun {
    /// Returns the number of bytes of data in the run.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        match self.content {
            RunContent::Data => self.range.end.saturating_sub(self.range.start),
            RunContent::Zeros => 0,
        }
    }
}
