//! What a model's configuration says, in one form for both formats.

use std::fmt;

use crate::{Mixture, Rope};

/// A family of models that Baton can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// LLaMA 2 and 3 and models of their shape (SmolLM2, ...): RMS norm, rotary positions, grouped-query attention,
    /// gated SiLU feed-forward.
    Llama,
    /// LLaMA's shape under another name; without its sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: LLaMA's shape with biases on Q, K and V.
    Qwen2,
    /// Qwen3, dense: LLaMA's shape with an RMS norm of each head of Q and K.
    Qwen3,
    /// Qwen3 with a mixture of experts.
    Qwen3Moe,
    /// DeepSeek V2: multi-head latent attention, shared and routed experts chosen by softmax.
    DeepseekV2,
    /// DeepSeek V3 and R1: as V2, experts chosen by sigmoid with a correction.
    DeepseekV3,
}

impl Architecture {
    /// Those that Baton runs.
    pub const ALL: [Self; 7] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Qwen3Moe,
        Self::DeepseekV2,
        Self::DeepseekV3,
    ];

    /// `model_type` in a Hugging Face `config.json`, and what `ModelIdentity.architecture` says.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3_moe",
            Self::DeepseekV2 => "deepseek_v2",
            Self::DeepseekV3 => "deepseek_v3",
        }
    }

    /// `general.architecture` in a GGUF file. Several may have the same one: there a Mistral is a LLaMA, and
    /// both DeepSeeks are one.
    pub const fn gguf_name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Qwen3Moe => "qwen3moe",
            Self::DeepseekV2 | Self::DeepseekV3 => "deepseek2",
        }
    }

    /// The architectures' names, each once, for error messages.
    pub(crate) fn listed(name: impl Fn(Self) -> &'static str) -> String {
        let mut names: Vec<&str> = Self::ALL.into_iter().map(name).collect();
        names.dedup();
        names.join(", ")
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a model attends.
#[derive(Debug, Clone, PartialEq)]
pub enum Attention {
    /// Keys and values of their own, each shared by a group of query heads.
    GroupedQuery(GroupedQuery),
    /// Keys and values that all heads make of one latent each token keeps (multi-head latent attention).
    Latent(LatentAttention),
}

/// Grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedQuery {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Width of one head; even. `heads * head_dim` need not be the hidden size.
    pub head_dim: u32,
    /// Q, K and V projections add a bias.
    pub qkv_bias: bool,
    /// The output projection adds a bias.
    pub output_bias: bool,
    /// Each head of Q and K goes through an RMS norm before it is rotated.
    pub head_norms: bool,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).
///
/// Of a token is kept: a latent `kv_rank` wide, normalised, and a key `rope_dim` wide, rotated, that all heads share.
/// A head's key is `nope_dim` values made of the latent, then the shared ones; its value is made of the latent too.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentAttention {
    pub heads: u32,
    /// Width of the latent that queries are made of; `None` if they are made of the hidden state.
    pub query_rank: Option<u32>,
    /// Width of the latent that keys and values are made of.
    pub kv_rank: u32,
    /// Elements of a head's query and key that are not rotated.
    pub nope_dim: u32,
    /// Elements that are; even.
    pub rope_dim: u32,
    /// Width of a head's value.
    pub value_dim: u32,
    /// Added to the mean square in the norms of latents.
    pub norm_eps: f32,
    /// Factor of the scores.
    pub scale: f32,
    /// What makes keys and values of the latent is stored as two tensors, keys' transposed ([`crate::LayerWeight::KeyUp`]).
    pub split_up: bool,
}

impl LatentAttention {
    /// Width of a head's query: `nope_dim + rope_dim`.
    pub fn query_dim(&self) -> u32 {
        self.nope_dim + self.rope_dim
    }

