//! The `cowslip` program.

fn main() {}
