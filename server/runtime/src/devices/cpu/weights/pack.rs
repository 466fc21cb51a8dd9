//! Repacks a stored matrix, `[out, in]` row by row, into panels of sixteen outputs in one of the kernels' formats.
//!
//! Quantised weights keep the values they had in the file; types of five and six bits are packed as bytes, the others at
//! their size. Those in bf16 become multiples of a scale for every 32 of them, [`B12`], unless they are to be exact; those
//! of eight bits with scales in blocks do, too. All threads pack, each its own panels.

use super::Store;
use crate::{
    RuntimeError,
    device::LinearPart,
    devices::cpu::{
        kernels::{B12, DenseFormat, PanelFormat, QuantisedFormat},
        lanes::{LANES, nearest},
        memory::{Bytes, Disjoint},
        threads::Pool,
    },
};
use baton_checkpoint::{Dtype, TensorView};
use half::bf16;

/// A matrix in panels.
pub(crate) struct Packed {
    pub(crate) format: PanelFormat,
    /// Outputs; the last panel may hold fewer than sixteen.
    pub(crate) rows: usize,
    /// Inputs.
    pub(crate) k: usize,
    pub(crate) panel_bytes: usize,
    pub(crate) bytes: Bytes,
    /// What the sums start from, the bias or zero, for all outputs of all panels.
    pub(crate) init: Vec<f32>,
}

impl Packed {
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}

/// The format that rows of `k` weights of a stored type are packed into.
pub(crate) fn format_of(dtype: Dtype, k: usize, exact_bf16: bool) -> PanelFormat {
    const B12: PanelFormat = PanelFormat::Quantised(QuantisedFormat::B12);
    let whole = k.is_multiple_of(B12.block());
    match dtype {
        Dtype::Bf16 if !exact_bf16 && whole => B12,
        Dtype::F8E4M3 if whole => B12,
        Dtype::F32 | Dtype::F8E4M3 => PanelFormat::Dense(DenseFormat::F32),
        Dtype::F16 => PanelFormat::Dense(DenseFormat::F16),
        Dtype::Bf16 => PanelFormat::Dense(DenseFormat::Bf16),
        Dtype::Q8_0 | Dtype::Q5_0 => PanelFormat::Quantised(QuantisedFormat::Q8),
        Dtype::Q4_0 => PanelFormat::Quantised(QuantisedFormat::Q4),
        Dtype::Q4_1 => PanelFormat::Quantised(QuantisedFormat::Q4Minimum),
        Dtype::Q5_1 => PanelFormat::Quantised(QuantisedFormat::Q5Minimum),
        Dtype::Q4K => PanelFormat::Quantised(QuantisedFormat::K4),
        Dtype::Q5K => PanelFormat::Quantised(QuantisedFormat::K5),
        Dtype::Q6K => PanelFormat::Quantised(QuantisedFormat::K6),
    }
}

