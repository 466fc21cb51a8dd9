//! The load client: a process that keeps so many requests in flight, on a connection each, and times and reads every answer.
//!
//! It speaks HTTP/1.1 by itself ([`connection`]), because what the client costs the machine is what the router does not get.

mod connection;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    error::BenchError,
    protocol::{Done, Job, Outcome, Spelling},
    words::{ANSWER_TOKENS, Words},
    worker::{read, say},
};
use connection::Connection;

/// Longest wait for a whole answer.
const PATIENCE: Duration = Duration::from_secs(200);

/// Runs until standard input ends: first the words, then jobs.
pub(crate) fn run() -> Result<(), BenchError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(BenchError::io("start a runtime"))?;
    let Some(words) = read::<Words>()? else { return Ok(()) };
    let words = Arc::new(words);
    while let Some(job) = read::<Job>()? {
        let bodies = Arc::new(Bodies::write(&words, &job));
        say(&Done {})?;
        if read::<Done>()?.is_none() {
            return Ok(());
        }
        say(&runtime.block_on(load(&words, &bodies, job)))?;
    }
    Ok(())
}

/// Prompts as they are sent, in two parts with the request's number between them.
struct Bodies {
    path: &'static str,
    prompts: Vec<(String, String)>,
}

impl Bodies {
    fn write(words: &Words, job: &Job) -> Self {
        let prompt = |index| {
            let prompt = words.prompt((job.texts_seed << 24) + u64::from(index), job.prompt_words);
            let rest = json!({"model": words.model, "stream": job.stream, "max_tokens": ANSWER_TOKENS, "temperature": 0});
            let rest = rest.to_string();
            let fields = rest.trim_start_matches('{').trim_end_matches('}');
            match job.spelling {
                Spelling::Chat => {
                    let text: String = prompt.iter().map(|word| word.text.as_str()).collect();
                    let after = format!("{text}\"}}]}}");
                    (format!("{{{fields},\"messages\":[{{\"role\":\"user\",\"content\":\"No "), after)
                }
                Spelling::Ids => {
                    let mut ids: Vec<_> = prompt.iter().map(|word| word.token.to_string()).collect();
                    ids.truncate(ids.len().saturating_sub(1).max(1));
                    (format!("{{{fields},\"prompt\":["), format!(",{}]}}", ids.join(",")))
                }
            }
        };
        let path = match job.spelling {
            Spelling::Chat => "/v1/chat/completions",
            Spelling::Ids => "/v1/completions",
        };
        Self { path, prompts: (0..job.texts.max(1)).map(prompt).collect() }
    }

    /// A whole request: the seed is its number, so that every answer is another.
    fn request(&self, words: &Words, job: &Job, number: u32) -> (Vec<u8>, u64, u64) {
        let seed = (job.seed << 24) + u64::from(number);
        let (before, after) = &self.prompts[number as usize % self.prompts.len()];
        // What is put at the front of a prompt makes it unlike every other.
        let unlike = match job.spelling {
            Spelling::Chat => seed.to_string(),
            Spelling::Ids => words.answer_at(seed, 7).token.to_string(),
        };
        let before = format!("{{\"seed\":{seed},{}", &before[1..]);
        let length = before.len() + unlike.len() + after.len();
        let path = self.path;
        let mut bytes = format!(
            "POST {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n",
            job.address
        )
        .into_bytes();
        for part in [&before, &unlike, after] {
            bytes.extend_from_slice(part.as_bytes());
        }
        (bytes, seed, length as u64)
    }
}

/// What one stream measured.
#[derive(Default)]
struct Measured {
    first_micros: Vec<u64>,
    whole_micros: Vec<u64>,
    body_bytes: u64,
    fault: Option<String>,
}

async fn load(words: &Arc<Words>, bodies: &Arc<Bodies>, job: Job) -> Outcome {
    let (job, next) = (Arc::new(job), Arc::new(AtomicU32::new(0)));
    let began = Instant::now();
    let mut streams = JoinSet::new();
    for stream in 0..job.streams {
        let late = Duration::from_micros(job.ramp_micros) * stream / job.streams;
        let (words, bodies, job, next) = (words.clone(), bodies.clone(), job.clone(), next.clone());
        streams.spawn(async move {
            tokio::time::sleep(late).await;
            let mut measured = Measured::default();
            let mut connection = None;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= job.requests {
                    return measured;
                }
                let asked = ask(&words, &bodies, &job, number, &mut connection, &mut measured);
                let fault = match tokio::time::timeout(PATIENCE, asked).await {
                    Ok(Ok(())) => continue,
                    Ok(Err(fault)) => fault,
                    Err(_) => format!("no whole answer within {PATIENCE:?}"),
                };
                // The others stop, too: a figure of a router that fails is none.
                next.store(job.requests, Ordering::Relaxed);
                measured.fault = Some(fault);
                return measured;
            }
        });
    }
    let mut outcome = Outcome {
        first_micros: Vec::new(),
        whole_micros: Vec::new(),
        wall_micros: 0,
        body_bytes: 0,
        fault: None,
    };
    while let Some(measured) = streams.join_next().await {
        match measured {
            Ok(measured) => {
                outcome.first_micros.extend(measured.first_micros);
                outcome.whole_micros.extend(measured.whole_micros);
                outcome.body_bytes += measured.body_bytes;
                outcome.fault = outcome.fault.or(measured.fault);
            }
            Err(error) => outcome.fault = Some(error.to_string()),
        }
    }
    outcome.wall_micros = began.elapsed().as_micros() as u64;
    outcome
}

/// Makes one request; an answer that is not whole, or another's, is a fault.
async fn ask(
    words: &Words,
    bodies: &Bodies,
    job: &Job,
    number: u32,
    connection: &mut Option<Connection>,
    measured: &mut Measured,
) -> Result<(), String> {
    let (request, seed, length) = bodies.request(words, job, number);
    let began = Instant::now();
    let mut open = match connection.take() {
        Some(open) => open,
        None => Connection::open(&job.address).await.map_err(|error| format!("cannot connect: {error}"))?,
    };
    let answer =
        open.ask(&request, job.stream).await.map_err(|error| format!("the answer broke off: {error}"))?;
    let whole = began.elapsed();
    if answer.status != 200 {
        return Err(format!("status {}: {}", answer.status, answer.body_start()));
    }
    let text = answer.text(job.stream)?;
    let expected: String = words.answer(seed).map(|word| word.text.as_str()).collect();
    if text != expected {
        return Err(format!("another text than it should be: {text:.200?} for {expected:.200?}"));
    }
    let first = answer.first.map_or(whole, |first| first - began);
    measured.first_micros.push(first.as_micros() as u64);
    measured.whole_micros.push(whole.as_micros() as u64);
    measured.body_bytes += length;
    if open.is_reusable() {
        *connection = Some(open);
    }
    Ok(())
}
