//! Between the engine and kvtransfer: begins transfers for sequences, tells the engine when they end.
//!
//! [`Transfers`] is called by the engine's thread and never blocks it. Each transfer has one task, which owns it until
//! no transport touches its blocks any more and then sends the engine exactly one command: `Received` for a cache that
//! arrived whole, `TransferEnded` for everything else. Blocks stay with their sequence all the while; that command is
//! the fence after which the engine may free or use them.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_kvtransfer::{
    Direction, ExpectSpec, FirstTokens, Incoming, KvLayout, KvNode, OfferSpec, Outgoing, Progress, Region,
    Sealed, TransferError,
};
use baton_proto::{ApiError, ErrorCode, Incarnation, TransferId};
use baton_runtime::{BlockId, KvContent, KvPool, KvPoolLayout};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tokio_util::task::TaskTracker;

use crate::{
    engine::{
        scheduler::{Expect, Offer},
        sequence::SequenceId,
        thread::Command,
    },
    metrics::HandoffMetrics,
};

/// The pool's layout as peers compare it.
pub fn kv_layout(pool: &KvPoolLayout, model_revision: &str) -> KvLayout {
    KvLayout {
        model_revision: model_revision.to_owned(),
        format: pool.format.to_owned(),
        dtype: pool.dtype.name().to_owned(),
        block_tokens: pool.block_tokens,
        layers: pool.layers,
        kv_heads: pool.kv_heads,
        head_dim: pool.head_dim,
        rope_dim: match pool.content {
            KvContent::KeysAndValues => 0,
            KvContent::Latents { rope_dim } => rope_dim,
        },
        tensor_parallel: 1,
        slice_bytes: pool.slice_bytes() as u64,
    }
}

/// The pool's memory, for the transports.
pub fn kv_region(pool: &Arc<KvPool>) -> Region {
    let owner: Arc<dyn std::any::Any + Send + Sync> = pool.clone();
    // SAFETY: the pool's memory lives as long as the pool, which the region keeps. Blocks are lent to transfers by
    // sequences alone: a receiving sequence is not in the batch, so nothing reads or writes its blocks, and a sending
    // one reports a block of a layer ready only once the model has written all of it (chunks end at block borders) and
    // does not write it again. That holds for blocks of a shared prefix, which were final before, and for the last,
    // partly filled block of a prompt, since a prefill leg never decodes and so appends nothing to it. Neither frees its
    // blocks before the transfer's fence (see `engine::sequence`, Closing).
    let region = unsafe { Region::new(owner, pool.base(), pool.layout().total_bytes()) };
    match pool.file() {
        Some(file) => region.backed_by(file.clone()),
        None => region,
    }
}

/// Whether a transfer that is closed would still have been wanted.
type Needed = bool;

/// What the engine's thread holds of an open transfer.
enum Open {
    Outgoing { progress: Progress, close: oneshot::Sender<Needed> },
    Incoming { close: oneshot::Sender<Needed> },
}

/// See the module.
pub struct Transfers {
    node: KvNode,
    open: HashMap<SequenceId, Open>,
    /// Decode legs without an offer; dropping the sender ends the watch.
    watched: HashMap<SequenceId, oneshot::Sender<()>>,
    engine: mpsc::Sender<Command>,
    block_tokens: u32,
    layers: u32,
    /// A transfer whose request has no deadline ends after this long.
    timeout: Duration,
    tasks: TaskTracker,
    runtime: Handle,
    metrics: HandoffMetrics,
}

impl Transfers {
    /// `engine` is the engine's own command queue; the transfers' tasks go to `tasks`, on `runtime`.
    pub fn new(
        node: KvNode,
        pool: &KvPoolLayout,
        engine: mpsc::Sender<Command>,
        timeout: Duration,
        tasks: TaskTracker,
        runtime: Handle,
        metrics: HandoffMetrics,
    ) -> Self {
        Self {
            node,
            open: HashMap::new(),
            watched: HashMap::new(),
            engine,
            block_tokens: pool.block_tokens,
            layers: pool.layers,
            timeout,
            tasks,
            runtime,
            metrics,
        }
    }

    /// Starts to send a sequence's cache. After an error there is no transfer.
    pub fn offer(&mut self, id: SequenceId, offer: Offer) -> Result<(), ApiError> {
        let Offer { to, prompt_tokens, prompt_digest, blocks, cached, priority, deadline } = offer;
        let outgoing = self.node.offer(OfferSpec {
            id: to.transfer,
            peer: to.endpoint,
            receiver: to.receiver,
            receiver_incarnation: incarnation(to.receiver_incarnation),
            prompt_tokens,
            prompt_digest,
            blocks: indices(&blocks, prompt_tokens.div_ceil(self.block_tokens)),
            priority,
            deadline: self.deadline(deadline),
        })?;
        let (close, closed) = oneshot::channel();
        let progress = outgoing.progress();
        (0..self.layers).for_each(|layer| progress.ready(layer, 0..cached));
        self.open.insert(id, Open::Outgoing { progress, close });
        let (engine, metrics) = (self.engine.clone(), self.metrics.clone());
        self.tasks.spawn_on(
            async move {
                let result = send(outgoing, closed, &metrics).await;
                // A closed queue means that the engine is gone, and its blocks with it.
                let _ =
                    engine.send(Command::TransferEnded { id, result: result.map_err(ApiError::from) }).await;
            },
            &self.runtime,
        );
        Ok(())
    }

