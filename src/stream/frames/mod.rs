//! Wire formats that carry more than the bytes of the disk.
//!
//! Pure: the modules encode and decode headers and do no I/O of their own.

pub mod rbd;
