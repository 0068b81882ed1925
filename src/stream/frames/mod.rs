//! Wire formats: what goes over the wire when it is not the disk's bytes alone.
//!
//! They are pure: bytes of headers made and read, no I/O.

pub mod rbd;
