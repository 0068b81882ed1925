//! `cowslip`: parse, run one command, print one error.

use std::io::{self, Write};
use std::process::ExitCode;

use cowslip::{cli, host};

fn main() -> ExitCode {
    host::keep_one_heap();
    // No thread may exist before this: `mount` and `run` fork.
    let code = cli::run(std::env::args_os()).unwrap_or_else(|error| {
        // Not eprintln!, which panics when nobody listens any more.
        let _ = writeln!(io::stderr(), "cowslip: {error:#}");
        cli::exit_code(&error)
    });
    ExitCode::from(code)
}
