//! The naive gather: what a rank's cache holds, written down value by value from the definition of each arrangement.
//! Shares nothing with the planner but its names of contents and types.

use half::bf16;

use super::{Case, Content, KvDtype};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrangement {
    Cpu,
    TokenMajor,
    /// `[token][head]` of first part, its scale, second part, its scale.
    Interleaved,
}

/// One side of a case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Naive {
    pub(super) arrangement: Arrangement,
    pub(super) content: Content,
    pub(super) dtype: KvDtype,
    pub(super) block_tokens: u32,
    pub(super) ranks: u32,
    /// Of a rank.
    pub(super) heads: u32,
}

/// A value of the model's cache. Every seventh token has a head without any.
pub(super) fn number(layer: u32, token: u32, part: usize, head: u32, dim: u32) -> f32 {
    if token % 7 == 3 && head % 2 == 1 {
        return 0.0;
    }
    let mut mixed =
        u64::from(layer) << 48 | u64::from(token) << 24 | u64::from(head) << 16 | u64::from(dim) << 1;
    mixed = (mixed | part as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed >> 40) as f32 / (1 << 23) as f32 - 1.0) * 4.0
}

/// Scale and multiples, rounded by the addition that rounds in the runtime.
fn int8(vector: &[f32]) -> (f32, Vec<i8>) {
    let most = vector.iter().map(|x| x.abs()).fold(0.0, f32::max);
    let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
    let round = |x: f32| (x * inverse + 12_582_912.0) - 12_582_912.0;
    (most / 127.0, vector.iter().map(|&x| round(x) as i8).collect())
}

impl Naive {
    /// Heads of a rank: each head as often as ranks have it, dealt out in order.
    pub(super) fn heads_of(&self, rank: u32, kv_heads: u32) -> Vec<u32> {
        let copies = (self.ranks / kv_heads).max(1);
        let all: Vec<u32> = (0..kv_heads).flat_map(|head| (0..copies).map(move |_| head)).collect();
        let each = all.len() / self.ranks as usize;
        all[rank as usize * each..][..each].to_vec()
    }

    fn unit(&self) -> usize {
        match self.dtype {
            KvDtype::F32 => 4,
            KvDtype::Bf16 => 2,
            KvDtype::Int8 => 1,
        }
    }

    fn scale_bytes(&self) -> usize {
        if self.dtype == KvDtype::Int8 { 4 } else { 0 }
    }

    /// Tokens, heads, and elements of each part.
    fn sizes(&self) -> (usize, usize, usize, usize) {
        let (first, second) = match self.content {
            Content::KeysAndValues { head_dim } => (head_dim, head_dim),
            Content::Latents { rank, rope } => (rank, rope),
        };
        (self.block_tokens as usize, self.heads as usize, first as usize, second as usize)
    }

    fn padded(&self, dim: usize) -> usize {
        let columns =
            self.arrangement == Arrangement::Cpu && matches!(self.content, Content::KeysAndValues { .. });
        if columns { dim.next_multiple_of(16) } else { dim }
    }

    /// Bytes of all values, before the scales where these come last.
    fn values(&self) -> usize {
        let (tokens, heads, first, second) = self.sizes();
        tokens * heads * (first + self.padded(second)) * self.unit()
    }

    pub(super) fn slice_bytes(&self) -> usize {
        let (tokens, heads, ..) = self.sizes();
        self.values() + 2 * tokens * heads * self.scale_bytes()
    }

