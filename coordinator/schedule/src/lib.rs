//! Where a request goes: prefill and decode chosen together. Pure but for the locks of [`board`], [`caches`] and [`chains`].
//!
//! The coordinator feeds it: [`fleet`] is who is there and what they said, [`ledger`] the work in flight, [`index`] and
//! [`caches`] who has which KV blocks, [`predict`] how fast each instance is, learnt from what it measures. [`view`] is all
//! of that in rows, [`cost`] prices a part of a request on a row, and [`choose`] takes the best pair of one class, or the one
//! instance that does everything if that is better. Every choice leaves a [`Receipt`]. The sending is left to the caller.
//! [`queue`] is the order of those who wait until there is room.
//!
//! Only instances of the model asked for are looked at, by its revision; time is O(those). What instances report is theirs
//! to say: it is bounded where it comes in, and costs are floating point, which does not overflow.

pub mod board;
pub mod caches;
pub mod chains;
mod choose;
mod cost;
pub mod fleet;
pub mod index;
pub mod ledger;
mod links;
pub mod predict;
pub mod queue;
mod settings;
pub mod view;

use baton_proto::{ApiError, ErrorCode, Incarnation, InstanceId, RoleEpoch};
use tokio::time::Instant;

use caches::Held;
use chains::Chain;
use ledger::Standing;
pub use settings::{Policy, Settings, Targets};

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

/// What is to be booked: a request, as whoever asks for a place for it knows it.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    pub prompt: Prompt<'a>,
    /// Of each choice.
    pub max_tokens: u32,
    /// Answers to the one prompt.
    pub choices: u32,
    /// The very model that the prompt was tokenised for: to instances of any other its token ids mean something else.
    pub revision: &'a str,
    /// Instances that are not to have it. The board lets the last go that can do what nobody else can.
    pub avoid: &'a [InstanceId],
    pub among: Among<'a>,
    /// By when its first token is wanted, as its target counts from when the request came. `None`: from now on.
    pub first_token: Option<Instant>,
}

impl<'a> Wanted<'a> {
    /// One answer, by whoever is best of all, to one that has just come.
    pub fn new(prompt: impl Into<Prompt<'a>>, max_tokens: u32, revision: &'a str) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens,
            choices: 1,
            revision,
            avoid: &[],
            among: Among::All,
            first_token: None,
        }
    }
}

/// Who is looked at.
#[derive(Debug, Clone, Copy)]
pub enum Among<'a> {
    All,
    /// All, for one that is new: if it would wait longer than [`Settings::room`] on each of them, it is [`NoPlace::Busy`].
    Roomy,
    /// All but those where as many wait as may, for one that is new and has waited for room in vain: if there is nobody else, it is
    /// [`NoPlace::Busy`].
    Waiting,
    /// Those that this one can hand its cache to, for a request that leaves it as it drains: having all of the cache but a
    /// block at most it takes prefill's part, and who goes on is all there is to choose.
    PeersOf(&'a InstanceId),
}

impl<'a> Among<'a> {
    /// Who hands its cache on.
    fn handed_on_by(self) -> Option<&'a InstanceId> {
        match self {
            Self::PeersOf(from) => Some(from),
            Self::All | Self::Roomy | Self::Waiting => None,
        }
    }
}

/// What a choice is made for: what is wanted, and what is known of it.
#[derive(Debug, Clone, Copy)]
struct Ask<'a> {
    wanted: Wanted<'a>,
    /// Who has how much of the prompt.
    held: Held<'a>,
    /// As many as answers have had of late, on average; of each choice.
    expected_tokens: u32,
    /// So many were placed before it: who is as good takes turns by it.
    nth: u64,
}

impl Ask<'_> {
    fn prompt_tokens(&self) -> u32 {
        self.wanted.prompt.tokens
    }
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
            Self::Whole => "whole",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// Whose part it is, as clients are told.
    pub fn instance(self) -> &'static str {
        match self {
            Self::Whole => "the instance",
            Self::Prefill => "the prefill instance",
            Self::Decode => "the decode instance",
        }
    }
}

