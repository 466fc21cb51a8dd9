//! How sequences come, end and meet their transfers: the events that the scheduler is told, and what is asked of it.

use std::{ops::Range, time::Instant};

use baton_proto::{ApiError, ErrorCode};
use baton_runtime::BlockId;

use super::{Chunk, Effect, Scheduler};
use crate::engine::blocks::CacheChange;
use crate::engine::sequence::{
    Address, FinishReason, LegEnd, LegUpdate, NewSequence, Sampled, Sequence, SequenceId, Stage, State,
    StreamId, Work,
};

/// Why a sequence was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "{choices} choices were asked for, and the instance runs at most {most} sequences: ask for fewer"
    )]
    TooManyChoices { choices: u32, most: u32 },
    #[error("{waiting} requests wait already: try again later")]
    QueueFull { waiting: u32 },
    #[error(
        "the prompt needs {needed} KV blocks and the instance has {total}: shorten it, or give the instance more memory"
    )]
    TooLarge { needed: u32, total: u32 },
    #[error(
        "the prompt has {prompt} tokens, and the context of {context} tokens must hold the completion too"
    )]
    ContextFull { prompt: u32, context: u32 },
    #[error(
        "{missing} tokens of what was to be handed on are not in the KV cache here: have it computed elsewhere"
    )]
    NotHere { missing: u32 },
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let code = match refused {
            Refused::TooManyChoices { .. } => ErrorCode::InvalidArgument,
            Refused::QueueFull { .. } => ErrorCode::QueueFull,
            Refused::TooLarge { .. } => ErrorCode::KvExhausted,
            Refused::ContextFull { .. } => ErrorCode::ContextLengthExceeded,
            Refused::NotHere { .. } => ErrorCode::Unavailable,
        };
        let error = Self::new(code, refused.to_string());
        if matches!(refused, Refused::TooManyChoices { .. }) { error.param("n") } else { error }
    }
}

impl Scheduler {
    /// Queues a sequence. If it cannot be taken the leg is ended with the reason.
    pub fn add(&mut self, new: NewSequence) {
        let goes_on = !new.asked.generated.is_empty() || new.asked.work.hands_on();
        let mut sequence =
            Sequence::new(new, self.arrivals, self.limits.context_tokens, self.blocks.total_tokens());
        if let Err(refused) = self.check(&sequence) {
            let end = LegEnd::Failed(refused.into());
            self.refuse_transfer(&sequence.work, &end);
            self.outputs.extend(ends(&mut sequence, &end));
            return;
        }
        self.arrivals += 1;
        let (id, deadline) = (sequence.id, sequence.deadline);
        let awaits = match &sequence.work {
            Work::Decode(from) => Some(from.transfer),
            Work::Whole | Work::Prefill(_) => None,
        };
        // One that goes on here was counted where it came first.
        if awaits.is_none() && !goes_on {
            self.counts.accepted.add(&sequence);
        }
        self.sequences.insert(id, sequence);
        match awaits {
            Some(transfer) => {
                self.effects.push(Effect::Watch { id, transfer, deadline });
                self.announced += 1;
            }
            None => {
                self.queue(id);
                self.refuse_uncached(id);
            }
        }
    }

    /// Ends a waiting leg that was to hand on what is here, if more than a block of it is not: who drains computes nothing
    /// that others would. Less cannot be asked for. Whoever generates has all but the last token in its cache, in blocks of
    /// which the full ones can be taken by others; the rest of the last, and the token, are computed in one of its own. True:
    /// it has ended.
    pub(super) fn refuse_uncached(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.get(&id) else { return false };
        let missing = sequence.remaining() - sequence.found;
        let refused = sequence.work.hands_on() && missing > self.limits.block_tokens;
        if refused {
            self.fail(id, Refused::NotHere { missing }.into());
        }
        refused
    }

