//! What a tiny reference model is checked for, and the report of how it went.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use baton_checkpoint::{Checkpoint, Dtype};
use baton_runtime::{BlockId, KvDtype, LoadOptions, SequenceChunk};
use serde::Deserialize;

use crate::session::{Session, argmax, blocks, slice, tiny, write_slice};

/// Every how many'th logit the reference files hold.
const STRIDE: usize = 3;

/// What transformers says: logits after each token of a prompt, and the most likely continuation.
#[derive(Deserialize)]
pub(crate) struct Expected {
    prompt: Vec<u32>,
    logits: Vec<Vec<f32>>,
    greedy: Vec<u32>,
}

/// The ways in which the same logits are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Check {
    WholePrompt,
    Chunks,
    Decode,
    MixedBatch,
    Handoff,
}

impl Check {
    pub(crate) const ALL: [(Self, &'static str); 5] = [
        (Self::WholePrompt, "whole prompt"),
        (Self::Chunks, "in chunks"),
        (Self::Decode, "decode"),
        (Self::MixedBatch, "mixed batch"),
        (Self::Handoff, "after a handoff"),
    ];
}

/// How one model did with one type of KV cache.
pub(crate) struct Outcome {
    pub(crate) family: &'static str,
    pub(crate) model: String,
    pub(crate) kv_dtype: KvDtype,
    pub(crate) weights: Weights,
    /// Largest difference of a logit by check.
    pub(crate) differences: BTreeMap<Check, f32>,
    /// Greedy tokens that are the reference's, and how many there are: alone, in a batch and after a handoff together.
    pub(crate) equal_tokens: (usize, usize),
}

/// What products are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    /// As they are in the file, in f32.
    Exact,
    /// Quantised ones, some of them, in integers.
    Quantised,
    /// Those in bf16 or E4M3 as multiples of 12 bits, in integers.
    Bf16Blocks,
}

impl Weights {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Exact, "exact weights"),
        (Self::Quantised, "quantised weights"),
        (Self::Bf16Blocks, "weights in blocks of 12 bits (from bf16, E4M3)"),
    ];

    fn of(checkpoint: &Checkpoint, how: How) -> Self {
        let has = |dtype: Dtype| checkpoint.tensors().any(|(_, tensor)| tensor.dtype == dtype);
        if checkpoint.tensors().any(|(_, tensor)| tensor.dtype.block_elements() > 1) {
            Self::Quantised
        } else if has(Dtype::F8E4M3) || has(Dtype::Bf16) && !how.exact_bf16 {
            Self::Bf16Blocks
        } else {
            Self::Exact
        }
    }
}

/// How a tiny model is loaded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) kv_dtype: KvDtype,
    pub(crate) exact_bf16: bool,
}

impl How {
    /// Those that make a difference for a model, every type of cache among them.
    pub(crate) fn all(name: &str) -> Vec<Self> {
        let mut all = KvDtype::ALL.map(|kv_dtype| Self { kv_dtype, exact_bf16: false }).to_vec();
        if name.contains("bf16") {
            all.push(Self { kv_dtype: KvDtype::F32, exact_bf16: true });
        }
        all
    }

    /// Loads a tiny model as an engine would.
    fn open(self, name: &str) -> Session {
        let Self { kv_dtype, exact_bf16 } = self;
        let (threads, kv_blocks, max_batch_tokens) = (2, 64, 1024);
        let rest = LoadOptions::default();
        let options = LoadOptions { threads, kv_dtype, exact_bf16, kv_blocks, max_batch_tokens, ..rest };
        Session::open(&tiny(name), &options)
    }
}

/// The larger; NaN if either is.
fn worse(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}

/// The largest difference; NaN if there is one.
pub(crate) fn difference(got: impl IntoIterator<Item = f32>, want: &[f32]) -> f32 {
    got.into_iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, worse)
}

