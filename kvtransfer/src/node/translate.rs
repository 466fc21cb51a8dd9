//! Taking slices in from a peer that lays its cache out otherwise: in other blocks, another arrangement, another type.
//!
//! What travels, is counted and is summed are the sender's slices. Each comes into staging memory; once its sum is right,
//! what the plan says of it is carried out into this node's own blocks, and only then does it count as landed. The claim
//! is open all the while, so the fence of an abort holds here as anywhere. Blocks that are held already are left alone.
//!
//! A [`Translation`] is made when a peer that has proven itself comes with another layout ([`super::service`]), and
//! shared by all peers of that layout. A [`Translated`] stands before a transfer for one frame (`Inbox::find`).

use std::{
    io::IoSliceMut,
    ptr::NonNull,
    sync::{Arc, OnceLock, Weak},
};

use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::{
    Node,
    inbound::Inbound,
    staging::{Staged, Staging},
    translation::Translation,
};
use crate::{
    KvLayout, Slices, TransferError,
    plan::PairPlan,
    session::{Claim, Cut, SliceRun},
    sync::Mutex,
    transport::{DataKey, Landing, Room, Transport},
};

/// Layouts that are mapped at a time. A fleet has one for each kind of sender.
const LAYOUTS: usize = 4;
/// Copies in a period of blocks of one layer, 24 bytes each: what a peer's choice of layout may cost this node.
const MOST_COPIES: u64 = 1 << 19;

/// What a node takes other layouts in with.
#[derive(Debug)]
pub(super) struct Translator {
    /// For as long as a peer has them.
    alive: Mutex<Vec<Weak<Translation>>>,
    /// Held by who lays a plan out: one at a time, as each takes memory, and many peers come with the same.
    laying_out: tokio::sync::Mutex<()>,
    /// Whether values of another type are taken in.
    convert: bool,
    staging: Staging,
}

impl Translator {
    /// `staging_bytes` is `Limits::staging_bytes`.
    pub(super) fn new(convert: bool, staging_bytes: usize) -> Self {
        Self {
            alive: Mutex::default(),
            laying_out: tokio::sync::Mutex::default(),
            convert,
            staging: Staging::new(staging_bytes),
        }
    }

    /// What stands before a transfer of another layout, for one frame of it.
    pub(super) fn before(&self, inbound: Arc<Inbound>, translation: Arc<Translation>) -> Translated {
        Translated { inbound, translation, staging: self.staging.clone(), staged: OnceLock::new() }
    }

    /// Most bytes of staging memory that there were at a time.
    pub(super) fn staging_bytes_peak(&self) -> u64 {
        self.staging.peak()
    }

    fn get(&self, fingerprint: &str) -> Option<Arc<Translation>> {
        self.alive.lock().iter().filter_map(Weak::upgrade).find(|one| one.is_from(fingerprint))
    }

    /// Whether there may be one more.
    fn check_room(&self) -> Result<(), TransferError> {
        let mut alive = self.alive.lock();
        alive.retain(|one| one.strong_count() > 0);
        if alive.len() >= LAYOUTS {
            return Err(TransferError::Limit { what: "KV layouts to map from", limit: LAYOUTS });
        }
        Ok(())
    }

    fn add(&self, made: Translation) -> Arc<Translation> {
        let made = Arc::new(made);
        self.alive.lock().push(Arc::downgrade(&made));
        made
    }
}

impl Node {
    /// How slices of a peer's layout would be taken in; `None` = as they are. Refused if they cannot be, or if that would
    /// change values and is not wanted here. Cheap: the peer has not shown yet who it is.
    pub(super) fn plan_from(&self, sender: &KvLayout) -> Result<Option<PairPlan>, TransferError> {
        let Some(plan) = self.layout.plan_from(sender)? else { return Ok(None) };
        let refuse = |field, why| {
            let (from, to) = (sender.field(field), self.layout.field(field));
            Err(TransferError::CannotReshard { field, from, to, why })
        };
        if plan.converts() && !self.translator.convert {
            return refuse(
                "dtype",
                "that changes values, which the receiver is not set to (handoff.convert)",
            );
        }
        if sender.slice_bytes > self.limits.staging_bytes as u64 {
            return refuse("slice_bytes", "one slice is more than the receiver has memory to map it in");
        }
        if plan.runs() > MOST_COPIES {
            return refuse("format", "it takes too many small copies a block; choose smaller blocks");
        }
        if !self.transports.iter().any(|transport| transport.kind().brings(true)) {
            return refuse(
                "format",
                "only tcp and shm bring slices to be mapped, and the receiver has neither",
            );
        }
        Ok(Some(plan))
    }

