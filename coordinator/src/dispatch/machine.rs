//! The protocol of one attempt at a request: what the legs say in, what to do out. Pure.
//!
//! Driven by [`super::generation`]. States: *running* (legs open, tokens come) -> *closing* (decode has said its last, a
//! token of prefill's is still on its way) -> *lingering* (every token is there, prefill has yet to say how much of the
//! prompt was cached) -> *over*. Two instances speak over two streams, so decode's tokens may overtake prefill's token
//! 0: tokens are put in order by position, and given out in order only.
//!
//! Whoever ends first: prefill ending the sequence itself (token 0 was a stop token, or the only one wanted) cancels
//! decode; a failing leg cancels the other, unless decode may have the cache already and no longer needs prefill. A decode
//! leg whose transfer was broken off from the other side says so before prefill says why, or that it needs no decode:
//! that failure waits for prefill's word, which always comes, if only as the break of its stream. The other way round,
//! a prefill leg that fails after its token may have handed over already: decode, which says nothing before its first
//! token, knows. Its word is waited for, but not for long: a decode that was never offered the cache has nobody to miss
//! and says nothing at all.

use std::collections::BTreeMap;

use baton_proto::{ApiError, ErrorCode};
use baton_schedule::Side;

use crate::{
    cause,
    fleet::{LegEnd, Output, StopReason, TokenLogprobs},
};

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Tell the leg's instance to stop.
    Cancel(Side),
    /// The same, and that the cache which the leg handed on arrived damaged.
    CancelDamaged(Side),
    /// Every token is there; send [`Machine::linger_over`] if prefill has not reported within a short while.
    Linger,
    /// Prefill is gone and decode may have the cache; send [`Machine::decode_silent`] if it has not spoken in time.
    AwaitDecode,
    /// The request has ended; nothing follows.
    End(Result<Completed, ApiError>),
}

impl Command {
    fn damaged(self) -> Self {
        match self {
            Self::Cancel(side) => Self::CancelDamaged(side),
            other => other,
        }
    }
}

/// A sequence that ran to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completed {
    pub reason: StopReason,
    /// Of the prompt, taken from a prefix cache.
    pub cached_tokens: u32,
    /// Whose instance ended it for want of room; elsewhere it would have gone on.
    pub outgrown: Option<Side>,
}

/// Tokens not given out before, in order.
#[derive(Debug, PartialEq)]
pub struct Fresh<'a> {
    pub tokens: &'a [u32],
    /// One for each of `tokens` if they were asked for, else none.
    pub logprobs: Vec<TokenLogprobs>,
}

/// Legs that have not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Open {
    Whole,
    Both,
    Prefill,
    Decode,
    Neither,
}

impl Open {
    fn has(self, side: Side) -> bool {
        matches!(
            (self, side),
            (Self::Whole, Side::Whole)
                | (Self::Both, Side::Prefill | Side::Decode)
                | (Self::Prefill, Side::Prefill)
                | (Self::Decode, Side::Decode)
        )
    }

