//! How a panel of sixteen weight rows is stored, and how its weights become f32 lanes.
//!
//! A panel is a run of blocks along k; a block holds `GROUP` consecutive k of all sixteen rows, scales first. Within a
//! block the sixteen values of one k lie together. Written by `pack`, read by `linear`. Every format turns a stored
//! number into f32 by the same single operation on every path, so the weight seen by the kernels is one well-defined
//! f32.
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
    /// 16 k: f32 scales, f32 minima, i8 quants.
    Q8Wide,
    /// 32 k: f32 scales, f32 minima, 4-bit quants as in Q4.
    Q4Wide,
}

impl PanelFormat {
    pub(crate) const COUNT: usize = 7;

    /// Consecutive k in one block; rows must be a multiple of it long.
    pub(crate) const fn group(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 2,
            Self::Q8 | Self::Q4 | Self::Q4Wide => 32,
            Self::Q8Wide => 16,
        }
    }

    /// Bytes of one block of sixteen rows.
    pub(crate) const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => F32::BYTES,
            Self::F16 => F16::BYTES,
            Self::Bf16 => Bf16::BYTES,
            Self::Q8 => Q8::BYTES,
            Self::Q4 => Q4::BYTES,
            Self::Q8Wide => Q8Wide::BYTES,
            Self::Q4Wide => Q4Wide::BYTES,
        }
    }

    /// Bytes of a panel whose rows have `k` elements.
    pub(crate) const fn panel_bytes(self, k: usize) -> usize {
        k / self.group() * self.block_bytes()
    }
}

/// A storage format as the kernels see it.
///
/// # Safety
/// `block` points to a whole block of the format, and the CPU has `V`'s features; `pair < GROUP / 2`.
pub(crate) trait Format {
    const GROUP: usize;
    const BYTES: usize;
    /// What all weights of a block share.
    type Scales<V: Lanes>: Copy;

    unsafe fn scales<V: Lanes>(block: *const u8) -> Self::Scales<V>;
    /// The weights at k = `2 pair` and `2 pair + 1` of the block.
    unsafe fn pair<V: Lanes>(block: *const u8, scales: Self::Scales<V>, pair: usize) -> (V, V);
}

macro_rules! dense {
    ($name:ident, $value:ty, $load:ident) => {
        pub(crate) struct $name;

        impl Format for $name {
            const GROUP: usize = 2;
            const BYTES: usize = 2 * LANES * size_of::<$value>();
            type Scales<V: Lanes> = ();

            #[inline(always)]
            unsafe fn scales<V: Lanes>(_: *const u8) {}

            #[inline(always)]
            unsafe fn pair<V: Lanes>(block: *const u8, (): (), _: usize) -> (V, V) {
                let values = block.cast::<$value>();
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
    const GROUP: usize = 32;
    const BYTES: usize = 2 * LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = V;

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8) -> V {
        V::load_f16(block.cast())
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(block: *const u8, scale: V, pair: usize) -> (V, V) {
        let quants = block.add(2 * LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).mul(scale), V::load_i8(quants.add(LANES)).mul(scale))
    }
}

pub(crate) struct Q4;

impl Format for Q4 {
    const GROUP: usize = 32;
    const BYTES: usize = 4 * LANES + Self::GROUP / 2 * LANES;
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8) -> (V, V) {
        let scales = block.cast();
        (V::load_f16(scales), V::load_f16(scales.add(LANES)))
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(block: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let (low, high) = V::load_nibbles(block.add(4 * LANES + pair * LANES));
        (low.fma(scale, minimum), high.fma(scale, minimum))
    }
}

pub(crate) struct Q8Wide;

impl Format for Q8Wide {
    const GROUP: usize = 16;
    const BYTES: usize = 8 * LANES + Self::GROUP * LANES;
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8) -> (V, V) {
        let scales = block.cast();
        (V::load(scales), V::load(scales.add(LANES)))
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(block: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let quants = block.add(8 * LANES + 2 * pair * LANES).cast();
        (V::load_i8(quants).fma(scale, minimum), V::load_i8(quants.add(LANES)).fma(scale, minimum))
    }
}

pub(crate) struct Q4Wide;

impl Format for Q4Wide {
    const GROUP: usize = 32;
    const BYTES: usize = 8 * LANES + Self::GROUP / 2 * LANES;
    type Scales<V: Lanes> = (V, V);

    #[inline(always)]
    unsafe fn scales<V: Lanes>(block: *const u8) -> (V, V) {
        let scales = block.cast();
        (V::load(scales), V::load(scales.add(LANES)))
    }

    #[inline(always)]
    unsafe fn pair<V: Lanes>(block: *const u8, (scale, minimum): (V, V), pair: usize) -> (V, V) {
        let (low, high) = V::load_nibbles(block.add(8 * LANES + pair * LANES));
        (low.fma(scale, minimum), high.fma(scale, minimum))
    }
}
