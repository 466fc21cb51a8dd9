//! The table of tensors: from GGUF's names, types and offsets to roles, dtypes and checked extents.

use std::collections::BTreeMap;

use super::header::{Fault, Header, TensorLine};
use crate::{Dtype, ExpertWeight, LayerWeight, Weight, parts::TensorEntry, source::Extent};

/// More experts than any configuration may have; what is beyond is not called for anyway.
const MOST_EXPERTS: usize = (1 << 14) + 1;

/// Tensors of a file, each expert's counted: several times as many as the largest models have. A line of the table may stand for
/// thousands of them and need not take a byte of the file.
const MOST_TENSORS: usize = 1 << 18;

/// The tensors of a file.
pub(crate) struct Table {
    pub(crate) tensors: BTreeMap<Weight, TensorEntry>,
    /// `rope_freqs`: LLaMA 3.1's scaling as divisors of the frequencies.
    pub(crate) rope_divisors: Option<TensorEntry>,
}

impl Table {
    /// Cuts a stack of all experts' tensors into one for each. Says whether one was there already.
    fn add_experts(&mut self, layer: u32, weight: ExpertWeight, stack: &TensorEntry) -> Result<bool, Fault> {
        // A stack of one has lost its outermost axis.
        let (experts, shape) = match stack.shape[..] {
            [experts, rows, columns] => (experts, vec![rows, columns]),
            [rows, columns] => (1, vec![rows, columns]),
            _ => {
                let reason = format!("its shape {:?} is not a stack of matrices", stack.shape);
                return Err(Fault::damaged(format!("tensor {}", stack.name), reason));
            }
        };
        // Whole rows, so that each has the same whole number of bytes; none at all where an axis is 0.
        let length = stack.extent.length.checked_div(experts).unwrap_or(0);
        let mut twice = false;
        for expert in 0..experts.min(MOST_EXPERTS) {
            let extent = Extent { start: stack.extent.start + expert * length, length, ..stack.extent };
            let entry = TensorEntry { shape: shape.clone(), extent, ..stack.clone() };
            twice |= self.tensors.insert(Weight::Expert(layer, expert as u32, weight), entry).is_some();
        }
        Ok(twice)
    }
}

pub(crate) fn table(header: &Header<'_>, file_bytes: usize) -> Result<Table, Fault> {
    let mut table = Table { tensors: BTreeMap::new(), rope_divisors: None };
    for line in &header.tensors {
        let entry = entry(header, line, file_bytes)?;
        let twice = match role(line.name)? {
            Role::Weight(weight) => table.tensors.insert(weight, entry).is_some(),
            Role::Experts(layer, weight) => table.add_experts(layer, weight, &entry)?,
            Role::RopeDivisors => table.rope_divisors.replace(entry).is_some(),
        };
        if twice {
            return Err(Fault::damaged(format!("tensor {}", line.name), "it is there twice"));
        }
        if table.tensors.len() > MOST_TENSORS {
            let reason = format!("with it there are more than {MOST_TENSORS}, those of experts counted");
            return Err(Fault::damaged(format!("tensor {}", line.name), reason));
        }
    }
    Ok(table)
}

fn entry(header: &Header<'_>, line: &TensorLine<'_>, file_bytes: usize) -> Result<TensorEntry, Fault> {
    let field = || format!("tensor {}", line.name);
    let dtype = dtype(line.kind).ok_or_else(|| {
        Fault::unsupported(field(), format!("of ggml type {}", line.kind), Dtype::SUPPORTED)
    })?;
    let too_large = || Fault::damaged(field(), format!("its size {:?} is beyond any file", line.axes));
    let sizes = line.axes.iter().map(|&n| usize::try_from(n).map_err(|_| too_large()));
    let mut shape = sizes.collect::<Result<Vec<usize>, _>>()?;
    let row = dtype.row_bytes(shape[0]).ok_or_else(|| {
        let reason = format!("a row of {} elements is not whole blocks of {}", shape[0], dtype.name());
        Fault::damaged(field(), reason)
    })?;
    let rows =
        shape[1..].iter().try_fold(1usize, |product, &n| product.checked_mul(n)).ok_or_else(too_large)?;
    let bytes = rows.checked_mul(row).ok_or_else(too_large)?;
    let range = header.locate(line, bytes as u64, file_bytes)?;
    shape.reverse();
    // A matrix written with trailing axes of 1 is a matrix.
    while shape.len() > 1 && shape[0] == 1 {
        shape.remove(0);
    }
    let extent = Extent { file: 0, start: range.start, length: bytes };
    Ok(TensorEntry { dtype, shape, extent, name: line.name.to_owned(), scales: None })
}