    fn without(self, side: Side) -> Self {
        match (self, side) {
            (Self::Both, Side::Prefill) => Self::Decode,
            (Self::Both, Side::Decode) => Self::Prefill,
            (Self::Whole, Side::Whole) | (Self::Prefill, Side::Prefill) | (Self::Decode, Side::Decode) => {
                Self::Neither
            }
            (unchanged, _) => unchanged,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    /// Decode (or the whole leg) has said its last; a token of prefill's may still be on its way.
    Closing(StopReason),
    Lingering(StopReason),
    Over,
}

/// One attempt at one choice of a request.
#[derive(Debug)]
pub struct Machine {
    max_tokens: u32,
    /// Prefill and decode are on two instances.
    apart: bool,
    open: Open,
    state: State,
    /// The completion so far, without gaps.
    tokens: Vec<u32>,
    /// How many of `tokens` there were before this attempt.
    carried: usize,
    /// How many of `tokens` have been given out.
    given: usize,
    /// Of the tokens that have not been given out.
    logprobs: Vec<TokenLogprobs>,
    wants_logprobs: bool,
    /// Tokens that arrived before one of a lower position.
    early: BTreeMap<u32, (u32, Option<TokenLogprobs>)>,
    /// Decode has taken the cache up: it generates, or has ended.
    decode_spoke: bool,
    // Boxed, as hardly any request has one.
    /// Why decode has no cache to go on from; prefill's word decides whether it matters.
    transfer_broken: Option<Box<ApiError>>,
    /// Why prefill's leg failed after its token; decode's word decides whether it matters.
    prefill_lost: Option<Box<ApiError>>,
    /// Once it was said.
    cached_tokens: Option<u32>,
    /// Whose word it is that it is complete.
    completed_by: Option<Side>,
}

impl Machine {
    /// Both parts on one instance.
    pub fn whole(max_tokens: u32) -> Self {
        Self::new(max_tokens, Open::Whole)
    }

    /// Prefill and decode on two.
    pub fn apart(max_tokens: u32) -> Self {
        Self::new(max_tokens, Open::Both)
    }

    /// Every token must come with its log probabilities.
    #[must_use]
    pub fn with_logprobs(self, wanted: bool) -> Self {
        Self { wants_logprobs: wanted, ..self }
    }

    /// The attempt goes on from tokens that an earlier one brought; they are not given out again.
    #[must_use]
    pub fn after(self, generated: &[u32]) -> Self {
        let carried = generated.len();
        Self { tokens: generated.to_vec(), carried, given: carried, ..self }
    }

    fn new(max_tokens: u32, open: Open) -> Self {
        Self {
            max_tokens,
            apart: open == Open::Both,
            open,
            state: State::Running,
            tokens: Vec::new(),
            carried: 0,
            given: 0,
            logprobs: Vec::new(),
            wants_logprobs: false,
            early: BTreeMap::new(),
            decode_spoke: false,
            transfer_broken: None,
            prefill_lost: None,
            cached_tokens: None,
            completed_by: None,
        }
    }

    /// All tokens so far, in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// This attempt has brought a token.
    pub fn has_begun(&self) -> bool {
        self.tokens.len() > self.carried
    }

    /// How much of the prompt was taken from a prefix cache, once it was said.
    pub fn cached_tokens(&self) -> Option<u32> {
        self.cached_tokens
    }

    /// Tokens not yet given out, in order; each is given once.
    pub fn take_fresh(&mut self) -> Fresh<'_> {
        let from = std::mem::replace(&mut self.given, self.tokens.len());
        Fresh { tokens: &self.tokens[from..], logprobs: std::mem::take(&mut self.logprobs) }
    }

    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// A leg has said something.
    pub fn output(&mut self, side: Side, mut output: Output) -> Vec<Command> {
        if self.is_over() || !self.open.has(side) {
            return Vec::new();
        }
        if let Err(error) = self.take_tokens(side, &mut output) {
            return self.fail(error);
        }
        match output.end {
            None => self.settle(),
            Some(end) => self.take_end(side, end),
        }
    }

    /// The reader has seen enough: a stop string matched.
    pub fn stop(&mut self) -> Vec<Command> {
        if self.is_over() {
            return Vec::new();
        }
        self.finish(StopReason::Stop)
    }

    /// The client has gone, or the time is up.
    pub fn abort(&mut self, error: ApiError) -> Vec<Command> {
        if self.is_over() {
            return Vec::new();
        }
        self.fail(error)
    }

    /// Prefill has been silent for long enough after [`Command::Linger`].
    pub fn linger_over(&mut self) -> Vec<Command> {
        match self.state {
            // Decode owns the cache, so prefill's leg is ending by itself; the cancel only says that nobody listens.
            State::Lingering(reason) => self.finish(reason),
            _ => Vec::new(),
        }
    }

    /// Decode has been silent for long enough after [`Command::AwaitDecode`].
    pub fn decode_silent(&mut self) -> Vec<Command> {
        match self.prefill_lost.take() {
            Some(error) if self.awaits_decode() => self.fail(*error),
            kept => {
                self.prefill_lost = kept;
                Vec::new()
            }
        }
    }

    fn take_tokens(&mut self, side: Side, output: &mut Output) -> Result<(), ApiError> {
        if self.wants_logprobs && output.logprobs.len() != output.tokens.len() {
            return Err(broken(side, "sent tokens without their log probabilities"));
        }
        if side != Side::Decode {
            self.cached_tokens = self.cached_tokens.max(output.cached_tokens);
        }
        let mut logprobs = std::mem::take(&mut output.logprobs).into_iter();
        for (index, &token) in output.tokens.iter().enumerate() {
            let position = u32::try_from(index).ok().and_then(|i| output.first_position.checked_add(i));
            let Some(position) = position.filter(|&position| position < self.max_tokens) else {
                return Err(broken(side, "sent more tokens than were asked for"));
            };
            if side == Side::Prefill && position as usize != self.carried {
                return Err(broken(side, "sent a token that is decode's"));
            }
            let logprobs = logprobs.next().filter(|_| self.wants_logprobs);
            // In order, as nearly every token comes.
            if position as usize == self.tokens.len() && self.early.is_empty() {
                self.tokens.push(token);
                self.logprobs.extend(logprobs);
                continue;
            }
            let held = match self.tokens.get(position as usize) {
                Some(&held) => held,
                None => self.early.entry(position).or_insert((token, logprobs)).0,
            };
            if held != token {
                return Err(broken(side, "sent two different tokens for one position"));
            }
        }
        self.decode_spoke |= side == Side::Decode && !output.tokens.is_empty();
        while let Some(entry) = self.early.first_entry() {
            if *entry.key() as usize != self.tokens.len() {
                break;
            }
            let (token, logprobs) = entry.remove();
            self.tokens.push(token);
            self.logprobs.extend(logprobs);
        }
        Ok(())
    }

    fn take_end(&mut self, side: Side, end: LegEnd) -> Vec<Command> {
        self.open = self.open.without(side);
        // Who is to blame matters to the driver alone.
        let end = if let LegEnd::Lost(error) = end { LegEnd::Failed(error) } else { end };
        if let LegEnd::Complete { .. } = end {
            self.completed_by = Some(side);
        }
        match (side, end) {
            (Side::Prefill, LegEnd::HandedOff { cached_tokens }) => {
                self.cached_tokens = self.cached_tokens.max(Some(cached_tokens));
                if !self.has_begun() {
                    return self.fail(broken(side, "handed over without a first token"));
                }
                if let Some(error) = self.transfer_broken.take() {
                    return self.fail(*error);
                }
                self.settle()
            }
            (_, LegEnd::HandedOff { .. }) => self.fail(broken(side, "handed over what it was to finish")),
            // Even a sequence that ends at once has the token that ends it.
            (Side::Prefill | Side::Whole, LegEnd::Complete { .. }) if !self.has_begun() => {
                self.fail(broken(side, "ended the request without a first token"))
            }
            (Side::Prefill, LegEnd::Complete { reason, cached_tokens }) => {
                self.cached_tokens = self.cached_tokens.max(Some(cached_tokens));
                self.finish(reason)
            }
            (_, LegEnd::Complete { reason, cached_tokens }) => {
                self.cached_tokens = self.cached_tokens.max(Some(cached_tokens));
                self.decode_spoke = true;
                self.state = State::Closing(reason);
                self.settle()
            }
            (Side::Decode, LegEnd::Failed(error))
                if self.open == Open::Prefill && cause::is_of_the_other_side(error.code) =>
            {
                self.transfer_broken = Some(error);
                self.settle()
            }
            // Decode may have the cache and goes on by itself then; only the count of cached tokens is lost.
            (Side::Prefill, LegEnd::Cancelled) if self.may_be_with_decode() => {
                self.lose_prefill(Box::new(stopped(side)))
            }
            (Side::Prefill, LegEnd::Failed(error)) if self.may_be_with_decode() => self.lose_prefill(error),
            (Side::Decode, LegEnd::Cancelled) => {
                let error = self.cause_of(stopped(side));
                self.fail(error)
            }
            (Side::Decode, LegEnd::Failed(error)) if cause::is_of_the_other_side(error.code) => {
                let error = self.cause_of(*error);
                self.fail(error)
            }
            (_, LegEnd::Cancelled) => self.fail(stopped(side)),
            (_, LegEnd::Failed(error) | LegEnd::Lost(error)) => self.fail(*error),
        }
    }

    /// Whether decode can finish without prefill, as far as is known.
    fn may_be_with_decode(&self) -> bool {
        self.has_begun() && self.transfer_broken.is_none()
    }

    fn lose_prefill(&mut self, error: Box<ApiError>) -> Vec<Command> {
        self.prefill_lost = Some(error);
        if self.awaits_decode() { vec![Command::AwaitDecode] } else { self.settle() }
    }

    /// Whether all depends on a decode that has said nothing yet.
    fn awaits_decode(&self) -> bool {
        self.state == State::Running && !self.decode_spoke
    }

    /// Why decode got no cache: what ended prefill, if that came first, else what decode says.
    fn cause_of(&mut self, decodes: ApiError) -> ApiError {
        self.prefill_lost.take().filter(|_| !self.decode_spoke).map_or(decodes, |error| *error)
    }

    /// Ends the request once all that was announced is there.
    fn settle(&mut self) -> Vec<Command> {
        match self.state {
            State::Running | State::Over => Vec::new(),
            State::Closing(reason) => {
                let whole = self.early.is_empty() && (self.has_begun() || self.open == Open::Neither);
                match (whole, self.open) {
                    (true, Open::Neither) => self.finish(reason),
                    (true, _) => {
                        self.state = State::Lingering(reason);
                        vec![Command::Linger]
                    }
                    (false, Open::Neither) => {
                        self.fail(ApiError::new(ErrorCode::Internal, "a token of the answer was lost"))
                    }
                    (false, _) => Vec::new(),
                }
            }
            State::Lingering(reason) if self.open == Open::Neither => self.finish(reason),
            State::Lingering(_) => Vec::new(),
        }
    }

    fn finish(&mut self, reason: StopReason) -> Vec<Command> {
        let mut commands = self.cancel_open();
        let cached_tokens = self.cached_tokens.unwrap_or(0);
        let short = self.tokens.len() < self.max_tokens as usize;
        let outgrown = self.completed_by.filter(|_| reason == StopReason::Length && short);
        commands.push(Command::End(Ok(Completed { reason, cached_tokens, outgrown })));
        commands
    }

    fn fail(&mut self, mut error: ApiError) -> Vec<Command> {
        error.code = cause::taken_for(error.code, self.apart);
        let mut commands = self.cancel_open();
        if error.code == ErrorCode::KvDamaged {
            // Decode may have told the coordinator before it told prefill, whose cache is in doubt as well.
            commands = commands.into_iter().map(Command::damaged).collect();
        }
        commands.push(Command::End(Err(error)));
        commands
    }

    fn cancel_open(&mut self) -> Vec<Command> {
        let open = std::mem::replace(&mut self.open, Open::Neither);
        self.state = State::Over;
        [Side::Whole, Side::Prefill, Side::Decode]
            .into_iter()
            .filter(|&side| open.has(side))
            .map(Command::Cancel)
            .collect()
    }
}

fn stopped(side: Side) -> ApiError {
    let message = format!("{} stopped before the request was complete; send it again", side.instance());
    ApiError::new(ErrorCode::Unavailable, message)
}

fn broken(side: Side, what: &str) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("{} {what}", side.instance()))
}

#[cfg(test)]
mod tests;
