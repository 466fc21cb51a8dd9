//! A product of many rows is the one of the same rows in small pieces, bit for bit, whatever is cut how.

use baton_checkpoint::{Dtype, TensorView};

use super::{Linear, Workspace};
use crate::{
    device::{LinearPart, RowOrder},
    devices::cpu::{
        kernels,
        threads::Pool,
        weights::{self, Store},
    },
};

/// Columns that are no multiple of the blocks in which activations are quantised or panels expanded.
const K: usize = 352;

/// A stack of parts of these types and numbers of outputs.
fn linear(parts: &[(Dtype, usize)], pool: &mut Pool) -> Linear {
    let mut linear = Linear { parts: Vec::new(), outputs: 0, inputs: K };
    let mut state = 3_u32;
    for &(dtype, outputs) in parts {
        let mut bytes = vec![0; dtype.row_bytes(K).unwrap() * outputs];
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for byte in block.iter_mut() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (state >> 24) as u8;
            }
            // The upper byte of a bf16 or f16, which may be a scale: numbers of moderate size.
            block[1] = block[1] & 0x80 | 0x3c;
        }
        let shape = [outputs, K];
        let weight = TensorView::new(dtype, &shape, &bytes);
        let part = LinearPart { name: "w".into(), weight, bias: None, rows: RowOrder::AsStored };
        linear.parts.push(weights::pack(&part, false, &mut Store::default(), pool).unwrap());
        linear.outputs += outputs;
    }
    linear
}

#[test]
fn many_rows_are_the_same_as_few_at_a_time() {
    let mut pool = Pool::start(2).unwrap();
    let mut workspace = Workspace::new(2);
    // Last panels that are not full, and parts of unlike kinds in one matrix.
    let stacks: [&[(Dtype, usize)]; 3] = [
        &[(Dtype::Bf16, 40)],
        &[(Dtype::F16, 24), (Dtype::Q8_0, 40), (Dtype::Q4_0, 16)],
        &[(Dtype::Q8_0, 1), (Dtype::Bf16, 33)],
    ];
    for parts in stacks {
        let linear = linear(parts, &mut pool);
        for rows in [9, 11, 13, 193, 289, 571, 576, 600] {
            let x: Vec<f32> = (0..rows * K).map(|i| ((i * 37 % 1013) as f32 - 506.0) / 300.0).collect();
            let mut product = |x: &[f32]| {
                let mut out = vec![f32::NAN; x.len() / K * linear.outputs];
                linear.apply(kernels::best(), &mut pool, &mut workspace, x, &mut out);
                out
            };
            let together = product(&x);
            let apart: Vec<f32> = x.chunks(7 * K).flat_map(&mut product).collect();
            assert!(together.iter().all(|value| value.is_finite()), "{parts:?}, {rows} rows");
            assert!(together == apart, "{parts:?}, {rows} rows");
        }
    }
}