/// Runs a model through every check.
pub(crate) fn examine(name: &str, how: How) -> Outcome {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/tiny").join(name);
    let expected = fs::read_to_string(path.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_str(&expected).unwrap();
    let checkpoint = Checkpoint::open(&tiny(name)).unwrap();
    let family = checkpoint.config().architecture.name();
    let exact = if how.exact_bf16 { ", exact" } else { "" };
    let mut exam = Exam {
        session: how.open(name),
        vocabulary: checkpoint.config().vocabulary as usize,
        expected,
        outcome: Outcome {
            family,
            model: format!("{name}{exact}"),
            kv_dtype: how.kv_dtype,
            weights: Weights::of(&checkpoint, how),
            differences: BTreeMap::new(),
            equal_tokens: (0, 0),
        },
    };
    exam.whole_prompt();
    exam.chunks();
    exam.decode();
    exam.mixed_batch();
    exam.handoff(how.open(name));
    exam.outcome
}

struct Exam {
    session: Session,
    vocabulary: usize,
    expected: Expected,
    outcome: Outcome,
}

impl Exam {
    /// Compares the logits after token `index` of the prompt.
    fn compare(&mut self, check: Check, index: usize, logits: &[f32]) {
        assert_eq!(logits.len(), self.vocabulary, "{}: vocabulary", self.outcome.model);
        let want = &self.expected.logits[index];
        assert_eq!(want.len(), self.vocabulary.div_ceil(STRIDE));
        let found = difference(logits.iter().copied().step_by(STRIDE), want);
        let largest = self.outcome.differences.entry(check).or_insert(0.0);
        *largest = worse(*largest, found);
    }

    fn count(&mut self, tokens: &[u32]) {
        let equal = tokens.iter().zip(&self.expected.greedy).filter(|(got, want)| got == want).count();
        self.outcome.equal_tokens.0 += equal;
        self.outcome.equal_tokens.1 += tokens.len();
    }

    /// Each beginning of the prompt at once.
    fn whole_prompt(&mut self) {
        let (at, prompt) = (blocks(0..4), self.expected.prompt.clone());
        for index in 0..prompt.len() {
            let logits = self.session.step(&prompt[..=index], 0, &at);
            self.compare(Check::WholePrompt, index, &logits);
        }
    }

    /// The prompt in chunks of five, each seeing those before it only in the cache.
    fn chunks(&mut self) {
        let (at, prompt) = (blocks(4..8), self.expected.prompt.clone());
        let mut start = 0;
        for chunk in prompt.chunks(5) {
            let logits = self.session.step(chunk, start, &at);
            start += chunk.len();
            self.compare(Check::Chunks, start - 1, &logits);
        }
    }

    /// Token by token, then the greedy continuation.
    fn decode(&mut self) {
        let (at, prompt) = (blocks(8..12), self.expected.prompt.clone());
        let mut logits = Vec::new();
        for index in 0..prompt.len() {
            logits = self.session.step(&prompt[index..=index], index, &at);
            self.compare(Check::Decode, index, &logits);
        }
        let tokens = self.session.greedy(logits, prompt.len(), self.expected.greedy.len(), &at);
        self.count(&tokens);
    }

    /// Three beginnings of the prompt, of unlike lengths, in one batch; then the whole one's continuation while the
    /// others go through the rest of the prompt a token at a time.
    fn mixed_batch(&mut self) {
        let (prompt, places) =
            (self.expected.prompt.clone(), [blocks(12..16), blocks(16..20), blocks(20..24)]);
        let mut lengths = [3, prompt.len(), 7];
        let mut chunks = lengths.map(|length| prompt[..length].to_vec());
        let mut starts = [0; 3];
        let mut tokens = Vec::new();
        while tokens.len() < self.expected.greedy.len() {
            let rows = self.batch(&chunks, starts, &places);
            for sequence in [0, 2] {
                self.compare(Check::MixedBatch, lengths[sequence] - 1, &rows[sequence]);
            }
            if tokens.is_empty() {
                self.compare(Check::MixedBatch, prompt.len() - 1, &rows[1]);
            }
            tokens.push(argmax(&rows[1]));
            starts = lengths;
            for (sequence, chunk) in chunks.iter_mut().enumerate() {
                if sequence == 1 {
                    *chunk = vec![tokens[tokens.len() - 1]];
                } else if lengths[sequence] == prompt.len() {
                    (starts[sequence], lengths[sequence]) = (0, 0);
                    *chunk = vec![prompt[0]];
                } else {
                    *chunk = vec![prompt[lengths[sequence]]];
                }
                lengths[sequence] += 1;
            }
        }
        self.count(&tokens);
    }

    fn batch(
        &mut self,
        chunks: &[Vec<u32>; 3],
        starts: [usize; 3],
        places: &[Vec<BlockId>; 3],
    ) -> Vec<Vec<f32>> {
        let batch: Vec<SequenceChunk<'_>> = chunks
            .iter()
            .zip(starts)
            .zip(places)
            .map(|((tokens, start), blocks)| SequenceChunk {
                tokens,
                start: start as u32,
                blocks,
                logits: true,
            })
            .collect();
        let logits = self.session.executor.forward(&batch, &mut |_| {}).unwrap();
        logits.rows().map(<[f32]>::to_vec).collect()
    }

    /// All but the last token of the prompt here; its slices copied to other blocks of `there`, and on from there.
    fn handoff(&mut self, mut there: Session) {
        let (from, to) = (blocks(24..27), [BlockId(50), BlockId(3), BlockId(29)]);
        let prompt = self.expected.prompt.clone();
        let last = prompt.len() - 1;
        self.session.step(&prompt[..last], 0, &from);
        let layers = there.executor.kv_pool().layout().layers;
        for layer in 0..layers {
            let bytes = slice(self.session.executor.as_ref(), layer, from[0]).to_vec();
            write_slice(there.executor.as_mut(), layer, to[0], &bytes);
        }
        let logits = there.step(&prompt[last..], last, &to);
        self.compare(Check::Handoff, last, &logits);
        let tokens = there.greedy(logits, prompt.len(), self.expected.greedy.len(), &to);
        self.count(&tokens);
    }
}

/// Writes the report: the worst of each family first, then every model. Gives its path.
pub(crate) fn report(outcomes: &[Outcome]) -> std::path::PathBuf {
    let mut text = String::from(
        "# Parity with Hugging Face transformers\n\nLargest difference of a logit from transformers' (f32 arithmetic on \
         the stored weights; logits spread over about 1.5),\nand greedy tokens that are the same ones. Written by \
         `cargo test -p baton-runtime --test huggingface`.\n",
    );
    for (kv_dtype, weights) in
        KvDtype::ALL.into_iter().flat_map(|kv| Weights::ALL.map(|weights| (kv, weights)))
    {
        let of_type = || outcomes.iter().filter(|o| o.kv_dtype == kv_dtype && o.weights == weights.0);
        let mut families: Vec<&str> = of_type().map(|outcome| outcome.family).collect();
        families.sort_unstable();
        families.dedup();
        let _ = write!(text, "\n## By family, {}, KV cache in {}\n\n", weights.1, kv_dtype.name());
        heading(&mut text, "family");
        for family in families {
            let members: Vec<&Outcome> = of_type().filter(|outcome| outcome.family == family).collect();
            row(&mut text, family, &members);
        }
    }
    for kv_dtype in KvDtype::ALL {
        let _ = write!(text, "\n## By model, KV cache in {}\n\n", kv_dtype.name());
        heading(&mut text, "model");
        for outcome in outcomes.iter().filter(|outcome| outcome.kv_dtype == kv_dtype) {
            row(&mut text, &outcome.model, &[outcome]);
        }
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("parity.md");
    fs::write(&path, text).unwrap();
    path
}

fn heading(text: &mut String, first: &str) {
    let names = Check::ALL.map(|(_, name)| name).join(" | ");
    let _ = writeln!(text, "| {first} | {names} | equal greedy tokens |\n|---|---|---|---|---|---|---|");
}

fn row(text: &mut String, name: &str, outcomes: &[&Outcome]) {
    let worst = |check| outcomes.iter().map(|outcome| outcome.differences[&check]).fold(0.0, worse);
    let cells = Check::ALL.map(|(check, _)| format!("{:.1e}", worst(check))).join(" | ");
    let sum = |part: fn(&Outcome) -> usize| outcomes.iter().map(|outcome| part(outcome)).sum::<usize>();
    let (equal, all) = (sum(|outcome| outcome.equal_tokens.0), sum(|outcome| outcome.equal_tokens.1));
    let _ = writeln!(text, "| {name} | {cells} | {equal} of {all} |");
}
