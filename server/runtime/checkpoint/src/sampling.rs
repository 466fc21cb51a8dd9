//! How those who made a model would have its tokens chosen where nobody says otherwise.
//!
//! Read by both formats' readers, used by the coordinator, which knows what each value may be: servers are told of sampling with
//! every request, and open a model whatever it suggests.

use std::path::{Path, PathBuf};

/// What a checkpoint suggests, as it stands there: within no bounds yet, and not even numbers for certain. `do_sample`, which
/// vLLM passes over, too, and `max_new_tokens` are not among it: how long answers are is for requests and operators to say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SuggestedSampling {
    /// The file that suggests it; empty if none does.
    pub path: PathBuf,
    pub temperature: Option<Suggestion>,
    pub top_p: Option<Suggestion>,
    pub top_k: Option<Suggestion>,
    pub min_p: Option<Suggestion>,
    pub repetition_penalty: Option<Suggestion>,
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub struct Suggestion {
    /// As the file calls it.
    pub field: &'static str,
    pub value: Suggested,
}

/// What stands there; of what is no number, how it begins.
pub type Suggested = Result<f64, String>;

/// What a format calls them, in the order of [`SuggestedSampling`].
pub(crate) type Fields = [&'static str; 5];

/// In `generation_config.json`.
pub(crate) const HUGGING_FACE: Fields = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty"];
/// In a GGUF file's metadata, as llama.cpp writes and reads them.
pub(crate) const GGUF: Fields = [
    "general.sampling.temp",
    "general.sampling.top_p",
    "general.sampling.top_k",
    "general.sampling.min_p",
    "general.sampling.penalty_repeat",
];

impl SuggestedSampling {
    /// Reads them by `number`.
    pub(crate) fn read(path: &Path, fields: Fields, number: impl Fn(&str) -> Option<Suggested>) -> Self {
        let suggested = |field| number(field).map(|value| Suggestion { field, value });
        let [temperature, top_p, top_k, min_p, repetition_penalty] = fields.map(suggested);
        Self { path: path.to_owned(), temperature, top_p, top_k, min_p, repetition_penalty }
    }
}
