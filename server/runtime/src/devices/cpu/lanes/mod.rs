//! Sixteen f32 lanes: the one vector type the kernels are written over, with an implementation for each instruction set.
//!
//! A lane is an output row of a weight panel or a token of a KV block, so kernels never add across lanes while they walk
//! along k: each output is one chain of fused multiply-adds in one order. That is why results are the same bit for bit
//! on every instruction set, for every batch and every number of threads. Beside the f32 lanes stand integers for
//! quantised weights: [`Lanes::Pairs`], two i16 for each lane, whose products are added up in [`Lanes::Ints`], exactly.
//!
//! Used by `kernels` only. Methods are unsafe because the implementing type stands for CPU features that the caller has
//! checked, and because loads and stores take raw pointers; the contract stands here once, for all implementations.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Rounds to a whole number, halves to even, if it is smaller than 2^22; NaN stays NaN. Adding rounds: the first x86-64
/// has no instruction for it, and calling a function takes far longer.
pub(crate) fn nearest(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    (x + ROUND) - ROUND
}

/// Sixteen f32 values.
///
/// # Safety
/// Every method requires that the CPU has the features the implementing type stands for. Methods that take a pointer
/// require that 16 values of the pointer's type can be read from it (or written to it); no alignment beyond that of the
/// value type is needed.
pub(crate) trait Lanes: Copy {
    /// Rows by sixteen columns whose sums fit the registers along with the operands, enough to hide each other's latency.
    const TILE_ROWS: usize;
    /// The same for sums of integers.
    const INT_TILE_ROWS: usize;
    /// Columns of a tile between two tests for its end.
    const UNROLL: usize = 4;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// The larger of each pair; `other` where either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// The smaller of each pair; `other` where either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    unsafe fn load_f16(from: *const u16) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn load_i8(from: *const i8) -> Self;
    unsafe fn load_u8(from: *const u8) -> Self;
    /// `self * 2^n`, where `biased` holds `n + 1.5 * 2^23` (so that n stands in its low bits), for normal results.
    unsafe fn scale_by_exponent(self, biased: Self) -> Self;
    /// Asks for the cache line at `from`, which need not be valid.
    unsafe fn prefetch(from: *const u8);

    /// Sixteen i32.
    type Ints: Copy;
    /// Sixteen pairs of i16.
    type Pairs: Copy;

    /// All the same.
    unsafe fn ints(value: i32) -> Self::Ints;
    /// `sums + a.0 * b.0 + a.1 * b.1`; neither products nor sums may overflow.
    unsafe fn dot(sums: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints;
    /// All lanes added up.
    unsafe fn total(ints: Self::Ints) -> i32;
    unsafe fn from_ints(ints: Self::Ints) -> Self;
    /// The first of each pair, and the second.
    unsafe fn split(pairs: Self::Pairs) -> (Self, Self);
    /// All the same: the pair at `from`.
    unsafe fn splat_pair(from: *const i16) -> Self::Pairs;
    /// 32 values.
    unsafe fn load_pairs(from: *const i16) -> Self::Pairs;
    unsafe fn store_pairs(pairs: Self::Pairs, to: *mut i16);
    /// 32 values.
    unsafe fn load_pairs_i8(from: *const i8) -> Self::Pairs;
    /// The four bits of 32 words, lowest first, as pairs of unsigned numbers: 128 in all.
    unsafe fn load_pairs_u4(from: *const u16) -> [Self::Pairs; 4];
    /// 128 numbers of 12 bits with sign, whose upper four are those of 32 words as in `load_pairs_u4` and whose lower
    /// eight are 128 bytes, 32 for each of the results.
    unsafe fn load_pairs_i12(high: *const u16, low: *const u8) -> [Self::Pairs; 4];
    /// `pairs - value`, each.
    unsafe fn lessen(pairs: Self::Pairs, value: i16) -> Self::Pairs;
    /// Rounds to whole numbers, halves to even, and stores them; NaN and what does not fit become arbitrary numbers.
    unsafe fn store_i16(self, to: *mut i16);
}
