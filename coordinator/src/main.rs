//! Starts the coordinator: flags and configuration, then [`baton_coordinator::run`] until a shutdown.

mod memory;

use std::process::ExitCode;

use baton_process::CommonArgs;
use clap::Parser;

/// The entry of a Baton cluster: serves the OpenAI API and schedules requests on prefill and decode instances.
#[derive(Parser)]
#[command(name = "baton-coordinator", version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Model to serve: a GGUF file or a Hugging Face directory. May be repeated [key: models]
    #[arg(long, value_name = "PATH")]
    model: Vec<String>,

    /// Address for clients, HOST:PORT [key: listen]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,

    /// Address for operators (gRPC), HOST:PORT [key: admin_listen]
    #[arg(long, value_name = "ADDR")]
    admin_listen: Option<String>,

    /// File of API keys: with one, clients need a key. `baton ctl key generate` makes them [key: api_keys.file]
    #[arg(long, value_name = "FILE")]
    api_keys: Option<String>,

    /// Controller that embeds the state store, HOST:PORT [key: store.controller]
    #[arg(long, value_name = "ADDR")]
    controller: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let flags = [
        ("models", models(&args.model)),
        ("listen", args.listen),
        ("admin_listen", args.admin_listen),
        ("api_keys.file", args.api_keys),
        ("store.controller", args.controller),
    ];
    let overrides =
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect::<Vec<_>>();
    baton_process::run("coordinator", args.common, overrides, baton_coordinator::run)
}

/// The list of models as the configuration is told it, in TOML: its strings are written as in JSON.
fn models(paths: &[String]) -> Option<String> {
    let tables: Vec<String> =
        paths.iter().map(|path| format!("{{path = {}}}", serde_json::Value::from(path.as_str()))).collect();
    (!tables.is_empty()).then(|| format!("[{}]", tables.join(", ")))
}
