//! Starts the server: flags and configuration, then [`baton_server::instance::run`] until it has drained.

use std::{error::Error, path::PathBuf, process::ExitCode};

use baton_kvtransfer::{TransportProbe, probe};
use baton_process::{CommonArgs, config};
use baton_runtime::{LoadOptions, product_rate};
use baton_server::{config::ServerConfig, instance};
use clap::Parser;

/// A Baton instance: runs a model, hands KV caches on or takes them up.
#[derive(Debug, Parser)]
#[command(name = "baton-server", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// The model: a GGUF file, or a Hugging Face directory [key: model.path]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,

    /// Name of this instance in the fleet [key: instance_id]
    #[arg(long, value_name = "NAME")]
    instance_id: Option<String>,

    /// A controller; may be repeated [key: controllers]
    #[arg(long = "controller", value_name = "HOST:PORT")]
    controllers: Vec<String>,

    /// gRPC address; port 0 = any free one [key: listen]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,

    /// Take this role on at once: prefill, decode or mixed [key: role]
    #[arg(long)]
    role: Option<String>,

    /// Print how many operations a second products with bf16 weights make on this machine, with the threads and the
    /// arithmetic of the configuration, and exit
    #[arg(long)]
    measure_products: bool,

    /// Print over what KV caches could travel from and to this machine, or why not, and exit
    #[arg(long)]
    transports: bool,
}

impl Args {
    fn overrides(&self) -> Vec<(String, String)> {
        let controllers = (!self.controllers.is_empty()).then(|| self.controllers.join(","));
        let flags = [
            ("model.path", self.model.as_ref().map(|path| path.display().to_string())),
            ("instance_id", self.instance_id.clone()),
            ("controllers", controllers),
            ("listen", self.listen.clone()),
            ("role", self.role.clone()),
        ];
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let overrides = args.overrides();
    if args.measure_products {
        return match measure_products(&args.common, overrides) {
            Ok(rate) => {
                println!("{rate:.0}");
                ExitCode::SUCCESS
            }
            Err(error) => {
                let mut words = error.to_string();
                let mut cause = error.source();
                while let Some(error) = cause {
                    words = format!("{words}: {error}");
                    cause = error.source();
                }
                eprintln!("error: {words}");
                ExitCode::FAILURE
            }
        };
    }
    if args.transports {
        for TransportProbe { kind, found } in probe(None) {
            match found {
                Ok(with) => println!("{:5} yes: {with}", kind.name()),
                Err(why) => println!("{:5} no: {why}", kind.name()),
            }
        }
        return ExitCode::SUCCESS;
    }
    baton_process::run::<ServerConfig, _, _, _>("server", args.common, overrides, instance::run)
}

fn measure_products(common: &CommonArgs, mut set: Vec<(String, String)>) -> Result<f64, Box<dyn Error>> {
    set.extend(config::parse_set(&common.set)?);
    let ServerConfig { runtime, .. } = config::load("server", common.config.as_deref(), &set)?;
    let (threads, exact_bf16) = (runtime.threads, runtime.exact_bf16);
    Ok(product_rate(&LoadOptions { threads, exact_bf16, ..LoadOptions::default() })?)
}