    pub(super) fn value_at(&self, part: usize, head: u32, token: u32, dim: u32) -> usize {
        let (tokens, heads, first, second) = self.sizes();
        let (h, t, d, unit) = (head as usize, token as usize, dim as usize, self.unit());
        let latents = matches!(self.content, Content::Latents { .. });
        match (self.arrangement, part) {
            (Arrangement::Cpu, 1) if latents => ((first + d) * tokens + t) * unit,
            (Arrangement::Cpu, 0) => ((h * first + d) * tokens + t) * unit,
            (Arrangement::Cpu, _) => {
                let column = (d / 16 * tokens + t) * 16 + d % 16;
                (heads * first * tokens + h * self.padded(second) * tokens + column) * unit
            }
            (Arrangement::TokenMajor, _) if latents => (t * (first + second) + part * first + d) * unit,
            (Arrangement::TokenMajor, _) => {
                (part * tokens * heads * first + (t * heads + h) * first + d) * unit
            }
            (Arrangement::Interleaved, _) => self.record(h, t, part) + d * unit,
        }
    }

    /// Where an interleaved vector begins.
    fn record(&self, head: usize, token: usize, part: usize) -> usize {
        let (_, heads, first, second) = self.sizes();
        let record = (first + second) * self.unit() + 2 * self.scale_bytes();
        (token * heads + head) * record + part * (first * self.unit() + self.scale_bytes())
    }

    pub(super) fn scale_at(&self, part: usize, head: u32, token: u32) -> usize {
        let (tokens, heads, first, second) = self.sizes();
        let (h, t) = (head as usize, token as usize);
        match self.arrangement {
            Arrangement::Cpu => self.values() + ((part * heads + h) * tokens + t) * 4,
            Arrangement::TokenMajor => self.values() + ((part * tokens + t) * heads + h) * 4,
            Arrangement::Interleaved => self.record(h, t, part) + [first, second][part] * self.unit(),
        }
    }

    /// Calls `with(layer, block, offset in the slice, byte)` for every byte that `rank` must hold, made from values that
    /// were stored as `before` first.
    pub(super) fn each_byte(
        &self,
        rank: u32,
        case: &Case,
        before: KvDtype,
        mut with: impl FnMut(u32, u32, usize, u8),
    ) {
        let (_, _, first, second) = self.sizes();
        let heads = self.heads_of(rank, case.kv_heads);
        for (layer, token) in (0..case.layers).flat_map(|l| (0..case.tokens).map(move |t| (l, t))) {
            let (block, slot) = (token / self.block_tokens, token % self.block_tokens);
            for (place, &head) in heads.iter().enumerate() {
                for (part, dims) in [first, second].into_iter().enumerate() {
                    let vector: Vec<f32> =
                        (0..dims).map(|dim| number(layer, token, part, head, dim as u32)).collect();
                    let (values, scale) = self.stored(&vector, before);
                    let mut put = |at: usize, bytes: &[u8]| {
                        bytes.iter().enumerate().for_each(|(i, &byte)| with(layer, block, at + i, byte));
                    };
                    for (dim, bytes) in values.iter().enumerate() {
                        put(self.value_at(part, place as u32, slot, dim as u32), bytes);
                    }
                    if let Some(scale) = scale {
                        put(self.scale_at(part, place as u32, slot), &scale.to_le_bytes());
                    }
                }
            }
        }
    }

    /// The bytes of each value and the scale, if there is one.
    fn stored(&self, vector: &[f32], before: KvDtype) -> (Vec<Vec<u8>>, Option<f32>) {
        let bf16s: Vec<f32> = vector.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        let bf16_bytes = |x: f32| bf16::from_f32(x).to_le_bytes().to_vec();
        match (before, self.dtype) {
            (_, KvDtype::F32) => (vector.iter().map(|x| x.to_le_bytes().to_vec()).collect(), None),
            (KvDtype::Int8, KvDtype::Bf16) => {
                let (scale, quants) = int8(vector);
                (quants.iter().map(|&q| bf16_bytes(f32::from(q) * scale)).collect(), None)
            }
            (_, KvDtype::Bf16) => (vector.iter().map(|&x| bf16_bytes(x)).collect(), None),
            (_, KvDtype::Int8) => {
                let (scale, quants) = int8(if before == KvDtype::Bf16 { &bf16s } else { vector });
                (quants.iter().map(|q| q.to_le_bytes().to_vec()).collect(), Some(scale))
            }
        }
    }
}
