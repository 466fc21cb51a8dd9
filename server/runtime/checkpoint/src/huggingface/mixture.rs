//! The mixture of experts in `config.json`.

use super::{JsonFile, config::needed};
use crate::{Architecture, CheckpointError, Mixture, RouterScores, Routing};

/// The mixture, if the architecture has one.
pub(super) fn mixture(
    file: &JsonFile,
    architecture: Architecture,
    layers: u32,
) -> Result<Option<Mixture>, CheckpointError> {
    match architecture {
        Architecture::Qwen3Moe => qwen3(file, layers).map(Some),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => Ok(None),
    }
}

fn qwen3(file: &JsonFile, layers: u32) -> Result<Mixture, CheckpointError> {
    // transformers writes one or the other name.
    let experts = match file.u32("num_experts")? {
        Some(experts) => experts,
        None => needed(file, "num_local_experts")?,
    };
    let step = file.u32("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(file.damaged("decoder_sparse_step", "it is not at least 1"));
    }
    let field = "mlp_only_layers";
    let dense = file.get(field).map_or(Some(&[][..]), |list| list.as_array().map(Vec::as_slice));
    let dense = dense.ok_or_else(|| file.damaged(field, "it is not a list of layers"))?;
    let is_dense = |layer: &u32| !(layer + 1).is_multiple_of(step) || dense.contains(&(*layer).into());
    Ok(Mixture {
        experts,
        experts_per_token: needed(file, "num_experts_per_tok")?,
        expert_ffn: needed(file, "moe_intermediate_size")?,
        shared_ffn: 0,
        routing: Routing {
            scores: RouterScores::Softmax,
            groups: None,
            correction_bias: false,
            normalise: file.bool("norm_topk_prob")?.unwrap_or(false),
            scale: 1.0,
        },
        // No more layers than a configuration may have: the number is checked later.
        dense_layers: (0..layers.min(1 << 16)).filter(is_dense).collect(),
    })
}
