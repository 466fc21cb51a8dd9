//! Types of tensor elements, their block layouts in bytes, and the plain reference that turns them into f32.
//!
//! Block layouts are ggml's; all numbers little-endian. The reference is for tests and for tensors too small to matter;
//! the runtime's kernels read the blocks themselves.

use half::{bf16, f16};

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    /// Sign, four bits of exponent (bias 7), three of mantissa; no infinities, NaN is all ones. Safetensors only, with
    /// scales beside it ([`crate::BlockScales`]).
    F8E4M3,
    /// 32 elements: scale f16, 32 x i8. `x = d q`.
    Q8_0,
    /// 32 elements: scale f16, 16 bytes; element `i` in the low half of byte `i`, `i + 16` in the high half.
    /// `x = d (q - 8)`.
    Q4_0,
    /// As Q4_0 with a minimum f16 after the scale. `x = d q + m`.
    Q4_1,
    /// 32 elements: scale f16, the fifth bits as u32, 16 bytes as in Q4_0. `x = d (q - 16)`.
    Q5_0,
    /// As Q5_0 with a minimum f16 after the scale. `x = d q + m`.
    Q5_1,
    /// 256 elements in 8 groups of 32: `d`, `dmin` f16, 12 bytes of 6-bit scales and minima, 128 bytes of halves.
    Q4K,
    /// As Q4K with 32 bytes of fifth bits before the halves.
    Q5K,
    /// 256 elements in 16 groups of 16: 128 bytes of low halves, 64 of upper two bits, 16 x i8 scales, `d` f16.
    Q6K,
}

impl Dtype {
    /// What is supported, for error messages.
    pub(crate) const SUPPORTED: &'static str =
        "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K";

    /// The name that ggml's tools use, or safetensors'.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements that share one block; 1 for the plain types.
    pub const fn block_elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 | Self::F8E4M3 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::F8E4M3 => 1,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of `elements` consecutive elements; `None` if they are not whole blocks or the count overflows.
    pub fn row_bytes(self, elements: usize) -> Option<usize> {
        let whole = elements.is_multiple_of(self.block_elements());
        whole.then(|| (elements / self.block_elements()).checked_mul(self.block_bytes())).flatten()
    }

    /// Turns whole blocks into f32, one value for each element.
    ///
    /// Panics if `bytes` is not exactly the blocks of `out.len()` elements.
    pub fn dequantize(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            self.row_bytes(out.len()),
            Some(bytes.len()),
            "bytes and elements of {} differ",
            self.name()
        );
        let blocks = bytes.chunks_exact(self.block_bytes()).zip(out.chunks_exact_mut(self.block_elements()));
        let block: fn(&[u8], &mut [f32]) = match self {
            Self::F32 => |b, x| x[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Self::F16 => |b, x| x[0] = half_at(b, 0),
            Self::Bf16 => |b, x| x[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Self::F8E4M3 => |b, x| x[0] = E4M3[usize::from(b[0])],
            Self::Q8_0 => q8_0,
            Self::Q4_0 => |b, x| halves(&b[2..], 0, x, |q| half_at(b, 0) * (q - 8.0)),
            Self::Q4_1 => |b, x| halves(&b[4..], 0, x, |q| half_at(b, 0) * q + half_at(b, 2)),
            Self::Q5_0 => |b, x| halves(&b[6..], fifth_bits(&b[2..]), x, |q| half_at(b, 0) * (q - 16.0)),
            Self::Q5_1 => {
                |b, x| halves(&b[8..], fifth_bits(&b[4..]), x, |q| half_at(b, 0) * q + half_at(b, 2))
            }
            Self::Q4K => |b, x| k45(b, &b[16..], None, x),
            Self::Q5K => |b, x| k45(b, &b[48..], Some(&b[16..48]), x),
            Self::Q6K => q6_k,
        };
        blocks.for_each(|(bytes, values)| block(bytes, values));
    }
}

/// The f16 at byte `at`.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The numbers that eight bits stand for in E4M3 as OCP defines it (FN: finite, and NaN).
static E4M3: [f32; 256] = {
    let mut numbers = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        let (exponent, mantissa) = (bits as u32 >> 3 & 15, bits as u32 & 7);
        let size = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa as f32 / 512.0,
            _ => f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20),
        };
        numbers[bits] = if bits < 128 { size } else { -size };
        bits += 1;
    }
    numbers
};

fn fifth_bits(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(x, &q)| *x = scale * f32::from(q as i8));
}

/// 32 elements of 4 bits in 16 bytes, with `fifth` giving bit 4 of each.
fn halves(quants: &[u8], fifth: u32, out: &mut [f32], value: impl Fn(f32) -> f32) {
    for (i, &byte) in quants[..16].iter().enumerate() {
        let bit = |element: usize| ((fifth >> element & 1) << 4) as u8;
        out[i] = value(f32::from(byte & 15 | bit(i)));
        out[i + 16] = value(f32::from(byte >> 4 | bit(i + 16)));
    }
}

/// Six-bit scale and minimum of group `group` (0 to 7) from the 12 packed bytes of Q4K and Q5K.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// Q4K, and Q5K where `fifth` has bit `group` of byte `i` as bit 4 of element `i` of the group.
fn k45(block: &[u8], quants: &[u8], fifth: Option<&[u8]>, out: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(&block[4..16], group);
        // Two groups share 32 bytes: the even one has the low halves.
        let bytes = &quants[group / 2 * 32..][..32];
        for (i, x) in out.iter_mut().enumerate() {
            let low = if group % 2 == 0 { bytes[i] & 15 } else { bytes[i] >> 4 };
            let high = fifth.map_or(0, |bits| (bits[i] >> group & 1) << 4);
            *x = d * scale * f32::from(low | high) - dmin * minimum;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, out) in out.chunks_exact_mut(128).enumerate() {
        let (low, high, scales) = (&block[half * 64..], &block[128 + half * 32..], &block[192 + half * 8..]);
        for (i, x) in out.iter_mut().enumerate() {
            // Quarter of 32 elements: 0 and 1 are low halves of bytes 0..32 and 32..64, 2 and 3 their high halves.
            let (quarter, j) = (i / 32, i % 32);
            let byte = low[quarter % 2 * 32 + j];
            let four = if quarter < 2 { byte & 15 } else { byte >> 4 };
            let two = high[j] >> (2 * quarter) & 3;
            let quant = (four | two << 4) as i8 - 32;
            *x = d * f32::from(scales[i / 16] as i8) * f32::from(quant);
        }
    }
}
