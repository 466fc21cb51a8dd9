//! Repacks a stored matrix, `[out, in]` row by row, into panels of sixteen outputs in one of the kernels' formats.
//!
//! Plain types and Q8_0, Q4_0, Q4_1 keep their size; the other types become the nearest wider format, so that every
//! weight keeps the value it had in the file (up to one rounding to f32). All threads pack, each its own panels.

use baton_checkpoint::{Dtype, TensorView};
use half::f16;

use super::{
    kernels::PanelFormat,
    lanes::LANES,
    memory::{AlignedBytes, Arena, Disjoint},
    threads::Pool,
};
use crate::{RuntimeError, device::LinearPart};

/// A matrix in panels.
pub(crate) struct Packed {
    pub(crate) format: PanelFormat,
    /// Outputs; the last panel may hold fewer than sixteen.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) k: usize,
    pub(crate) panel_bytes: usize,
    pub(crate) bytes: AlignedBytes,
    /// What the sums start from, the bias or zero, for all outputs of all panels.
    pub(crate) init: Vec<f32>,
}

impl Packed {
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}

/// The format a stored type is packed into.
pub(crate) fn format_of(dtype: Dtype) -> PanelFormat {
    match dtype {
        Dtype::F32 => PanelFormat::F32,
        Dtype::F16 => PanelFormat::F16,
        Dtype::Bf16 => PanelFormat::Bf16,
        Dtype::Q8_0 => PanelFormat::Q8,
        Dtype::Q4_0 | Dtype::Q4_1 => PanelFormat::Q4,
        Dtype::Q4K => PanelFormat::Q4Wide,
        Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Q5K | Dtype::Q6K => PanelFormat::Q8Wide,
    }
}

pub(crate) fn pack(
    part: &LinearPart<'_>,
    arena: &mut Arena,
    pool: &mut Pool,
) -> Result<Packed, RuntimeError> {
    let TensorView { dtype, .. } = part.weight;
    let (rows, k, format) = (part.weight.rows(), part.weight.columns(), format_of(dtype));
    if !k.is_multiple_of(format.group()) {
        let reason = format!("rows of {k} elements are not whole groups of {}", format.group());
        return Err(RuntimeError::Tensor { tensor: part.name.clone(), reason });
    }
    let panel_bytes = format.panel_bytes(k);
    let panels = rows.div_ceil(LANES);
    let mut bytes = arena.zeroed(panels * panel_bytes)?;
    let memory = Disjoint::new(bytes.as_mut_slice());
    pool.run(panels, &|_, panel| {
        // SAFETY: each task has a panel of its own, within the `panels * panel_bytes` allocated.
        let to = unsafe { memory.slice(panel * panel_bytes, panel_bytes) };
        for lane in 0..LANES.min(rows - panel * LANES) {
            let row = part.weight.row(part.rows.stored_row(panel * LANES + lane));
            pack_row(dtype, row, to, lane);
        }
    });
    let mut init = vec![0.0; panels * LANES];
    if let Some(bias) = &part.bias {
        let stored = bias.to_f32();
        for (output, value) in init.iter_mut().take(rows).enumerate() {
            *value = stored[part.rows.stored_row(output)];
        }
    }
    Ok(Packed { format, rows, k, panel_bytes, bytes, init })
}

