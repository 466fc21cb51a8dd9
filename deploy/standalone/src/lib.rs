//! The `baton` command: [`up`] runs a cluster on this machine, [`ctl`] looks inside one, [`bench`] measures an
//! endpoint. Whatever goes wrong ends in one line that says what to do, and an exit status that is not 0.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;
mod ctl;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub use ctl::fuzz;
mod run_file;
mod screen;
mod up;

/// Serves large language models with prefill and decode apart.
#[derive(Debug, Parser)]
#[command(name = "baton", version, propagate_version = true, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(Box<up::UpArgs>),
    Ctl(Box<ctl::CtlArgs>),
    Bench(Box<bench::BenchCommand>),
}

/// Does what the command line says.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let ended = runtime.block_on(async {
        match args.command {
            Command::Up(args) => up::run(*args).await.map_err(Box::<dyn std::error::Error>::from),
            Command::Ctl(args) => ctl::run(*args).await.map(done).map_err(Box::<dyn std::error::Error>::from),
            Command::Bench(args) => {
                bench::run(&args).await.map(done).map_err(Box::<dyn std::error::Error>::from)
            }
        }
    });
    // A read of standard input or of a slow disk must not hold the end up.
    runtime.shutdown_background();
    match ended {
        Ok(code) => code,
        Err(error) => fail(error.as_ref()),
    }
}

fn done(_: ()) -> ExitCode {
    ExitCode::SUCCESS
}

fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    screen::complain(&format!("error: {}", baton_process::one_line(error)));
    ExitCode::FAILURE
}
