//! The configuration out of a GGUF file's metadata and table of tensors. Its keys begin with the architecture's name.

use super::{
    header::Fault,
    metadata::{Metadata, missing},
    tensors::Table,
};
use crate::{
    Architecture, Attention, ExpertGroups, GroupScore, GroupedQuery, LatentAttention, LayerWeight, Mixture,
    ModelConfig, Rope, RopeOrder, RopeScaling, RouterScores, Routing, Weight, source::MappedFile,
};

/// The architecture, if the file is one that can be run.
pub(crate) fn architecture(metadata: &Metadata<'_>) -> Result<Architecture, Fault> {
    let key = "general.architecture";
    let name = metadata.text(key)?.ok_or_else(|| missing(key))?;
    let found = Architecture::ALL.into_iter().find(|architecture| architecture.gguf_name() == name);
    let supported = || Architecture::listed(Architecture::gguf_name);
    let architecture = found.ok_or_else(|| Fault::unsupported(key, format!("{name:?}"), supported()))?;
    if metadata.u32("split.count")?.is_some_and(|count| count > 1) {
        let supported = "one whole file; join the parts with `llama-gguf-split --merge`";
        return Err(Fault::unsupported("split.count", "more than one file", supported));
    }
    Ok(architecture)
}

/// Reads the configuration.
pub(crate) fn read(
    architecture: Architecture,
    metadata: &Metadata<'_>,
    table: &Table,
    file: &MappedFile,
) -> Result<ModelConfig, Fault> {
    let mut reader = Reader { architecture, metadata, table };
    // One name for both DeepSeeks: what their routers do tells them apart.
    if architecture == Architecture::DeepseekV2 && reader.sigmoid()? {
        reader.architecture = Architecture::DeepseekV3;
    }
    reader.config(file)
}

/// `expert_gating_func` in GGUF.
const SOFTMAX: u32 = 1;
const SIGMOID: u32 = 2;

