//! `baton bench handoff`: how long an answer waits for its KV cache to cross.
//!
//! Two servers, one of role `prefill`, one of role `decode`, asked as a coordinator would ask them, one request at a time.
//! What is measured is what they say in their logs of each request, by the one clock of the machine: when the last keys
//! and values of its prompt were in prefill's blocks, when its first token was chosen, when the last of them were in
//! decode's blocks, when decode's first step began. Before the first token lie the rest of the last layer, for one row,
//! and the product with the vocabulary; the last layer's slices cross meanwhile and share the processors with them.
//!
//! The yardstick is how long the last layer's bytes take with nothing in their way: in the same round, over a plain
//! connection of the machine's loopback, or copied from memory to memory.

use std::{
    borrow::Cow,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::Instant,
};

use baton_checkpoint::{Checkpoint, CheckpointError};
use baton_proto::{
    TransferId,
    v1::{self, dispatch::Work as Leg},
};
use clap::Args;
use serde::{Deserialize, Serialize};
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
    #[error("the log of the {server} server does not say when request {request} reached {stage}")]
    NotLogged { server: &'static str, request: String, stage: &'static str },
    #[error("cannot measure what a bare connection or copy takes")]
    Bare(#[source] io::Error),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
}

/// One request's times, milliseconds since the last layer's keys and values were in prefill's blocks.
#[derive(Debug, Clone, Copy, Serialize)]
struct Sample {
    first_token: f64,
    last_slice: f64,
    first_step: f64,
    /// The last layer's bytes alone take so long.
    bare: f64,
}

impl Sample {
    /// What the handoff takes beside the bare transfer of the last layer.
    fn beside_the_layer(&self) -> f64 {
        self.first_step - self.bare
    }
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
    let (vocabulary, layers) = {
        let checkpoint = Checkpoint::open(&model)?;
        (checkpoint.config().vocabulary, checkpoint.config().layers)
    };
    let bar = rounds_bar(u64::from(args.rounds + 1));
    bar.set_message("starting the servers");
    let mut pairs = Vec::new();
    let mut rows = Vec::new();
    for transport in &args.transports {
        pairs.push(Pair::start(args, &model, (vocabulary, layers), transport).await?);
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
                let sample = pair.measure(tokens, &row.transport).await?;
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
    layers: u32,
}

impl Pair {
    async fn start(
        args: &HandoffArgs,
        model: &std::path::Path,
        (vocabulary, layers): (u32, u32),
        transport: &str,
    ) -> Result<Self, HandoffError> {
        let longest = args.prompt_tokens.iter().max().copied().unwrap_or(1);
        let blocks = (longest + ANSWER_TOKENS) / SMALLEST_BLOCK + 4;
        let settings = [
            format!("runtime.threads={}", args.threads),
            format!("runtime.kv_blocks={blocks}"),
            format!("handoff.transports=[{transport:?}]"),
            "process.log.format=json".to_owned(),
            "process.log.level=warn,baton_server=debug".to_owned(),
        ];
        let prefill = Server::start(model, "prefill", &settings).await?;
        let decode = Server::start(model, "decode", &settings).await?;
        Ok(Self { prefill, decode, vocabulary, layers })
    }

    /// One request from its dispatch to its end on both sides.
    async fn measure(&mut self, tokens: u32, transport: &str) -> Result<Sample, HandoffError> {
        let request = Server::request_id(self.prefill.next_leg());
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
            hand_on: false,
        };
        self.decode.dispatch(prompt.clone(), ANSWER_TOKENS, Leg::Decode(decode)).await?;
        self.prefill.dispatch(prompt, ANSWER_TOKENS, Leg::Prefill(prefill)).await?;
        for server in [&mut self.prefill, &mut self.decode] {
            while !server.step().await?.iter().any(|leg| leg.end.is_some()) {}
        }
        let (prefill, decode) = (self.prefill.log()?, self.decode.log()?);
        let at = |server, log: &str, stage| {
            reached(log, &request, stage).ok_or_else(|| HandoffError::NotLogged {
                server,
                request: request.clone(),
                stage,
            })
        };
        let last_layer = at("prefill", &prefill, "last_layer")?;
        let first_token = at("prefill", &prefill, "first_token")?;
        let last_slice = at("decode", &decode, "last_slice")?;
        let first_step = at("decode", &decode, "first_step")?;
        let stage = "cache received";
        let bytes = last_received(&decode).ok_or_else(|| HandoffError::NotLogged {
            server: "decode",
            request,
            stage,
        })?;
        let bare = bare(transport, bytes / u64::from(self.layers)).map_err(HandoffError::Bare)?;
        Ok(Sample {
            first_token: between(last_layer, first_token),
            last_slice: between(last_layer, last_slice),
            first_step: between(last_layer, first_step),
            bare,
        })
    }

    async fn stop(self) {
        self.prefill.stop().await;
        self.decode.stop().await;
    }
}

