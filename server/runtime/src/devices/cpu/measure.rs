//! How fast this CPU multiplies matrices with nothing else around it: what a measurement of prefill is put beside.

use std::time::Instant;

use baton_checkpoint::{Dtype, TensorView};
use half::bf16;

use super::{
    kernels,
    linear::{Linear, Workspace},
    threads::Pool,
    weights::{self, Store},
};
use crate::{
    LoadOptions, RuntimeError,
    device::{LinearPart, RowOrder},
};

/// Rows of activations, as in the prefill of a chunk.
const ROWS: usize = 512;
/// Inputs and outputs of the matrix: 4 million weights, more than the caches of a core hold.
const WIDTH: usize = 2048;
/// Products that are timed. The one in the middle counts: what the machine gives just then, which is what an engine
/// measured beside it gets.
const TIMES: usize = 15;

/// Operations a second, a multiplication and an addition for each weight and row, of products of 512 rows with a matrix
/// of 2,048 by 2,048 weights in bf16.
pub fn product_rate(options: &LoadOptions) -> Result<f64, RuntimeError> {
    let mut pool = Pool::start(super::threads_of(options)?).map_err(RuntimeError::Threads)?;
    let weight = |i: usize| bf16::from_f32((i * 7919 % 1009) as f32 / 1009.0 - 0.5);
    let bytes: Vec<u8> = (0..WIDTH * WIDTH).flat_map(|i| weight(i).to_le_bytes()).collect();
    let shape = [WIDTH, WIDTH];
    let weight = TensorView::new(Dtype::Bf16, &shape, &bytes);
    let part = LinearPart { name: "weights".into(), weight, bias: None, rows: RowOrder::AsStored };
    let packed = weights::pack(&part, options.exact_bf16, &mut Store::default(), &mut pool)?;
    let linear = Linear { parts: vec![packed], outputs: WIDTH, inputs: WIDTH };
    let mut workspace = Workspace::new(pool.threads());
    let x: Vec<f32> = (0..ROWS * WIDTH).map(|i| (i * 31 % 257) as f32 / 257.0 - 0.5).collect();
    let mut out = vec![0.0; ROWS * WIDTH];
    let mut seconds = || {
        let begin = Instant::now();
        linear.apply(kernels::best(), &mut pool, &mut workspace, &x, &mut out);
        begin.elapsed().as_secs_f64()
    };
    seconds();
    let mut times: Vec<f64> = (0..TIMES).map(|_| seconds()).collect();
    times.sort_by(f64::total_cmp);
    Ok((2 * ROWS * WIDTH * WIDTH) as f64 / times[TIMES / 2])
}
