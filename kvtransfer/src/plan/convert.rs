//! Between bf16 and int8, vector by vector.
//!
//! The arithmetic is the CPU device's own (`Int8` in `server/runtime/src/devices/cpu/attention.rs`), so that a cache that
//! was converted on its way is, bit for bit, what the receiver would have written from the same bf16 values.

use half::bf16;

use super::{
    VectorRun,
    slice_map::{KvDtype, PartMap, SliceMap},
    strided::Coordinate,
};
use crate::TransferError;

/// Writes `vector` as multiples of the scale it returns: its largest magnitude over 127, and NaN if any element is not a
/// finite number, so that whatever is computed with the vector is NaN, too. Elements are rounded to the nearest
/// multiple, halves to the even one. Both slices should have the same length; elements without a partner are left.
pub fn quantise(vector: &[f32], quants: &mut [i8]) -> f32 {
    let largest = vector.iter().fold(0.0_f32, |largest, element| largest.max(element.abs()));
    let fault: f32 = vector.iter().map(|element| element * 0.0).sum();
    // Magnitudes so small that their scale would be no normal number count as zero.
    let steps = if largest < 127.0 * f32::MIN_POSITIVE { 0.0 } else { 127.0 / largest };
    for (quant, element) in quants.iter_mut().zip(vector) {
        *quant = (element * steps).round_ties_even() as i8;
    }
    largest / 127.0 + fault
}

/// The values that `quants` and their scale stand for. Elements without a partner are left.
pub fn dequantise(quants: &[i8], scale: f32, vector: &mut [f32]) {
    for (element, quant) in vector.iter_mut().zip(quants) {
        *element = f32::from(*quant) * scale;
    }
}

/// What a conversion has to know of both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Conversion {
    pub(super) source: SliceMap,
    pub(super) target: SliceMap,
    pub(super) dims: [u32; 2],
    pub(super) to: KvDtype,
}

impl Conversion {
    /// Converts vectors of one slice into another.
    pub(super) fn run(
        &self,
        vectors: &VectorRun,
        source: &[u8],
        target: &mut [u8],
    ) -> Result<(), TransferError> {
        let parts = (self.source.parts.get(vectors.part), self.target.parts.get(vectors.part));
        let (Some(from), Some(to), Some(&dim)) = (parts.0, parts.1, self.dims.get(vectors.part)) else {
            return Err(TransferError::Invalid(format!(
                "a slice has two parts, none of index {}",
                vectors.part
            )));
        };
        let (from, to) = (Places::of(from, dim), Places::of(to, dim));
        let (mut elements, mut quants) = (vec![0.0; dim as usize], vec![0; dim as usize]);
        for head in 0..vectors.heads {
            for token in 0..vectors.tokens {
                let at = |first: u32, index: u32| u64::from(first) + u64::from(index);
                let here = (at(vectors.source_head, head), at(vectors.source_token, token));
                let there = (at(vectors.target_head, head), at(vectors.target_token, token));
                if self.to == KvDtype::Int8 {
                    from.read(source, here, &mut elements, |bytes| bf16::from_le_bytes(bytes).to_f32())?;
                    let scale = quantise(&elements, &mut quants);
                    to.write(target, there, &quants, |quant| quant.to_le_bytes())?;
                    to.put_scale(target, there, scale)?;
                } else {
                    from.read(source, here, &mut quants, i8::from_le_bytes)?;
                    dequantise(&quants, from.scale(source, here)?, &mut elements);
                    to.write(target, there, &elements, |value| bf16::from_f32(value).to_le_bytes())?;
                }
            }
        }
        Ok(())
    }
}

/// A part, with what each element adds to a vector's offset worked out once.
struct Places<'a> {
    part: &'a PartMap,
    dims: Vec<u64>,
}

/// Head and token.
type Vector = (u64, u64);

impl<'a> Places<'a> {
    fn of(part: &'a PartMap, dim: u32) -> Self {
        Self { part, dims: (0..dim).map(|dim| part.values.along(Coordinate::Dim, dim.into())).collect() }
    }

    fn start(&self, (head, token): Vector) -> u64 {
        let (values, part) = (&self.part.values, self.part.values.start);
        part.saturating_add(values.along(Coordinate::Head, head))
            .saturating_add(values.along(Coordinate::Token, token))
    }

    fn read<T, const N: usize>(
        &self,
        slice: &[u8],
        vector: Vector,
        into: &mut [T],
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<(), TransferError> {
        let start = self.start(vector);
        for (value, dim) in into.iter_mut().zip(&self.dims) {
            *value = decode(get(slice, start.saturating_add(*dim))?);
        }
        Ok(())
    }

    fn write<T: Copy, const N: usize>(
        &self,
        slice: &mut [u8],
        vector: Vector,
        from: &[T],
        encode: impl Fn(T) -> [u8; N],
    ) -> Result<(), TransferError> {
        let start = self.start(vector);
        for (value, dim) in from.iter().zip(&self.dims) {
            put(slice, start.saturating_add(*dim), encode(*value))?;
        }
        Ok(())
    }

    fn scale_at(&self, (head, token): Vector) -> Result<u64, TransferError> {
        let scales = self.part.scales.as_ref().ok_or_else(outside)?;
        let (head, token) = (scales.along(Coordinate::Head, head), scales.along(Coordinate::Token, token));
        Ok(scales.start.saturating_add(head).saturating_add(token))
    }

    fn scale(&self, slice: &[u8], vector: Vector) -> Result<f32, TransferError> {
        Ok(f32::from_le_bytes(get(slice, self.scale_at(vector)?)?))
    }

    fn put_scale(&self, slice: &mut [u8], vector: Vector, scale: f32) -> Result<(), TransferError> {
        put(slice, self.scale_at(vector)?, scale.to_le_bytes())
    }
}

fn outside() -> TransferError {
    TransferError::Invalid("a vector to convert lies outside its slice".into())
}

fn get<const N: usize>(slice: &[u8], at: u64) -> Result<[u8; N], TransferError> {
    let tail = usize::try_from(at).ok().and_then(|at| slice.get(at..));
    tail.and_then(|tail| tail.first_chunk()).copied().ok_or_else(outside)
}

fn put<const N: usize>(slice: &mut [u8], at: u64, bytes: [u8; N]) -> Result<(), TransferError> {
    let tail = usize::try_from(at).ok().and_then(|at| slice.get_mut(at..));
    *tail.and_then(|tail| tail.first_chunk_mut()).ok_or_else(outside)? = bytes;
    Ok(())
}