/// A line of a log.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    request_id: Cow<'a, str>,
    #[serde(borrow, default)]
    stage: Cow<'a, str>,
    /// When it was: microseconds since 1970.
    #[serde(default)]
    at_micros: Option<u64>,
    /// Of a cache that was received.
    #[serde(default)]
    bytes: Option<u64>,
}

/// Bytes of the cache that was received last.
fn last_received(log: &str) -> Option<u64> {
    log.lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line<'_>>(line).ok())
        .find_map(|line| line.bytes)
}

/// Times that the bare transfer is made; the middle one counts.
const BARE_TIMES: usize = 9;

/// Milliseconds that so many bytes take: over a connection of the loopback, until the other end has them all, or as one
/// copy between processes' memory would take them.
fn bare(transport: &str, bytes: u64) -> io::Result<f64> {
    let payload = vec![1u8; bytes as usize];
    let mut millis = Vec::with_capacity(BARE_TIMES);
    if transport == "shm" {
        let mut target = vec![2u8; payload.len()];
        for _ in 0..BARE_TIMES {
            let started = Instant::now();
            target.copy_from_slice(std::hint::black_box(&payload));
            std::hint::black_box(&mut target);
            millis.push(started.elapsed().as_secs_f64() * 1e3);
        }
    } else {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut stream = TcpStream::connect(listener.local_addr()?)?;
        stream.set_nodelay(true)?;
        let (mut peer, _) = listener.accept()?;
        let mut target = vec![2u8; payload.len()];
        let taking = thread::spawn(move || {
            (0..BARE_TIMES).try_for_each(|_| {
                peer.read_exact(&mut target)?;
                peer.write_all(&[1])
            })
        });
        for _ in 0..BARE_TIMES {
            let started = Instant::now();
            stream.write_all(&payload)?;
            stream.read_exact(&mut [0])?;
            millis.push(started.elapsed().as_secs_f64() * 1e3);
        }
        taking.join().unwrap_or_else(|_| Err(io::Error::other("the receiving thread panicked")))?;
    }
    millis.sort_by(f64::total_cmp);
    Ok(millis[BARE_TIMES / 2])
}

/// When a request was so far: microseconds since 1970.
fn reached(log: &str, request: &str, stage: &str) -> Option<u64> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Line<'_>>(line).ok());
    let mut of_it = lines.filter(|line| line.request_id == request && line.stage == stage);
    of_it.next().and_then(|line| line.at_micros)
}

/// Milliseconds from one time to another, which may be a little before it: two processes' clocks may disagree a little.
fn between(from: u64, to: u64) -> f64 {
    (to as f64 - from as f64) / 1e3
}

fn table(args: &HandoffArgs, rows: &[Row]) -> String {
    let mut table = Builder::default();
    let head = [
        "handoff",
        "first token",
        "last slice landed",
        "first step",
        "longest",
        "layer alone",
        "beside it",
        "target",
    ];
    table.push_record(head);
    for Row { transport, prompt_tokens, samples } in rows {
        let millis = |value: f64| format!("{value:.2} ms");
        table.push_record([
            format!("{transport}, {prompt_tokens} tokens"),
            millis(median(samples, |sample| sample.first_token)),
            millis(median(samples, |sample| sample.last_slice)),
            millis(median(samples, |sample| sample.first_step)),
            millis(samples.iter().map(|sample| sample.first_step).fold(0.0, f64::max)),
            millis(median(samples, |sample| sample.bare)),
            millis(median(samples, Sample::beside_the_layer)),
            format!("<= {TARGET_MILLIS} ms"),
        ]);
    }
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{}\nfrom the last layer's keys and values on; medians of {} rounds; prefill and decode with {} compute threads each, on {cores} processors",
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
    fn a_stage_is_found_in_the_log() {
        let log = [
            "not JSON",
            r#"{"timestamp":"2026-01-31T23:59:59.999500Z","request_id":"r-1","stage":"last_layer","at_micros":1790000000000000}"#,
            r#"{"timestamp":"2026-02-01T00:00:00.001900Z","request_id":"r-1","stage":"first_token","at_micros":1790000000002000}"#,
        ]
        .join("\n");
        let at = |request, stage| reached(&log, request, stage);
        let (from, to) = (at("r-1", "last_layer").expect("there"), at("r-1", "first_token").expect("there"));
        assert_eq!((between(from, to), between(to, from)), (2.0, -2.0));
        assert_eq!((at("r-2", "last_layer"), at("r-1", "first_step")), (None, None));
    }

    #[test]
    fn medians_of_even_and_odd_counts() {
        let samples = |of: &[f64]| {
            of.iter()
                .map(|&v| Sample { first_token: v, last_slice: v, first_step: v + 1.0, bare: 1.0 })
                .collect()
        };
        let of = |values: &[f64]| {
            let samples: Vec<Sample> = samples(values);
            median(&samples, Sample::beside_the_layer)
        };
        assert_eq!((of(&[3.0, 1.0, 2.0]), of(&[4.0, 1.0])), (2.0, 2.5));
        assert!(of(&[]).is_nan());
    }
}
