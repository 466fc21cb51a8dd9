//! Carries out descriptors where both caches are in this process: for tests, and for turning a cache round in place of
//! moving it in many small pieces.

use super::pair::{Action, Descriptor, PairPlan};
use crate::TransferError;

/// One rank's cache as plain bytes, laid out `[layer][block]`.
#[derive(Debug)]
pub struct PoolBytes<'t, B> {
    pub bytes: B,
    /// Blocks in each layer.
    pub blocks: u32,
    /// Which blocks of the pool the transfer's blocks are.
    pub table: &'t [u32],
}

impl<B> PoolBytes<'_, B> {
    /// The bytes of a slice.
    fn locate(&self, layer: u32, block: u32, slice_bytes: u64) -> Option<std::ops::Range<usize>> {
        let block = *self.table.get(usize::try_from(block).ok()?)?;
        let index = u64::from(layer) * u64::from(self.blocks) + u64::from(block);
        let start = usize::try_from(index.checked_mul(slice_bytes)?).ok()?;
        let end = start.checked_add(usize::try_from(slice_bytes).ok()?)?;
        (block < self.blocks).then_some(start..end)
    }
}

impl PairPlan {
    /// Carries out `descriptors` of this plan from the sender's cache into the receiver's. Refuses descriptors that name
    /// blocks or bytes that are not there; those before have been carried out by then.
    pub fn apply(
        &self,
        descriptors: impl IntoIterator<Item = Descriptor>,
        source: &PoolBytes<'_, &[u8]>,
        target: &mut PoolBytes<'_, &mut [u8]>,
    ) -> Result<(), TransferError> {
        let template = self.template();
        for descriptor in descriptors {
            let Descriptor { layer, source_block, target_block, action } = descriptor;
            let from = source.locate(layer, source_block, template.source_bytes);
            let to = target.locate(layer, target_block, template.target_bytes);
            let from = from.and_then(|range| source.bytes.get(range));
            let to = to.and_then(|range| target.bytes.get_mut(range));
            let (Some(from), Some(to)) = (from, to) else {
                return Err(outside(&descriptor));
            };
            self.carry_out(&action, from, to)?;
        }
        Ok(())
    }

    /// Carries out one action of this plan from a slice of the sender's into one of the receiver's. Refuses one that
    /// reaches outside either.
    pub(crate) fn carry_out(&self, action: &Action, from: &[u8], to: &mut [u8]) -> Result<(), TransferError> {
        match (action, &self.template().conversion) {
            (&Action::Copy { source_offset, target_offset, bytes }, None) => {
                let range = |offset: u64| {
                    let (start, end) = (usize::try_from(offset), usize::try_from(offset.checked_add(bytes)?));
                    Some(start.ok()?..end.ok()?)
                };
                let from = range(source_offset).and_then(|range| from.get(range));
                let to = range(target_offset).and_then(|range| to.get_mut(range));
                let (Some(from), Some(to)) = (from, to) else {
                    return Err(TransferError::Invalid(format!("{action:?} lies outside its slices")));
                };
                to.copy_from_slice(from);
                Ok(())
            }
            (Action::Convert(vectors), Some(conversion)) => conversion.run(vectors, from, to),
            (Action::Copy { .. }, Some(_)) | (Action::Convert(_), None) => {
                Err(TransferError::Invalid("a descriptor of another plan".into()))
            }
        }
    }
}

fn outside(descriptor: &Descriptor) -> TransferError {
    TransferError::Invalid(format!("{descriptor:?} lies outside the caches it is to be carried out on"))
}
