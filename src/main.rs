//! The `cowslip` binary: parses the arguments, runs one command, prints at most one error.

use std::process::ExitCode;

use cowslip::{cli, host, process};

fn main() -> ExitCode {
    host::use_single_arena();
    process::handle_sigxfsz();
    // `mount` and `run` fork, so no thread may exist before this line.
    let code = cli::run(std::env::args_os()).unwrap_or_else(|error| {
        cli::print_error(&error);
        cli::exit_code(&error)
    });
    ExitCode::from(code)
}
