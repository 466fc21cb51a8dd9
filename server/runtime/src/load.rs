//! From a checkpoint on disk to an [`Executor`]: chooses the device.

use baton_checkpoint::{Checkpoint, ModelConfig};

use crate::{
    Executor, KvDtype, KvPoolLayout, RuntimeError,
    devices::cpu::{self, CpuDevice},
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
/// `progress(done_bytes, total_bytes)` counts bytes of the checkpoint's tensors and ends at the total. The checkpoint
/// may be dropped afterwards.
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
            let device = CpuDevice::new(checkpoint.config(), options)?;
            Ok(Box::new(Decoder::load(device, checkpoint, options, progress)?))
        }
    }
}
