//! What the readers of both formats hand over, for [`crate::checkpoint`] to check and to hold.

use std::collections::BTreeMap;

use crate::{
    Dtype, ModelConfig, SuggestedSampling, TokenizerSource, Weight,
    source::{Extent, MappedFile},
};

/// What a model's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Gguf,
    HuggingFace,
}

/// A tensor's place: which file, where in it, and what.
#[derive(Debug, Clone)]
pub(crate) struct TensorEntry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) extent: Extent,
    /// As the file calls it, for error messages.
    pub(crate) name: String,
    pub(crate) scales: Option<ScalesEntry>,
}

/// The place of a tensor's [`BlockScales`](crate::BlockScales).
#[derive(Debug, Clone)]
pub(crate) struct ScalesEntry {
    pub(crate) block: [usize; 2],
    pub(crate) dtype: Dtype,
    pub(crate) extent: Extent,
}

/// What a format's reader hands over, not yet checked against the configuration.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) format: Format,
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) tensors: BTreeMap<Weight, TensorEntry>,
    pub(crate) files: Vec<MappedFile>,
    pub(crate) tokenizer: TokenizerSource,
    pub(crate) chat_template: Option<String>,
    pub(crate) bos_token: Option<String>,
    pub(crate) eos_token: Option<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) sampling: SuggestedSampling,
}
