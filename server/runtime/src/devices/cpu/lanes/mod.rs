//! Sixteen f32 lanes: the one vector type the kernels are written over, with an implementation for each instruction set.
//!
//! A lane is an output row of a weight panel or a token of a KV block, so kernels never add across lanes while they walk
//! along k: each output is one chain of fused multiply-adds in one order. That is why results are the same bit for bit
//! on every instruction set, for every batch and every number of threads.
//!
//! Used by `kernels` only. Methods are unsafe because the implementing type stands for CPU features that the caller has
//! checked, and because loads and stores take raw pointers; the contract stands here once, for all implementations.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values.
///
/// # Safety
/// Every method requires that the CPU has the features the implementing type stands for. Methods that take a pointer
/// require that 16 values of the pointer's type can be read from it (or written to it); no alignment beyond that of the
/// value type is needed.
pub(crate) trait Lanes: Copy {
    /// Rows by sixteen columns whose sums fit the registers along with the operands, enough to hide each other's latency.
    const TILE_ROWS: usize;

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
    /// The low and the high four bits of 16 bytes, as unsigned numbers.
    unsafe fn load_nibbles(from: *const u8) -> (Self, Self);
    /// `self * 2^n`, where `biased` holds `n + 1.5 * 2^23` (so that n stands in its low bits), for normal results.
    unsafe fn scale_by_exponent(self, biased: Self) -> Self;
    /// Asks for the cache line at `from`, which need not be valid.
    unsafe fn prefetch(from: *const u8);
}
