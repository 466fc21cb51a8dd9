//! The `baton` command; all of it is in the library beside.

use std::process::ExitCode;

fn main() -> ExitCode {
    baton_standalone::main()
}
