//! `config.json`: the model's configuration, as transformers 4 and 5 write it.

use super::{fields::JsonFile, latent, mixture::mixture, rope::rope};
use crate::{Architecture, Attention, CheckpointError, GroupedQuery, ModelConfig, RopeOrder};

/// The configuration, and whether the embeddings are tied. The vocabulary is what the file says; the tensors' shapes
/// are checked against it later.
pub(super) fn model(file: &JsonFile) -> Result<(ModelConfig, bool), CheckpointError> {
    let architecture = architecture(file)?;
    let context_tokens = file.u32("max_position_embeddings")?.unwrap_or(2048);
    let layers = file.needed("num_hidden_layers")?;
    check_supported(file, architecture, layers, context_tokens)?;
    let deepseek = matches!(architecture, Architecture::DeepseekV2 | Architecture::DeepseekV3);
    let (attention, order) = if deepseek {
        latent::attention(file, architecture)?
    } else {
        (Attention::GroupedQuery(grouped_query(file, architecture)?), RopeOrder::Halves)
    };
    let tied = file.bool("tie_word_embeddings")?.unwrap_or(false);
    let config = ModelConfig {
        architecture,
        layers,
        hidden: file.needed("hidden_size")?,
        attention,
        ffn: file.needed("intermediate_size")?,
        ffn_bias: architecture == Architecture::Llama && file.bool("mlp_bias")?.unwrap_or(false),
        mixture: mixture(file, architecture, layers)?,
        rope: rope(file, context_tokens, order)?,
        rms_eps: file.f32("rms_norm_eps")?.unwrap_or(1e-6),
        context_tokens,
        vocabulary: file.needed("vocab_size")?,
        tied_embeddings: tied,
    };
    Ok((config, tied))
}

fn architecture(file: &JsonFile) -> Result<Architecture, CheckpointError> {
    let field = "model_type";
    let kind = file.text(field)?.ok_or_else(|| file.damaged(field, "it is not there"))?;
    let found = Architecture::ALL.into_iter().find(|architecture| architecture.name() == kind);
    let supported = || Architecture::listed(Architecture::name);
    found.ok_or_else(|| file.unsupported(field, format!("{kind:?}"), &supported()))
}

fn grouped_query(file: &JsonFile, architecture: Architecture) -> Result<GroupedQuery, CheckpointError> {
    let heads = file.needed("num_attention_heads")?;
    // What transformers' classes do: Qwen2 always has biases on Q, K and V, Mistral never has any.
    let attention_bias = file.bool("attention_bias")?.unwrap_or(false);
    let (qkv_bias, output_bias) = match architecture {
        Architecture::Llama | Architecture::Qwen3 | Architecture::Qwen3Moe => {
            (attention_bias, attention_bias)
        }
        Architecture::Qwen2 => (true, false),
        Architecture::Mistral | Architecture::DeepseekV2 | Architecture::DeepseekV3 => (false, false),
    };
    Ok(GroupedQuery {
        heads,
        kv_heads: file.u32("num_key_value_heads")?.unwrap_or(heads),
        head_dim: match file.u32("head_dim")? {
            Some(width) => width,
            None => file.needed("hidden_size")?.checked_div(heads).unwrap_or(0),
        },
        qkv_bias,
        output_bias,
        head_norms: matches!(architecture, Architecture::Qwen3 | Architecture::Qwen3Moe),
    })
}

/// Refuses what is well formed but cannot be run.
fn check_supported(
    file: &JsonFile,
    architecture: Architecture,
    layers: u32,
    context_tokens: u32,
) -> Result<(), CheckpointError> {
    if let Some(activation) = file.text("hidden_act")?.filter(|&name| name != "silu") {
        return Err(file.unsupported("hidden_act", format!("{activation:?}"), "silu"));
    }
    for field in ["partial_rotary_factor", "rope_parameters.partial_rotary_factor"] {
        if let Some(part) = file.f32(field)?.filter(|&part| part != 1.0) {
            return Err(file.unsupported(field, part.to_string(), "1.0"));
        }
    }
    sliding_window(file, architecture, layers, context_tokens)
}

/// Refuses a sliding window that some layer would feel.
fn sliding_window(
    file: &JsonFile,
    architecture: Architecture,
    layers: u32,
    context_tokens: u32,
) -> Result<(), CheckpointError> {
    let listed = file.get("layer_types").and_then(|kinds| kinds.as_array());
    if let Some(kind) = listed.into_iter().flatten().find(|kind| *kind != "full_attention") {
        return Err(file.unsupported("layer_types", kind.to_string(), "full_attention"));
    }
    let used = match architecture {
        Architecture::Llama | Architecture::DeepseekV2 | Architecture::DeepseekV3 => false,
        Architecture::Mistral => true,
        // The first `max_window_layers` layers are without; a list of kinds has the last word.
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let without = file.u32("max_window_layers")?.unwrap_or(0);
            file.bool("use_sliding_window")?.unwrap_or(false) && listed.is_none() && without < layers
        }
        Architecture::Qwen3Moe => file.bool("use_sliding_window")?.unwrap_or(false),
    };
    let window = file.u32("sliding_window")?.filter(|&window| used && window < context_tokens);
    match window {
        Some(window) => {
            let supported = format!("none, or one of at least the context's {context_tokens} tokens");
            Err(file.unsupported("sliding_window", window.to_string(), &supported))
        }
        None => Ok(()),
    }
}

/// What `quantize` says of weights that are not.
const UNQUANTISED: [&str; 2] = ["", "float"];

/// Rows and columns of the blocks that share a scale, where weights have eight bits: DeepSeek V3 as it is published.
pub(super) fn scaled_blocks(file: &JsonFile) -> Result<Option<[usize; 2]>, CheckpointError> {
    let at = |field: &str| format!("quantization_config.{field}");
    let supported = "\"fp8\", or unquantised safetensors; for other quantised weights give a GGUF file";
    // What MindIE's tools write in its place, also of sparse weights ("w8a8s", "w8a8sc").
    if let Some(form) = file.text("quantize")?.filter(|form| !UNQUANTISED.contains(form)) {
        return Err(file.unsupported("quantize", format!("{form:?}"), supported));
    }
    if file.get("quantization_config").is_none() {
        return Ok(None);
    }
    let field = at("quant_method");
    match file.text(&field)? {
        Some("fp8") => {}
        method => return Err(file.unsupported(&field, format!("{:?}", method.unwrap_or("none")), supported)),
    }
    if let Some(format) = file.text(&at("fmt"))?.filter(|&format| format != "e4m3") {
        return Err(file.unsupported(&at("fmt"), format!("{format:?}"), "\"e4m3\""));
    }
    let field = at("weight_block_size");
    let Some(block) = file.get(&field) else {
        return Err(file.unsupported(&field, "none", "blocks with a scale each, such as [128, 128]"));
    };
    let number = |value: &serde_json::Value| value.as_u64().filter(|&n| n > 0 && n <= 1 << 20);
    match block.as_array().map(|axes| axes.iter().map(number).collect::<Vec<_>>()).as_deref() {
        Some(&[Some(rows), Some(columns)]) => Ok(Some([rows as usize, columns as usize])),
        _ => Err(file.damaged(&field, format!("{block} is not two numbers of at least 1"))),
    }
}