    fn check(&self, sequence: &Sequence) -> Result<(), Refused> {
        let context = self.limits.context_tokens;
        if sequence.given_tokens >= context {
            return Err(Refused::ContextFull { prompt: sequence.given_tokens, context });
        }
        let (choices, most) = (sequence.unforked, self.limits.max_sequences);
        if choices > most {
            return Err(Refused::TooManyChoices { choices, most });
        }
        let (needed, total) = (self.blocks.blocks_for(sequence.most_cached_tokens()), self.blocks.total());
        if needed > total {
            return Err(Refused::TooLarge { needed, total });
        }
        if self.waiting_room() == 0 {
            return Err(Refused::QueueFull { waiting: self.limits.max_waiting });
        }
        Ok(())
    }

    /// Requests that may come to the queue yet.
    pub(super) fn waiting_room(&self) -> u32 {
        self.limits.max_waiting.saturating_sub(self.waiting.len() as u32 + self.announced)
    }

    /// A decode leg's cache has been offered, so that it may queue for its blocks, or it has not been in time.
    pub fn offered(&mut self, id: SequenceId, result: Result<(), ApiError>) {
        let announced = |sequence: &&mut Sequence| sequence.state == State::Announced;
        // The leg may have ended in the meantime.
        let Some(sequence) = self.sequences.get_mut(&id).filter(announced) else { return };
        match result {
            Ok(()) => {
                sequence.enter(State::Waiting);
                sequence.rank.arrival = self.arrivals;
                self.arrivals += 1;
                self.announced -= 1;
                self.queue(id);
            }
            Err(error) => self.fail(id, error),
        }
    }

    /// Ends a sequence on behalf of its coordinator.
    pub fn cancel(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        let end = sequence.finished(FinishReason::Cancelled);
        self.end(id, end);
    }

    /// Ends every sequence of a stream.
    pub fn cancel_stream(&mut self, stream: StreamId) {
        let ids: Vec<_> =
            self.sequences.values().filter(|s| s.address.stream == stream).map(|s| s.id).collect();
        ids.into_iter().for_each(|id| self.cancel(id));
    }

    /// Ends every sequence with an error.
    pub fn fail_all(&mut self, error: &ApiError) {
        let ids: Vec<_> = self.sequences.keys().copied().collect();
        ids.into_iter().for_each(|id| self.fail(id, error.clone()));
    }

    /// Ends a sequence with an error.
    pub fn fail(&mut self, id: SequenceId, error: ApiError) {
        self.end(id, LegEnd::Failed(error));
    }

    /// Ends what has passed its deadline.
    pub fn expire(&mut self, now: Instant) {
        let due =
            |s: &&Sequence| s.state != State::Closing && s.deadline.is_some_and(|deadline| deadline <= now);
        let ids: Vec<_> = self.sequences.values().filter(due).map(|s| s.id).collect();
        for id in ids {
            self.fail(
                id,
                ApiError::new(ErrorCode::DeadlineExceeded, "the request ran out of time on the server"),
            );
        }
    }