    /// Lays a plan out for a peer that has shown who it is.
    pub(super) async fn translation(
        &self,
        sender: &KvLayout,
        plan: PairPlan,
    ) -> Result<Arc<Translation>, TransferError> {
        let fingerprint = sender.fingerprint();
        let _alone = self.translator.laying_out.lock().await;
        if let Some(known) = self.translator.get(&fingerprint) {
            return Ok(known);
        }
        self.translator.check_room()?;
        let laid_out = spawn_blocking(move || plan.expand()).await;
        let expansion = laid_out
            .map_err(|error| TransferError::Io { what: "lay a plan out", reason: error.to_string() })?;
        let cut = Cut {
            sender_tokens: sender.block_tokens,
            own_tokens: self.layout.block_tokens,
            slice_bytes: sender.slice_bytes,
        };
        Ok(self.translator.add(Translation::new(fingerprint, cut, expansion)))
    }
}

/// A transfer whose slices are mapped, for one frame of it.
pub(super) struct Translated {
    inbound: Arc<Inbound>,
    translation: Arc<Translation>,
    staging: Staging,
    /// Room for its run, or why there is none.
    staged: OnceLock<Result<Staged, TransferError>>,
}

impl Translated {
    /// Where a claimed slice is meanwhile.
    fn staged(&self, layer: u32, block: u32) -> Result<(&Slices, u32), TransferError> {
        let none = || TransferError::Invalid("there is no room for what was claimed".into());
        let staged = self.staged.get().ok_or_else(none)?.as_ref().map_err(Clone::clone)?;
        Ok((staged.slices(), staged.index(layer, block)?))
    }
}

impl Landing for Translated {
    fn data_key(&self) -> &DataKey {
        self.inbound.data_key()
    }

    fn slice_bytes(&self) -> u64 {
        self.translation.cut().slice_bytes
    }

    fn span(&self) -> &tracing::Span {
        self.inbound.span()
    }

    fn room(&self, run: SliceRun) -> Option<Room<'_>> {
        Some(Box::pin(async move {
            let room = self.staging.take(run, self.translation.cut().slice_bytes as usize).await;
            let _ = self.staged.set(room); // a frame asks once
        }))
    }

    fn claim(&self, run: SliceRun, sums: &[u32]) -> Claim {
        let claim = self.inbound.claim(run, sums);
        match self.staged.get() {
            Some(Err(reason)) if claim == Claim::Write => {
                self.inbound.let_go_of(run, reason.clone());
                Claim::Refused
            }
            _ => claim,
        }
    }

    fn arrived(&self, layer: u32, block: u32) -> Result<(), TransferError> {
        let (slices, index) = self.staged(layer, block)?;
        self.inbound.take_in(|prompt_tokens, pool, place| {
            let slice = slices.source(0, index)?;
            self.translation.carry_out((layer, block), prompt_tokens, slice, pool, place)
        })
    }

    fn landed(&self, run: SliceRun) {
        self.inbound.landed(run);
    }

    fn damaged(&self, run: SliceRun, block: u32) {
        self.inbound.damaged(run, block);
    }

    fn interrupted(&self, run: SliceRun, why: &str) {
        self.inbound.interrupted(run, why);
    }

    fn target(&self, layer: u32, block: u32, skip: usize) -> Result<IoSliceMut<'_>, TransferError> {
        let (slices, index) = self.staged(layer, block)?;
        slices.io_slice_mut(0, index, skip)
    }

    fn place(&self, layer: u32, block: u32) -> Result<NonNull<u8>, TransferError> {
        let (slices, index) = self.staged(layer, block)?;
        slices.place(0, index)
    }

    fn content(&self, layer: u32, block: u32, skip: usize) -> Result<&[u8], TransferError> {
        let (slices, index) = self.staged(layer, block)?;
        let slice = slices.source(0, index)?;
        slice.get(skip..).ok_or_else(|| TransferError::Invalid(format!("byte {skip} lies outside a slice")))
    }

    fn copy_out(&self, layer: u32, block: u32, from: usize, into: &mut [u8]) -> Result<(), TransferError> {
        let (slices, index) = self.staged(layer, block)?;
        slices.copy_out(0, index, from, into)
    }

    fn revoked(&self) -> &CancellationToken {
        self.inbound.revoked()
    }
}
