//! cowslip mounts virtual disks as plain files, through FUSE.
//!
//! A disk is a stack of layers: a base at the bottom, and copy-on-write overlays above it that take
//! the writes. One mount shows many disks, and `lseek(SEEK_HOLE/SEEK_DATA)` is answered from the
//! extent map. A disk may instead be a [`stream`], whose bytes leave in order while they are
//! written, or arrive.
//!
//! This crate serves the program `cowslip` and its tests, benchmarks and fuzz targets. Its modules
//! are public for those alone: they are no API, and change without notice.
//!
//! A request goes down the modules once and comes back once:
//!
//! ```text
//!   cli ──plan──▶ mount ──▶ fs ──▶ control        the start and end; FUSE; the `.cowslip` directory
//!                            │       │
//!                            ▼       ▼
//!                           catalog ──▶ store     names and inodes; the directory behind `--store`
//!                            │            │
//!                            ▼            ▼
//!                           disk                  the stack of layers, its gate, its history
//!                  ┌─────────┼─────────┐
//!                  ▼         ▼         ▼
//!               overlay ──▶ base ◀── stream       changes; what is below them; bytes in order
//!                  └─────────┼─────────┘
//!                            ▼
//!               layer, extents, host, pool        the traits, runs of bytes, the host, threads
//!
//!                          remote                 images on servers, below base
//!
//!   cli ──▶ transfer, export ──▶ formats          files through pipes; diffs; other tools' formats
//! ```
//!
//! Beside them:
//!
//! - [`offline`]: work on overlays that are not mounted: check, rebase, commit, import.
//! - [`config`]: the user's settings as plain values, without I/O.
//! - [`confined`], [`trust`], [`trusted_path`]: which files and directories of others may be opened
//!   and believed, and which links lead to them.
//! - [`direct`], [`aligned`]: reading and writing past the host's page cache.
//! - [`identity`], [`checksum`], [`program`], [`arrival`]: what a changed base is noticed by, CRC32C, programs that are
//!   started, bytes that are on their way.
//! - [`part_file`], [`name`], [`printable`], [`process`], [`logging`]: files that get their name
//!   when they are complete, names in a mount, text for a terminal, limits of the process, the
//!   daemon's log.
//!
//! `docs/architecture.md` follows four requests through the functions, and lists the order of
//! locks, the threads and the words. `CONTRIBUTING.md` says how to test and extend the code.

mod aligned;
mod arrival;
pub mod base;
pub mod catalog;
pub mod checksum;
pub mod cli;
pub mod config;
pub mod confined;
pub mod control;
mod direct;
pub mod disk;
mod export;
pub mod extents;
pub mod formats;
mod fs;
pub mod host;
pub mod identity;
pub mod layer;
mod log_throttle;
mod logging;
mod mount;
mod name;
mod offline;
pub mod overlay;
pub mod part_file;
mod pool;
mod printable;
pub mod process;
pub mod program;
pub mod remote;
mod sandbox;
mod store;
pub mod stream;
pub mod transfer;
pub mod trust;
pub mod trusted_path;
mod zeros;
