//! Lanes as one 512-bit register: AVX-512F and BW, with VNNI's sums of products where the CPU has them.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use std::arch::x86_64::*;

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(__m512);

/// Numbers of 12 bits: their upper four, with the sign, are the upper four of `high`, the others are at `low`.
#[inline(always)]
unsafe fn join_i12(high: __m512i, low: *const u8) -> __m512i {
    let upper = _mm512_and_si512(_mm512_srai_epi16(high, 4), _mm512_set1_epi16(!0xff));
    _mm512_or_si512(upper, _mm512_cvtepu8_epi16(_mm256_loadu_si256(low.cast())))
}

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    const TILE_ROWS: usize = 12;
    const INT_TILE_ROWS: usize = 12;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self(_mm512_set1_ps(value))
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(_mm512_loadu_ps(from))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        _mm512_storeu_ps(to, self.0);
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Self(_mm512_add_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Self(_mm512_sub_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(_mm512_mul_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        Self(_mm512_div_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        Self(_mm512_max_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        Self(_mm512_min_ps(self.0, other.0))
    }

    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        Self(_mm512_fmadd_ps(self.0, factor.0, addend.0))
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast())))
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
        Self(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self {
        Self(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))))
    }

    #[inline(always)]
    unsafe fn scale_by_exponent(self, biased: Self) -> Self {
        let shifted = _mm512_slli_epi32(_mm512_castps_si512(biased.0), 23);
        Self(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(self.0), shifted)))
    }

    #[inline(always)]
    unsafe fn prefetch(from: *const u8) {
        _mm_prefetch::<_MM_HINT_T0>(from.cast());
    }

    type Ints = __m512i;
    type Pairs = __m512i;

    #[inline(always)]
    unsafe fn ints(value: i32) -> __m512i {
        _mm512_set1_epi32(value)
    }

    #[inline(always)]
    unsafe fn dot(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
        if VNNI { _mm512_dpwssd_epi32(sums, a, b) } else { _mm512_add_epi32(sums, _mm512_madd_epi16(a, b)) }
    }

    #[inline(always)]
    unsafe fn total(ints: __m512i) -> i32 {
        _mm512_reduce_add_epi32(ints)
    }

    #[inline(always)]
    unsafe fn from_ints(ints: __m512i) -> Self {
        Self(_mm512_cvtepi32_ps(ints))
    }

    #[inline(always)]
    unsafe fn split(pairs: __m512i) -> (Self, Self) {
        let low = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16);
        (Self::from_ints(low), Self::from_ints(_mm512_srai_epi32(pairs, 16)))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const i16) -> __m512i {
        _mm512_set1_epi32(from.cast::<i32>().read_unaligned())
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const i16) -> __m512i {
        _mm512_loadu_si512(from.cast())
    }

    #[inline(always)]
    unsafe fn store_pairs(pairs: __m512i, to: *mut i16) {
        _mm512_storeu_si512(to.cast(), pairs);
    }

    #[inline(always)]
    unsafe fn load_pairs_i8(from: *const i8) -> __m512i {
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.cast()))
    }

    #[inline(always)]
    unsafe fn load_pairs_u4(from: *const u16) -> [__m512i; 4] {
        let (words, low) = (Self::load_pairs(from.cast()), _mm512_set1_epi16(15));
        [
            _mm512_and_si512(words, low),
            _mm512_and_si512(_mm512_srli_epi16(words, 4), low),
            _mm512_and_si512(_mm512_srli_epi16(words, 8), low),
            _mm512_srli_epi16(words, 12),
        ]
    }

    #[inline(always)]
    unsafe fn load_pairs_i12(high: *const u16, low: *const u8) -> [__m512i; 4] {
        let high = Self::load_pairs(high.cast());
        [
            join_i12(_mm512_slli_epi16(high, 12), low),
            join_i12(_mm512_slli_epi16(high, 8), low.add(32)),
            join_i12(_mm512_slli_epi16(high, 4), low.add(64)),
            join_i12(high, low.add(96)),
        ]
    }

    #[inline(always)]
    unsafe fn lessen(pairs: __m512i, value: i16) -> __m512i {
        _mm512_sub_epi16(pairs, _mm512_set1_epi16(value))
    }

    #[inline(always)]
    unsafe fn store_i16(self, to: *mut i16) {
        _mm256_storeu_si256(to.cast(), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(self.0)));
    }
}
