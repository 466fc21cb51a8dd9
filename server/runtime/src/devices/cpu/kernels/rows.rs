//! Operations on one row of activations or scores: norms, gated SiLU, softmax.
//!
//! Sums over a row run in sixteen lanes that are added up in lane order at the end, the same for every row.
#![allow(
    unsafe_op_in_unsafe_fn,
    reason = "the contract of every function is that of the kernel table's field"
)]

use super::super::lanes::{LANES, Lanes};

/// Calls `full` with each offset of sixteen whole values and `part` once with what is left over, if anything is.
#[inline(always)]
fn sixteens(length: usize, mut full: impl FnMut(usize), part: impl FnOnce(usize, usize)) {
    let whole = length / LANES * LANES;
    let mut at = 0;
    while at < whole {
        full(at);
        at += LANES;
    }
    if whole < length {
        part(whole, length - whole);
    }
}

/// The first `count` lanes from memory, the rest `fill`.
#[inline(always)]
unsafe fn load_part<V: Lanes>(from: *const f32, count: usize, fill: f32) -> V {
    let mut lanes = [fill; LANES];
    std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count);
    V::load(lanes.as_ptr())
}

#[inline(always)]
unsafe fn store_part<V: Lanes>(values: V, to: *mut f32, count: usize) {
    let mut lanes = [0.0; LANES];
    values.store(lanes.as_mut_ptr());
    std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count);
}

/// The lanes added up, lane 0 first.
#[inline(always)]
unsafe fn sum<V: Lanes>(values: V) -> f32 {
    let mut lanes = [0.0; LANES];
    values.store(lanes.as_mut_ptr());
    lanes.iter().sum()
}

/// e to the power of each lane, within 2 units in the last place; NaN stays NaN. Arguments are held within -87 to 88,
/// so that results are normal and finite.
#[inline(always)]
pub(super) unsafe fn exp<V: Lanes>(x: V) -> V {
    /// 1.5 * 2^23: adding it rounds to an integer and leaves that in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts; products of the first with small integers are exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = V::splat(-87.0).max(V::splat(88.0).min(x));
    let biased = x.fma(V::splat(std::f32::consts::LOG2_E), V::splat(ROUND));
    let n = biased.sub(V::splat(ROUND));
    let r = n.fma(V::splat(-LN_2_LOW), n.fma(V::splat(-LN_2_HIGH), x));
    // Taylor to r^7: |r| <= ln 2 / 2, so that what is cut off is below 6e-9.
    let mut p = V::splat(1.0 / 5040.0);
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.fma(r, V::splat(coefficient));
    }
    p.scale_by_exponent(biased)
}

#[inline(always)]
pub(super) unsafe fn rms_norm<V: Lanes>(
    x: *const f32,
    weight: *const f32,
    epsilon: f32,
    out: *mut f32,
    length: usize,
) {
    let mut squares = V::splat(0.0);
    let total = &mut squares;
    let mut at = 0;
    while at + LANES <= length {
        let v = V::load(x.add(at));
        *total = v.fma(v, *total);
        at += LANES;
    }
    if at < length {
        let v = load_part::<V>(x.add(at), length - at, 0.0);
        *total = v.fma(v, *total);
    }
    let inverse = V::splat(1.0 / (sum(squares) / length as f32 + epsilon).sqrt());
    sixteens(
        length,
        |at| V::load(x.add(at)).mul(inverse).mul(V::load(weight.add(at))).store(out.add(at)),
        |at, n| {
            let (v, w) = (load_part::<V>(x.add(at), n, 0.0), load_part::<V>(weight.add(at), n, 0.0));
            store_part(v.mul(inverse).mul(w), out.add(at), n);
        },
    );
}

#[inline(always)]
pub(super) unsafe fn add<V: Lanes>(x: *mut f32, delta: *const f32, length: usize) {
    sixteens(
        length,
        |at| V::load(x.add(at)).add(V::load(delta.add(at))).store(x.add(at)),
        |at, n| {
            let sum = load_part::<V>(x.add(at), n, 0.0).add(load_part::<V>(delta.add(at), n, 0.0));
            store_part(sum, x.add(at), n);
        },
    );
}

#[inline(always)]
unsafe fn gated<V: Lanes>(gate: V, up: V) -> V {
    let negative = V::splat(0.0).sub(gate);
    gate.div(V::splat(1.0).add(exp(negative))).mul(up)
}

#[inline(always)]
pub(super) unsafe fn silu_mul<V: Lanes>(gate: *const f32, up: *const f32, out: *mut f32, length: usize) {
    sixteens(
        length,
        |at| gated(V::load(gate.add(at)), V::load(up.add(at))).store(out.add(at)),
        |at, n| {
            let (g, u) = (load_part::<V>(gate.add(at), n, 0.0), load_part::<V>(up.add(at), n, 0.0));
            store_part(gated(g, u), out.add(at), n);
        },
    );
}

#[inline(always)]
pub(super) unsafe fn softmax<V: Lanes>(scores: *mut f32, visible: usize) -> f32 {
    let padded = visible.next_multiple_of(LANES);
    for hidden in visible..padded {
        *scores.add(hidden) = f32::NEG_INFINITY;
    }
    let mut largest = V::splat(f32::NEG_INFINITY);
    for at in (0..padded).step_by(LANES) {
        largest = largest.max(V::load(scores.add(at)));
    }
    let mut lanes = [0.0; LANES];
    largest.store(lanes.as_mut_ptr());
    let largest = V::splat(lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let mut total = V::splat(0.0);
    let mut at = 0;
    while at < padded {
        let mut powers = exp(V::load(scores.add(at)).sub(largest));
        if visible - at < LANES {
            powers.store(scores.add(at));
            powers = load_part(scores.add(at), visible - at, 0.0);
        }
        powers.store(scores.add(at));
        total = total.add(powers);
        at += LANES;
    }
    sum(total)
}

#[inline(always)]
pub(super) unsafe fn scale<V: Lanes>(x: *mut f32, factors: *const f32) {
    V::load(x).mul(V::load(factors)).store(x);
}
