//! Caches of one model in every way that nodes can map to each other, written and read value by value from the
//! arrangements' descriptions, independently of the crate's own code.

use baton_kvtransfer::{
    KvLayout,
    plan::{dequantise, quantise},
};
use half::bf16;

use super::{LAYERS, Pool};

pub const HEADS: usize = 2;
/// No multiple of the 16 columns of a panel.
pub const DIM: usize = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Panel,
    TokenMajor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    Int8,
}

/// How an instance keeps its cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    pub order: Order,
    pub dtype: Dtype,
    pub block: usize,
}

pub fn panel(dtype: Dtype, block: usize) -> Form {
    Form { order: Order::Panel, dtype, block }
}

/// What a vector is kept as.
type Kept = (Vec<u8>, Option<[u8; 4]>);

impl Form {
    fn unit(self) -> usize {
        match self.dtype {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
            Dtype::Int8 => 1,
        }
    }

    /// Elements of all vectors of a part, with what fills them up.
    fn part(self, part: usize) -> usize {
        let padded = self.order == Order::Panel && part == 1;
        HEADS * self.block * if padded { DIM.next_multiple_of(16) } else { DIM }
    }

    pub fn slice_bytes(self) -> usize {
        let scales = if self.dtype == Dtype::Int8 { 2 * HEADS * self.block * 4 } else { 0 };
        (self.part(0) + self.part(1)) * self.unit() + scales
    }

    pub fn layout(self) -> KvLayout {
        KvLayout {
            model_revision: "r1".into(),
            format: match self.order {
                Order::Panel => "cpu-panel-16-columns".into(),
                Order::TokenMajor => "token-major".into(),
            },
            dtype: format!("{:?}", self.dtype).to_lowercase(),
            block_tokens: self.block as u32,
            layers: LAYERS,
            kv_heads: HEADS as u32,
            head_dim: DIM as u32,
            rope_dim: 0,
            tensor_parallel: 1,
            slice_bytes: self.slice_bytes() as u64,
        }
    }

    pub fn blocks(self, tokens: usize) -> usize {
        tokens.div_ceil(self.block)
    }

    fn value_at(self, part: usize, head: usize, token: usize, dim: usize) -> usize {
        let index = match (self.order, part) {
            (Order::TokenMajor, _) => (token * HEADS + head) * DIM + dim,
            (Order::Panel, 0) => (head * DIM + dim) * self.block + token,
            (Order::Panel, _) => ((head * DIM.div_ceil(16) + dim / 16) * self.block + token) * 16 + dim % 16,
        };
        (part * self.part(0) + index) * self.unit()
    }

    fn scale_at(self, part: usize, head: usize, token: usize) -> usize {
        let index = match self.order {
            Order::TokenMajor => token * HEADS + head,
            Order::Panel => head * self.block + token,
        };
        (self.part(0) + self.part(1)) * self.unit() + (part * HEADS * self.block + index) * 4
    }

    fn get(self, slice: &[u8], part: usize, head: usize, token: usize) -> Kept {
        let place = |dim| self.value_at(part, head, token, dim);
        let values = (0..DIM).flat_map(|dim| slice[place(dim)..place(dim) + self.unit()].to_vec()).collect();
        let at = self.scale_at(part, head, token);
        let scale = (self.dtype == Dtype::Int8).then(|| slice[at..at + 4].try_into().expect("four"));
        (values, scale)
    }

    fn put(self, slice: &mut [u8], part: usize, head: usize, token: usize, (values, scale): &Kept) {
        for (dim, value) in values.chunks(self.unit()).enumerate() {
            let at = self.value_at(part, head, token, dim);
            slice[at..at + self.unit()].copy_from_slice(value);
        }
        if let Some(scale) = scale {
            let at = self.scale_at(part, head, token);
            slice[at..at + 4].copy_from_slice(scale);
        }
    }

    /// What an instance of this form keeps of a vector that the model computed.
    fn kept(self, vector: &[f32]) -> Kept {
        match self.dtype {
            Dtype::F32 => (vector.iter().flat_map(|value| value.to_le_bytes()).collect(), None),
            Dtype::Bf16 => {
                (vector.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(), None)
            }
            Dtype::Int8 => {
                let mut quants = [0; DIM];
                let scale = quantise(vector, &mut quants);
                (quants.iter().map(|&quant| quant as u8).collect(), Some(scale.to_le_bytes()))
            }
        }
    }

    /// What it keeps of a vector that came from an instance of another form.
    fn kept_from(self, source: Form, vector: &[f32]) -> Kept {
        if (source.dtype, self.dtype) != (Dtype::Int8, Dtype::Bf16) {
            return self.kept(vector);
        }
        let mut quants = [0; DIM];
        let scale = quantise(vector, &mut quants);
        let mut widened = [0.0; DIM];
        dequantise(&quants, scale, &mut widened);
        self.kept(&widened)
    }
}

/// A vector of the model's, of values that bf16 holds exactly.
fn vector(seed: u64, layer: u32, part: usize, head: usize, token: usize) -> Vec<f32> {
    let which = ((u64::from(layer) * 2 + part as u64) * HEADS as u64 + head as u64) << 20 | token as u64;
    super::pattern(seed, layer, which as u32, DIM * 4)
        .chunks(4)
        .map(|bytes| {
            let word = i32::from_le_bytes(bytes.try_into().expect("four"));
            bf16::from_f32(word as f32 / 1e9).to_f32()
        })
        .collect()
}

/// Writes layers of a sequence's cache as an instance of this form computes it; what is beyond the last token is noise.
pub fn fill(pool: &Pool, form: Form, seed: u64, blocks: &[u32], tokens: usize) {
    for layer in 0..LAYERS {
        for (index, &block) in blocks.iter().enumerate() {
            let mut slice = vec![0xA5; form.slice_bytes()];
            for token in 0..form.block.min(tokens - index * form.block) {
                for (part, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let vector = vector(seed, layer, part, head, index * form.block + token);
                    form.put(&mut slice, part, head, token, &form.kept(&vector));
                }
            }
            pool.write(layer, block, &slice);
        }
    }
}

/// Checks that a sequence's cache, computed in another form, is in these blocks as this form keeps it. Blocks of `held`
/// are not looked at.
pub fn assert_holds(
    pool: &Pool,
    (form, source): (Form, Form),
    seed: u64,
    blocks: &[u32],
    tokens: usize,
    held: &[u32],
) {
    for layer in 0..LAYERS {
        for (index, &block) in blocks.iter().enumerate() {
            if held.contains(&(index as u32)) {
                continue;
            }
            let slice = pool.read(layer, block);
            for token in 0..form.block.min(tokens - index * form.block) {
                for (part, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let vector = vector(seed, layer, part, head, index * form.block + token);
                    assert_eq!(
                        form.get(&slice, part, head, token),
                        form.kept_from(source, &vector),
                        "{source:?} -> {form:?}, layer {layer}, block {index}, token {token}, part {part}, head {head}"
                    );
                }
            }
        }
    }
}
