//! What a model's configuration says, in one form for both formats.

use std::fmt;

use crate::Rope;

/// A family of models that Baton can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// LLaMA 2 and 3 and models of their shape (SmolLM2, ...): RMS norm, rotary positions, grouped-query attention,
    /// gated SiLU feed-forward.
    Llama,
}

impl Architecture {
    /// What is supported, for error messages.
    pub(crate) const SUPPORTED: &'static str = "llama";

    /// The name in GGUF's `general.architecture` and in `ModelIdentity.architecture`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Shape and constants of a model. [`crate::Checkpoint::open`] has checked that they are positive, fit together and
/// agree with the shapes of the tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub architecture: Architecture,
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer between gate/up and down.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of one head; even. `heads * head_dim` need not be `hidden`.
    pub head_dim: u32,
    pub rope: Rope,
    /// Added to the mean square in every RMS norm.
    pub rms_eps: f32,
    /// Longest sequence, prompt and completion together, in tokens.
    pub context_tokens: u32,
    /// Rows of the embedding, which may be more than the tokeniser knows.
    pub vocabulary: u32,
    /// The output projection is the embedding; [`crate::Weight::Output`] then gives the embedding's tensor.
    pub tied_embeddings: bool,
    /// Q, K and V projections add a bias.
    pub qkv_bias: bool,
    /// The attention's output projection adds a bias.
    pub attention_output_bias: bool,
    /// Gate, up and down projections add a bias.
    pub ffn_bias: bool,
}

impl ModelConfig {
    /// Width of the query projection: `heads * head_dim`.
    pub fn query_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Width of the key projection and of the value projection: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// Checks that the numbers fit together; the error is (field, reason).
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        // Generous bounds that no real model comes near: they keep every product of two of these within u64.
        let bounded = [
            ("layers", self.layers, 4096),
            ("hidden size", self.hidden, 1 << 20),
            ("feed-forward size", self.ffn, 1 << 22),
            ("attention heads", self.heads, 1 << 14),
            ("key/value heads", self.kv_heads, 1 << 14),
            ("head size", self.head_dim, 1 << 14),
            ("context length", self.context_tokens, 1 << 30),
            ("vocabulary size", self.vocabulary, 1 << 24),
        ];
        for (field, value, most) in bounded {
            if value == 0 || value > most {
                return Err((field, format!("{value} is not within 1 to {most}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err((
                "key/value heads",
                format!("{} does not divide {} heads", self.kv_heads, self.heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head size", format!("{} is odd", self.head_dim)));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(("RMS norm epsilon", format!("{} is not a small positive number", self.rms_eps)));
        }
        self.rope.check(self.head_dim).map_err(|reason| ("rotary positions", reason))
    }
}