pub(crate) fn pack(
    part: &LinearPart<'_>,
    exact_bf16: bool,
    store: &mut Store,
    pool: &mut Pool,
) -> Result<Packed, RuntimeError> {
    let TensorView { dtype, .. } = part.weight;
    let (rows, k) = (part.weight.rows(), part.weight.columns());
    let format = format_of(dtype, k, exact_bf16);
    if !k.is_multiple_of(format.block()) {
        let reason = format!("rows of {k} elements are not whole blocks of {}", format.block());
        return Err(RuntimeError::Tensor { tensor: part.name.clone(), reason });
    }
    let panel_bytes = format.panel_bytes(k);
    let panels = rows.div_ceil(LANES);
    let what = format!("{}: {format:?} {rows} x {k}", part.name);
    let bytes = store.put(&what, panels * panel_bytes, pool, &mut |bytes, pool| {
        let memory = Disjoint::new(bytes);
        pool.run(panels, &|_, panel| {
            // SAFETY: each task has a panel of its own, within the `panels * panel_bytes` there are.
            let to = unsafe { memory.slice(panel * panel_bytes, panel_bytes) };
            let mut values = vec![0.0; if dtype == Dtype::F8E4M3 { k } else { 0 }];
            for lane in 0..LANES.min(rows - panel * LANES) {
                let row = part.rows.stored_row(panel * LANES + lane);
                if dtype == Dtype::F8E4M3 {
                    part.weight.dequantize_row(row, &mut values);
                    pack_values(&values, format, to, lane);
                } else {
                    pack_row(dtype, format, part.weight.row(row), to, lane);
                }
            }
        });
    })?;
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
fn pack_row(dtype: Dtype, format: PanelFormat, row: &[u8], panel: &mut [u8], lane: usize) {
    let block: fn(Dtype, &[u8], &mut [u8], usize) = match dtype {
        Dtype::Bf16 if matches!(format, PanelFormat::Quantised(_)) => |dtype, from, to, lane| {
            let mut weights = [0.0; 32];
            dtype.dequantize(from, &mut weights);
            pack_b12(&weights, to, lane);
        },
        Dtype::F32 => |_, from, to, lane| spread::<4>(from, to, lane),
        Dtype::F16 | Dtype::Bf16 => |_, from, to, lane| spread::<2>(from, to, lane),
        Dtype::Q8_0 => |_, from, to, lane| {
            let (scales, quants) = to.split_at_mut(2 * LANES);
            spread::<2>(&from[..2], scales, lane);
            put_bytes(|i| from[2 + i], quants, lane);
        },
        Dtype::Q4_0 | Dtype::Q4_1 => pack_4,
        Dtype::Q5_0 | Dtype::Q5_1 => pack_5,
        Dtype::Q4K | Dtype::Q5K => pack_k45,
        Dtype::Q6K => pack_k6,
        Dtype::F8E4M3 => unreachable!("its values are packed, with their scales"),
    };
    let stored = format.block() / dtype.block_elements() * dtype.block_bytes();
    for (from, to) in row.chunks_exact(stored).zip(panel.chunks_exact_mut(format.block_bytes())) {
        block(dtype, from, to, lane);
    }
}

/// Puts a row's values into its lane of a panel.
fn pack_values(values: &[f32], format: PanelFormat, panel: &mut [u8], lane: usize) {
    match format {
        PanelFormat::Quantised(_) => {
            let (blocks, _) = values.as_chunks::<32>();
            let panel = panel.chunks_exact_mut(format.block_bytes());
            blocks.iter().zip(panel).for_each(|(weights, to)| pack_b12(weights, to, lane));
        }
        PanelFormat::Dense(_) => {
            for (value, to) in values.iter().zip(panel.chunks_exact_mut(4 * LANES)) {
                to[4 * lane..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// 32 weights as multiples of one scale: that of the largest, rounded up to bf16.
fn pack_b12(weights: &[f32; 32], to: &mut [u8], lane: usize) {
    let most = weights.iter().fold(0.0_f32, |most, weight| most.max(weight.abs()));
    let exact = most / f32::from(B12::LARGEST);
    // One that is no finite number makes all products with the block none.
    let scale = if weights.iter().all(|weight| weight.is_finite()) {
        bf16::from_bits((exact.to_bits().saturating_add(0xffff) >> 16) as u16)
    } else {
        bf16::NAN
    };
    let value = scale.to_f32();
    // Of zeros only, 0 / 0; casting makes that 0.
    let quants = weights.map(|weight| (nearest(weight / value) as i16).clamp(-B12::LARGEST, B12::LARGEST));
    let rest = spread_numbers(&scale.to_le_bytes(), to, lane);
    let (low, high) = rest.split_at_mut(32 * LANES);
    put_bytes(|i| quants[i] as u8, low, lane);
    put_nibbles(|i| (quants[i] >> 8) as u8 & 15, high, lane);
}

/// Q4_0 and Q4_1: a scale, a minimum where the type has one, and 32 times four bits.
fn pack_4(_: Dtype, from: &[u8], to: &mut [u8], lane: usize) {
    let (numbers, halves) = from.split_at(from.len() - 16);
    let nibbles = spread_numbers(numbers, to, lane);
    put_nibbles(|i| if i < 16 { halves[i] & 15 } else { halves[i - 16] >> 4 }, nibbles, lane);
}

/// Q5_0 and Q5_1: a scale, a minimum where the type has one, 32 fifth bits and 32 times four bits. Without a minimum
/// the quants are those less 16.
fn pack_5(dtype: Dtype, from: &[u8], to: &mut [u8], lane: usize) {
    let (header, halves) = from.split_at(from.len() - 16);
    let (numbers, fifth) = header.split_at(header.len() - 4);
    let less = if dtype == Dtype::Q5_0 { 16 } else { 0 };
    let quants: [u8; 32] = std::array::from_fn(|i| {
        let four = if i < 16 { halves[i] & 15 } else { halves[i - 16] >> 4 };
        (four | (fifth[i / 8] >> (i % 8) & 1) << 4).wrapping_sub(less)
    });
    let to = spread_numbers(numbers, to, lane);
    put_bytes(|i| quants[i], to, lane);
}

/// Copies f16 numbers to one lane of rows of sixteen; gives what follows them.
fn spread_numbers<'a>(numbers: &[u8], to: &'a mut [u8], lane: usize) -> &'a mut [u8] {
    let (lanes, rest) = to.split_at_mut(numbers.len() * LANES);
    spread::<2>(numbers, lanes, lane);
    rest
}

/// Q4_K and Q5_K: factors of scales and minima, six bits of each for every group, fifth bits, four bits.
fn pack_k45(dtype: Dtype, from: &[u8], to: &mut [u8], lane: usize) {
    let (factors, groups) = to.split_at_mut(4 * LANES);
    let (scales, minima) = factors.split_at_mut(2 * LANES);
    spread::<2>(&from[..2], scales, lane);
    // The minimum is taken off: its sign goes into the factor.
    spread::<2>(&[from[2], from[3] ^ 0x80], minima, lane);
    let (fifth, fours) = from[16..].split_at(from.len() - 16 - 128);
    let group_bytes = groups.len() / 8;
    for (group, to) in groups.chunks_exact_mut(group_bytes).enumerate() {
        (to[lane], to[LANES + lane]) = k_scales(&from[4..16], group);
        let halves = &fours[group / 2 * 32..][..32];
        let four = |i: usize| if group % 2 == 0 { halves[i] & 15 } else { halves[i] >> 4 };
        if dtype == Dtype::Q4K {
            put_nibbles(four, &mut to[2 * LANES..], lane);
        } else {
            let quants: [u8; 32] = std::array::from_fn(|i| four(i) | (fifth[i] >> group & 1) << 4);
            put_bytes(|i| quants[i], &mut to[2 * LANES..], lane);
        }
    }
}

/// Q6_K: four bits, two bits, a scale for every sixteen, their factor. Quants are stored 32 too large.
fn pack_k6(_: Dtype, from: &[u8], to: &mut [u8], lane: usize) {
    let (factors, groups) = to.split_at_mut(2 * LANES);
    spread::<2>(&from[208..], factors, lane);
    let group_bytes = groups.len() / 16;
    for (group, to) in groups.chunks_exact_mut(group_bytes).enumerate() {
        to[lane] = from[192 + group];
        // Within each half of 128: quarters of 32 share bytes; see the checkpoint's description of Q6_K.
        let (half, quarter, at) = (group / 8, group % 8 / 2, group % 2 * 16);
        let (low, high) = (&from[half * 64 + quarter % 2 * 32 + at..], &from[128 + half * 32 + at..]);
        let quants: [u8; 16] = std::array::from_fn(|i| {
            let four = if quarter < 2 { low[i] & 15 } else { low[i] >> 4 };
            (four | (high[i] >> (2 * quarter) & 3) << 4).wrapping_sub(32)
        });
        put_bytes(|i| quants[i], &mut to[LANES..], lane);
    }
}

/// Copies consecutive values of `SIZE` bytes to one lane of consecutive k.
fn spread<const SIZE: usize>(values: &[u8], panel: &mut [u8], lane: usize) {
    for (value, to) in values.chunks_exact(SIZE).zip(panel.chunks_exact_mut(SIZE * LANES)) {
        to[SIZE * lane..][..SIZE].copy_from_slice(value);
    }
}

/// Writes quants to a lane, two of consecutive k side by side.
fn put_bytes(quant: impl Fn(usize) -> u8, bytes: &mut [u8], lane: usize) {
    for (pair, to) in bytes.chunks_exact_mut(2 * LANES).enumerate() {
        (to[2 * lane], to[2 * lane + 1]) = (quant(2 * pair), quant(2 * pair + 1));
    }
}

/// Writes four-bit quants to a lane: of every eight, those of even k in one word of 16 bits, those of odd k in the next.
fn put_nibbles(quant: impl Fn(usize) -> u8, words: &mut [u8], lane: usize) {
    for (eight, to) in words.chunks_exact_mut(4 * LANES).enumerate() {
        for odd in 0..2 {
            let four = |i: usize| u16::from(quant(8 * eight + 2 * i + odd)) << (4 * i);
            let word = four(0) | four(1) | four(2) | four(3);
            to[4 * lane + 2 * odd..][..2].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Scale and minimum of a group of 32 in a block of Q4_K or Q5_K: six bits each, packed in twelve bytes.
fn k_scales(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (packed[group] & 63, packed[group + 4] & 63);
    }
    let low = packed[group + 4];
    (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
}

#[cfg(test)]
mod tests {
    use half::f16;

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
            Dtype::F8E4M3,
        ];
        let mut pool = Pool::start(2).unwrap();
        for (dtype, exact_bf16) in types.map(|dtype| (dtype, true)).into_iter().chain([(Dtype::Bf16, false)])
        {
            let (rows, k) = (24, 512);
            let stored = stored(dtype, rows, k);
            let shape = [rows, k];
            let weight = TensorView::new(dtype, &shape, &stored);
            let order = RowOrder::Rotary { head_dim: 8, stored: baton_checkpoint::RopeOrder::Interleaved };
            let part = LinearPart { name: "w".into(), weight, bias: None, rows: order };
            let packed = pack(&part, exact_bf16, &mut Store::default(), &mut pool).unwrap();
            for panel in 0..packed.panels() {
                let mut lanes = vec![0.0; k * LANES];
                let bytes = &packed.bytes.as_slice()[panel * packed.panel_bytes..][..packed.panel_bytes];
                // SAFETY: a whole panel of `k` columns, and room for sixteen of each.
                unsafe { kernels::best().expand(packed.format)(bytes.as_ptr(), k, lanes.as_mut_ptr()) };
                for lane in 0..LANES.min(rows - panel * LANES) {
                    let mut row = vec![0.0; k];
                    weight.dequantize_row(order.stored_row(panel * LANES + lane), &mut row);
                    for (i, &want) in row.iter().enumerate() {
                        let got = lanes[i * LANES + lane];
                        let most = row[i / 32 * 32..][..32].iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                        // Half a step of a scale that was rounded up by at most a 128th; else rounding to f32.
                        let exact = exact_bf16 && dtype != Dtype::F8E4M3;
                        let bound =
                            if exact { 1e-6 * (1.0 + want.abs()) } else { most * 0.5 / 2047.0 * 1.01 };
                        assert!((got - want).abs() <= bound, "{dtype:?} {i}: {got}, not {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_of_12_bits_keep_zeros_and_what_is_no_number() {
        let mut pool = Pool::start(1).unwrap();
        let (tiny, largest) = (f32::from_bits(1 << 16), 3.3895314e38);
        let block = |values: [f32; 4]| [values, [0.0; 4]].concat().repeat(4);
        let cases = [
            block([0.0, -0.0, 0.0, 0.0]),
            block([tiny, -tiny, 3.0 * tiny, 0.0]),
            block([largest, -largest, 1.0, 0.0]),
            block([1.0, f32::NAN, 0.0, 0.0]),
            block([1.0, f32::INFINITY, 0.0, 0.0]),
            block([f32::NEG_INFINITY, f32::INFINITY, 0.0, 0.0]),
        ];
        for values in cases {
            let bytes: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            let shape = [1, 32];
            let weight = TensorView::new(Dtype::Bf16, &shape, &bytes);
            let part = LinearPart { name: "w".into(), weight, bias: None, rows: RowOrder::AsStored };
            let packed = pack(&part, false, &mut Store::default(), &mut pool).unwrap();
            let mut lanes = vec![0.0; 32 * LANES];
            let panel = packed.bytes.as_slice().as_ptr();
            // SAFETY: a whole panel of 32 columns, and room for sixteen of each.
            unsafe { kernels::best().expand(packed.format)(panel, 32, lanes.as_mut_ptr()) };
            let most = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let bound = (most / 2047.0 * 0.51).max(tiny);
            for (got, want) in lanes.iter().step_by(LANES).zip(&values) {
                if values.iter().all(|value| value.is_finite()) {
                    assert!((got - want).abs() <= bound, "{got}, not {want}");
                } else {
                    assert!(got.is_nan(), "{got} beside {most}");
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
                // Not the one that is no number.
                Dtype::F8E4M3 => {
                    block[0] &= 0xfe;
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
