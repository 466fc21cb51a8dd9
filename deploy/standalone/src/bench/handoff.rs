//! `baton bench handoff`: how long an answer waits for its KV cache to cross.
//!
//! Two servers, one of role `prefill`, one of role `decode`, asked as a coordinator would ask them, one request at a time.
//! What is measured is what they show of each request to Prometheus: on one side the time from a prompt's last layer
//! until decode has said that its cache is whole, on the other from that moment to the step that goes on from it. Their
//! sum counts the way back of "it is whole" as well, so it is an upper bound of the time from prefill's last layer to
//! decode's first step. Between the two lie the layer's transfer, the product with the vocabulary and the sampling of
//! the first token.

use std::path::PathBuf;

use baton_checkpoint::{Checkpoint, CheckpointError};
use baton_proto::{
    TransferId,
    v1::{self, dispatch::Work as Leg},
};
use clap::Args;
use serde::Serialize;
use tabled::{builder::Builder, settings::Style};

use super::{
    prompt::mix,
    rounds_bar,
    server::{Server, ServerError, prompt_tokens},
};
use crate::{screen::say, up};

/// What each answer has: the first token comes from prefill, the others from decode.
const ANSWER_TOKENS: u32 = 8;
/// A block has at least so many tokens.
const SMALLEST_BLOCK: u32 = 16;
/// What the handoff may cost beside the transfer of the last layer.
const TARGET_MILLIS: f64 = 2.0;