/// Puts one stored row into its lane of a panel.
fn pack_row(dtype: Dtype, row: &[u8], panel: &mut [u8], lane: usize) {
    let blocks = row.chunks_exact(dtype.block_bytes());
    match dtype {
        Dtype::F32 => spread::<4>(row, panel, lane),
        Dtype::F16 | Dtype::Bf16 => spread::<2>(row, panel, lane),
        Dtype::Q8_0 => {
            for (from, to) in blocks.zip(panel.chunks_exact_mut(PanelFormat::Q8.block_bytes())) {
                let (scales, quants) = to.split_at_mut(2 * LANES);
                scales[2 * lane..][..2].copy_from_slice(&from[..2]);
                spread::<1>(&from[2..], quants, lane);
            }
        }
        Dtype::Q4_0 | Dtype::Q4_1 => {
            for (from, to) in blocks.zip(panel.chunks_exact_mut(PanelFormat::Q4.block_bytes())) {
                let (scales, rest) = to.split_at_mut(2 * LANES);
                let (minima, quants) = rest.split_at_mut(2 * LANES);
                let (header, halves) = from.split_at(from.len() - 16);
                scales[2 * lane..][..2].copy_from_slice(&header[..2]);
                // Q4_0's d (q - 8) is d q - 8 d; 8 d is exact, so that the rounding is the same.
                let minimum = if dtype == Dtype::Q4_1 { f16_at(header, 2) } else { -8.0 * f16_at(header, 0) };
                minima[2 * lane..][..2].copy_from_slice(&f16::from_f32(minimum).to_le_bytes());
                let quant = |i: usize| if i < 16 { halves[i] & 15 } else { halves[i - 16] >> 4 };
                pair_up(quant, quants, lane);
            }
        }
        Dtype::Q4K => {
            let groups = panel.chunks_exact_mut(PanelFormat::Q4Wide.block_bytes());
            let source = blocks.flat_map(|block| (0..8).map(move |group| (block, group)));
            for ((block, group), to) in source.zip(groups) {
                let (scale, minimum) = k_scales(block, group);
                let quants = write_scales(to, lane, scale, minimum);
                let halves = &block[16 + group / 2 * 32..][..32];
                pair_up(|i| if group % 2 == 0 { halves[i] & 15 } else { halves[i] >> 4 }, quants, lane);
            }
        }
        Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Q5K | Dtype::Q6K => {
            let groups = panel.chunks_exact_mut(PanelFormat::Q8Wide.block_bytes());
            let in_block = dtype.block_elements() / 16;
            let source = blocks.flat_map(|block| (0..in_block).map(move |group| (block, group)));
            for ((block, group), to) in source.zip(groups) {
                let (scale, minimum, values) = sixteen(dtype, block, group);
                let quants = write_scales(to, lane, scale, minimum);
                spread::<1>(&values.map(|q| q as u8), quants, lane);
            }
        }
    }
}

/// Copies consecutive values of `SIZE` bytes to one lane of consecutive k.
fn spread<const SIZE: usize>(values: &[u8], panel: &mut [u8], lane: usize) {
    for (value, to) in values.chunks_exact(SIZE).zip(panel.chunks_exact_mut(SIZE * LANES)) {
        to[SIZE * lane..][..SIZE].copy_from_slice(value);
    }
}

/// Writes 32 four-bit quants to a lane, two consecutive ones in a byte.
fn pair_up(quant: impl Fn(usize) -> u8, quants: &mut [u8], lane: usize) {
    for (pair, to) in quants.chunks_exact_mut(LANES).enumerate() {
        to[lane] = quant(2 * pair) | quant(2 * pair + 1) << 4;
    }
}

/// Writes a lane's scale and minimum of a wide format; gives the block's quants.
fn write_scales(block: &mut [u8], lane: usize, scale: f32, minimum: f32) -> &mut [u8] {
    let (scales, rest) = block.split_at_mut(4 * LANES);
    let (minima, quants) = rest.split_at_mut(4 * LANES);
    scales[4 * lane..][..4].copy_from_slice(&scale.to_le_bytes());
    minima[4 * lane..][..4].copy_from_slice(&minimum.to_le_bytes());
    quants
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Scale and minimum of a group of 32 in a block of Q4_K or Q5_K: six bits each, packed in twelve bytes.
fn k_scales(block: &[u8], group: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
    };
    (f16_at(block, 0) * f32::from(scale), -(f16_at(block, 2) * f32::from(minimum)))
}

