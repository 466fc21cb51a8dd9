//! A KV pool of a peer, and the node over it.

use std::{fs::File, net::TcpListener, ptr::NonNull, sync::Arc, time::Duration};

use baton_kvtransfer::{
    DataPortConfig, KvLayout, KvNode, Limits, NodeConfig, Plaintext, Region, TransportConfig, TransportKind,
};
use baton_proto::{Incarnation, InstanceId};
use memmap2::MmapMut;
use rustix::fs::{MemfdFlags, memfd_create};
use tokio_util::sync::CancellationToken;

use crate::{error::BenchError, protocol::Setup};

const LEASE: Duration = Duration::from_secs(10);

/// A region as a server's: a file's memory, so that it can be shared, all of it paged in.
fn region(bytes: u64) -> Result<Region, BenchError> {
    let failed = || BenchError::io("make a KV pool");
    let file = memfd_create("kv", MemfdFlags::ALLOW_SEALING).map_err(|error| failed()(error.into()))?;
    let file = File::from(file);
    file.set_len(bytes).map_err(failed())?;
    // SAFETY: nobody but this process, and those that its node lends it to for reading, has the file.
    let mut map = unsafe { MmapMut::map_mut(&file) }.map_err(failed())?;
    map.fill(1);
    let (base, len) = (NonNull::from(&mut map[..]).cast(), map.len());
    // SAFETY: the mapping lives in the owner, and this program touches it through the node only.
    Ok(unsafe { Region::new(Arc::new(map), base, len) }.backed_by(Arc::new(file)))
}

/// The one place that knows how a node is configured.
pub(crate) fn node(setup: &Setup, stop: CancellationToken) -> Result<KvNode, BenchError> {
    let layout = KvLayout {
        model_revision: "bench".into(),
        format: "bench".into(),
        dtype: "f32".into(),
        block_tokens: 1,
        layers: setup.layers,
        kv_heads: 1,
        head_dim: 1,
        rope_dim: 0,
        tensor_parallel: 1,
        slice_bytes: setup.slice_bytes,
    };
    let transport = match TransportKind::from_name(&setup.transport) {
        Some(TransportKind::Shm) => TransportConfig::Shm,
        _ => TransportConfig::Tcp { connections: 4 },
    };
    let listener = TcpListener::bind("127.0.0.1:0").map_err(BenchError::io("listen"))?;
    let config = NodeConfig {
        instance_id: instance(&setup.name)?,
        incarnation: Incarnation(1),
        layout,
        region: region(setup.pool_bytes())?,
        blocks: setup.blocks,
        data_port: DataPortConfig::new(listener),
        transports: vec![transport],
        dial: Arc::new(Plaintext),
        secret: None,
        convert: false,
        lease: LEASE,
        limits: Limits::for_lease(LEASE),
        reclaim: Arc::new(|_| {}),
    };
    Ok(KvNode::start(config, stop)?)
}

pub(crate) fn instance(name: &str) -> Result<InstanceId, BenchError> {
    InstanceId::new(name).map_err(|error| BenchError::said("a peer's name", error.to_string()))
}
