//! How a panel of sixteen weight rows is stored, and how its weights become f32 lanes.
//!
//! A panel is a run of blocks along k; a block holds `BLOCK` consecutive k of all sixteen rows in groups of `GROUP` that
//! share their scales. Within a group the sixteen values of one k lie together. Quants of five and six bits are kept as
//! bytes: putting them together costs more time than the memory they save. Written by `pack`, read by `linear`. Every format
//! turns a stored number into f32 by the same single operation on every path, so the weight seen by the kernels is one
//! well-defined f32.
#![allow(unsafe_op_in_unsafe_fn, reason = "the contract of every method is the trait's")]

use super::super::lanes::{LANES, Lanes};

/// Formats of packed weights, by name: the index into the kernel tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PanelFormat {
    F32,
    F16,
    Bf16,
    /// 32 k: f16 scales, i8 quants.
    Q8,
    /// 32 k: f16 scales, f16 minima, 4-bit quants, two consecutive k in a byte.
    Q4,
    /// 32 k: f16 scales, f16 minima, i8 quants.
    Q5,
    /// 256 k: f16 factors of scales and of minima; 8 groups of 32 k: u8 scales, u8 minima, 4-bit quants as in Q4.
    K4,
    /// As K4 with i8 quants.
    K5,
    /// 256 k: f16 factors of scales; 16 groups of 16 k: i8 scales, i8 quants.
    K6,
}

impl PanelFormat {
    pub(crate) const COUNT: usize = 9;

    /// Consecutive k in one block; rows must be a multiple of it long.
    pub(crate) const fn block(self) -> usize {
        self.of_format().0
    }

    /// Bytes of one block of sixteen rows.
    pub(crate) const fn block_bytes(self) -> usize {
        self.of_format().1
    }

    const fn of_format(self) -> (usize, usize) {
        match self {
            Self::F32 => (F32::BLOCK, F32::BYTES),
            Self::F16 => (F16::BLOCK, F16::BYTES),
            Self::Bf16 => (Bf16::BLOCK, Bf16::BYTES),
            Self::Q8 => (Q8::BLOCK, Q8::BYTES),
            Self::Q4 => (Q4::BLOCK, Q4::BYTES),
            Self::Q5 => (Q5::BLOCK, Q5::BYTES),
            Self::K4 => (K4::BLOCK, K4::BYTES),
            Self::K5 => (K5::BLOCK, K5::BYTES),
            Self::K6 => (K6::BLOCK, K6::BYTES),
        }
    }

    /// Bytes of a panel whose rows have `k` elements.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        k / self.block() * self.block_bytes()
    }
}

/// Bytes of 4-bit quants of `k` columns.
const fn nibble_bytes(k: usize) -> usize {
    k / 2 * LANES
}

/// A storage format as the kernels see it.
///
/// # Safety
/// `block` points to a whole block of the format, `group` to that group of it, and the CPU has `V`'s features;
/// `pair < GROUP / 2`.
pub(crate) trait Format {
    /// Columns of a block.
    const BLOCK: usize;
    /// Columns of a group.
    const GROUP: usize = Self::BLOCK;
    /// Bytes of a block before its first group.
    const HEADER_BYTES: usize = 0;
    const GROUP_BYTES: usize;
    const BYTES: usize = Self::HEADER_BYTES + Self::BLOCK / Self::GROUP * Self::GROUP_BYTES;
    /// What all weights of a group share.
    type Scales<V: Lanes>: Copy;

    unsafe fn scales<V: Lanes>(block: *const u8, group: *const u8) -> Self::Scales<V>;
    /// The weights at k = `2 pair` and `2 pair + 1` of the group.
    unsafe fn pair<V: Lanes>(group: *const u8, scales: Self::Scales<V>, pair: usize) -> (V, V);
}

