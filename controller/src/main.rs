//! Starts the controller: flags, configuration, run, drain. See the library's documentation for the rest.

use std::process::ExitCode;

use baton_process::CommonArgs;
use clap::Parser;

/// Decides which instance of a Baton cluster prefills and which decodes, and keeps the cluster's state.
#[derive(Debug, Parser)]
#[command(name = "baton-controller", version)]
struct Args {
    /// Where servers, coordinators and `baton ctl` reach it: HOST:PORT or fd://N.
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,

    /// Prefill instances wanted in a group.
    #[arg(long, value_name = "N")]
    prefill: Option<u32>,

    /// Decode instances wanted in a group.
    #[arg(long, value_name = "M")]
    decode: Option<u32>,

    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let flags = [
        ("listen", args.listen),
        ("roles.prefill", args.prefill.map(|count| count.to_string())),
        ("roles.decode", args.decode.map(|count| count.to_string())),
    ];
    let overrides = flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
    baton_process::run("controller", args.common, overrides, baton_controller::run)
}
