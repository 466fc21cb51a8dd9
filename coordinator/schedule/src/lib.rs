//! Where a request goes: prefill and decode chosen together. Pure.
//!
//! Called by [`board`] with the fleet, the ledger of this coordinator's own work and the request; leaves the sending to
//! its caller. [`cost`] predicts how long each instance would take for a part of the work, by how it stands
//! ([`ledger`]) and what it has cached of the prompt ([`caches`], [`index`]).
//!
//! The cheapest pair of one group and KV layout is taken, or the cheapest mixed instance if that is cheaper. Equal costs
//! take turns. Only instances of the model asked for are looked at, by its revision; time is O(those). What instances
//! report is theirs to say: the arithmetic over it saturates.

pub mod board;
pub mod caches;
pub mod chains;
mod cost;
pub mod fleet;
pub mod index;
pub mod ledger;

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, RoleEpoch};
use tokio::time::Instant;

use crate::{
    chains::Chain,
    fleet::{Fleet, Instance, Role, Spec},
};
use caches::Held;
use cost::{blocks_wanted, cached_tokens, cost_micros, expected_tokens, fits};
use ledger::{Ledger, Standing};

/// Candidates for a part of the work that a receipt keeps, the cheapest.
const RECEIPT_MOST: usize = 4;

/// What there is to be computed of a request: its prompt, and what was generated elsewhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Prompt<'a> {
    pub tokens: u32,
    /// Its full blocks, in each dialect that may be asked for.
    pub chains: &'a [Chain],
}

/// One that nobody has anything of.
impl From<u32> for Prompt<'_> {
    fn from(tokens: u32) -> Self {
        Self { tokens, chains: &[] }
    }
}

/// What the scheduler needs to know of a request.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub prompt_tokens: u32,
    /// Who has how much of the prompt.
    pub held: Held<'a>,
    pub max_tokens: u32,
    /// Answers to the one prompt.
    pub choices: u32,
    /// The very model that the prompt was tokenised for: to instances of any other its token ids mean something else.
    pub revision: &'a str,
    /// Instances that have just failed the request, or fail whatever they are given.
    pub avoid: &'a [InstanceId],
    /// Any number that differs from request to request: equal costs take turns by it.
    pub turn: u64,
}

/// Which part of the work a leg is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Prefill and decode on one instance.
    Whole,
    Prefill,
    Decode,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "mixed",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// One instance chosen for one leg, and the role it was seen in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seat {
    pub instance: InstanceId,
    pub incarnation: Incarnation,
    pub role_epoch: RoleEpoch,
    pub model: String,
    pub handoff_endpoint: String,
    /// KV blocks the request is expected to take there.
    pub blocks: u64,
    /// Tokens of the prompt that it is not expected to have cached.
    pub uncached_tokens: u64,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// All of it on one instance: a mixed one, or one of prefill's for a request of one token.
    Alone(Seat),
    Apart {
        prefill: Seat,
        decode: Seat,
    },
}

/// A candidate: how it was estimated to stand, and the cost that follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    pub instance: InstanceId,
    pub side: Side,
    pub cost_micros: u64,
    pub standing: Standing,
    /// KV blocks the request is expected to take there.
    pub blocks: u64,
    /// Tokens of the prompt that it is expected to have cached.
    pub cached_tokens: u32,
}

/// Why a request went where it went: what was asked, and who could take it at which cost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Receipt {
    pub prompt_tokens: u32,
    /// Of each choice.
    pub expected_tokens: u32,
    pub choices: u32,
    /// How many instances were looked at.
    pub candidates: usize,
    /// The cheapest of them for each part of the work, and whoever was taken, cheapest first.
    pub cheapest: Vec<Scored>,
}

impl Receipt {
    fn new(ask: &Ask<'_>) -> Self {
        let (prompt_tokens, choices) = (ask.prompt_tokens, ask.choices);
        Self { prompt_tokens, expected_tokens: expected_tokens(ask), choices, ..Self::default() }
    }

    /// One that could take a part of the work.
    fn note(&mut self, candidate: &Candidate<'_>, ask: &Ask<'_>) {
        self.candidates += 1;
        let mut alike = self.cheapest.iter().enumerate().filter(|(_, held)| held.side == candidate.side);
        match alike.nth(RECEIPT_MOST - 1).map(|(at, held)| (at, held.cost_micros)) {
            Some((_, dearest)) if dearest <= candidate.cost_micros => return,
            Some((at, _)) => drop(self.cheapest.remove(at)),
            None => {}
        }
        self.insert(candidate, ask);
    }

