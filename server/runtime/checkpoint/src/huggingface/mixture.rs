//! The mixture of experts in `config.json`.

use super::fields::JsonFile;
use crate::{Architecture, CheckpointError, ExpertGroups, GroupScore, Mixture, RouterScores, Routing};

/// The mixture, if the architecture has one.
pub(super) fn mixture(
    file: &JsonFile,
    architecture: Architecture,
    layers: u32,
) -> Result<Option<Mixture>, CheckpointError> {
    match architecture {
        Architecture::Qwen3Moe => qwen3(file, layers).map(Some),
        Architecture::DeepseekV2 | Architecture::DeepseekV3 => deepseek(file, architecture, layers).map(Some),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 | Architecture::Qwen3 => Ok(None),
    }
}

fn qwen3(file: &JsonFile, layers: u32) -> Result<Mixture, CheckpointError> {
    // transformers writes one or the other name.
    let experts = match file.u32("num_experts")? {
        Some(experts) => experts,
        None => file.needed("num_local_experts")?,
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
        experts_per_token: file.needed("num_experts_per_tok")?,
        expert_ffn: file.needed("moe_intermediate_size")?,
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

fn deepseek(file: &JsonFile, architecture: Architecture, layers: u32) -> Result<Mixture, CheckpointError> {
    let v3 = architecture == Architecture::DeepseekV3;
    let expert_ffn = file.needed("moe_intermediate_size")?;
    let shared = file.u32("n_shared_experts")?.unwrap_or(0);
    if let Some(step) = file.u32("moe_layer_freq")?.filter(|&step| step != 1) {
        return Err(file.unsupported("moe_layer_freq", step.to_string(), "1"));
    }
    let scores = if v3 { RouterScores::Sigmoid } else { RouterScores::Softmax };
    let name = if v3 { "sigmoid" } else { "softmax" };
    if let Some(found) = file.text("scoring_func")?.filter(|&found| found != name) {
        return Err(file.unsupported("scoring_func", format!("{found:?}"), name));
    }
    let dense = file.u32("first_k_dense_replace")?.unwrap_or(if v3 { 3 } else { 0 });
    let normalise = file.bool("norm_topk_prob")?.unwrap_or(v3);
    if normalise && !v3 {
        // DeepSeek's own code and transformers do different things then; no published model asks for it.
        return Err(file.unsupported("norm_topk_prob", "true", "false, for deepseek_v2"));
    }
    Ok(Mixture {
        experts: file.needed("n_routed_experts")?,
        experts_per_token: file.needed("num_experts_per_tok")?,
        expert_ffn,
        shared_ffn: expert_ffn.saturating_mul(shared),
        routing: Routing {
            scores,
            groups: groups(file, v3)?,
            correction_bias: v3,
            normalise,
            scale: file.f32("routed_scaling_factor")?.unwrap_or(if v3 { 2.5 } else { 1.0 }),
        },
        dense_layers: (0..dense.min(layers).min(1 << 16)).collect(),
    })
}

/// The groups, by the method that chooses experts.
fn groups(file: &JsonFile, v3: bool) -> Result<Option<ExpertGroups>, CheckpointError> {
    let field = "topk_method";
    let method = file.text(field)?.unwrap_or(if v3 { "noaux_tc" } else { "greedy" });
    let score = match (method, v3) {
        ("greedy", false) => return Ok(None),
        ("group_limited_greedy", false) => GroupScore::Best,
        ("noaux_tc", true) => GroupScore::BestTwo,
        (_, v3) => {
            let supported = if v3 { "noaux_tc" } else { "greedy, group_limited_greedy" };
            return Err(file.unsupported(field, format!("{method:?}"), supported));
        }
    };
    let (groups, chosen) = (file.needed("n_group")?, file.needed("topk_group")?);
    Ok(Some(ExpertGroups { groups, chosen, score }))
}
