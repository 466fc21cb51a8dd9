//! The memory that transfers read and write: one region per node, laid out `[layer][block]`. Bounds are checked here.
//!
//! Whoever makes a [`Region`] promises, once, that blocks lent to the node are left alone until they come back; from
//! then on every access is bounds-checked here and names slices, never addresses. The node's claims
//! (`crate::node::claims`) see to it that no two transfers write a block at the same time.

use std::{
    any::Any,
    fmt,
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    ptr::NonNull,
    sync::Arc,
};

use crate::{KvLayout, TransferError};

/// A node's KV memory. Cheap to clone; keeps the memory's owner alive.
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
    file: Option<Arc<File>>,
    device: Option<Arc<dyn DeviceMemory>>,
}

/// How the CPU looks into memory that it cannot read in place.
pub trait DeviceMemory: Send + Sync {
    /// Copies `into.len()` bytes at `from`, which lie in a region of this device, into `into`. Blocks.
    fn copy_out(&self, from: NonNull<u8>, into: &mut [u8]) -> io::Result<()>;
}

struct Inner {
    base: NonNull<u8>,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `Inner` is an address and a length; the memory outlives it (it holds the owner), may be used from any thread
// (contract of `Region::new`), and is only reached through `Slices`, whose use the node's claims make exclusive.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Region {
    /// Takes `len` bytes at `base` under this crate's care.
    ///
    /// # Safety
    /// - The bytes are valid for reads and writes, from any thread, for as long as `owner` lives; those of a device, which
    ///   [`on_device`](Self::on_device) must say before the region is used, by that device.
    /// - Blocks lent to a node (`ExpectSpec::blocks`) are neither read nor written by anyone else until they come back
    ///   (`Incoming::close` or `NodeConfig::reclaim`) or the transfer is sealed.
    /// - Blocks being sent (`OfferSpec::blocks`) are not written, in a layer once `Progress::ready` has named them
    ///   there, until they come back (`Outgoing::close` or `NodeConfig::reclaim`).
    pub unsafe fn new(owner: Arc<dyn Any + Send + Sync>, base: NonNull<u8>, len: usize) -> Self {
        Self { inner: Arc::new(Inner { base, len, _owner: owner }), file: None, device: None }
    }

    /// Zeroed memory that goes with the region.
    pub(crate) fn zeroed(len: usize) -> Self {
        let mut owner = vec![0u8; len];
        let base = NonNull::from(owner.as_mut_slice()).cast();
        // SAFETY: the bytes live in `owner`, which nobody else can reach. Whoever has the region lends its slices to one
        // frame at a time (`node::staging`); tests reach them from one thread at a time.
        unsafe { Self::new(Arc::new(owner), base, len) }
    }

    /// The same region, known to be a shared mapping of this file (`memfd_create`, with sealing allowed) from its start,
    /// so that processes of the same host can read it in place. The file must not be mapped for writing again.
    pub fn backed_by(mut self, file: Arc<File>) -> Self {
        self.file = Some(file);
        self
    }

    /// The same region, known to be memory of a device: only transports that move such memory can carry it, and the CPU
    /// looks into it through `device`.
    pub fn on_device(mut self, device: Arc<dyn DeviceMemory>) -> Self {
        self.device = Some(device);
        self
    }

    /// Whether the CPU cannot read it in place.
    pub(crate) fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    /// What it is a mapping of, if that is known.
    pub(crate) fn file(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Where it starts; for transports that register the whole of it.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.inner.base
    }

    /// Where `len` bytes at `offset` start; nothing if any lies outside.
    pub(crate) fn at(&self, offset: u64, len: usize) -> Option<NonNull<u8>> {
        let offset = usize::try_from(offset).ok()?;
        let inside = offset.checked_add(len)? <= self.inner.len;
        // SAFETY: inside the region, as was just checked.
        inside.then(|| unsafe { self.inner.base.add(offset) })
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.inner.len
    }

    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// Where in the region `len` bytes at `start` lie; nothing if any lies outside.
    #[allow(dead_code, reason = "asked by one-sided transports, which not every build has")]
    pub(crate) fn offset_of(&self, start: NonNull<u8>, len: usize) -> Option<usize> {
        let offset = start.addr().get().checked_sub(self.inner.base.addr().get())?;
        (offset.checked_add(len)? <= self.inner.len).then_some(offset)
    }