macro_rules! dense {
    ($name:ident, $value:ty, $load:ident) => {
        pub(crate) struct $name;

        impl Format for $name {
            const BLOCK: usize = 2;
            const GROUP_BYTES: usize = 2 * LANES * size_of::<$value>();
            type Scales<V: Lanes> = ();

            #[inline(always)]
            unsafe fn scales<V: Lanes>(_: *const u8, _: *const u8) {}

            #[inline(always)]
            unsafe fn pair<V: Lanes>(group: *const u8, (): (), _: usize) -> (V, V) {
                let values = group.cast::<$value>();
                (V::$load(values), V::$load(values.add(LANES)))
            }
        }
    };
}

dense!(F32, f32, load);
dense!(F16, u16, load_f16);
dense!(Bf16, u16, load_bf16);

pub(crate) struct Q8;

impl Format for Q8 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 2 * LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = V;

    #[inline(always)]
    unsafe fn scales<V: Lanes>(_: *const u8, group: *const u8) -> V {
        V::load_f16(group.cast())
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, scale: V, pair: usize) -> (V, V) {
        let quants = group.add(2 * LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).mul(scale), V::load_i8(quants.add(LANES)).mul(scale))
    }
}

/// Scales and minima as f16, one after the other.
#[inline(always)]
unsafe fn f16_scales<V: Lanes>(group: *const u8) -> (V, V) {
    (V::load_f16(group.cast()), V::load_f16(group.add(2 * LANES).cast()))
}

pub(crate) struct Q4;

impl Format for Q4 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 4 * LANES + nibble_bytes(Self::GROUP);
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(_: *const u8, group: *const u8) -> (V, V) {
        f16_scales(group)
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let (low, high) = V::load_nibbles(group.add(4 * LANES + pair * LANES));
        (low.fma(scale, minimum), high.fma(scale, minimum))
    }
}

pub(crate) struct Q5;

impl Format for Q5 {
    const BLOCK: usize = 32;
    const GROUP_BYTES: usize = 4 * LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(_: *const u8, group: *const u8) -> (V, V) {
        f16_scales(group)
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let quants = group.add(4 * LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).fma(scale, minimum), V::load_i8(quants.add(LANES)).fma(scale, minimum))
    }
}

/// Scales and minima as products of the block's factors and the group's bytes; both are exact.
#[inline(always)]
unsafe fn k_scales<V: Lanes>(block: *const u8, group: *const u8) -> (V, V) {
    let (scale, minimum) = f16_scales::<V>(block);
    (scale.mul(V::load_u8(group)), minimum.mul(V::load_u8(group.add(LANES))))
}

pub(crate) struct K4;

impl Format for K4 {
    const BLOCK: usize = 256;
    const GROUP: usize = 32;
    const HEADER_BYTES: usize = 4 * LANES;
    const GROUP_BYTES: usize = 2 * LANES + nibble_bytes(Self::GROUP);
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8, group: *const u8) -> (V, V) {
        k_scales(block, group)
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let (low, high) = V::load_nibbles(group.add(2 * LANES + pair * LANES));
        (low.fma(scale, minimum), high.fma(scale, minimum))
    }
}

pub(crate) struct K5;

impl Format for K5 {
    const BLOCK: usize = 256;
    const GROUP: usize = 32;
    const HEADER_BYTES: usize = 4 * LANES;
    const GROUP_BYTES: usize = 2 * LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8, group: *const u8) -> (V, V) {
        k_scales(block, group)
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let quants = group.add(2 * LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).fma(scale, minimum), V::load_i8(quants.add(LANES)).fma(scale, minimum))
    }
}

pub(crate) struct K6;

impl Format for K6 {
    const BLOCK: usize = 256;
    const GROUP: usize = 16;
    const HEADER_BYTES: usize = 2 * LANES;
    const GROUP_BYTES: usize = LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = V;

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8, group: *const u8) -> V {
        V::load_f16(block.cast()).mul(V::load_i8(group.cast()))
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(group: *const u8, scale: V, pair: usize) -> (V, V) {
        let quants = group.add(LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).mul(scale), V::load_i8(quants.add(LANES)).mul(scale))
    }
}
