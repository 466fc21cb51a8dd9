//! From a checkpoint on disk to an [`Executor`]: chooses the device.

use std::path::PathBuf;

use baton_checkpoint::{Checkpoint, ModelConfig};

use crate::{
    Executor, KvDtype, KvPoolLayout, RuntimeError,
    devices::cpu::{self, CpuDevice, Found, Place, Store},
    models::Decoder,
};

/// Which hardware runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceKind {
    #[default]
    Cpu,
}

/// How a model is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    pub device: DeviceKind,
    /// Compute threads, the calling one included; 0 for one a core.
    pub threads: usize,
    pub kv_dtype: KvDtype,
    /// Whether weights in bf16 are kept and multiplied as they are, in f32. If not, every 32 of them become multiples of
    /// 12 bits of one scale: four fifths of the memory, and products in integers.
    pub exact_bf16: bool,
    /// The folder where packed weights are kept on disk, if they are: loading maps them from then on, and all processes
    /// that do so share their memory. Copies that were not used for 30 days go when another is written.
    pub packed_copies: Option<PathBuf>,
    /// Blocks of the KV pool, in each layer.
    pub kv_blocks: u32,
    /// Most tokens of one forward pass.
    pub max_batch_tokens: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            device: DeviceKind::Cpu,
            threads: 0,
            kv_dtype: KvDtype::Bf16,
            exact_bf16: false,
            packed_copies: None,
            kv_blocks: 1024,
            max_batch_tokens: 512,
        }
    }
}

/// The KV pool's layout that [`load`] will allocate; known before any weight is read.
pub fn kv_layout(config: &ModelConfig, options: &LoadOptions) -> KvPoolLayout {
    match options.device {
        DeviceKind::Cpu => cpu::kv_layout(config, options),
    }
}

/// Loads a model: packs its weights, allocates its KV pool, starts its threads.
///
/// `progress(done_bytes, total_bytes)` counts bytes of the checkpoint's tensors, never goes back and ends at the total. The
/// checkpoint may be dropped afterwards.
pub fn load(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Box<dyn Executor>, RuntimeError> {
    let positive = "at least 1";
    if options.kv_blocks == 0 {
        return Err(RuntimeError::Option { option: "kv_blocks", found: 0, wanted: positive });
    }
    if options.max_batch_tokens == 0 {
        return Err(RuntimeError::Option { option: "max_batch_tokens", found: 0, wanted: positive });
    }
    match options.device {
        DeviceKind::Cpu => {
            cpu::threads_of(options)?;
            let mut most = 0;
            let mut forwards = |done: u64, total| {
                most = most.max(done);
                progress(most, total);
            };
            let load = |store| {
                let device = CpuDevice::new(checkpoint.config(), options, store)?;
                Decoder::load(device, checkpoint, options, &mut forwards)
            };
            Ok(Box::new(load_with_copy(checkpoint, options, load)?))
        }
    }
}

/// Loads from the packed copy if there is to be one. One that is not there is written, and then used; one that is damaged is
/// written anew. Where none can be, weights are in this process's memory.
fn load_with_copy(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    mut load: impl FnMut(Store) -> Result<Decoder<CpuDevice>, RuntimeError>,
) -> Result<Decoder<CpuDevice>, RuntimeError> {
    let Some(folder) = &options.packed_copies else { return load(Store::default()) };
    let place = Place::new(folder, checkpoint, options.exact_bf16)?;
    let mut damaged = None;
    // Damaged, written, used: no way is longer.
    for _ in 0..3 {
        match place.find(damaged) {
            Ok(Found::Copy(reader)) => {
                let number = reader.number();
                match load(reader.into()) {
                    Err(error @ RuntimeError::PackedCopy { .. }) => {
                        tracing::warn!("{error}; it is written anew");
                        damaged = Some(number);
                    }
                    result => return result,
                }
            }
            Ok(Found::Nothing(writer)) => {
                let decoder = load(writer.into())?;
                if !decoder.device().wrote_copy() {
                    return Ok(decoder);
                }
            }
            Err(error) => {
                tracing::warn!("no packed copy {} is kept: {error}", place.path().display());
                break;
            }
        }
    }
    load(Store::default())
}
