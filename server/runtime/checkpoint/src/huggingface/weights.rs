//! safetensors files: one, or shards listed in `model.safetensors.index.json`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use safetensors::{Dtype as StoredDtype, SafeTensors};

use super::{fields::JsonFile, lacks};
use crate::{
    Architecture, CheckpointError, Dtype, ExpertWeight, LayerWeight, ModelConfig, ModelRoot, Weight,
    parts::{ScalesEntry, TensorEntry},
    source::{Extent, MappedFile},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a tensor's scales are called, after the tensor's own name.
const SCALES: &str = "_scale_inv";

type Table = BTreeMap<Weight, TensorEntry>;

pub(super) fn read(
    (root, directory): (&ModelRoot, &Path),
    config: &ModelConfig,
    block: Option<[usize; 2]>,
) -> Result<(Vec<MappedFile>, Table), CheckpointError> {
    let names = match JsonFile::open(root, directory, INDEX)? {
        Some(index) => shards(&index)?,
        None if directory.join(SINGLE).is_file() => vec![SINGLE.to_owned()],
        None => return Err(lacks(directory, "model.safetensors and no model.safetensors.index.json")),
    };
    let mut files = Vec::new();
    let (mut tensors, mut scales) = (Table::new(), Table::new());
    for name in names {
        let file = MappedFile::open(root, &directory.join(name))?;
        add(&mut tensors, &mut scales, &file, files.len(), config)?;
        files.push(file);
    }
    join(&mut tensors, scales, &files, block)?;
    Ok((files, tensors))
}

/// Gives tensors of eight bits the scales that lie beside them; no others have any.
fn join(
    tensors: &mut Table,
    mut scales: Table,
    files: &[MappedFile],
    block: Option<[usize; 2]>,
) -> Result<(), CheckpointError> {
    let damaged = |entry: &TensorEntry, reason: String| CheckpointError::Damaged {
        path: files[entry.extent.file].path().to_owned(),
        field: format!("tensor {}", entry.name),
        reason,
    };
    for (weight, entry) in tensors.iter_mut().filter(|(_, entry)| entry.dtype == Dtype::F8E4M3) {
        let given = block.zip(scales.remove(weight));
        let missing = || {
            damaged(
                entry,
                format!(
                    "it is of type F8_E4M3 and there is no tensor of that name with {SCALES}, or no quantization_config"
                ),
            )
        };
        let (block, given) = given.ok_or_else(missing)?;
        let blocks: Vec<usize> =
            entry.shape.iter().zip(block).map(|(axis, block)| axis.div_ceil(block)).collect();
        if entry.shape.len() != 2 || given.shape != blocks {
            let found = format!(
                "its shape is {:?}, that of its tensor {:?} calls for {blocks:?}",
                given.shape, entry.shape
            );
            return Err(damaged(&given, found));
        }
        if !matches!(given.dtype, Dtype::F32 | Dtype::Bf16) {
            return Err(damaged(&given, format!("scales of type {} are not supported", given.dtype.name())));
        }
        entry.scales = Some(ScalesEntry { block, dtype: given.dtype, extent: given.extent });
    }
    match scales.into_values().next() {
        Some(entry) => Err(damaged(&entry, "there is no tensor of type F8_E4M3 that it scales".to_owned())),
        None => Ok(()),
    }
}

/// The files that the index names, each once. They must lie in the directory itself.
fn shards(index: &JsonFile) -> Result<Vec<String>, CheckpointError> {
    let field = "weight_map";
    let map = index.get(field).and_then(|map| map.as_object());
    let map = map.ok_or_else(|| index.damaged(field, "it is not a JSON object"))?;
    let mut names = BTreeSet::new();
    for (tensor, name) in map {
        let plain = |name: &&str| name.ends_with(".safetensors") && !name.contains(['/', '\\']);
        let name = name.as_str().filter(plain);
        let wrong =
            || index.damaged(&format!("{field}.{tensor}"), "it is not the name of a safetensors file");
        names.insert(name.ok_or_else(wrong)?.to_owned());
    }
    if names.is_empty() {
        return Err(index.damaged(field, "it names no file"));
    }
    Ok(names.into_iter().collect())
}

/// Adds the tensors of one file, and the scales of tensors under what they scale.
fn add(
    tensors: &mut Table,
    scales: &mut Table,
    file: &MappedFile,
    index: usize,
    config: &ModelConfig,
) -> Result<(), CheckpointError> {
    let damaged = |field: String, reason: String| CheckpointError::Damaged {
        path: file.path().to_owned(),
        field,
        reason,
    };
    // Checks that the offsets are in order, without gaps, within the file, and fit shapes and types.
    let (header_bytes, header) = SafeTensors::read_metadata(file.all())
        .map_err(|error| damaged("its header".to_owned(), error.to_string()))?;
    let data_start = header_bytes.saturating_add(8);
    for (name, info) in header.tensors() {
        if predicts_further_tokens(&name, config) {
            continue;
        }
        let scaled = name.strip_suffix(SCALES);
        let Some(weight) = role(scaled.unwrap_or(&name)) else {
            if name.ends_with(".rotary_emb.inv_freq") {
                continue; // old exports store what follows from the configuration
            }
            return Err(CheckpointError::Unsupported {
                path: file.path().to_owned(),
                field: format!("tensor {name}"),
                found: format!("not one of the {} architecture's", config.architecture),
                supported: "its tensors".to_owned(),
            });
        };
        let dtype = match info.dtype {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::F16 => Dtype::F16,
            StoredDtype::BF16 => Dtype::Bf16,
            StoredDtype::F8_E4M3 => Dtype::F8E4M3,
            other => {
                return Err(CheckpointError::Unsupported {
                    path: file.path().to_owned(),
                    field: format!("tensor {name}"),
                    found: format!("of type {other:?}"),
                    supported: "F32, F16, BF16, F8_E4M3".to_owned(),
                });
            }
        };
        let (start, end) = info.data_offsets;
        let (start, length) = (data_start.saturating_add(start), end.saturating_sub(start));
        if start.saturating_add(length) > file.all().len() {
            return Err(damaged(format!("tensor {name}"), "it ends past the end of the file".to_owned()));
        }
        let extent = Extent { file: index, start, length };
        let shape = info.shape.clone();
        let entry = TensorEntry { dtype, shape, extent, name: name.clone(), scales: None };
        let table = if scaled.is_some() { &mut *scales } else { &mut *tensors };
        if table.insert(weight, entry).is_some() {
            return Err(damaged(format!("tensor {name}"), "it is in more than one file".to_owned()));
        }
    }
    Ok(())
}

/// Whether a tensor is of the layers behind the model's own that DeepSeek's checkpoints have for predicting several
/// tokens at once: the model is whole without them.
fn predicts_further_tokens(name: &str, config: &ModelConfig) -> bool {
    let layer = || name.strip_prefix("model.layers.")?.split_once('.')?.0.parse::<u32>().ok();
    config.architecture == Architecture::DeepseekV3 && layer().is_some_and(|layer| layer >= config.layers)
}

fn role(name: &str) -> Option<Weight> {
    match name {
        "model.embed_tokens.weight" => Some(Weight::Embedding),
        "model.norm.weight" => Some(Weight::OutputNorm),
        "lm_head.weight" => Some(Weight::Output),
        _ => name.strip_prefix("model.layers.").and_then(layer_weight),
    }
}

/// `"3.self_attn.q_proj.weight"` and the like.
fn layer_weight(rest: &str) -> Option<Weight> {
    let (layer, name) = rest.split_once('.')?;
    let layer = layer.parse().ok()?;
    if let Some(rest) = name.strip_prefix("mlp.experts.") {
        let (expert, name) = rest.split_once('.')?;
        let weight = match name {
            "gate_proj.weight" => ExpertWeight::Gate,
            "up_proj.weight" => ExpertWeight::Up,
            "down_proj.weight" => ExpertWeight::Down,
            _ => return None,
        };
        return Some(Weight::Expert(layer, expert.parse().ok()?, weight));
    }
    let weight = match name {
        "input_layernorm.weight" => LayerWeight::AttentionNorm,
        "self_attn.q_proj.weight" => LayerWeight::Query,
        "self_attn.q_proj.bias" => LayerWeight::QueryBias,
        "self_attn.k_proj.weight" => LayerWeight::Key,
        "self_attn.k_proj.bias" => LayerWeight::KeyBias,
        "self_attn.v_proj.weight" => LayerWeight::Value,
        "self_attn.v_proj.bias" => LayerWeight::ValueBias,
        "self_attn.q_norm.weight" => LayerWeight::QueryNorm,
        "self_attn.k_norm.weight" => LayerWeight::KeyNorm,
        "self_attn.q_a_proj.weight" => LayerWeight::QueryDown,
        "self_attn.q_a_layernorm.weight" => LayerWeight::QueryDownNorm,
        "self_attn.q_b_proj.weight" => LayerWeight::QueryUp,
        "self_attn.kv_a_proj_with_mqa.weight" => LayerWeight::KvDown,
        "self_attn.kv_a_layernorm.weight" => LayerWeight::KvDownNorm,
        "self_attn.kv_b_proj.weight" => LayerWeight::KvUp,
        "self_attn.o_proj.weight" => LayerWeight::AttentionOutput,
        "self_attn.o_proj.bias" => LayerWeight::AttentionOutputBias,
        "post_attention_layernorm.weight" => LayerWeight::FfnNorm,
        "mlp.gate_proj.weight" => LayerWeight::Gate,
        "mlp.gate_proj.bias" => LayerWeight::GateBias,
        "mlp.up_proj.weight" => LayerWeight::Up,
        "mlp.up_proj.bias" => LayerWeight::UpBias,
        "mlp.down_proj.weight" => LayerWeight::Down,
        "mlp.down_proj.bias" => LayerWeight::DownBias,
        "mlp.gate.weight" => LayerWeight::Router,
        "mlp.gate.e_score_correction_bias" => LayerWeight::RouterBias,
        "mlp.shared_experts.gate_proj.weight" => LayerWeight::SharedGate,
        "mlp.shared_experts.up_proj.weight" => LayerWeight::SharedUp,
        "mlp.shared_experts.down_proj.weight" => LayerWeight::SharedDown,
        _ => return None,
    };
    Some(Weight::Layer(layer, weight))
}
