//! Codecs for other tools' formats of whole images and of changes.
//!
//! The codecs know no disk: a writer is given the runs and their bytes, and a reader returns the
//! same. Formats that a stream can send in order are in [`crate::stream::frames`]; the formats here
//! need to know the whole image before its first byte.

pub mod android;
pub mod bmap;