    /// Sees the region as slices of `layout` with `blocks` blocks in each layer; refused if it is too small.
    pub fn slices(&self, layout: &KvLayout, blocks: u32) -> Result<Slices, TransferError> {
        layout.validate()?;
        self.cut(layout.slice_bytes as usize, layout.layers, blocks)
    }

    /// As [`Self::slices`], of any size.
    pub(crate) fn cut(&self, slice_bytes: usize, layers: u32, blocks: u32) -> Result<Slices, TransferError> {
        let needed = slice_bytes.checked_mul(blocks as usize).and_then(|n| n.checked_mul(layers as usize));
        match needed {
            Some(needed) if needed <= self.inner.len => {
                Ok(Slices { region: self.clone(), slice_bytes, layers, blocks })
            }
            _ => Err(TransferError::Invalid(format!(
                "a region of {} bytes is too small for {layers} layers of {blocks} blocks of {slice_bytes} bytes",
                self.inner.len
            ))),
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("len", &self.inner.len).finish_non_exhaustive()
    }
}

/// A region seen as `[layer][block]` slices.
#[derive(Debug, Clone)]
pub struct Slices {
    region: Region,
    slice_bytes: usize,
    layers: u32,
    blocks: u32,
}

impl Slices {
    /// Bytes of one slice.
    pub fn slice_bytes(&self) -> usize {
        self.slice_bytes
    }

    pub fn layers(&self) -> u32 {
        self.layers
    }

    /// Blocks in each layer.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether the CPU cannot read them in place.
    pub(crate) fn is_on_device(&self) -> bool {
        self.region.is_on_device()
    }

    /// Where a slice starts in the region, in bytes; refuses slices outside it.
    pub(crate) fn offset(&self, layer: u32, block: u32) -> Result<u64, TransferError> {
        if layer >= self.layers || block >= self.blocks {
            return Err(TransferError::Invalid(format!(
                "slice (layer {layer}, block {block}) lies outside {} layers of {} blocks",
                self.layers, self.blocks
            )));
        }
        // `Region::slices` checked that layers * blocks * slice_bytes is within a region's length, a `usize`.
        Ok(((layer as usize * self.blocks as usize + block as usize) * self.slice_bytes) as u64)
    }

    /// Address of a slice, for those that write it by other means. Only for slices that the caller has claimed.
    pub(crate) fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError> {
        let offset = self.offset(layer, block)? as usize;
        // SAFETY: `offset` lies inside the region.
        Ok(unsafe { self.region.inner.base.add(offset) })
    }

    /// Copies a part of a slice, from byte `from` on, wherever its memory is. Only for slices that a transfer has been
    /// told are ready, or that the caller has claimed.
    pub(crate) fn copy_out(
        &self,
        layer: u32,
        block: u32,
        from: usize,
        into: &mut [u8],
    ) -> Result<(), TransferError> {
        let within = from.checked_add(into.len()).is_some_and(|end| end <= self.slice_bytes);
        if !within {
            let message = format!("bytes {from} and on lie outside a slice of {}", self.slice_bytes);
            return Err(TransferError::Invalid(message));
        }
        let Some(device) = &self.region.device else {
            into.copy_from_slice(&self.source(layer, block)?[from..from + into.len()]);
            return Ok(());
        };
        // SAFETY: inside the slice, as was just checked.
        let start = unsafe { self.place(layer, block)?.add(from) };
        let what = "look into the device's memory";
        device.copy_out(start, into).map_err(|error| TransferError::Io { what, reason: error.to_string() })
    }