    /// One that is taken.
    fn take(&mut self, candidate: &Candidate<'_>, ask: &Ask<'_>) {
        let is = |held: &Scored| held.instance == candidate.instance.spec.id && held.side == candidate.side;
        if !self.cheapest.iter().any(is) {
            self.insert(candidate, ask);
        }
    }

    fn insert(&mut self, candidate: &Candidate<'_>, ask: &Ask<'_>) {
        let at = self.cheapest.partition_point(|held| held.cost_micros <= candidate.cost_micros);
        self.cheapest.insert(at, candidate.scored(ask));
    }
}

/// Why a request cannot be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    #[error("no instance is ready to serve; try again in a moment")]
    NoInstance,
    #[error(
        "no instance runs the checkpoint that this coordinator tokenises for, those that are ready run others; start one with it"
    )]
    OtherModel,
    #[error("a decode instance is ready but no prefill instance is; try again in a moment")]
    NoPrefill,
    #[error("a prefill instance is ready but no decode instance fits it; try again in a moment")]
    NoDecode,
    #[error("the prompt has {0} tokens, more than the KV cache of any ready instance holds; shorten it")]
    TooLarge(u32),
}

impl NoPlace {
    /// Whether waiting for the fleet to change can help.
    pub fn may_pass(self) -> bool {
        !matches!(self, Self::TooLarge(_))
    }

    /// As a client is told, who asked for the model of this name.
    pub fn told(self, model: &str) -> ApiError {
        let code = match self {
            Self::TooLarge(_) => ErrorCode::ContextLengthExceeded,
            Self::NoInstance | Self::OtherModel | Self::NoPrefill | Self::NoDecode => ErrorCode::Unavailable,
        };
        ApiError::new(code, format!("model `{model}`: {self}"))
    }
}

/// An instance for a part of the work, while one is chosen.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    instance: &'a Instance,
    epoch: RoleEpoch,
    side: Side,
    standing: Standing,
    cached_tokens: u32,
    cost_micros: u64,
    /// Of equal costs the lowest is taken.
    turn: u64,
}

impl<'a> Candidate<'a> {
    fn order(&self) -> (u64, u64) {
        (self.cost_micros, self.turn)
    }

    fn scored(&self, ask: &Ask<'_>) -> Scored {
        let spec = &self.instance.spec;
        Scored {
            instance: spec.id.clone(),
            side: self.side,
            cost_micros: self.cost_micros,
            standing: self.standing,
            blocks: blocks_wanted(spec, ask),
            cached_tokens: self.cached_tokens,
        }
    }

    fn seat(&self, ask: &Ask<'_>) -> Seat {
        let spec = &self.instance.spec;
        Seat {
            instance: spec.id.clone(),
            incarnation: spec.incarnation,
            role_epoch: self.epoch,
            model: spec.model.clone(),
            handoff_endpoint: spec.handoff_endpoint.clone(),
            blocks: blocks_wanted(spec, ask),
            uncached_tokens: u64::from(ask.prompt_tokens.saturating_sub(self.cached_tokens)),
        }
    }
}

/// The cheapest candidate of a kind so far.
#[derive(Clone, Copy, Default)]
struct Best<'a>(Option<Candidate<'a>>);

impl<'a> Best<'a> {
    fn take(&mut self, candidate: Candidate<'a>) {
        if self.0.is_none_or(|held| candidate.order() < held.order()) {
            self.0 = Some(candidate);
        }
    }
}

/// Instances that can hand KV caches to each other.
struct Class<'a> {
    like: &'a Spec,
    prefill: Half<'a>,
    decode: Half<'a>,
}

/// The instances of one role in a class.
#[derive(Default)]
struct Half<'a> {
    best: Best<'a>,
    /// One of them can never hold the request.
    too_small: bool,
}

impl Half<'_> {
    /// Nobody is there, small or large.
    fn is_vacant(&self) -> bool {
        self.best.0.is_none() && !self.too_small
    }
}

