//! `cowslip`: parse, run one command, print one error.

use std::process::ExitCode;

use cowslip::{cli, host, process};

fn main() -> ExitCode {
    host::use_single_arena();
    process::handle_sigxfsz();
    // No thread may exist before this: `mount` and `run` fork.
    let code = cli::run(std::env::args_os()).unwrap_or_else(|error| {
        cli::print_error(&error);
        cli::exit_code(&error)
    });
    ExitCode::from(code)
}