/// Measure how long an answer waits between prefill's last layer and decode's first step.
#[derive(Debug, Clone, Args)]
pub(crate) struct HandoffArgs {
    /// A GGUF file or Hugging Face directory [default: the small model that `baton up` fetches].
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Tokens of the prompts.
    #[arg(long, value_delimiter = ',', default_values_t = [512, 4096], value_parser = clap::value_parser!(u32).range(1..=100_000))]
    prompt_tokens: Vec<u32>,
    /// How caches cross.
    #[arg(long, value_delimiter = ',', default_values_t = ["tcp".to_owned(), "shm".to_owned()])]
    transports: Vec<String>,
    /// Compute threads of each server.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,
    /// Times that each is measured, after one round that does not count.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Write every round's figures to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandoffError {
    #[error(transparent)]
    Model(#[from] up::UpError),
    #[error("cannot read the model")]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error("the server does not show {0}")]
    NotShown(&'static str),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
}

/// One request's times, milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sample {
    /// From the last layer until decode has said that the cache is whole.
    last_layer_to_whole: f64,
    /// From there to decode's first step.
    whole_to_step: f64,
}

/// All rounds of one prompt length over one transport.
#[derive(Debug, Serialize)]
struct Row {
    transport: String,
    prompt_tokens: u32,
    samples: Vec<Sample>,
}

/// Runs the whole measurement and prints its table.
pub(crate) async fn run(args: &HandoffArgs) -> Result<(), HandoffError> {
    let model = match &args.model {
        Some(model) => model.clone(),
        None => up::default_model().await?,
    };
    let vocabulary = Checkpoint::open(&model)?.config().vocabulary;
    let bar = rounds_bar(u64::from(args.rounds + 1));
    bar.set_message("starting the servers");
    let mut pairs = Vec::new();
    let mut rows = Vec::new();
    for transport in &args.transports {
        pairs.push(Pair::start(args, &model, vocabulary, transport).await?);
        rows.extend(args.prompt_tokens.iter().map(|&prompt_tokens| Row {
            transport: transport.clone(),
            prompt_tokens,
            samples: Vec::new(),
        }));
    }
    for round in 0..=args.rounds {
        let mut row = rows.iter_mut();
        for pair in &mut pairs {
            for (&tokens, row) in args.prompt_tokens.iter().zip(row.by_ref()) {
                bar.set_message(format!("{tokens} tokens over {}", row.transport));
                let sample = pair.measure(tokens).await?;
                if round > 0 {
                    row.samples.push(sample);
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    for pair in pairs {
        pair.stop().await;
    }
    say(&table(args, &rows));
    if let Some(path) = &args.json {
        let written = std::fs::write(path, serde_json::json!({ "rows": rows }).to_string());
        written.map_err(|source| HandoffError::Write { path: path.clone(), source })?;
    }
    Ok(())
}

/// A prefill and a decode server.
struct Pair {
    prefill: Server,
    decode: Server,
    vocabulary: u32,
}

impl Pair {
    async fn start(
        args: &HandoffArgs,
        model: &std::path::Path,
        vocabulary: u32,
        transport: &str,
    ) -> Result<Self, HandoffError> {
        let longest = args.prompt_tokens.iter().max().copied().unwrap_or(1);
        let blocks = (longest + ANSWER_TOKENS) / SMALLEST_BLOCK + 4;
        let settings = [
            format!("runtime.threads={}", args.threads),
            format!("runtime.kv_blocks={blocks}"),
            format!("handoff.transports=[{transport:?}]"),
        ];
        let prefill = Server::start(model, "prefill", &settings).await?;
        let decode = Server::start(model, "decode", &settings).await?;
        Ok(Self { prefill, decode, vocabulary })
    }

    /// One request from its dispatch to its end on both sides.
    async fn measure(&mut self, tokens: u32) -> Result<Sample, HandoffError> {
        let before = self.sums().await?;
        let transfer = TransferId::generate();
        let id = || transfer.as_bytes().to_vec().into();
        // A prompt that no request had before: none of it is in a prefix cache.
        let prompt = prompt_tokens(self.vocabulary, mix(self.prefill.next_leg()), tokens);
        let decode = v1::dispatch::Decode {
            transfer_id: id(),
            prefill_instance: "prefill".to_owned(),
            prefill_incarnation: self.prefill.incarnation(),
        };
        let prefill = v1::dispatch::Prefill {
            transfer_id: id(),
            decode_instance: "decode".to_owned(),
            decode_incarnation: self.decode.incarnation(),
            decode_handoff_endpoint: self.decode.address().to_owned(),
        };
        self.decode.dispatch(prompt.clone(), ANSWER_TOKENS, Leg::Decode(decode)).await?;
        self.prefill.dispatch(prompt, ANSWER_TOKENS, Leg::Prefill(prefill)).await?;
        for server in [&mut self.prefill, &mut self.decode] {
            while !server.step().await?.iter().any(|leg| leg.end.is_some()) {}
        }
        let after = self.sums().await?;
        let [last_layer_to_whole, whole_to_step] = [0, 1].map(|nth| (after[nth] - before[nth]) * 1e3);
        Ok(Sample { last_layer_to_whole, whole_to_step })
    }

    /// Seconds so far, of all requests: from last layer to whole, from whole to the first step.
    async fn sums(&self) -> Result<[f64; 2], HandoffError> {
        let [handoff, join] = ["baton_server_handoff_seconds_sum", "baton_server_join_seconds_sum"];
        let of = |text: &str, name: &'static str| shown(text, name).ok_or(HandoffError::NotShown(name));
        Ok([of(&self.prefill.metrics().await?, handoff)?, of(&self.decode.metrics().await?, join)?])
    }

    async fn stop(self) {
        self.prefill.stop().await;
        self.decode.stop().await;
    }
}

/// A sample without labels, in the text that Prometheus reads.
fn shown(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn table(args: &HandoffArgs, rows: &[Row]) -> String {
    let mut table = Builder::default();
    let head = ["handoff", "last layer to whole", "whole to first step", "together", "longest", "target"];
    table.push_record(head);
    for Row { transport, prompt_tokens, samples } in rows {
        let sum = |sample: &Sample| sample.last_layer_to_whole + sample.whole_to_step;
        let millis = |value: f64| format!("{value:.2} ms");
        table.push_record([
            format!("{transport}, {prompt_tokens} tokens"),
            millis(median(samples, |sample| sample.last_layer_to_whole)),
            millis(median(samples, |sample| sample.whole_to_step)),
            millis(median(samples, sum)),
            millis(samples.iter().map(sum).fold(0.0, f64::max)),
            format!("<= {TARGET_MILLIS} ms + the layer"),
        ]);
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{}\nmedians of {} rounds; prefill and decode with {} compute threads each, on {cores} processors",
        table.build().with(Style::markdown()),
        args.rounds,
        args.threads,
    )
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "# HELP a_sum x\na_sum_total 1\na_sum 2.5\n";
        assert_eq!(shown(text, "a_sum"), Some(2.5));
        assert_eq!(shown(text, "a"), None);
    }

    #[test]
    fn medians_of_even_and_odd_counts() {
        let samples =
            |of: &[f64]| of.iter().map(|&v| Sample { last_layer_to_whole: v, whole_to_step: 0.0 }).collect();
        let of = |values: &[f64]| {
            let samples: Vec<Sample> = samples(values);
            median(&samples, |sample| sample.last_layer_to_whole)
        };
        assert_eq!((of(&[3.0, 1.0, 2.0]), of(&[4.0, 1.0])), (2.0, 2.5));
        assert!(of(&[]).is_nan());
    }
}
