//! Rotary positions in `config.json`: `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters`
//! (transformers 5).

use super::fields::JsonFile;
use crate::{CheckpointError, Rope, RopeOrder, RopeScaling};

/// The rotary positions of a model whose context is `context_tokens`.
pub(super) fn rope(file: &JsonFile, context_tokens: u32, order: RopeOrder) -> Result<Rope, CheckpointError> {
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
    Ok(Rope { theta: theta.unwrap_or(10_000.0), scaling, order })
}
