//! A model that is nothing but its cache: the logits after a sequence are a hash of what lies in the KV pool for each of
//! its positions, in every layer. A slice that is missing, misplaced, stale or another sequence's changes every token
//! from there on, so right tokens prove right bookkeeping of blocks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_runtime::{
    BlockId, Executor, KvContent, KvDtype, KvPool, KvPoolLayout, Logits, ModelShape, RuntimeError,
    SequenceChunk,
};

pub const VOCABULARY: u32 = 64;
pub const CONTEXT_TOKENS: u32 = 256;
pub const BLOCK_TOKENS: u32 = 4;
pub const LAYERS: u32 = 3;

/// Misbehaviour on demand.
#[derive(Debug, Default)]
pub struct Faults {
    /// The next batch fails, for want of memory.
    pub error: AtomicBool,
    /// Every batch fails.
    pub broken: AtomicBool,
    /// The next batch panics when it has written all but its last layer.
    pub panic: AtomicBool,
    /// The next logits are NaN.
    pub nan: AtomicBool,
    /// Whether a wire lies before the instance's data port.
    pub has_wire: bool,
    /// Not 0: the wire before the instance's data port damages a byte of what comes over it next, then sets this to 0.
    /// A number of its own each time.
    pub wire: AtomicU64,
    /// How long a batch takes.
    pub batch_micros: AtomicU64,
}

pub struct HashModel {
    shape: ModelShape,
    pool: Arc<KvPool>,
    logits: Vec<f32>,
    faults: Arc<Faults>,
}

pub fn layout(blocks: u32) -> KvPoolLayout {
    KvPoolLayout {
        format: "hash",
        content: KvContent::KeysAndValues,
        dtype: KvDtype::F32,
        block_tokens: BLOCK_TOKENS,
        layers: LAYERS,
        kv_heads: 1,
        head_dim: 4,
        stored_dim: 8,
        blocks,
    }
}

fn mix(state: u64, value: u64) -> u64 {
    let mut z = state.rotate_left(5) ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// What a layer keeps of a token.
fn cached(layer: u32, position: u32, token: u32) -> u64 {
    mix(mix(u64::from(layer), u64::from(position)), u64::from(token))
}

fn logits_of(state: u64, out: &mut Vec<f32>) {
    out.extend((0..VOCABULARY).map(|token| (mix(state, u64::from(token)) % 1000) as f32 / 100.0));
}

/// The logits after `tokens`, computed without a pool.
pub fn reference_logits(tokens: &[u32]) -> Vec<f32> {
    let mut state = 0;
    for layer in 0..LAYERS {
        for (position, &token) in tokens.iter().enumerate() {
            state = mix(state, cached(layer, position as u32, token));
        }
    }
    let mut logits = Vec::new();
    logits_of(state, &mut logits);
    logits
}

impl HashModel {
    pub fn new(blocks: u32, faults: Arc<Faults>) -> Self {
        Self {
            shape: ModelShape { layers: LAYERS, vocabulary: VOCABULARY, context_tokens: CONTEXT_TOKENS },
            pool: Arc::new(KvPool::allocate(layout(blocks)).expect("a small pool")),
            logits: Vec::new(),
            faults,
        }
    }

    fn place(&self, layer: u32, blocks: &[BlockId], position: u32) -> *mut u64 {
        let block = blocks[(position / BLOCK_TOKENS) as usize];
        let in_slice =
            (position % BLOCK_TOKENS) as usize * self.pool.layout().slice_bytes() / BLOCK_TOKENS as usize;
        let offset = self.pool.slice_offset(layer, block) + in_slice;
        // SAFETY: the offset lies within the pool; slices and shares of a token are multiples of 8 bytes, so it is
        // aligned as the pool is.
        unsafe { self.pool.base().as_ptr().add(offset).cast() }
    }
}

impl Executor for HashModel {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn kv_pool(&self) -> &Arc<KvPool> {
        &self.pool
    }

    fn max_batch_tokens(&self) -> usize {
        1024
    }

    fn forward(
        &mut self,
        batch: &[SequenceChunk<'_>],
        on_layer: &mut dyn FnMut(u32),
    ) -> Result<Logits<'_>, RuntimeError> {
        std::thread::sleep(Duration::from_micros(self.faults.batch_micros.load(Ordering::Relaxed)));
        if self.faults.error.swap(false, Ordering::Relaxed) || self.faults.broken.load(Ordering::Relaxed) {
            return Err(RuntimeError::Activations { bytes: 1 << 40 });
        }
        for layer in 0..LAYERS {
            let panics = layer == LAYERS - 1 && self.faults.panic.swap(false, Ordering::Relaxed);
            assert!(!panics, "the model was told to panic");
            for chunk in batch {
                for (position, &token) in (chunk.start..).zip(chunk.tokens) {
                    let value = cached(layer, position, token);
                    // SAFETY: the engine gave this block to this sequence alone.
                    unsafe { self.place(layer, chunk.blocks, position).write(value) };
                }
            }
            on_layer(layer);
        }
        self.logits.clear();
        for chunk in batch.iter().filter(|chunk| chunk.logits) {
            let mut state = 0;
            for layer in 0..LAYERS {
                for position in 0..chunk.start + chunk.tokens.len() as u32 {
                    // SAFETY: as above; a transport has let go of the block before the engine runs the sequence.
                    state = mix(state, unsafe { self.place(layer, chunk.blocks, position).read() });
                }
            }
            logits_of(state, &mut self.logits);
        }
        if !self.logits.is_empty() && self.faults.nan.swap(false, Ordering::Relaxed) {
            self.logits.fill(f32::NAN);
        }
        Ok(Logits::new(&self.logits, VOCABULARY as usize))
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) -> Result<(), RuntimeError> {
        for &(from, to) in copies {
            // SAFETY: the engine lends these blocks to nobody else meanwhile.
            unsafe { self.pool.copy_block(from, to) };
        }
        Ok(())
    }
}