    /// One slice's bytes, for a transport that sends them. Only for slices that a transfer has been told are ready, of
    /// regions that the CPU can read.
    pub(crate) fn source(&self, layer: u32, block: u32) -> Result<&[u8], TransferError> {
        let start = self.place(layer, block)?;
        // SAFETY: in bounds (`place`), alive while `self` holds the region, and, by the contract of `Region::new` and
        // the node's claims, written by nobody while it is readable here.
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), self.slice_bytes) })
    }

    #[allow(clippy::mut_from_ref)] // exclusive by the contract of `Region::new` and the node's claims
    fn target(&self, layer: u32, block: u32) -> Result<&mut [u8], TransferError> {
        let start = self.place(layer, block)?;
        // SAFETY: in bounds (`place`), alive while `self` holds the region; the only one to reach these bytes now: a
        // receiving transfer's blocks are its alone and each of its slices is claimed by one frame at a time, or, where
        // slices are mapped, written under a lock (`node::translate`).
        Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.slice_bytes) })
    }

    /// One slice as an element of a vectored write, from byte `skip` on.
    pub(crate) fn io_slice(&self, layer: u32, block: u32, skip: usize) -> Result<IoSlice<'_>, TransferError> {
        let bytes = self.source(layer, block)?;
        Ok(IoSlice::new(&bytes[skip.min(bytes.len())..]))
    }

    /// One slice as an element of a vectored read, from byte `skip` on. Only for slices that the caller has claimed.
    pub(crate) fn io_slice_mut(
        &self,
        layer: u32,
        block: u32,
        skip: usize,
    ) -> Result<IoSliceMut<'_>, TransferError> {
        let bytes = self.target(layer, block)?;
        let skip = skip.min(bytes.len());
        Ok(IoSliceMut::new(&mut bytes[skip..]))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn layout(layers: u32, slice_bytes: u64) -> KvLayout {
        KvLayout {
            model_revision: "r".into(),
            format: "f".into(),
            dtype: "f32".into(),
            block_tokens: 16,
            layers,
            kv_heads: 1,
            head_dim: 1,
            rope_dim: 0,
            tensor_parallel: 1,
            slice_bytes,
        }
    }

    #[test]
    fn slices_lie_layer_by_layer_and_do_not_overlap() {
        let slices = Region::zeroed(3 * 4 * 10).slices(&layout(3, 10), 4).expect("fits");
        for layer in 0..3u8 {
            for block in 0..4u8 {
                let mut slice = slices.io_slice_mut(layer.into(), block.into(), 0).expect("in range");
                slice.fill(layer * 4 + block);
            }
        }
        for layer in 0..3u8 {
            for block in 0..4u8 {
                let got = slices.source(layer.into(), block.into()).expect("in range");
                assert_eq!(got, [layer * 4 + block; 10]);
            }
        }
    }

    #[test]
    fn nothing_outside_can_be_named() {
        let region = Region::zeroed(100);
        assert!(region.slices(&layout(2, 10), 6).is_err(), "larger than the region");
        assert!(region.slices(&layout(4096, 1 << 30), u32::MAX).is_err(), "overflows");
        let at = |offset: usize| region.base().map_addr(|base| base.saturating_add(offset));
        assert_eq!((region.offset_of(at(0), 100), region.offset_of(at(99), 1)), (Some(0), Some(99)));
        assert_eq!((region.offset_of(at(100), 0), region.offset_of(at(100), 1)), (Some(100), None));
        assert_eq!((region.offset_of(at(1), 100), region.offset_of(at(1), usize::MAX)), (None, None));
        assert_eq!(region.offset_of(NonNull::dangling(), 1), None);
        let slices = region.slices(&layout(2, 10), 5).expect("fits");
        assert!(slices.source(2, 0).is_err());
        assert!(slices.source(0, 5).is_err());
        assert!(slices.io_slice_mut(1, 5, 0).is_err());
        assert_eq!(slices.io_slice(1, 4, 99).expect("in range").len(), 0);
    }
}
