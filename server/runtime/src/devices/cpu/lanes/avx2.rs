//! Lanes as two 256-bit registers: AVX2, FMA and F16C.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use std::arch::x86_64::*;

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// `value * 2^n`, n standing in the low bits of the other. Not a closure: those are compiled without the caller's
/// instruction set unless they happen to be inlined.
#[inline(always)]
unsafe fn add_exponent(value: __m256, n: __m256) -> __m256 {
    let shifted = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), shifted))
}

impl Lanes for Avx2 {
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        let all = _mm256_set1_ps(value);
        Self(all, all)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8)))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        _mm256_storeu_ps(to, self.0);
        _mm256_storeu_ps(to.add(8), self.1);
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1))
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(
            _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
        )
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
        let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
        Self(
            _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)),
        )
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
        let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.add(8).cast()));
        Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
        let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
        Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
    }

    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> (Self, Self) {
        let mask = _mm256_set1_epi32(15);
        let first = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
        let second = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.add(8).cast()));
        let low = Self(
            _mm256_cvtepi32_ps(_mm256_and_si256(first, mask)),
            _mm256_cvtepi32_ps(_mm256_and_si256(second, mask)),
        );
        let high = Self(
            _mm256_cvtepi32_ps(_mm256_srli_epi32(first, 4)),
            _mm256_cvtepi32_ps(_mm256_srli_epi32(second, 4)),
        );
        (low, high)
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, biased: Self) -> Self {
        Self(add_exponent(self.0, biased.0), add_exponent(self.1, biased.1))
    }
    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }
}
