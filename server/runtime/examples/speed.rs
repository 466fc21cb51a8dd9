//! Measures loading, prefill and decode of a model: `speed MODEL [THREADS] [f32|bf16|int8] [prefill|decode|all [FOLDER]]`,
//! where FOLDER is that of packed copies. Prints a table of tokens a second, on average and in the best step (what a
//! machine with nothing else to do would give).

use std::{
    env,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use baton_checkpoint::Checkpoint;
use baton_runtime::{BlockId, Executor, KvDtype, LoadOptions, RuntimeError, SequenceChunk, load};

const PROMPT: u32 = 512;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let model = arguments
        .next()
        .ok_or("usage: speed MODEL [THREADS] [f32|bf16|int8] [prefill|decode|all [FOLDER]]")?;
    let threads = arguments.next().map_or(Ok(0), |n| n.parse())?;
    let kv_dtype = arguments.next().unwrap_or_else(|| "bf16".into());
    let kv_dtype =
        KvDtype::ALL.into_iter().find(|dtype| dtype.name() == kv_dtype).ok_or("no such KV type")?;
    let only = arguments.next().unwrap_or_else(|| "all".into());
    let wanted = |what: &str| only == "all" || only == what;
    let packed_copies = arguments.next().map(PathBuf::from);
    let options = LoadOptions { threads, kv_dtype, kv_blocks: 512, packed_copies, ..LoadOptions::default() };
    let checkpoint = Checkpoint::open(Path::new(&model))?;
    let start = Instant::now();
    let mut executor = load(&checkpoint, &options, &mut |_, _| {})?;
    let seconds = start.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("unknown").trim();
    let (name, kv) = (checkpoint.name(), kv_dtype.name());
    println!("{name} loaded in {seconds:.2} s, peak memory {peak}, KV {kv}");

    println!("{:<24} {:>12} {:>12} {:>12} {:>12}", "", "tok/s", "ms a step", "best tok/s", "by core time");
    let prompt: Vec<u32> = (0..PROMPT).map(|i| (i * 37 + 11) % executor.shape().vocabulary).collect();
    for tokens in [64, 512].into_iter().filter(|_| wanted("prefill")) {
        let blocks: Vec<BlockId> = (0..32).map(BlockId).collect();
        let chunk = SequenceChunk { tokens: &prompt[..tokens], start: 0, blocks: &blocks, logits: true };
        report(&format!("prefill {tokens}"), tokens, 5, || {
            executor.forward(&[chunk], &mut |_| {}).map(drop)
        })?;
    }
    for sequences in [1, 2, 4, 8].into_iter().filter(|_| wanted("decode")) {
        decode(executor.as_mut(), &prompt, sequences)?;
    }
    Ok(())
}

/// Decodes 32 tokens of each of some sequences with prompts of 128 tokens.
fn decode(executor: &mut dyn Executor, prompt: &[u32], sequences: u32) -> Result<(), RuntimeError> {
    let blocks: Vec<Vec<BlockId>> =
        (0..sequences).map(|s| (0..16).map(|b| BlockId(s * 16 + b)).collect()).collect();
    for blocks in &blocks {
        let chunk = SequenceChunk { tokens: &prompt[..128], start: 0, blocks, logits: false };
        executor.forward(&[chunk], &mut |_| {})?;
    }
    let mut position = 128;
    report(&format!("decode, batch {sequences}"), sequences as usize, 100, || {
        let chunk = |blocks| SequenceChunk { tokens: &prompt[7..8], start: position, blocks, logits: true };
        let batch: Vec<SequenceChunk<'_>> = blocks.iter().map(|blocks| chunk(blocks.as_slice())).collect();
        executor.forward(&batch, &mut |_| {})?;
        position += 1;
        Ok(())
    })
}

fn report(
    what: &str,
    tokens: usize,
    times: u32,
    mut step: impl FnMut() -> Result<(), RuntimeError>,
) -> Result<(), RuntimeError> {
    step()?;
    let (mut total, mut best, mut least) = (0.0, f64::INFINITY, f64::INFINITY);
    for _ in 0..times {
        let (start, computed) = (Instant::now(), computing_seconds());
        step()?;
        let seconds = start.elapsed().as_secs_f64();
        (total, best) = (total + seconds, best.min(seconds));
        least = least.min(computing_seconds() - computed);
    }
    let (seconds, tokens) = (total / f64::from(times), tokens as f64);
    let (average, best, computed) = (tokens / seconds, tokens / best, tokens / least);
    println!("{what:<24} {average:>12.1} {:>12.2} {best:>12.1} {computed:>12.1}", seconds * 1e3);
    Ok(())
}

/// Seconds that this thread has been on a core so far, where the system tells.
fn computing_seconds() -> f64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = times.split_whitespace().next().and_then(|first| first.parse().ok());
    nanoseconds.unwrap_or(f64::NAN) / 1e9
}
