//! The flags of `baton up`.

use std::path::PathBuf;

use baton_process::Listen;

use super::UpError;

/// Run a cluster on this machine: controller, coordinator, prefill and decode servers.
///
/// Each service is a process of its own, started again when it dies. Without --model, a small model
/// (SmolLM2-135M-Instruct, 98 MB) is fetched once and kept. Ctrl-C lets running requests finish and stops
/// everything; a second Ctrl-C stops at once (exit status 130).
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct UpArgs {
    /// Model to serve: a GGUF file, or a Hugging Face directory (config.json, tokenizer.json, *.safetensors). Given more than
    /// once, each model has servers of its own.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Vec<PathBuf>,

    /// Servers that prefill, for each model.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) prefill: u32,

    /// Servers that decode, for each model. `--prefill 1 --decode 0` runs one server that does both.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub(crate) decode: u32,

    /// Address of the OpenAI API; port 0 picks a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    pub(crate) listen: Listen,

    /// Serves /metrics, /health and /readiness apart from the OpenAI API: the coordinator's at this address, the controller's at
    /// the next port, those of the servers at the ports behind [default: the coordinator's are at --listen, the others' at
    /// ports of their own choice].
    #[arg(long, value_name = "ADDR")]
    pub(crate) metrics_listen: Option<Listen>,

    /// Compute threads of each server [default: the machine's cores, shared among the servers of a role, of all models].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) threads: Option<u32>,

    /// Where models are kept, and packed copies of their weights, which servers share and load faster from [default:
    /// $XDG_CACHE_HOME/baton or ~/.cache/baton]. `--set server.runtime.packed_copies=` keeps no copies.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,

    /// Where this run's logs, configuration files and run.json lie [default: a directory by address in
    /// $XDG_STATE_HOME/baton/runs or ~/.local/state/baton/runs].
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,

    /// Set a service's configuration key, as in `--set server.runtime.kv_dtype=int8` or
    /// `--set coordinator.limits.max_queued=10`. May be repeated. `baton-server --config-reference` prints the keys of
    /// servers, the other services theirs.
    #[arg(long, value_name = "SERVICE.KEY=VALUE")]
    pub(crate) set: Vec<String>,

    /// Show the logs of all processes here too.
    #[arg(long, short)]
    pub(crate) verbose: bool,

    /// Fetch the default model, print its path, and exit.
    #[arg(long)]
    pub(crate) fetch_only: bool,

    /// Stop when standard input closes.
    #[arg(long, hide = true)]
    pub(crate) supervised: bool,
}

impl UpArgs {
    /// Apart, or one server alone: anything else could not serve.
    pub(crate) fn check_counts(&self) -> Result<(), UpError> {
        if self.decode == 0 && self.prefill > 1 { Err(UpError::NoDecode(self.prefill)) } else { Ok(()) }
    }

    /// How many servers each model will have.
    pub(crate) fn instances(&self) -> u32 {
        self.prefill + self.decode
    }
}