/// One instance chosen for one leg, and the role it was seen in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignee {
    pub instance: InstanceId,
    pub incarnation: Incarnation,
    pub role_epoch: RoleEpoch,
    pub model: String,
    pub handoff_endpoint: String,
    /// KV blocks the request is expected to take there.
    pub blocks: u64,
    /// Tokens of the prompt that it is not expected to have cached, and the pairs of one of them and one before it.
    pub uncached_tokens: u64,
    pub uncached_pairs: u64,
    /// It is predicted to wait there before it is begun with.
    pub waits: bool,
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// All of it on one instance: a mixed one, one of prefill's for a request of one token, or one of decode's that computes
    /// a short prompt itself.
    Alone(Assignee),
    Apart {
        prefill: Assignee,
        decode: Assignee,
    },
}

impl Placement {
    /// Who prefills and who decodes; one instance alone twice.
    pub fn both(&self) -> [&Assignee; 2] {
        match self {
            Self::Alone(alone) => [alone; 2],
            Self::Apart { prefill, decode } => [prefill, decode],
        }
    }
}

/// The instances of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair<'a> {
    pub prefill: &'a InstanceId,
    /// `None`: it decodes, too.
    pub decode: Option<&'a InstanceId>,
}

impl<'a> Pair<'a> {
    /// Who generates.
    pub fn generates(self) -> &'a InstanceId {
        self.decode.unwrap_or(self.prefill)
    }

    /// Each once.
    pub fn each(self) -> impl Iterator<Item = &'a InstanceId> {
        [Some(self.prefill), self.decode].into_iter().flatten()
    }
}

/// A candidate: how it was estimated to stand, and the cost that follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scored {
    pub instance: InstanceId,
    pub side: Side,
    pub cost_micros: u64,
    /// Predicted until the first token; 0 = it gives none.
    pub ttft_micros: u64,
    /// Predicted from one token to the next; 0 = it gives one at most.
    pub tpot_micros: u64,
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
    pub policy: Policy,
    /// How many instances could take a part of it.
    pub candidates: usize,
    /// Instances that run the model and were left aside.
    pub left_aside: LeftAside,
    /// What the way that was taken costs, all of it, and the handoff's part of that.
    pub cost_micros: u64,
    pub handoff_micros: u64,
    /// The best of the other ways. It may be the cheaper one where the way is drawn (`placement.temperature`), or a policy is
    /// plain.
    pub runner_up: Option<RunnerUp>,
    /// The best candidates for each part of the work, by [`Self::policy`]: the cheapest, unless that is a plain one. And whoever was
    /// taken. Cheapest first.
    pub cheapest: Vec<Scored>,
}

/// A way that was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunnerUp {
    /// The same as `decode` if one does both.
    pub prefill: InstanceId,
    pub decode: InstanceId,
    pub cost_micros: u64,
}

/// Why instances were left aside, and how many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftAside {
    /// They are not ready, or not to be reached.
    pub away: u32,
    /// They fail what they are given, or have failed this very request.
    pub avoided: u32,
    /// As many wait there as may: they come last.
    pub full: u32,
    /// The prompt is more than they could hold.
    pub too_small: u32,
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
    /// Somebody will have room.
    #[error("all instances are busy; try again in a moment")]
    Busy,
    #[error("the prompt has {0} tokens, more than the KV cache of any ready instance holds; shorten it")]
    TooLarge(u32),
    #[error(
        "{0} answers to one prompt are more than any ready instance generates at a time; ask for fewer (`n`)"
    )]
    TooManyChoices(u32),
}

impl NoPlace {
    /// Whether waiting for the fleet to change can help.
    pub fn may_pass(self) -> bool {
        !matches!(self, Self::TooLarge(_) | Self::TooManyChoices(_))
    }

    /// As a client is told, who asked for the model of this name.
    pub fn into_api_error(self, model: &str) -> ApiError {
        let code = match self {
            Self::TooLarge(_) => ErrorCode::ContextLengthExceeded,
            Self::TooManyChoices(_) => ErrorCode::InvalidArgument,
            Self::Busy => ErrorCode::QueueFull,
            Self::NoInstance | Self::OtherModel | Self::NoPrefill | Self::NoDecode => ErrorCode::Unavailable,
        };
        ApiError::new(code, format!("model `{model}`: {self}"))
    }
}

#[cfg(test)]
mod tests;
