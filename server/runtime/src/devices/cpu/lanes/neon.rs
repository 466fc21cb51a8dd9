//! Lanes as four 128-bit registers: NEON, which every aarch64 has.
//!
//! [`Lanes::Pairs`] are taken apart when they are loaded: the first of each pair in two registers, the second in two
//! more. One multiply-add then adds the products of four lanes to their sums, so that sixteen sums take four registers
//! as sixteen f32 do, and a tile of six rows fits. Taking apart is part of the load (`ld2`) and done once for all rows.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use std::arch::{aarch64::*, asm};

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Neon(float32x4_t, float32x4_t, float32x4_t, float32x4_t);

/// The same function of each register, or of two that stand at the same place.
macro_rules! each {
    ($function:ident, $a:expr) => {
        Neon($function($a.0), $function($a.1), $function($a.2), $function($a.3))
    };
    ($function:ident, $a:expr, $b:expr) => {
        Neon($function($a.0, $b.0), $function($a.1, $b.1), $function($a.2, $b.2), $function($a.3, $b.3))
    };
}

/// `a` where it is larger, else `b`. The instruction for it gives NaN where either is.
#[inline(always)]
unsafe fn larger(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcgtq_f32(a, b), a, b)
}

/// `a` where it is smaller, else `b`.
#[inline(always)]
unsafe fn smaller(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    vbslq_f32(vcltq_f32(a, b), a, b)
}

/// `value * 2^n`, n standing in the low bits of the other.
#[inline(always)]
unsafe fn add_exponent(value: float32x4_t, n: float32x4_t) -> float32x4_t {
    let shifted = vshlq_n_s32::<23>(vreinterpretq_s32_f32(n));
    vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(value), shifted))
}

/// Four f16 as f32. An instruction because the type of the function for it is not stable yet.
#[inline(always)]
unsafe fn widen_f16(from: *const u16) -> float32x4_t {
    let halves: uint16x4_t = vld1_u16(from);
    let wide: float32x4_t;
    // SAFETY: one instruction of every aarch64 on registers.
    unsafe {
        asm!(
            "fcvtl {wide:v}.4s, {halves:v}.4h",
            wide = out(vreg) wide,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

/// Four bf16 as f32.
#[inline(always)]
unsafe fn widen_bf16(from: *const u16) -> float32x4_t {
    vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from))))
}

/// Sixteen i16 in two registers as f32.
#[inline(always)]
unsafe fn widen_i16(low: int16x8_t, high: int16x8_t) -> Neon {
    Neon(
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    )
}

/// Sixteen u8 as i16.
#[inline(always)]
unsafe fn widen_u8(bytes: uint8x16_t) -> (int16x8_t, int16x8_t) {
    let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
    (vreinterpretq_s16_u16(low), vreinterpretq_s16_u16(high))
}

/// Eight sums of `sums + a.0 * b.0 + a.1 * b.1`, the first four and the last.
#[inline(always)]
unsafe fn add_products(
    (low, high): (int32x4_t, int32x4_t),
    (a, b): (int16x8_t, int16x8_t),
    (second_a, second_b): (int16x8_t, int16x8_t),
) -> (int32x4_t, int32x4_t) {
    let low = vmlal_s16(low, vget_low_s16(a), vget_low_s16(b));
    let high = vmlal_high_s16(high, a, b);
    (vmlal_s16(low, vget_low_s16(second_a), vget_low_s16(second_b)), vmlal_high_s16(high, second_a, second_b))
}

/// Four bits of each word from bit `SHIFT` on, which is not 0: no instruction shifts by that.
#[inline(always)]
unsafe fn nibble<const SHIFT: i32>(words: uint16x8_t) -> int16x8_t {
    lowest_nibble(vshrq_n_u16::<SHIFT>(words))
}

/// The lowest four bits of each word.
#[inline(always)]
unsafe fn lowest_nibble(words: uint16x8_t) -> int16x8_t {
    vreinterpretq_s16_u16(vandq_u16(words, vdupq_n_u16(15)))
}

/// Pairs of numbers of 12 bits: the upper four, with the sign, as bytes, and the others at `low`.
#[inline(always)]
unsafe fn join_pairs_i12(first: int8x16_t, second: int8x16_t, low: *const u8) -> [int16x8_t; 4] {
    let int8x16x2_t(first_low, second_low) = vld2q_s8(low.cast());
    [
        vreinterpretq_s16_s8(vzip1q_s8(first_low, first)),
        vreinterpretq_s16_s8(vzip2q_s8(first_low, first)),
        vreinterpretq_s16_s8(vzip1q_s8(second_low, second)),
        vreinterpretq_s16_s8(vzip2q_s8(second_low, second)),
    ]
}

/// The lower four bits of each byte, with their sign.
#[inline(always)]
unsafe fn low_nibble(bytes: uint8x16_t) -> int8x16_t {
    vshrq_n_s8::<4>(vreinterpretq_s8_u8(vshlq_n_u8::<4>(bytes)))
}

/// The upper four bits of each byte, with their sign.
#[inline(always)]
unsafe fn high_nibble(bytes: uint8x16_t) -> int8x16_t {
    vshrq_n_s8::<4>(vreinterpretq_s8_u8(bytes))
}