/// Scale, minimum and quants of the `group`th sixteen elements of a block.
fn sixteen(dtype: Dtype, block: &[u8], group: usize) -> (f32, f32, [i8; 16]) {
    let mut quants = [0; 16];
    let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 };
    let (scale, minimum) = match dtype {
        Dtype::Q5_0 | Dtype::Q5_1 => {
            let (header, rest) = block.split_at(block.len() - 20);
            for (i, quant) in quants.iter_mut().enumerate() {
                let element = 16 * group + i;
                let fifth = rest[element / 8] >> (element % 8) & 1;
                *quant = (nibble(rest[4 + i], group == 1) | fifth << 4) as i8;
            }
            let scale = f16_at(header, 0);
            (scale, if dtype == Dtype::Q5_1 { f16_at(header, 2) } else { -16.0 * scale })
        }
        Dtype::Q5K => {
            let pair = group / 2;
            for (i, quant) in quants.iter_mut().enumerate() {
                let at = group % 2 * 16 + i;
                let fifth = block[16 + at] >> pair & 1;
                *quant = (nibble(block[48 + pair / 2 * 32 + at], pair % 2 == 1) | fifth << 4) as i8;
            }
            k_scales(block, pair)
        }
        _ => {
            for (i, quant) in quants.iter_mut().enumerate() {
                // Within each half of 128: quarters of 32 share bytes; see the checkpoint's description of Q6_K.
                let (half, quarter, at) = (group / 8, group % 8 / 2, group % 2 * 16 + i);
                let low = nibble(block[half * 64 + quarter % 2 * 32 + at], quarter >= 2);
                let high = block[128 + half * 32 + at] >> (2 * quarter) & 3;
                *quant = (low | high << 4) as i8 - 32;
            }
            (f16_at(block, 208) * f32::from(block[192 + group] as i8), 0.0)
        }
    };
    (scale, minimum, quants)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::RowOrder, devices::cpu::kernels};

    /// All types, rows that do not fill the last panel, arbitrary bits with sane scales.
    #[test]
    fn packed_weights_are_the_stored_ones() {
        let types = [
            Dtype::F32,
            Dtype::F16,
            Dtype::Bf16,
            Dtype::Q8_0,
            Dtype::Q4_0,
            Dtype::Q4_1,
            Dtype::Q5_0,
            Dtype::Q5_1,
            Dtype::Q4K,
            Dtype::Q5K,
            Dtype::Q6K,
        ];
        let mut pool = Pool::start(2).unwrap();
        for dtype in types {
            let (rows, k) = (24, 512);
            let stored = stored(dtype, rows, k);
            let shape = [rows, k];
            let weight = TensorView { dtype, shape: &shape, bytes: &stored };
            let order = RowOrder::Rotary { head_dim: 8, stored: baton_checkpoint::RopeOrder::Interleaved };
            let part = LinearPart { name: "w".into(), weight, bias: None, rows: order };
            let packed = pack(&part, &mut Arena::default(), &mut pool).unwrap();
            for panel in 0..packed.panels() {
                let mut lanes = vec![0.0; k * LANES];
                let bytes = &packed.bytes.as_slice()[panel * packed.panel_bytes..][..packed.panel_bytes];
                // SAFETY: a whole panel of `k` columns, and room for sixteen of each.
                unsafe {
                    kernels::best().expand[packed.format as usize](bytes.as_ptr(), k, lanes.as_mut_ptr())
                };
                for lane in 0..LANES.min(rows - panel * LANES) {
                    let mut row = vec![0.0; k];
                    weight.dequantize_row(order.stored_row(panel * LANES + lane), &mut row);
                    for (i, &want) in row.iter().enumerate() {
                        let got = lanes[i * LANES + lane];
                        assert!(
                            (got - want).abs() <= 1e-6 * (1.0 + want.abs()),
                            "{dtype:?} {i}: {got}, not {want}"
                        );
                    }
                }
            }
        }
    }

    fn stored(dtype: Dtype, rows: usize, k: usize) -> Vec<u8> {
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let mut bytes: Vec<u8> = (0..dtype.row_bytes(k).unwrap() * rows).map(|_| next()).collect();
        // Where f16 or f32 numbers stand, small ones.
        let small = f16::from_f32(0.01).to_le_bytes();
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            let halves: &[usize] = match dtype {
                Dtype::F32 => {
                    block.copy_from_slice(&(f32::from(block[0]) - 128.0).to_le_bytes());
                    &[]
                }
                Dtype::F16 | Dtype::Bf16 => {
                    block[1] = block[1] & 0x80 | 0x3c;
                    &[]
                }
                Dtype::Q8_0 | Dtype::Q4_0 | Dtype::Q5_0 => &[0],
                Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K => &[0, 2],
                Dtype::Q6K => &[208],
            };
            for &at in halves {
                block[at..at + 2].copy_from_slice(&small);
            }
        }
        bytes
    }
}
