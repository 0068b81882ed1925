//! What several test programs share.

// Every test program compiles all of this as a module of its own and uses its part.
#![allow(dead_code, unreachable_pub)]

pub mod library;
pub mod model;
pub mod mount;
pub mod sim;
pub mod state;
pub mod strace;