    /// Width of what is kept of a token: `kv_rank + rope_dim`.
    pub fn kept_dim(&self) -> u32 {
        self.kv_rank + self.rope_dim
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        within(&[
            ("attention heads", self.heads, 1 << 14),
            ("rank of queries", self.query_rank.unwrap_or(1), 1 << 20),
            ("rank of keys and values", self.kv_rank, 1 << 20),
            ("head size without positions", self.nope_dim, 1 << 14),
            ("head size with positions", self.rope_dim, 1 << 14),
            ("head size of values", self.value_dim, 1 << 14),
        ])?;
        if !self.rope_dim.is_multiple_of(2) {
            return Err(("head size with positions", format!("{} is odd", self.rope_dim)));
        }
        let small = |value: f32| value.is_finite() && value >= 0.0;
        if !(small(self.norm_eps) && small(self.scale)) {
            let reason = format!("{} or the scale {} is not a small number", self.norm_eps, self.scale);
            return Err(("norm epsilon of latents", reason));
        }
        Ok(())
    }
}

impl GroupedQuery {
    /// Width of the query projection: `heads * head_dim`.
    pub fn query_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Width of the key projection and of the value projection: `kv_heads * head_dim`.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
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
    pub attention: Attention,
    /// Width of a dense feed-forward block between gate/up and down.
    pub ffn: u32,
    /// Gate, up and down projections of dense blocks add a bias.
    pub ffn_bias: bool,
    /// The experts, if some layers have a mixture of them instead of a dense block.
    pub mixture: Option<Mixture>,
    pub rope: Rope,
    /// Added to the mean square in RMS norms.
    pub rms_eps: f32,
    /// Longest sequence, prompt and completion together, in tokens.
    pub context_tokens: u32,
    /// Rows of the embedding, which may be more than the tokeniser knows.
    pub vocabulary: u32,
    /// The output projection is the embedding; [`crate::Weight::Output`] then gives the embedding's tensor.
    pub tied_embeddings: bool,
}

/// A number that must be within 1 to the last.
pub(crate) type Bounded = (&'static str, u32, u32);

impl ModelConfig {
    /// Elements of a head that are rotated.
    pub fn rope_dim(&self) -> u32 {
        match &self.attention {
            Attention::GroupedQuery(attention) => attention.head_dim,
            Attention::Latent(attention) => attention.rope_dim,
        }
    }

    /// Checks that the numbers fit together; the error is (field, reason).
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        // Generous bounds that no real model comes near: they keep every product of two of these within u64.
        within(&[
            ("layers", self.layers, 4096),
            ("hidden size", self.hidden, 1 << 20),
            ("feed-forward size", self.ffn, 1 << 22),
            ("context length", self.context_tokens, 1 << 30),
            ("vocabulary size", self.vocabulary, 1 << 24),
        ])?;
        match &self.attention {
            Attention::GroupedQuery(attention) => attention.check()?,
            Attention::Latent(attention) => attention.check()?,
        }
        if let Some(mixture) = &self.mixture {
            mixture.check()?;
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(("RMS norm epsilon", format!("{} is not a small positive number", self.rms_eps)));
        }
        self.rope.check(self.rope_dim()).map_err(|reason| ("rotary positions", reason))
    }
}

impl GroupedQuery {
    fn check(&self) -> Result<(), (&'static str, String)> {
        within(&[
            ("attention heads", self.heads, 1 << 14),
            ("key/value heads", self.kv_heads, 1 << 14),
            ("head size", self.head_dim, 1 << 14),
        ])?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err((
                "key/value heads",
                format!("{} does not divide {} heads", self.kv_heads, self.heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head size", format!("{} is odd", self.head_dim)));
        }
        Ok(())
    }
}

/// The first number out of its bounds is an error.
pub(crate) fn within(numbers: &[Bounded]) -> Result<(), (&'static str, String)> {
    match numbers.iter().find(|(_, value, most)| *value == 0 || value > most) {
        Some((field, value, most)) => Err((field, format!("{value} is not within 1 to {most}"))),
        None => Ok(()),
    }
}