    /// When [`Self::expire`] next has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.sequences.values().filter(|s| s.state != State::Closing).filter_map(|s| s.deadline).min()
    }

    /// A decode leg's cache is whole and no transport touches its blocks any more: its choices join the batch.
    pub fn received(&mut self, id: SequenceId, first_tokens: &[u32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        match sequence.state {
            State::Receiving => {
                self.receiving -= 1;
                sequence.computed = sequence.given_tokens;
                let choices = sequence.unforked as usize;
                self.seal_blocks(id);
                self.run(id);
                if first_tokens.len() != choices {
                    let message =
                        format!("prefill sent {} first tokens for {choices} choices", first_tokens.len());
                    return self.fail(id, ApiError::new(ErrorCode::HandoffFailed, message));
                }
                for (id, choice) in self.fork(id) {
                    self.append(id, first_tokens[choice as usize]);
                }
            }
            State::Closing => self.remove(id),
            State::Announced | State::Waiting | State::Running | State::HandingOff => {
                debug_assert!(false, "{:?} received a cache", self.sequences[&id]);
            }
        }
    }

    /// A transfer is over and touches its sequence's blocks no more. For a prefill leg `Ok` means that decode has the
    /// cache; for a decode leg only errors come here, see [`Self::received`]. After damage the prompt is in quarantine on
    /// both sides: which of its blocks is wrong, and on which side, cannot be known.
    pub fn transfer_ended(&mut self, id: SequenceId, result: Result<(), ApiError>) {
        if result.as_ref().is_err_and(|error| error.code == ErrorCode::KvDamaged) {
            self.quarantine(id);
        }
        let Some(sequence) = self.sequences.get(&id) else { return };
        if !sequence.transfers() {
            debug_assert!(false, "{sequence:?} had no transfer");
            return;
        }
        let failed = |message| LegEnd::Failed(ApiError::new(ErrorCode::HandoffFailed, message));
        let end = match result {
            Ok(()) if sequence.state == State::HandingOff => sequence.finished(FinishReason::HandedOff),
            Ok(()) => failed("the transfer ended before its seal".to_owned()),
            // The peer's leg is over, for a reason of its own. Nobody has cancelled this one.
            Err(error) if error.code == ErrorCode::Cancelled => failed(error.message),
            Err(error) => LegEnd::Failed(error),
        };
        if sequence.state != State::Closing {
            self.tell_end(id, &end);
            self.leave_batch(id);
        }
        self.remove(id);
    }

    /// One chunk of the last plan is in the cache; `sampled` is the next token of each choice if its logits were wanted.
    pub fn computed(&mut self, chunk: &Chunk, sampled: Vec<Sampled>) {
        let Some(sequence) = self.sequences.get_mut(&chunk.id) else { return };
        sequence.computed = chunk.start + chunk.tokens;
        self.seal_blocks(chunk.id);
        let Some(sequence) = self.sequences.get(&chunk.id).filter(|_| !sampled.is_empty()) else { return };
        if matches!(sequence.work, Work::Prefill(_)) {
            return self.hand_off(chunk.id, sampled);
        }
        let forks = self.fork(chunk.id);
        for sampled in sampled {
            if let Some(&(id, _)) = forks.iter().find(|(_, choice)| *choice == sampled.choice) {
                let token = sampled.token;
                self.tell_token(id, sampled);
                self.append(id, token);
            }
        }
    }

    /// The blocks that have become full are final: others may share them.
    fn seal_blocks(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id).filter(|_| self.limits.prefix_cache) else { return };
        let full = sequence.computed / self.limits.block_tokens;
        let new = sequence.sealed..full;
        sequence.sealed = full;
        let (blocks, hashes) = sequence.chain(self.root, self.limits.block_tokens);
        new.for_each(|index| self.blocks.seal(blocks, index, hashes));
    }

    /// What legs are to be told since the last call, in order.
    pub fn take_outputs(&mut self) -> Vec<(Address, LegUpdate)> {
        std::mem::take(&mut self.outputs)
    }

    /// What the cache took in and gave up since the last call, in order.
    pub fn take_cache_changes(&mut self) -> Vec<CacheChange> {
        self.blocks.take_changes()
    }

    /// What is to be done outside since the last call, in order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Blocks to copy, each pair after the one before it, before the last plan is computed.
    pub fn take_copies(&mut self) -> Vec<(BlockId, BlockId)> {
        std::mem::take(&mut self.copies)
    }

    /// Tokens and blocks of a planned chunk's sequence.
    pub fn view(&self, chunk: &Chunk) -> (&[u32], &[BlockId]) {
        let sequence = &self.sequences[&chunk.id];
        let (start, end) = (chunk.start as usize, (chunk.start + chunk.tokens) as usize);
        (&sequence.tokens[start..end], sequence.blocks.as_slice())
    }

    /// Indices in its sequence's block list of the blocks that a planned chunk fills; the last may stay partly empty.
    pub fn blocks_of(&self, chunk: &Chunk) -> Range<u32> {
        chunk.start / self.limits.block_tokens..self.blocks.blocks_for(chunk.start + chunk.tokens)
    }

    /// Whether a planned chunk computes a token that was generated here, not what the sequence came with.
    pub fn is_decode(&self, chunk: &Chunk) -> bool {
        chunk.start >= self.sequences[&chunk.id].given_tokens
    }

    /// The sequence of a planned chunk, for sampling.
    pub(in crate::engine) fn sequence(&self, id: SequenceId) -> &Sequence {
        &self.sequences[&id]
    }

    /// Says in the log how far a leg is, if it is still there.
    pub(in crate::engine) fn log(&self, id: SequenceId, stage: Stage, at: Instant) {
        self.sequences.get(&id).into_iter().for_each(|sequence| sequence.log(stage, at));
    }

    /// In traces, a part of a leg beside its states, if it is still there.
    pub(in crate::engine) fn trace(&self, id: SequenceId, part: &'static str, from: Instant, to: Instant) {
        self.sequences.get(&id).into_iter().for_each(|sequence| sequence.stages().part(part, from, to));
    }

    /// Where what is done for a sequence is traced.
    pub(in crate::engine) fn span(&self, id: SequenceId) -> tracing::Span {
        self.sequences.get(&id).map_or_else(tracing::Span::none, |sequence| sequence.span.clone())
    }

    /// Ends a sequence: the leg is told, its blocks go back now or when its transfer is closed.
    pub(super) fn end(&mut self, id: SequenceId, end: LegEnd) {
        let Some(sequence) = self.sequences.get(&id) else { return };
        if sequence.state == State::Closing {
            return;
        }
        let transfers = sequence.transfers();
        let over = |reason: &FinishReason| matches!(reason, FinishReason::Stop | FinishReason::Length);
        let needed = !matches!(&end, LegEnd::Finished { reason, .. } if over(reason));
        if sequence.state == State::Announced {
            self.effects.push(Effect::Unwatch { id });
        }
        if matches!(sequence.state, State::Announced | State::Waiting) {
            let work = sequence.work.clone();
            self.refuse_transfer(&work, &end);
        }
        self.tell_end(id, &end);
        self.leave_batch(id);
        if !transfers {
            self.remove(id);
        } else if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.enter(State::Closing);
            self.effects.push(Effect::Close { id, needed });
        }
    }

    /// Tells every choice that a sequence stands for its end.
    fn tell_end(&mut self, id: SequenceId, end: &LegEnd) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.outputs.extend(ends(sequence, end));
        }
    }

    /// A decode leg that never came to expect its transfer says so to the sender, which would wait otherwise.
    fn refuse_transfer(&mut self, work: &Work, end: &LegEnd) {
        if let Work::Decode(from) = work {
            let reason = match end {
                LegEnd::Failed(error) => error.clone(),
                LegEnd::Finished { .. } => {
                    ApiError::new(ErrorCode::Cancelled, "the decode leg was cancelled")
                }
            };
            self.effects.push(Effect::Refuse { transfer: from.transfer, reason });
        }
    }

    /// Takes a sequence out of the queue or the batch that its state says it is in.
    pub(super) fn leave_batch(&mut self, id: SequenceId) {
        match self.sequences[&id].state {
            State::Announced => self.announced -= 1,
            State::Waiting => self.waiting.retain(|&other| other != id),
            State::Running => self.running.retain(|&other| other != id),
            State::Receiving => self.receiving -= 1,
            State::HandingOff | State::Closing => {}
        }
    }

    fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            sequence.leave();
            self.blocks.release(sequence.blocks);
        }
    }
}

/// What tells each choice that a sequence stands for its end.
fn ends(sequence: &mut Sequence, end: &LegEnd) -> Vec<(Address, LegUpdate)> {
    let choices = sequence.choices.clone();
    choices.into_iter().map(|choice| sequence.tell_end(choice, end)).collect()
}