/// ggml's type numbers.
fn dtype(kind: u32) -> Option<Dtype> {
    Some(match kind {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        30 => Dtype::Bf16,
        _ => return None,
    })
}

enum Role {
    Weight(Weight),
    /// All experts of a layer, stacked.
    Experts(u32, ExpertWeight),
    RopeDivisors,
}

fn role(name: &str) -> Result<Role, Fault> {
    let found = match name {
        "token_embd.weight" => Some(Weight::Embedding),
        "output_norm.weight" => Some(Weight::OutputNorm),
        "output.weight" => Some(Weight::Output),
        "rope_freqs.weight" => return Ok(Role::RopeDivisors),
        _ => name.strip_prefix("blk.").and_then(layer_weight),
    };
    let unknown = || {
        Fault::unsupported(format!("tensor {name}"), "not one that Baton knows", "the architecture's tensors")
    };
    let stacked = || name.strip_prefix("blk.").and_then(expert_weights);
    found.map(Role::Weight).or_else(stacked).ok_or_else(unknown)
}

/// `"3.ffn_gate_exps.weight"` and the like.
fn expert_weights(rest: &str) -> Option<Role> {
    let (layer, name) = rest.split_once('.')?;
    let weight = match name {
        "ffn_gate_exps.weight" => ExpertWeight::Gate,
        "ffn_up_exps.weight" => ExpertWeight::Up,
        "ffn_down_exps.weight" => ExpertWeight::Down,
        _ => return None,
    };
    Some(Role::Experts(layer.parse().ok()?, weight))
}

/// `"3.attn_q.weight"` and the like.
fn layer_weight(rest: &str) -> Option<Weight> {
    let (layer, name) = rest.split_once('.')?;
    let weight = match name {
        "attn_norm.weight" => LayerWeight::AttentionNorm,
        "attn_q.weight" => LayerWeight::Query,
        "attn_q.bias" => LayerWeight::QueryBias,
        "attn_k.weight" => LayerWeight::Key,
        "attn_k.bias" => LayerWeight::KeyBias,
        "attn_v.weight" => LayerWeight::Value,
        "attn_v.bias" => LayerWeight::ValueBias,
        "attn_q_norm.weight" => LayerWeight::QueryNorm,
        "attn_k_norm.weight" => LayerWeight::KeyNorm,
        "attn_q_a.weight" => LayerWeight::QueryDown,
        "attn_q_a_norm.weight" => LayerWeight::QueryDownNorm,
        "attn_q_b.weight" => LayerWeight::QueryUp,
        "attn_kv_a_mqa.weight" => LayerWeight::KvDown,
        "attn_kv_a_norm.weight" => LayerWeight::KvDownNorm,
        "attn_kv_b.weight" => LayerWeight::KvUp,
        "attn_k_b.weight" => LayerWeight::KeyUp,
        "attn_v_b.weight" => LayerWeight::ValueUp,
        "attn_output.weight" => LayerWeight::AttentionOutput,
        "attn_output.bias" => LayerWeight::AttentionOutputBias,
        "ffn_norm.weight" => LayerWeight::FfnNorm,
        "ffn_gate.weight" => LayerWeight::Gate,
        "ffn_gate.bias" => LayerWeight::GateBias,
        "ffn_up.weight" => LayerWeight::Up,
        "ffn_up.bias" => LayerWeight::UpBias,
        "ffn_down.weight" => LayerWeight::Down,
        "ffn_down.bias" => LayerWeight::DownBias,
        "ffn_gate_inp.weight" => LayerWeight::Router,
        "exp_probs_b.bias" => LayerWeight::RouterBias,
        "ffn_gate_shexp.weight" => LayerWeight::SharedGate,
        "ffn_up_shexp.weight" => LayerWeight::SharedUp,
        "ffn_down_shexp.weight" => LayerWeight::SharedDown,
        _ => return None,
    };
    Some(Weight::Layer(layer.parse().ok()?, weight))
}