    /// Sends `Command::Offered` once a transfer is offered; nothing after [`Self::unwatch`]. A leg without a deadline is
    /// given up after `handoff.timeout`; the deadline of one that has it is the engine's to keep.
    pub fn watch(&mut self, id: SequenceId, transfer: TransferId, deadline: Option<Instant>) {
        let (unwatch, unwatched) = oneshot::channel::<()>();
        self.watched.insert(id, unwatch);
        let (give_up, offered) = (self.deadline(None), self.node.offered(transfer));
        let engine = self.engine.clone();
        self.tasks.spawn_on(
            async move {
                let result = tokio::select! {
                    biased;
                    _ = unwatched => return,
                    () = offered => Ok(()),
                    () = tokio::time::sleep_until(give_up.into()), if deadline.is_none() => {
                        let message = "the prefill instance did not offer the cache in time";
                        Err(ApiError::new(ErrorCode::HandoffFailed, message))
                    }
                };
                let _ = engine.send(Command::Offered { id, result }).await;
            },
            &self.runtime,
        );
    }

    /// The leg has been told, or has ended.
    pub fn unwatch(&mut self, id: SequenceId) {
        self.watched.remove(&id);
    }

    /// Lets a sequence's cache arrive, but for what it holds. After an error there is no transfer.
    pub fn expect(&mut self, id: SequenceId, expect: Expect) -> Result<(), ApiError> {
        let Expect { from, prompt_tokens, prompt_digest, blocks, held, deadline } = expect;
        let incoming = self.node.expect(ExpectSpec {
            id: from.transfer,
            sender: from.sender,
            sender_incarnation: incarnation(from.sender_incarnation),
            prompt_tokens,
            prompt_digest,
            blocks: indices(&blocks, prompt_tokens.div_ceil(self.block_tokens)),
            held: (0..held).collect(),
            deadline: self.deadline(deadline),
        })?;
        let (close, closed) = oneshot::channel();
        self.open.insert(id, Open::Incoming { close });
        let (engine, metrics) = (self.engine.clone(), self.metrics.clone());
        self.tasks.spawn_on(
            async move {
                let (command, received) = match receive(incoming, closed).await {
                    Ok(sealed) => (Command::Received { id, sealed: sealed.clone() }, Some(sealed)),
                    Err(error) => (Command::TransferEnded { id, result: Err(error.into()) }, None),
                };
                let _ = engine.send(command).await;
                // Told after it: the sequence waits for nothing else.
                if let Some(Sealed { slices, bytes, took, .. }) = received {
                    metrics.received(took);
                    tracing::debug!(slices, bytes, ?took, "cache received");
                }
            },
            &self.runtime,
        );
        Ok(())
    }

    /// Tells the sender of a transfer that it will not be expected.
    pub fn refuse(&self, transfer: TransferId, reason: ApiError) {
        self.node.refuse(transfer, reason);
    }

    /// Where to report the layers of a sequence whose cache goes out.
    pub fn progress(&self, id: SequenceId) -> Option<Progress> {
        match self.open.get(&id)? {
            Open::Outgoing { progress, .. } => Some(progress.clone()),
            Open::Incoming { .. } => None,
        }
    }

    /// Every layer of every block of an outgoing transfer is reported.
    pub fn seal(&self, id: SequenceId, first_tokens: FirstTokens) {
        if let Some(progress) = self.progress(id) {
            progress.seal(first_tokens);
        }
    }

    /// Ends a transfer early. Its command follows.
    pub fn close(&mut self, id: SequenceId, needed: Needed) {
        if let Some(Open::Outgoing { close, .. } | Open::Incoming { close }) = self.open.remove(&id) {
            let _ = close.send(needed);
        }
    }

    /// A transfer's command has arrived. Says which way it went, unless it was [closed](Self::close).
    pub fn ended(&mut self, id: SequenceId) -> Option<Direction> {
        Some(match self.open.remove(&id)? {
            Open::Outgoing { .. } => Direction::Outgoing,
            Open::Incoming { .. } => Direction::Incoming,
        })
    }

    /// A request's own deadline is what its client bargained for; a transfer does not undercut it, since its time
    /// counts queueing and computing too.
    fn deadline(&self, of_request: Option<Instant>) -> Instant {
        of_request.unwrap_or_else(|| Instant::now() + self.timeout)
    }
}

/// Pool indices of the first `count` blocks.
fn indices(blocks: &[BlockId], count: u32) -> Vec<u32> {
    blocks.iter().take(count as usize).map(|block| block.0).collect()
}

/// 0 on the wire = any.
fn incarnation(of: Incarnation) -> Option<Incarnation> {
    (of.0 != 0).then_some(of)
}

async fn send(
    mut outgoing: Outgoing,
    closed: oneshot::Receiver<Needed>,
    metrics: &HandoffMetrics,
) -> Result<(), TransferError> {
    let result = tokio::select! {
        biased;
        result = outgoing.finished() => result,
        needed = closed => {
            let why = "the prefill leg has ended";
            if needed == Ok(false) {
                outgoing.withdraw("the sequence ended with its first token");
            } else {
                outgoing.cancel(why);
            }
            Err(TransferError::Cancelled(why.into()))
        }
    };
    outgoing.close().await;
    let stats = result?;
    metrics.handed_off(stats.ready_to_released);
    tracing::debug!(slices = stats.slices, bytes = stats.bytes, took = ?stats.took, "cache handed on");
    Ok(())
}

async fn receive(mut incoming: Incoming, closed: oneshot::Receiver<Needed>) -> Result<Sealed, TransferError> {
    let result = tokio::select! {
        biased;
        result = incoming.sealed() => result,
        _ = closed => {
            incoming.cancel("the decode leg has ended");
            Err(TransferError::Cancelled("the decode leg has ended".into()))
        }
    };
    incoming.close().await;
    result
}
