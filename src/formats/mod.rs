//! Codecs of formats that other tools own: of images, of changes, and of streams.
//!
//! The codecs know no disk: an encoder is given runs and their bytes, and a decoder returns the
//! same. They read from `Read` and write to `Write`; opening files is the callers' work
//! ([`crate::export`], [`crate::transfer`], [`crate::stream`]).
//!
//! | format | encoded for | decoded for |
//! |---|---|---|
//! | [`rbd`] | `frames=rbd`, `send` | `recv` |
//! | [`android`] | `diff -O android-sparse`, `send` | `recv` |
//! | [`bmap`] | `diff -O bmap` | |

pub mod android;
pub mod bmap;
pub mod rbd;
