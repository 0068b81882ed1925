//! Integration tests: the program on real mounts with real tools, and the library's layers with
//! simulated files.
//!
//! One crate with a module for each subject, so that the helpers in [`common`] are compiled and
//! linked once. A test is selected by its path: `cargo test --test it mount::`.

// Sizes in tests are small, and a test may panic.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::expect_used,
    clippy::single_range_in_vec_init,
    clippy::unwrap_used
)]

mod common;

mod add_remove;
mod bad_input;
mod check_rebase;
mod commit;
mod commit_crash;
mod control;
mod control_text;
mod crash_mount;
mod diff;
mod direct;
mod documents;
mod foreign;
mod formats;
mod hostile;
mod hostile_mount;
mod life;
mod life_crash;
mod life_kill;
mod life_model;
mod map_picture;
mod mount;
mod mount_model;
mod other_users;
mod overlay_concurrency;
mod overlay_crash;
mod overlay_model;
mod partitions;
mod plain_tools;
mod process;
mod qcow2;
mod reflink;
mod remote;
mod remote_bmap;
mod remote_http;
mod remote_model;
mod send;
mod send_kill;
mod send_sparse;
mod store;
mod stream_device;
mod stream_guard;
mod streams;
mod views;
mod wire;
