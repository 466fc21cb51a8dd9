//! What is known of the model before its weights are read, and what follows from it: the spec that the controller is
//! told, the engine's limits, the layout of the KV cache; and the reading of the weights.

use std::{sync::Arc, time::SystemTime};

use baton_checkpoint::{Checkpoint, Dtype, ModelRoot};
use baton_kvtransfer::{HANDOFF_PROTOCOLS, KvLayout};
use baton_proto::{InstanceId, InstanceSpec, KvLayoutSpec, ModelIdentity};
use baton_runtime::{DeviceKind, Executor, KvPoolLayout, LoadOptions};
use tokio::sync::mpsc;

use super::{incarnation, listeners::Endpoints};
use crate::{
    config::{HandoffConfig, ModelConfig, ServerConfig},
    engine::scheduler::Limits,
    error::ServerError,
    handoff::kv_layout,
    inference::dispatch::InstanceFacts,
    role::Event,
};

/// What is known of the model before its weights are read.
pub(super) struct Plan {
    checkpoint: Arc<Checkpoint>,
    options: LoadOptions,
    layout: KvPoolLayout,
    revision: String,
}

impl Plan {
    pub(super) async fn read(config: &ServerConfig) -> Result<Self, ServerError> {
        let ModelConfig { path, root, .. } = config.model.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let root = ModelRoot::at(&root).map_err(ServerError::ModelRoot)?;
            let checkpoint = Checkpoint::open_under(&root, &path)?;
            let revision = checkpoint.revision()?;
            Ok::<_, ServerError>((checkpoint, revision))
        });
        let (checkpoint, revision) = opened.await.map_err(|_| ServerError::LoadPanicked)??;
        let mut options = LoadOptions {
            device: DeviceKind::Cpu,
            threads: config.runtime.threads,
            kv_dtype: config.runtime.kv_dtype()?,
            exact_bf16: config.runtime.exact_bf16,
            packed_copies: Some(config.runtime.packed_copies.clone())
                .filter(|folder| !folder.as_os_str().is_empty()),
            kv_blocks: 1,
            max_batch_tokens: config.runtime.max_batch_tokens as usize,
        };
        let one_block = baton_runtime::kv_layout(checkpoint.config(), &options);
        config.runtime.check_batch(one_block.block_tokens)?;
        options.kv_blocks = config.runtime.blocks(one_block.total_bytes() as u64)?;
        let layout = KvPoolLayout { blocks: options.kv_blocks, ..one_block };
        let plan = Self { checkpoint: Arc::new(checkpoint), options, layout, revision };
        let (pool_tokens, context) = (plan.pool_tokens(), plan.context_tokens(config));
        if pool_tokens < u64::from(context) {
            tracing::warn!(
                pool_tokens,
                context,
                "the KV cache holds less than one full context, so that less is offered; raise runtime.kv_cache_bytes"
            );
        }
        Ok(plan)
    }

    /// What peers must have, too: the model, computed in the same way.
    pub(super) fn kv_layout(&self) -> KvLayout {
        let in_bf16 = || self.checkpoint.tensors().any(|(_, tensor)| tensor.dtype == Dtype::Bf16);
        let exactly = self.options.exact_bf16 && in_bf16();
        kv_layout(&self.layout, &format!("{}{}", self.revision, if exactly { ", bf16 as it is" } else { "" }))
    }

    /// As the controller and the coordinators are told it: with the class of those that it can hand caches to.
    fn announced_layout(&self, handoff: &HandoffConfig) -> KvLayoutSpec {
        let layout = self.kv_layout();
        let maps = handoff.transports.iter().any(|transport| ["tcp", "shm"].contains(&transport.as_str()));
        let class = match (maps, handoff.convert) {
            (false, _) => layout.fingerprint(),
            (true, false) => layout.handover_class(),
            (true, true) => layout.converting_class(),
        };
        KvLayoutSpec { class, ..KvLayoutSpec::from(&layout) }
    }

    fn pool_tokens(&self) -> u64 {
        u64::from(self.layout.blocks) * u64::from(self.layout.block_tokens)
    }

    /// What clients are told: a context that is never refused for want of blocks.
    fn offered_context_tokens(&self, config: &ServerConfig) -> u32 {
        self.context_tokens(config).min(u32::try_from(self.pool_tokens()).unwrap_or(u32::MAX))
    }

    fn context_tokens(&self, config: &ServerConfig) -> u32 {
        let own = self.checkpoint.config().context_tokens;
        match config.runtime.max_context_tokens {
            0 => own,
            limit => own.min(limit),
        }
    }

    pub(super) fn facts(&self, config: &ServerConfig) -> Result<InstanceFacts, ServerError> {
        let name = &config.model.name;
        Ok(InstanceFacts {
            instance_id: InstanceId::new(config.instance_id.as_str())?,
            incarnation: incarnation(SystemTime::now()),
            model: if name.is_empty() { self.checkpoint.name().to_owned() } else { name.clone() },
            vocabulary: self.checkpoint.config().vocabulary,
            context_tokens: self.context_tokens(config),
        })
    }

    pub(super) fn limits(&self, config: &ServerConfig) -> Limits {
        Limits {
            max_batch_tokens: config.runtime.max_batch_tokens,
            max_sequences: config.runtime.max_sequences,
            max_waiting: config.runtime.max_waiting,
            context_tokens: self.context_tokens(config),
            block_tokens: self.layout.block_tokens,
            prefix_cache: config.runtime.prefix_cache,
        }
    }

    pub(super) fn spec(
        &self,
        config: &ServerConfig,
        facts: &InstanceFacts,
        endpoints: &Endpoints,
    ) -> InstanceSpec {
        InstanceSpec {
            id: facts.instance_id.clone(),
            incarnation: facts.incarnation,
            group: config.group.clone(),
            device: "cpu".into(),
            device_count: 1,
            model: ModelIdentity {
                name: facts.model.clone(),
                revision: self.revision.clone(),
                architecture: self.checkpoint.config().architecture.name().to_owned(),
                vocabulary_size: facts.vocabulary,
            },
            context_tokens: self.offered_context_tokens(config),
            kv_layout: self.announced_layout(&config.handoff),
            inference_endpoint: endpoints.grpc.clone(),
            handoff_endpoint: endpoints.grpc.clone(),
            metrics_endpoint: endpoints.metrics.clone(),
            transports: config.handoff.transports.clone(),
            handoff_protocols: HANDOFF_PROTOCOLS,
            labels: config.labels.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    /// Reads the weights, on a thread of its own; tells the duty how far it is.
    pub(super) async fn load(&self, events: mpsc::Sender<Event>) -> Result<Box<dyn Executor>, ServerError> {
        let (checkpoint, options) = (self.checkpoint.clone(), self.options.clone());
        let loading = tokio::task::spawn_blocking(move || {
            let mut told = 0;
            let mut progress = |done: u64, total: u64| {
                let permille = (done.saturating_mul(1000) / total.max(1)).min(1000) as u32;
                if permille > told {
                    told = permille;
                    // Progress is for show: what does not fit into the queue is left out.
                    let _ = events.try_send(Event::Progress { permille });
                }
            };
            baton_runtime::load(&checkpoint, &options, &mut progress)
        });
        Ok(loading.await.map_err(|_| ServerError::LoadPanicked)??)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layout that a server over the tiny model of this name tells.
    async fn layout_of(tiny: &str, exact_bf16: bool) -> KvLayout {
        let tiny = format!("{}/runtime/tests/reference/tiny/{tiny}", env!("CARGO_MANIFEST_DIR"));
        let mut config = ServerConfig::default();
        config.model.path = tiny.into();
        config.runtime.exact_bf16 = exact_bf16;
        Plan::read(&config).await.expect("the model reads").kv_layout()
    }

    #[tokio::test]
    async fn those_that_round_bf16_weights_do_not_pair_with_those_that_do_not() {
        let (rounds, exact) =
            (layout_of("hf-bf16-mistral", false).await, layout_of("hf-bf16-mistral", true).await);
        assert!(rounds.compatible_with(&exact).is_err() && rounds.fingerprint() != exact.fingerprint());
        let (one, other) =
            (layout_of("hf-f32-ratio1-tied", false).await, layout_of("hf-f32-ratio1-tied", true).await);
        assert_eq!(one.compatible_with(&other), Ok(()), "without bf16 weights there is no difference");
    }

    #[tokio::test]
    async fn a_class_is_of_those_that_map_each_others_caches() {
        let mut config = ServerConfig::default();
        config.model.path =
            format!("{}/runtime/tests/reference/tiny/hf-f32-ratio1-tied", env!("CARGO_MANIFEST_DIR")).into();
        config.runtime.kv_dtype = "int8".into();
        let plan = Plan::read(&config).await.expect("the model reads");
        let layout = plan.kv_layout();
        for (transports, convert, class) in [
            (["rdma", "tcp"], false, layout.handover_class()),
            (["rdma", "tcp"], true, layout.converting_class()),
            (["rdma", "rdma"], true, layout.fingerprint()),
        ] {
            let transports = transports.map(str::to_owned).into();
            let handoff = HandoffConfig { transports, convert, ..HandoffConfig::default() };
            assert_eq!(plan.announced_layout(&handoff).handover_class(), class, "{handoff:?}");
        }
    }
}