struct Reader<'a> {
    architecture: Architecture,
    metadata: &'a Metadata<'a>,
    table: &'a Table,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.gguf_name())
    }

    fn u32(&self, name: &str) -> Result<Option<u32>, Fault> {
        self.metadata.u32(&self.key(name))
    }

    fn f32(&self, name: &str) -> Result<Option<f32>, Fault> {
        self.metadata.f32(&self.key(name))
    }

    fn needed(&self, name: &str) -> Result<u32, Fault> {
        self.u32(name)?.ok_or_else(|| missing(&self.key(name)))
    }

    /// Whether the first layer has such a tensor.
    fn has(&self, weight: LayerWeight) -> bool {
        self.table.tensors.contains_key(&Weight::Layer(0, weight))
    }

    fn config(&self, file: &MappedFile) -> Result<ModelConfig, Fault> {
        let context_tokens = self.needed("context_length")?;
        // The embedding has the last word: `vocab_size` is not in every file.
        let embedding = self.table.tensors.get(&Weight::Embedding);
        let rows = embedding.and_then(|entry| entry.shape.first().copied());
        Ok(ModelConfig {
            architecture: self.architecture,
            layers: self.needed("block_count")?,
            hidden: self.needed("embedding_length")?,
            attention: match self.architecture {
                Architecture::DeepseekV2 | Architecture::DeepseekV3 => Attention::Latent(self.latent()?),
                _ => Attention::GroupedQuery(self.grouped_query()?),
            },
            ffn: self.needed("feed_forward_length")?,
            ffn_bias: self.has(LayerWeight::GateBias),
            mixture: self.mixture()?,
            rope: self.rope(file, context_tokens)?,
            rms_eps: self.epsilon()?,
            context_tokens,
            vocabulary: rows.and_then(|rows| u32::try_from(rows).ok()).unwrap_or(0),
            tied_embeddings: !self.table.tensors.contains_key(&Weight::Output),
        })
    }

    fn grouped_query(&self) -> Result<GroupedQuery, Fault> {
        let heads = self.needed("attention.head_count")?;
        let head_dim = match self.u32("attention.key_length")? {
            Some(width) => width,
            None => self.needed("embedding_length")?.checked_div(heads).unwrap_or(0),
        };
        for (name, what) in [("attention.value_length", "key length"), ("rope.dimension_count", "head size")]
        {
            if let Some(width) = self.u32(name)?.filter(|&width| width != head_dim) {
                let supported = format!("the {what}, {head_dim}");
                return Err(Fault::unsupported(self.key(name), width.to_string(), supported));
            }
        }
        let context_tokens = self.needed("context_length")?;
        let felt = |window: &u32| (1..context_tokens).contains(window);
        if let Some(window) = self.u32("attention.sliding_window")?.filter(felt) {
            let key = self.key("attention.sliding_window");
            return Err(Fault::unsupported(key, window.to_string(), "attention to the whole context"));
        }
        Ok(GroupedQuery {
            heads,
            kv_heads: self.u32("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            qkv_bias: self.has(LayerWeight::QueryBias),
            output_bias: self.has(LayerWeight::AttentionOutputBias),
            head_norms: matches!(self.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
        })
    }

    fn latent(&self) -> Result<LatentAttention, Fault> {
        // Newer files give the sizes of heads under these names, and under the others those of the latents.
        let size = |name: &str| match self.u32(&format!("{name}_mla"))? {
            Some(size) => Ok(size),
            None => self.needed(name),
        };
        let (query_dim, rope_dim) = (size("attention.key_length")?, self.needed("rope.dimension_count")?);
        let key = self.key("attention.key_length");
        let nope_dim = query_dim.checked_sub(rope_dim);
        let nope_dim = nope_dim.ok_or_else(|| Fault::damaged(key, "it is less than rope.dimension_count"))?;
        let factor = self.f32("rope.scaling.factor")?.unwrap_or(1.0);
        let stretch =
            1.0 + self.f32("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0) * factor.max(1.0).ln();
        Ok(LatentAttention {
            heads: self.needed("attention.head_count")?,
            query_rank: self.u32("attention.q_lora_rank")?.filter(|&rank| rank > 0),
            kv_rank: self.needed("attention.kv_lora_rank")?,
            nope_dim,
            rope_dim,
            value_dim: size("attention.value_length")?,
            norm_eps: self.epsilon()?,
            scale: stretch * stretch / (query_dim as f32).sqrt(),
            split_up: self.has(LayerWeight::KeyUp),
        })
    }

    fn epsilon(&self) -> Result<f32, Fault> {
        let name = "attention.layer_norm_rms_epsilon";
        self.f32(name)?.ok_or_else(|| missing(&self.key(name)))
    }

    /// Whether the router's scores are sigmoids; files of V3 made before there was a key for it have the correction.
    fn sigmoid(&self) -> Result<bool, Fault> {
        let name = "expert_gating_func";
        match self.u32(name)? {
            None => {
                Ok(self.table.tensors.keys().any(|w| matches!(w, Weight::Layer(_, LayerWeight::RouterBias))))
            }
            Some(SOFTMAX) => Ok(false),
            Some(SIGMOID) => Ok(true),
            Some(other) => {
                Err(Fault::unsupported(self.key(name), other.to_string(), "1 (softmax), 2 (sigmoid)"))
            }
        }
    }

    fn mixture(&self) -> Result<Option<Mixture>, Fault> {
        let experts = self.u32("expert_count")?.unwrap_or(0);
        let deepseek = match self.architecture {
            Architecture::DeepseekV2 | Architecture::DeepseekV3 => true,
            Architecture::Qwen3Moe => false,
            _ if experts == 0 => return Ok(None),
            _ => {
                let key = self.key("expert_count");
                return Err(Fault::unsupported(
                    key,
                    experts.to_string(),
                    "dense models of this architecture",
                ));
            }
        };
        let sigmoid = self.architecture == Architecture::DeepseekV3;
        let expert_ffn = self.needed("expert_feed_forward_length")?;
        let groups = self.u32("expert_group_count")?.filter(|&groups| groups > 1);
        let groups = match groups {
            Some(groups) => Some(ExpertGroups {
                groups,
                chosen: self.needed("expert_group_used_count")?,
                score: if sigmoid { GroupScore::BestTwo } else { GroupScore::Best },
            }),
            None => None,
        };
        let dense = self.u32("leading_dense_block_count")?.unwrap_or(0);
        Ok(Some(Mixture {
            experts,
            experts_per_token: self.needed("expert_used_count")?,
            expert_ffn,
            shared_ffn: expert_ffn.saturating_mul(self.u32("expert_shared_count")?.unwrap_or(0)),
            routing: Routing {
                scores: if sigmoid { RouterScores::Sigmoid } else { RouterScores::Softmax },
                groups,
                correction_bias: sigmoid,
                // Every published Qwen3 does, and files leave it unsaid.
                normalise: self.metadata.bool(&self.key("expert_weights_norm"))?.unwrap_or(!deepseek),
                scale: self.f32("expert_weights_scale")?.unwrap_or(1.0),
            },
            dense_layers: (0..dense.min(1 << 16)).collect(),
        }))
    }

    /// How this architecture's files order the pairs that are rotated together.
    fn rope_order(&self) -> RopeOrder {
        match self.architecture {
            Architecture::Llama
            | Architecture::Mistral
            | Architecture::DeepseekV2
            | Architecture::DeepseekV3 => RopeOrder::Interleaved,
            Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe => RopeOrder::Halves,
        }
    }

    fn rope(&self, file: &MappedFile, context_tokens: u32) -> Result<Rope, Fault> {
        let theta = self.f32("rope.freq_base")?.unwrap_or(10_000.0);
        let rope = |scaling| Ok(Rope { theta, scaling, order: self.rope_order() });
        if let Some(entry) = &self.table.rope_divisors {
            let mut divisors = vec![0.0; entry.shape.iter().product()];
            entry.dtype.dequantize(file.bytes(&entry.extent), &mut divisors);
            return rope(RopeScaling::Divisors(divisors));
        }
        let key = self.key("rope.scaling.type");
        let old = self.f32("rope.scale_linear")?;
        let factor = self.f32("rope.scaling.factor")?.or(old);
        match (self.metadata.text(&key)?, factor) {
            (Some("none"), _) | (None, None) => rope(RopeScaling::None),
            (Some("linear") | None, Some(factor)) => rope(RopeScaling::Linear { factor }),
            (Some("yarn"), Some(factor)) => {
                // DeepSeek's stretch of the scores has the place of YaRN's scale of sine and cosine.
                let natural = match self.architecture {
                    Architecture::DeepseekV2 | Architecture::DeepseekV3 => 1.0,
                    _ => RopeScaling::yarn_attention_factor(factor, 1.0),
                };
                let given = self.f32("rope.scaling.attn_factor")?.unwrap_or(1.0);
                rope(RopeScaling::Yarn {
                    factor,
                    original_context_tokens: self
                        .u32("rope.scaling.original_context_length")?
                        .unwrap_or(context_tokens),
                    beta_fast: self.f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                    beta_slow: self.f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                    attention_factor: given * natural,
                    truncate: true,
                })
            }
            (Some("linear" | "yarn"), None) => Err(missing(&self.key("rope.scaling.factor"))),
            (Some(other), _) => Err(Fault::unsupported(key, format!("{other:?}"), "none, linear, yarn")),
        }
    }
}
