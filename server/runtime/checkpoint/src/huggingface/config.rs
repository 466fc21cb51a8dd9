//! `config.json`: the model's configuration, as transformers 4 and 5 write it.

use super::JsonFile;
use crate::{Architecture, CheckpointError, ModelConfig, Rope, RopeOrder, RopeScaling};

/// The configuration, and whether the embeddings are tied. The vocabulary is what the file says; the tensors' shapes
/// are checked against it later.
pub(super) fn model(file: &JsonFile) -> Result<(ModelConfig, bool), CheckpointError> {
    check_supported(file)?;
    let needed = |field: &str| file.u32(field)?.ok_or_else(|| file.damaged(field, "it is not there"));
    let hidden = needed("hidden_size")?;
    let heads = needed("num_attention_heads")?;
    let context_tokens = file.u32("max_position_embeddings")?.unwrap_or(2048);
    let attention_bias = file.bool("attention_bias")?.unwrap_or(false);
    let tied = file.bool("tie_word_embeddings")?.unwrap_or(false);
    let config = ModelConfig {
        architecture: Architecture::Llama,
        layers: needed("num_hidden_layers")?,
        hidden,
        ffn: needed("intermediate_size")?,
        heads,
        kv_heads: file.u32("num_key_value_heads")?.unwrap_or(heads),
        head_dim: match file.u32("head_dim")? {
            Some(width) => width,
            None => hidden.checked_div(heads).unwrap_or(0),
        },
        rope: rope(file, context_tokens)?,
        rms_eps: file.f32("rms_norm_eps")?.unwrap_or(1e-6),
        context_tokens,
        vocabulary: needed("vocab_size")?,
        tied_embeddings: tied,
        qkv_bias: attention_bias,
        attention_output_bias: attention_bias,
        ffn_bias: file.bool("mlp_bias")?.unwrap_or(false),
    };
    Ok((config, tied))
}

/// Refuses what is well formed but cannot be run.
fn check_supported(file: &JsonFile) -> Result<(), CheckpointError> {
    let field = "model_type";
    let kind = file.text(field)?.ok_or_else(|| file.damaged(field, "it is not there"))?;
    if kind != Architecture::Llama.name() {
        return Err(file.unsupported(field, format!("{kind:?}"), Architecture::SUPPORTED));
    }
    if let Some(activation) = file.text("hidden_act")?.filter(|&name| name != "silu") {
        return Err(file.unsupported("hidden_act", format!("{activation:?}"), "silu"));
    }
    if let Some(config) = file.get("quantization_config") {
        let method = config.get("quant_method").and_then(|method| method.as_str()).unwrap_or("given");
        let supported = "unquantised safetensors; for quantised weights give a GGUF file";
        return Err(file.unsupported("quantization_config", method, supported));
    }
    for field in ["partial_rotary_factor", "rope_parameters.partial_rotary_factor"] {
        if let Some(part) = file.f32(field)?.filter(|&part| part != 1.0) {
            return Err(file.unsupported(field, part.to_string(), "1.0"));
        }
    }
    Ok(())
}

/// Rotary positions: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).
fn rope(file: &JsonFile, context_tokens: u32) -> Result<Rope, CheckpointError> {
    let at = if file.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let number = |name: &str| file.f32(&format!("{at}.{name}"));
    let needed = |name: &str| {
        number(name)?.ok_or_else(|| file.damaged(&format!("{at}.{name}"), "the kind of scaling calls for it"))
    };
    let theta = number("rope_theta")?.map_or_else(|| file.f32("rope_theta"), |theta| Ok(Some(theta)))?;
    // Older files say `type`.
    let kind = file
        .text(&format!("{at}.rope_type"))?
        .map_or_else(|| file.text(&format!("{at}.type")), |k| Ok(Some(k)))?;
    let original = file.u32(&format!("{at}.original_max_position_embeddings"))?.unwrap_or(context_tokens);
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low_freq_factor: needed("low_freq_factor")?,
            high_freq_factor: needed("high_freq_factor")?,
            original_context_tokens: original,
        },
        "yarn" => {
            let factor = needed("factor")?;
            let attention_factor =
                match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?) {
                    (Some(given), ..) => given,
                    (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => {
                        let scale = |mscale| RopeScaling::yarn_attention_factor(factor, mscale);
                        scale(mscale) / scale(all)
                    }
                    _ => RopeScaling::yarn_attention_factor(factor, 1.0),
                };
            RopeScaling::Yarn {
                factor,
                original_context_tokens: original,
                beta_fast: number("beta_fast")?.unwrap_or(32.0),
                beta_slow: number("beta_slow")?.unwrap_or(1.0),
                attention_factor,
                truncate: file.bool(&format!("{at}.truncate"))?.unwrap_or(true),
            }
        }
        other => {
            let field = format!("{at}.rope_type");
            return Err(file.unsupported(&field, format!("{other:?}"), "default, linear, llama3, yarn"));
        }
    };
    Ok(Rope { theta: theta.unwrap_or(10_000.0), scaling, order: RopeOrder::Halves })
}