impl Lanes for Neon {
    const TILE_ROWS: usize = 6;
    const INT_TILE_ROWS: usize = 6;
    /// Of more, the compiler loads all operands first, and they do not fit the registers.
    const UNROLL: usize = 1;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        let all = vdupq_n_f32(value);
        Self(all, all, all, all)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(vld1q_f32(from), vld1q_f32(from.add(4)), vld1q_f32(from.add(8)), vld1q_f32(from.add(12)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        vst1q_f32(to, self.0);
        vst1q_f32(to.add(4), self.1);
        vst1q_f32(to.add(8), self.2);
        vst1q_f32(to.add(12), self.3);
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        each!(vaddq_f32, self, other)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        each!(vsubq_f32, self, other)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        each!(vmulq_f32, self, other)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        each!(vdivq_f32, self, other)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        each!(larger, self, other)
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        each!(smaller, self, other)
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(
            vfmaq_f32(addend.0, self.0, factor.0),
            vfmaq_f32(addend.1, self.1, factor.1),
            vfmaq_f32(addend.2, self.2, factor.2),
            vfmaq_f32(addend.3, self.3, factor.3),
        )
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(widen_f16(from), widen_f16(from.add(4)), widen_f16(from.add(8)), widen_f16(from.add(12)))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(widen_bf16(from), widen_bf16(from.add(4)), widen_bf16(from.add(8)), widen_bf16(from.add(12)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        let bytes = vld1q_s8(from);
        widen_i16(vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        let (low, high) = widen_u8(vld1q_u8(from));
        widen_i16(low, high)
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, biased: Self) -> Self {
        each!(add_exponent, self, biased)
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        let at = from.addr();
        // SAFETY: a hint, which an address that is not valid does not hurt.
        unsafe { asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nomem, nostack, preserves_flags)) };
    }

    type Ints = [int32x4_t; 4];
    /// The firsts of lanes 0 to 7 and 8 to 15, then the seconds.
    type Pairs = [int16x8_t; 4];

    #[inline(always)]
    unsafe fn ints(value: i32) -> Self::Ints {
        [vdupq_n_s32(value); 4]
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints {
        let (s0, s1) = add_products((sums[0], sums[1]), (a[0], b[0]), (a[2], b[2]));
        let (s2, s3) = add_products((sums[2], sums[3]), (a[1], b[1]), (a[3], b[3]));
        [s0, s1, s2, s3]
    }

    #[inline(always)]
    unsafe fn total(ints: Self::Ints) -> i32 {
        vaddvq_s32(vaddq_s32(vaddq_s32(ints[0], ints[1]), vaddq_s32(ints[2], ints[3])))
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        let [a, b, c, d] = ints;
        Self(vcvtq_f32_s32(a), vcvtq_f32_s32(b), vcvtq_f32_s32(c), vcvtq_f32_s32(d))
    }

    #[inline(always)]
    unsafe fn split(pairs: Self::Pairs) -> (Self, Self) {
        (widen_i16(pairs[0], pairs[1]), widen_i16(pairs[2], pairs[3]))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const i16) -> Self::Pairs {
        let pair = vreinterpret_s16_s32(vdup_n_s32(from.cast::<i32>().read_unaligned()));
        let (first, second) = (vdupq_lane_s16::<0>(pair), vdupq_lane_s16::<1>(pair));
        [first, first, second, second]
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> Self::Pairs {
        let (low, high) = (vld2q_s16(from), vld2q_s16(from.add(16)));
        [low.0, high.0, low.1, high.1]
    }

    #[inline(always)]
    unsafe fn store_pairs(pairs: Self::Pairs, to: *mut i16) {
        vst2q_s16(to, int16x8x2_t(pairs[0], pairs[2]));
        vst2q_s16(to.add(16), int16x8x2_t(pairs[1], pairs[3]));
    }

    #[inline(always)]
    unsafe fn load_pairs_i8(from: *const i8) -> Self::Pairs {
        let int8x16x2_t(first, second) = vld2q_s8(from);
        [
            vmovl_s8(vget_low_s8(first)),
            vmovl_high_s8(first),
            vmovl_s8(vget_low_s8(second)),
            vmovl_high_s8(second),
        ]
    }

    #[inline(always)]
    unsafe fn load_pairs_u4(from: *const u16) -> [Self::Pairs; 4] {
        let (low, high) = (vld2q_u16(from), vld2q_u16(from.add(16)));
        let (a, b, c, d) = (low.0, high.0, low.1, high.1);
        [
            [lowest_nibble(a), lowest_nibble(b), lowest_nibble(c), lowest_nibble(d)],
            [nibble::<4>(a), nibble::<4>(b), nibble::<4>(c), nibble::<4>(d)],
            [nibble::<8>(a), nibble::<8>(b), nibble::<8>(c), nibble::<8>(d)],
            [nibble::<12>(a), nibble::<12>(b), nibble::<12>(c), nibble::<12>(d)],
        ]
    }

    #[inline(always)]
    unsafe fn load_pairs_i12(high: *const u16, low: *const u8) -> [Self::Pairs; 4] {
        // The lower and the upper byte of the first word of each lane, then of the second.
        let uint8x16x4_t(first, first_high, second, second_high) = vld4q_u8(high.cast());
        [
            join_pairs_i12(low_nibble(first), low_nibble(second), low),
            join_pairs_i12(high_nibble(first), high_nibble(second), low.add(32)),
            join_pairs_i12(low_nibble(first_high), low_nibble(second_high), low.add(64)),
            join_pairs_i12(high_nibble(first_high), high_nibble(second_high), low.add(96)),
        ]
    }

    #[inline(always)]
    unsafe fn lessen(pairs: Self::Pairs, value: i16) -> Self::Pairs {
        let ([a, b, c, d], value) = (pairs, vdupq_n_s16(value));
        [vsubq_s16(a, value), vsubq_s16(b, value), vsubq_s16(c, value), vsubq_s16(d, value)]
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        let low = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(self.0)), vcvtnq_s32_f32(self.1));
        let high = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(self.2)), vcvtnq_s32_f32(self.3));
        vst1q_s16(to, low);
        vst1q_s16(to.add(8), high);
    }
}