/// Chooses where `ask` goes.
pub fn place(
    fleet: &Fleet,
    ledger: &Ledger,
    ask: &Ask<'_>,
    now: Instant,
) -> Result<(Placement, Receipt), NoPlace> {
    let mut receipt = Receipt::new(ask);
    let mut mixed = Best::default();
    let mut classes: Vec<Class<'_>> = Vec::new();
    let mut seen = Seen::default();
    let known = fleet.known(ask.revision);
    for (index, (instance, duty)) in fleet.usable(ask.revision, now).enumerate() {
        if ask.avoid.contains(&instance.spec.id) {
            continue;
        }
        let side = match duty.role {
            Role::None => None,
            Role::Mixed => Some(Side::Whole),
            Role::Prefill => Some(Side::Prefill),
            Role::Decode => Some(Side::Decode),
        };
        seen.ready += 1;
        let Some(side) = side else { continue };
        let standing = ledger.standing(&instance.spec.id, &instance.load());
        if !fits(&instance.spec, &standing, ask) {
            match side {
                Side::Whole => seen.too_small = true,
                Side::Prefill => class_of(&mut classes, &instance.spec).prefill.too_small = true,
                Side::Decode => class_of(&mut classes, &instance.spec).decode.too_small = true,
            }
            continue;
        }
        let turn = (index as u64).wrapping_add(ask.turn) % (known as u64).max(1);
        let cached_tokens = cached_tokens(&instance.spec.id, ask, side);
        let cost_micros = cost_micros(&instance.spec, &standing, ask, (side, cached_tokens));
        let epoch = duty.epoch;
        let candidate = Candidate { instance, epoch, side, standing, cached_tokens, cost_micros, turn };
        receipt.note(&candidate, ask);
        match side {
            Side::Whole => mixed.take(candidate),
            Side::Prefill => class_of(&mut classes, &instance.spec).prefill.best.take(candidate),
            Side::Decode => class_of(&mut classes, &instance.spec).decode.best.take(candidate),
        }
    }
    let pair = classes
        .iter()
        .filter_map(|class| Some((class.prefill.best.0?, class.decode.best.0?)))
        .map(|(prefill, decode)| (prefill.cost_micros.saturating_add(decode.cost_micros), prefill, decode))
        .min_by_key(|(cost, prefill, _)| (*cost, prefill.turn));
    // One token is prefill's work alone: nothing is reserved, or handed over.
    if ask.max_tokens == 1 {
        classes.iter().filter_map(|class| class.prefill.best.0).for_each(|prefill| mixed.take(prefill));
    }
    match (pair, mixed.0) {
        (_, Some(alone)) if pair.is_none_or(|(cost, ..)| alone.cost_micros < cost) => {
            receipt.take(&alone, ask);
            Ok((Placement::Alone(alone.seat(ask)), receipt))
        }
        (Some((_, prefill, decode)), _) => {
            receipt.take(&prefill, ask);
            receipt.take(&decode, ask);
            Ok((Placement::Apart { prefill: prefill.seat(ask), decode: decode.seat(ask) }, receipt))
        }
        _ if known == 0 && fleet.others_serve(ask.revision, now) => Err(NoPlace::OtherModel),
        _ => Err(seen.lack(known, &classes, ask)),
    }
}

/// What was met on the way to no place.
#[derive(Default)]
struct Seen {
    /// Instances that are ready.
    ready: usize,
    /// A mixed instance can never hold the request.
    too_small: bool,
}

impl Seen {
    /// Why nobody takes the request, of `known` instances of its model. It is too large only if none of those that are not
    /// ready just now might hold it.
    fn lack(&self, known: usize, classes: &[Class<'_>], ask: &Ask<'_>) -> NoPlace {
        let small = |class: &Class<'_>| class.prefill.too_small || class.decode.too_small;
        if classes.iter().any(|class| class.prefill.best.0.is_some() && class.decode.is_vacant()) {
            NoPlace::NoDecode
        } else if classes.iter().any(|class| class.decode.best.0.is_some() && class.prefill.is_vacant()) {
            NoPlace::NoPrefill
        } else if self.ready == known && (self.too_small || classes.iter().any(small)) {
            NoPlace::TooLarge(ask.prompt_tokens)
        } else {
            NoPlace::NoInstance
        }
    }
}

fn class_of<'c, 'a>(classes: &'c mut Vec<Class<'a>>, spec: &'a Spec) -> &'c mut Class<'a> {
    let alike = |class: &Class<'_>| class.like.group == spec.group && class.like.layout == spec.layout;
    let at = classes.iter().position(alike).unwrap_or_else(|| {
        classes.push(Class { like: spec, prefill: Half::default(), decode: Half::default() });
        classes.len() - 1
    });
    &mut classes[at]
}

#[cfg(test)]
mod tests;
