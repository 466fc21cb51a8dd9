//! Latent attention in `config.json`: DeepSeek.

use super::fields::JsonFile;
use crate::{Architecture, Attention, CheckpointError, LatentAttention, RopeOrder, RopeScaling};

/// The norms of latents have transformers' default, whatever `rms_norm_eps` says.
const NORM_EPS: f32 = 1e-6;

/// The attention, and how the pairs of its rotated elements are ordered.
pub(super) fn attention(
    file: &JsonFile,
    architecture: Architecture,
) -> Result<(Attention, RopeOrder), CheckpointError> {
    for field in ["attention_bias", "mlp_bias"] {
        if file.bool(field)?.unwrap_or(false) {
            return Err(file.unsupported(field, "true", "false"));
        }
    }
    let heads = file.needed("num_attention_heads")?;
    if let Some(kv_heads) = file.u32("num_key_value_heads")?.filter(|&kv_heads| kv_heads != heads) {
        let supported = format!("as many as there are attention heads, {heads}");
        return Err(file.unsupported("num_key_value_heads", kv_heads.to_string(), &supported));
    }
    let (nope_dim, rope_dim) = (file.needed("qk_nope_head_dim")?, file.needed("qk_rope_head_dim")?);
    let interleaved = match architecture {
        Architecture::DeepseekV3 => file.bool("rope_interleave")?.unwrap_or(true),
        _ => true,
    };
    let attention = LatentAttention {
        heads,
        query_rank: file.u32("q_lora_rank")?,
        kv_rank: file.needed("kv_lora_rank")?,
        nope_dim,
        rope_dim,
        value_dim: file.needed("v_head_dim")?,
        norm_eps: NORM_EPS,
        scale: stretch(file)? / (f64::from(nope_dim) + f64::from(rope_dim)).sqrt() as f32,
        split_up: false,
    };
    let order = if interleaved { RopeOrder::Interleaved } else { RopeOrder::Halves };
    Ok((Attention::Latent(attention), order))
}

/// What scaled positions make of the scores' factor: the square of YaRN's `mscale_all_dim`.
fn stretch(file: &JsonFile) -> Result<f32, CheckpointError> {
    let at = if file.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let kind = |name: &str| file.text(&format!("{at}.{name}"));
    let kind = match kind("rope_type")? {
        Some(kind) => Some(kind),
        None => kind("type")?,
    };
    let (factor, all) = (file.f32(&format!("{at}.factor"))?, file.f32(&format!("{at}.mscale_all_dim"))?);
    Ok(match (kind, factor, all) {
        (Some(kind), Some(factor), Some(all)) if kind != "default" && all != 0.0 => {
            RopeScaling::yarn_attention_factor(factor, all).powi(2)
        }
        _ => 1.0,
    })
}
