//! A model as it lies on disk: a GGUF file or a Hugging Face directory, mapped into memory and checked.
//!
//! Used by the runtime (weights), the coordinator (tokeniser, chat template, sampling) and `baton up` (name, size). Whatever the
//! format, they see the same thing: a [`ModelConfig`], tensors by their [`Weight`] role, a [`TokenizerSource`].
//! Everything a file says is checked in [`Checkpoint::open`], so that what follows need not doubt it: bounds, tensor
//! shapes against the configuration, supported architectures and types. Arithmetic on the weights is the runtime's,
//! except [`Dtype::dequantize`], the plain reference that its kernels are tested against.
//!
//! Modules in the order a file is read: `root` opens it if it lies where it may, `source` maps it, `gguf` or `huggingface`
//! parses it into `parts`, `checkpoint` checks and holds these.

mod checkpoint;
mod config;
mod dtype;
mod error;
mod gguf;
mod huggingface;
mod mixture;
mod parts;
mod root;
mod rope;
mod sampling;
mod source;
mod tensor;
mod tokenizer;
mod wanted;

pub use checkpoint::Checkpoint;
pub use config::{Architecture, Attention, GroupedQuery, LatentAttention, ModelConfig};
pub use dtype::Dtype;
pub use error::CheckpointError;
pub use mixture::{ExpertGroups, GroupScore, Mixture, RouterScores, Routing};
pub use parts::Format;
pub use root::{ModelRoot, RootedFile};
pub use rope::{Rope, RopeFrequencies, RopeOrder, RopeScaling};
pub use sampling::{Suggested, SuggestedSampling, Suggestion};
pub use tensor::{BlockScales, ExpertWeight, LayerWeight, TensorView, Weight};
pub use tokenizer::{Around, GgmlTokenizer, TokenKind, TokenizerSource};
