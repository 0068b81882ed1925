//! Formats of other tools for whole images and for changes, each a codec of its own.
//!
//! They know no disk: a writer is told what lies where and is handed the bytes, a reader tells
//! the same. What a stream sends in order is in [`crate::stream::frames`]; here are the formats
//! that have to know the whole image before its first byte.

pub mod android;
pub mod bmap;
