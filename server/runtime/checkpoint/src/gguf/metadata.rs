//! What the metadata of a GGUF file says: the configuration, the tokeniser's tables, the tokens that stop.

use std::{collections::BTreeMap, fmt};

use super::{
    header::{Array, Fault, Value},
    tensors::Table,
};
use crate::{
    Architecture, GgmlTokenizer, LayerWeight, ModelConfig, Rope, RopeOrder, RopeScaling, TokenKind, Weight,
    source::MappedFile, tokenizer::ENDINGS,
};

/// Typed access to metadata by key.
pub(crate) struct Metadata<'a> {
    values: &'a BTreeMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    pub(crate) fn new(values: &'a BTreeMap<&'a str, Value<'a>>) -> Self {
        Self { values }
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, Fault> {
        self.read(key, "text", |value| match value {
            Value::Text(text) => Some(*text),
            _ => None,
        })
    }

    fn u32(&self, key: &str) -> Result<Option<u32>, Fault> {
        self.read(key, "a 32-bit number", |value| match *value {
            Value::Unsigned(n) => n.try_into().ok(),
            Value::Signed(n) => n.try_into().ok(),
            _ => None,
        })
    }

    fn f32(&self, key: &str) -> Result<Option<f32>, Fault> {
        self.read(key, "a number", |value| match *value {
            Value::Float(x) => Some(x as f32),
            Value::Unsigned(n) => Some(n as f32),
            Value::Signed(n) => Some(n as f32),
            _ => None,
        })
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, Fault> {
        self.read(key, "true or false", |value| match *value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    fn array(&self, key: &str) -> Result<Option<&'a Array<'a>>, Fault> {
        self.read(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn read<T>(
        &self,
        key: &str,
        kind: &str,
        convert: impl Fn(&'a Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Fault> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || Fault::damaged(key, format!("{} is not {kind}", Shown(value)));
        convert(value).ok_or_else(wrong).map(Some)
    }

    /// Refuses what is well formed but cannot be run.
    pub(crate) fn check_supported(&self) -> Result<(), Fault> {
        let key = "general.architecture";
        let architecture = self.text(key)?.ok_or_else(|| missing(key))?;
        if architecture != Architecture::Llama.name() {
            return Err(Fault::unsupported(key, format!("{architecture:?}"), Architecture::SUPPORTED));
        }
        if self.u32("split.count")?.is_some_and(|count| count > 1) {
            let supported = "one whole file; join the parts with `llama-gguf-split --merge`";
            return Err(Fault::unsupported("split.count", "more than one file", supported));
        }
        if let Some(experts) = self.u32("llama.expert_count")?.filter(|&count| count > 0) {
            return Err(Fault::unsupported("llama.expert_count", experts.to_string(), "dense models"));
        }
        Ok(())
    }

    fn needed(&self, key: &str) -> Result<u32, Fault> {
        self.u32(key)?.ok_or_else(|| missing(key))
    }

    pub(crate) fn config(&self, table: &Table, file: &MappedFile) -> Result<ModelConfig, Fault> {
        let hidden = self.needed("llama.embedding_length")?;
        let heads = self.needed("llama.attention.head_count")?;
        let head_dim = match self.u32("llama.attention.key_length")? {
            Some(width) => width,
            None => hidden.checked_div(heads).unwrap_or(0),
        };
        if let Some(width) = self.u32("llama.attention.value_length")?.filter(|&width| width != head_dim) {
            let key = "llama.attention.value_length";
            return Err(Fault::unsupported(key, width.to_string(), format!("the key length, {head_dim}")));
        }
        if let Some(width) = self.u32("llama.rope.dimension_count")?.filter(|&width| width != head_dim) {
            let key = "llama.rope.dimension_count";
            return Err(Fault::unsupported(key, width.to_string(), format!("the head size, {head_dim}")));
        }
        let context_tokens = self.needed("llama.context_length")?;
        // The embedding has the last word: `vocab_size` is not in every file.
        let rows = table.tensors.get(&Weight::Embedding).and_then(|entry| entry.shape.first().copied());
        let vocabulary = rows.and_then(|rows| u32::try_from(rows).ok()).unwrap_or(0);
        let has = |weight| table.tensors.contains_key(&Weight::Layer(0, weight));
        Ok(ModelConfig {
            architecture: Architecture::Llama,
            layers: self.needed("llama.block_count")?,
            hidden,
            ffn: self.needed("llama.feed_forward_length")?,
            heads,
            kv_heads: self.u32("llama.attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rope: self.rope(table, file, context_tokens)?,
            rms_eps: self
                .f32("llama.attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| missing("llama.attention.layer_norm_rms_epsilon"))?,
            context_tokens,
            vocabulary,
            tied_embeddings: !table.tensors.contains_key(&Weight::Output),
            qkv_bias: has(LayerWeight::QueryBias),
            attention_output_bias: has(LayerWeight::AttentionOutputBias),
            ffn_bias: has(LayerWeight::GateBias),
        })
    }

    fn rope(&self, table: &Table, file: &MappedFile, context_tokens: u32) -> Result<Rope, Fault> {
        let theta = self.f32("llama.rope.freq_base")?.unwrap_or(10_000.0);
        let rope = |scaling| Ok(Rope { theta, scaling, order: RopeOrder::Interleaved });
        if let Some(entry) = &table.rope_divisors {
            let mut divisors = vec![0.0; entry.shape.iter().product()];
            entry.dtype.dequantize(file.bytes(&entry.extent), &mut divisors);
            return rope(RopeScaling::Divisors(divisors));
        }
        let key = "llama.rope.scaling.type";
        let old = self.f32("llama.rope.scale_linear")?;
        let factor = self.f32("llama.rope.scaling.factor")?.or(old);
        match (self.text(key)?, factor) {
            (Some("none"), _) | (None, None) => rope(RopeScaling::None),
            (Some("linear") | None, Some(factor)) => rope(RopeScaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => {
                let original =
                    self.u32("llama.rope.scaling.original_context_length")?.unwrap_or(context_tokens);
                let given = self.f32("llama.rope.scaling.attn_factor")?.unwrap_or(1.0);
                rope(RopeScaling::Yarn {
                    factor,
                    original_context_tokens: original,
                    beta_fast: self.f32("llama.rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.f32("llama.rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    attention_factor: given * RopeScaling::yarn_attention_factor(factor, 1.0),
                    truncate: true,
                })
            }
            (Some("linear" | "yarn"), None) => Err(missing("llama.rope.scaling.factor")),
            (Some(other), _) => Err(Fault::unsupported(key, format!("{other:?}"), "none, linear, yarn")),
        }
    }

    pub(crate) fn tokenizer(&self) -> Result<GgmlTokenizer, Fault> {
        let texts = |key| self.array(key)?.map_or(Ok(Vec::new()), |array| array.texts(key));
        let key = "tokenizer.ggml.tokens";
        let tokens = texts(key)?;
        if tokens.is_empty() {
            return Err(missing(key));
        }
        Ok(GgmlTokenizer {
            model: self
                .text("tokenizer.ggml.model")?
                .ok_or_else(|| missing("tokenizer.ggml.model"))?
                .to_owned(),
            pre: self.text("tokenizer.ggml.pre")?.unwrap_or_default().to_owned(),
            kinds: self.token_kinds(tokens.len())?,
            scores: self.scores(tokens.len())?,
            merges: texts("tokenizer.ggml.merges")?,
            bos: self.token_id("bos", tokens.len())?,
            eos: self.token_id("eos", tokens.len())?,
            unknown: self.token_id("unknown", tokens.len())?,
            padding: self.token_id("padding", tokens.len())?,
            add_bos: self.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: self.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: self.bool("tokenizer.ggml.add_space_prefix")?,
            tokens,
        })
    }

    fn token_id(&self, name: &str, tokens: usize) -> Result<Option<u32>, Fault> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = self.u32(&key)?;
        match id {
            Some(id) if id as usize >= tokens => {
                Err(Fault::damaged(key, format!("{id} is not one of the {tokens} tokens")))
            }
            id => Ok(id),
        }
    }

    fn token_kinds(&self, tokens: usize) -> Result<Vec<TokenKind>, Fault> {
        let key = "tokenizer.ggml.token_type";
        let Some(array) = self.array(key)? else { return Ok(vec![TokenKind::Normal; tokens]) };
        same_length(key, array.len(), tokens)?;
        let kind = |number: f64| match number as i64 {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        };
        Ok(array.numbers(key)?.into_iter().map(kind).collect())
    }

    fn scores(&self, tokens: usize) -> Result<Vec<f32>, Fault> {
        let key = "tokenizer.ggml.scores";
        let Some(array) = self.array(key)? else { return Ok(Vec::new()) };
        same_length(key, array.len(), tokens)?;
        Ok(array.numbers(key)?.into_iter().map(|score| score as f32).collect())
    }

    /// EOS, end of turn, end of message, and control tokens that are known to end a turn although files often leave
    /// them unnamed.
    pub(crate) fn stop_token_ids(&self, tokenizer: &GgmlTokenizer) -> Result<Vec<u32>, Fault> {
        let mut ids: Vec<u32> = tokenizer.eos.into_iter().collect();
        for name in ["eot", "eom"] {
            ids.extend(self.token_id(name, tokenizer.tokens.len())?);
        }
        let control = |kind: &TokenKind| *kind == TokenKind::Control;
        let named = tokenizer.tokens.iter().zip(&tokenizer.kinds).enumerate();
        let named = named.filter(|(_, (text, kind))| control(kind) && ENDINGS.contains(&text.as_str()));
        ids.extend(named.map(|(id, _)| id as u32));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

fn missing(key: &str) -> Fault {
    Fault::damaged(key, "it is not there")
}

fn same_length(key: &str, found: usize, tokens: usize) -> Result<(), Fault> {
    if found == tokens {
        Ok(())
    } else {
        Err(Fault::damaged(key, format!("{found} entries for {tokens} tokens")))
    }
}

/// A value short enough for a message.
struct Shown<'a>(&'a Value<'a>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Value::Unsigned(n) => n.fmt(f),
            Value::Signed(n) => n.fmt(f),
            Value::Float(x) => x.fmt(f),
            Value::Bool(flag) => flag.fmt(f),
            Value::Text(text) => write!(f, "{:?}", text.chars().take(64).collect::<String>()),
            Value::Array(array) => write!(f, "an array of {}", array.len()),
        }
    }
}
