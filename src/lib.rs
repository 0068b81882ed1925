//! cowslip mounts virtual disks as plain files.
//!
//! Each disk is a stack of layers: a base that is never modified, and copy-on-write overlays above
//! it. One mount shows many disks. `lseek(SEEK_HOLE/SEEK_DATA)` is answered from the extent map.
//!
//! A request passes down through these modules, and its reply back up: [`fs`] (decodes FUSE) →
//! [`catalog`] (names) → [`disk`] (the stack of layers) → [`overlay`] and [`base`] → [`extents`].
//! Before that, [`config`] parses the user's input into plain values.
//!
//! Instead of a stack of layers, a disk may be a [`stream`]: written data is sent on in order, or
//! incoming data is read. [`transfer`] sends files of any kind through pipes, and needs no mount.

pub mod aligned;
pub mod base;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod confined;
pub mod control;
pub mod direct;
pub mod disk;
pub mod export;
pub mod extents;
pub mod formats;
pub mod fs;
pub mod host;
pub mod layer;
pub mod logging;
pub mod mount;
pub mod name;
pub mod overlay;
pub mod part_file;
pub mod pool;
pub mod printable;
pub mod process;
pub mod store;
pub mod stream;
pub mod transfer;
pub mod trust;
