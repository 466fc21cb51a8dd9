//! What becomes of the choices that a sequence stands for: their first tokens, their forks, their ends.

use std::ops::Range;

use baton_kvtransfer::FirstTokens;

use super::{Effect, Scheduler};
use crate::engine::sequence::{FinishReason, Sampled, SequenceId, State};

impl Scheduler {
    /// Ends choices of a leg on behalf of its coordinator.
    pub fn cancel_choices(&mut self, leg: SequenceId, choices: Range<u32>) {
        for choice in choices {
            // Forked, or not (yet); the first to go on keeps the id.
            let stands =
                |id: &SequenceId| self.sequences.get(id).is_some_and(|s| s.choices.contains(&choice));
            let own = SequenceId(leg.0 + u64::from(choice));
            if let Some(id) = [own, leg].into_iter().find(stands) {
                self.end_choice(id, choice, FinishReason::Cancelled);
            }
        }
    }

    /// Ends one of the choices that a sequence stands for, and the sequence with the last of them.
    fn end_choice(&mut self, id: SequenceId, choice: u32, reason: FinishReason) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if sequence.state == State::Closing || !sequence.choices.contains(&choice) {
            return;
        }
        let end = sequence.finished(reason);
        if let [_] = sequence.choices[..] {
            return self.end(id, end);
        }
        sequence.choices.retain(|&other| other != choice);
        let update = sequence.tell_end(choice, &end);
        self.outputs.push(update);
    }

    /// A prefill leg has the first token of each choice: those that it does not end go on elsewhere.
    pub(super) fn hand_off(&mut self, id: SequenceId, sampled: Vec<Sampled>) {
        let first_tokens: Vec<u32> = sampled.iter().map(|sampled| sampled.token).collect();
        let mut over = Vec::new();
        for (index, sampled) in sampled.into_iter().enumerate() {
            let (choice, token) = (sampled.choice, sampled.token);
            self.tell_token(id, sampled);
            let Some(sequence) = self.sequences.get_mut(&id) else { return };
            if index == 0 {
                sequence.push(token);
            }
            over.extend(sequence.finish_reason_of(token).map(|reason| (choice, reason)));
        }
        for (choice, reason) in over {
            self.end_choice(id, choice, reason);
        }
        let Some(sequence) = self.sequences.get_mut(&id).filter(|s| s.state == State::Running) else {
            return;
        };
        match FirstTokens::new(&first_tokens) {
            Ok(first_tokens) => {
                sequence.enter(State::HandingOff);
                self.effects.push(Effect::Seal { id, first_tokens });
                self.running.retain(|&other| other != id);
            }
            Err(error) => self.fail(id, error.into()),
        }
    }

    /// Makes a sequence of each choice that a running one stands for; gives them with their choices.
    pub(super) fn fork(&mut self, id: SequenceId) -> Vec<(SequenceId, u32)> {
        let Some(sequence) = self.sequences.get(&id) else { return Vec::new() };
        let (own, others) = match sequence.choices.split_first() {
            Some((own, others)) => (*own, others.to_vec()),
            None => return Vec::new(),
        };
        let mut all = vec![(id, own)];
        for choice in others {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let blocks = self.blocks.fork(&sequence.blocks);
            let fork = sequence.fork(choice, blocks);
            all.push((fork.id, choice));
            let fork_id = fork.id;
            self.sequences.insert(fork_id, fork);
            self.run(fork_id);
        }
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.settle();
        }
        all
    }

    /// Appends a token to a running sequence of one choice, and ends it if that was its last.
    pub(super) fn append(&mut self, id: SequenceId, token: u32) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.push(token);
        if let Some(reason) = sequence.finish_reason() {
            let end = sequence.finished(reason);
            self.end(id, end);
        }
    }

    /// Tells a choice its next token, unless it has ended.
    pub(super) fn tell_token(&mut self, id: SequenceId, sampled: Sampled) {
        let update = self.sequences.get_mut(&id).and_then(|sequence| sequence.tell(sampled));
        self.outputs.extend(update);
    }
}
