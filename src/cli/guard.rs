//! `cowslip __guard`: the guard of a command that reads a stream; cowslip itself starts it.

use std::io;

use clap::Args;

use super::EXIT_OK;
use crate::program::guard::run_guard;

#[derive(Debug, Args)]
pub(super) struct GuardArgs {
    /// The process group to kill when stdin ends without a byte
    group: i32,
}

pub(super) fn run(args: &GuardArgs) -> anyhow::Result<u8> {
    run_guard(io::stdin(), args.group)?;
    Ok(EXIT_OK)
}
