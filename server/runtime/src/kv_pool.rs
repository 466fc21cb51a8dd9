//! The paged KV pool: one allocation, laid out `[layer][block]`, so that one block of one layer is contiguous. That
//! piece, a *slice*, is the unit that moves between instances.
//!
//! Blocks are handed out by the engine; the pool only owns the memory. The engine's kernels and the transports access
//! it through raw pointers, because they touch disjoint blocks of it at the same time from different threads.

use std::{fs::File, ptr::NonNull, sync::Arc};

use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::{BlockId, RuntimeError};

/// How KV values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    Bf16,
    /// Multiples of an f32 scale for each vector: every head's key and value of every token has its own.
    Int8,
}

impl KvDtype {
    pub const ALL: [Self; Self::COUNT] = [Self::F32, Self::Bf16, Self::Int8];
    pub(crate) const COUNT: usize = 3;

    /// Of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    /// Of what is kept of a vector besides its values.
    pub const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int8 => 4,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }
}

/// What a pool keeps of each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvContent {
    /// A key and a value for each KV head, `head_dim` wide both.
    KeysAndValues,
    /// One vector for each KV head that is both: the value is a prefix of the key (latent attention). The last elements of
    /// the key are its rotated part.
    Latents { rope_dim: u32 },
}

impl KvContent {
    /// Vectors of each KV head of each token that have a scale of their own, in types that have scales: key and value, or
    /// a latent's two parts.
    const SCALED_VECTORS: usize = 2;
}

/// Shape of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvPoolLayout {
    /// Arrangement within a slice; two pools exchange bytes as they are only if it is equal.
    pub format: &'static str,
    /// Elements of a token's vectors for one KV head, all of them together, with what fills them up.
    pub stored_dim: u32,
    pub content: KvContent,
    pub dtype: KvDtype,
    pub block_tokens: u32,
    pub layers: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Blocks in each layer.
    pub blocks: u32,
}

impl KvPoolLayout {
    /// Bytes of one block of one layer: all that is kept of `block_tokens` tokens.
    pub fn slice_bytes(&self) -> usize {
        let head = self.stored_dim as usize * self.dtype.bytes()
            + KvContent::SCALED_VECTORS * self.dtype.scale_bytes();
        self.block_tokens as usize * self.kv_heads as usize * head
    }

    pub fn total_bytes(&self) -> usize {
        self.slice_bytes() * self.blocks as usize * self.layers as usize
    }

    /// Blocks that `tokens` tokens occupy.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }
}

/// The memory of a pool, taken from the system as blocks are first written. Freed when the last `Arc` to it goes.
#[derive(Debug)]
pub struct KvPool {
    layout: KvPoolLayout,
    base: NonNull<u8>,
    /// Owns what `base` points to.
    _memory: MmapMut,
    /// What that is a mapping of, where the system has such files.
    file: Option<Arc<File>>,
}

// SAFETY: the pool is plain memory; who may touch which block when is the engine's block accounting (see the module).
unsafe impl Send for KvPool {}
// SAFETY: as above; `&KvPool` gives raw pointers only, and dereferencing those is the caller's own unsafe step.
unsafe impl Sync for KvPool {}

impl KvPool {
    /// Maps zeroed memory for `layout`.
    pub fn allocate(layout: KvPoolLayout) -> Result<Self, RuntimeError> {
        let bytes = layout.total_bytes();
        let exhausted = || RuntimeError::KvPool { bytes };
        // The system refuses more than it could ever give, but of a file's memory it takes any size.
        let private = MmapMut::map_anon(bytes.max(1)).map_err(|_| exhausted())?;
        let (mut memory, file) = match map_shareable(bytes.max(1)) {
            Ok((memory, file)) => (memory, Some(Arc::new(file))),
            Err(error) => {
                tracing::debug!(%error, "the KV pool cannot be shared with other processes");
                (private, None)
            }
        };
        let base = NonNull::new(memory.as_mut_ptr()).ok_or_else(exhausted)?;
        Ok(Self { layout, base, _memory: memory, file })
    }

    /// The file that the pool is a mapping of, from its start, so that other processes of the host can be let read it.
    pub fn file(&self) -> Option<&Arc<File>> {
        self.file.as_ref()
    }

    pub fn layout(&self) -> &KvPoolLayout {
        &self.layout
    }

    /// Start of the pool; `layout().total_bytes()` bytes from here are the pool's.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Offset in bytes of a slice from [`Self::base`]. Panics if layer or block lies outside the pool.
    pub fn slice_offset(&self, layer: u32, block: BlockId) -> usize {
        assert!(layer < self.layout.layers && block.0 < self.layout.blocks, "slice outside the KV pool");
        (layer as usize * self.layout.blocks as usize + block.0 as usize) * self.layout.slice_bytes()
    }

    /// Copies a block's slices of all layers over another's. Panics if a block lies outside the pool.
    ///
    /// # Safety
    /// Nobody writes `from` and nobody touches `to` meanwhile.
    pub unsafe fn copy_block(&self, from: BlockId, to: BlockId) {
        if from == to {
            return;
        }
        for layer in 0..self.layout.layers {
            let (from, to) = (self.slice_offset(layer, from), self.slice_offset(layer, to));
            // SAFETY: `slice_offset` gives whole slices within the pool, and two of different blocks do not overlap; the
            // caller keeps others away.
            unsafe {
                let base = self.base.as_ptr();
                base.add(to).copy_from_nonoverlapping(base.add(from), self.layout.slice_bytes());
            }
        }
    }
}

/// Memory that is a file's, taken from the system as it is first written.
fn map_shareable(bytes: usize) -> std::io::Result<(MmapMut, File)> {
    let file = File::from(memfd_create("baton-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(bytes as u64)?;
    // SAFETY: the file has no name and is this pool's own; whoever is lent it can neither shrink nor write it (kvtransfer
    // seals it first), and the pool is reached by raw pointers only.
    let memory = unsafe { MmapMut::map_mut(&file)? };
    Ok((memory, file))
}
