//! The work this coordinator has placed and not seen done, per instance. Pure.
//!
//! Instances report the load of all coordinators together, but late: what has been placed and what has ended since a
//! report was made is known here alone. Each report says which of this coordinator's legs it includes: those up to a
//! number, less those that the instance had told the end of before (see `InstanceLoad.seen_leg`). So, whenever a report
//! was made and however long it was on its way:
//!
//! > estimate = reported + ours that it does not include + nothing of what it includes of ours and is over
//!
//! *The invariant*, as `tests` has it for any order of events and any delays: where instances count a leg as it was booked
//! (all of it until it is over), the estimate is the others' work at the time of the report in hand plus this
//! coordinator's own work as it is now. With others at rest that is the truth; with no report yet it is the own work.
//!
//! An instance counts more finely: what is left of a half computed prompt, blocks as they are taken. What it says is
//! believed until the next report; what ends meanwhile is taken off as it was booked, never below nothing, and of a prompt that
//! is computed no more than can have been since. Blocks are
//! never taken to be fewer than are promised: a decode leg holds none before its cache is offered.
//!
//! A leg is over for the estimate as soon as this coordinator cancels it, but stays known until the instance confirms
//! it: reports count it until then. An instance of an earlier version does not say what it includes; then a report is
//! taken to include all that was dispatched before it came, and nothing that was over by then.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    num::NonZeroU32,
    ops::Bound::{Excluded, Unbounded},
};

use baton_proto::{InstanceId, LegId};

use crate::fleet::Load;

/// Cancelled legs of an instance whose end is waited for; of more, the oldest are taken to have ended.
const CANCELLED_MOST: usize = 4096;

/// An amount of work on one instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// To be computed of a prompt, and the pairs of one of them and a token before it.
    pub prefill_tokens: u64,
    pub prefill_pairs: u64,
    /// Legs, and the sequences that they become there: one for each choice.
    pub requests: u64,
    pub sequences: u64,
    pub blocks: u64,
}

impl Work {
    fn add(&mut self, other: Work) {
        self.prefill_tokens += other.prefill_tokens;
        self.prefill_pairs += other.prefill_pairs;
        self.requests += other.requests;
        self.sequences += other.sequences;
        self.blocks += other.blocks;
    }

    fn take(&mut self, other: Work) {
        self.prefill_tokens = self.prefill_tokens.saturating_sub(other.prefill_tokens);
        self.prefill_pairs = self.prefill_pairs.saturating_sub(other.prefill_pairs);
        self.requests = self.requests.saturating_sub(other.requests);
        self.sequences = self.sequences.saturating_sub(other.sequences);
        self.blocks = self.blocks.saturating_sub(other.blocks);
    }

    fn is_none(&self) -> bool {
        *self == Work::default()
    }
}

/// How an instance is estimated to stand now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    pub queued_prefill_tokens: u64,
    pub queued_prefill_pairs: u64,
    /// Running and waiting: also those whose cache is still to come, which take no place yet.
    pub sequences: u64,
    /// Of them those that ran when it told.
    pub running: u64,
    /// Of them those that it decodes at a time, at most. `None`: it does not say.
    pub sequences_most: Option<NonZeroU32>,
    /// Requests that it would still take on if none of those that it has not counted had started at once. `None`: it does not
    /// say.
    pub waiting_room: Option<u64>,
    /// `None`: the instance has not said.
    pub blocks_total: Option<u64>,
    pub blocks_free: Option<u64>,
    /// Blocks that what was sent there will want beyond all that there are.
    pub blocks_short: u64,
    /// 0 = not measured.
    pub prefill_tokens_per_second: u64,
    /// 0 = not measured.
    pub decode_step_micros: u64,
}

impl Standing {
    /// Those that it decodes at a time.
    pub fn batch(&self) -> u64 {
        self.sequences_most.map_or(self.sequences, |most| self.sequences.min(most.get().into()))
    }

    /// Blocks that are not free; 0 where the instance has not said.
    pub fn blocks_used(&self) -> u64 {
        self.blocks_total.unwrap_or(0).saturating_sub(self.blocks_free.unwrap_or(0))
    }

    /// How many times as many as are decoded at a time have to end before so many more are. Nobody waits for more than those that
    /// are there.
    pub fn turns_before(&self, choices: u32) -> f64 {
        let Some(most) = self.sequences_most.map(|most| u64::from(most.get())) else { return 0.0 };
        let ahead = (self.sequences + u64::from(choices)).saturating_sub(most).min(self.sequences);
        ahead as f64 / most as f64
    }
}

/// A dispatched leg whose end the instance has not told.
#[derive(Debug)]
struct Leg {
    /// What is left of its work.
    work: Work,
    /// Choices whose end has not been told.
    choices: u32,
}

#[derive(Debug, Default)]
struct Account {
    /// Legs on the stream that stands.
    legs: BTreeMap<LegId, Leg>,
    /// Those of them that have been cancelled.
    cancelled: BTreeSet<LegId>,
    /// The last leg that the report in hand includes.
    seen: LegId,
    /// All that is booked and not over.
    own: Work,
    /// Of that, what the report in hand does not include.
    unseen: Work,
    /// What the report in hand includes of ours though it is over.
    over: Work,
    /// Of that, tokens of prompts that have been computed since.
    computed: u64,
}

impl Account {
    fn is_empty(&self) -> bool {
        self.legs.is_empty() && self.own.is_none() && self.over.is_none()
    }

    /// Work of a leg that was not cancelled is over.
    fn settle(&mut self, leg: LegId, work: Work) {
        self.own.take(work);
        if leg <= self.seen {
            self.over.add(work);
        } else {
            self.unseen.take(work);
        }
    }

    /// Of a leg that was not cancelled the prompt has been computed, of no more than so many tokens since the report in hand: the
    /// rest had been before, and is not counted there.
    fn prefilled(&mut self, leg: LegId, work: Work, most: u64) {
        if leg > self.seen {
            return self.settle(leg, work);
        }
        self.own.take(work);
        let Work { prefill_tokens: tokens, prefill_pairs: pairs, .. } = work;
        let counted = tokens.min(most.saturating_sub(self.computed));
        self.computed += counted;
        // They are its last, before which the most lie.
        let each = pairs as f64 / tokens.max(1) as f64 + (tokens - counted) as f64 / 2.0;
        let prefill_pairs = pairs.min((counted as f64 * each) as u64);
        self.over.add(Work { prefill_tokens: counted, prefill_pairs, ..Work::default() });
    }

    fn reported(&mut self, seen: Option<LegId>) {
        self.computed = 0;
        let seen = match seen {
            Some(seen) => seen,
            None => {
                let cancelled = std::mem::take(&mut self.cancelled);
                self.legs.retain(|leg, _| !cancelled.contains(leg));
                LegId(u64::MAX)
            }
        };
        // What it says beyond the last of them would be taken for true of those to come.
        let later = self.legs.range((Excluded(self.seen), Unbounded)).take_while(|(leg, _)| **leg <= seen);
        for (&leg, of) in later {
            if !self.cancelled.contains(&leg) {
                self.unseen.take(of.work);
            }
            self.seen = leg;
        }
        self.over = Work::default();
        let legs = &self.legs;
        let cancelled = self.cancelled.range(..=self.seen).filter_map(|leg| legs.get(leg));
        cancelled.for_each(|of| self.over.add(of.work));
    }
}

/// Work in flight, per instance.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: HashMap<InstanceId, Account>,
}

impl Ledger {
    /// Work has been placed on an instance, and is about to be dispatched.
    pub fn credit(&mut self, instance: &InstanceId, work: Work) {
        let account = match self.accounts.get_mut(instance) {
            Some(account) => account,
            None => self.accounts.entry(instance.clone()).or_default(),
        };
        account.own.add(work);
        account.unseen.add(work);
    }

    /// Work that was placed is not dispatched.
    pub fn release(&mut self, instance: &InstanceId, work: Work) {
        self.change(instance, |account| {
            account.own.take(work);
            account.unseen.take(work);
        });
    }

    /// Work that was placed is dispatched, as a leg of so many choices whose number is above that of all before it. To be
    /// called before the instance can know of it.
    pub fn dispatched(&mut self, instance: &InstanceId, leg: LegId, work: Work, choices: u32) {
        self.change(instance, |account| {
            account.legs.insert(leg, Leg { work, choices: choices.max(1) });
        });
    }

    /// The instance says that a leg's prompt is computed. `most`: tokens of prompts that it can have computed since its last
    /// report.
    pub fn prefilled(&mut self, instance: &InstanceId, leg: LegId, most: u64) {
        self.change(instance, |account| {
            let Some(of) = account.legs.get_mut(&leg) else { return };
            let prefill_tokens = std::mem::take(&mut of.work.prefill_tokens);
            let prefill_pairs = std::mem::take(&mut of.work.prefill_pairs);
            if !account.cancelled.contains(&leg) {
                account.prefilled(leg, Work { prefill_tokens, prefill_pairs, ..Work::default() }, most);
            }
        });
    }

    /// The instance says that a choice of a leg has ended.
    pub fn choice_ended(&mut self, instance: &InstanceId, leg: LegId) {
        self.change(instance, |account| {
            let Some(of) = account.legs.get_mut(&leg) else { return };
            of.choices -= 1;
            if of.choices == 0 {
                let work = of.work;
                account.legs.remove(&leg);
                // The report in hand may include one that was cancelled: the next does not.
                if !account.cancelled.remove(&leg) {
                    account.settle(leg, work);
                }
            }
        });
    }

    /// What is left of a dispatched leg, if anything, is not wanted any more: the instance has been told, or is told now.
    pub fn cancelled(&mut self, instance: &InstanceId, leg: LegId) {
        self.change(instance, |account| {
            let Some(of) = account.legs.get(&leg) else { return };
            let work = of.work;
            if account.cancelled.insert(leg) {
                account.settle(leg, work);
            }
            if account.cancelled.len() > CANCELLED_MOST
                && let Some(oldest) = account.cancelled.pop_first()
            {
                account.legs.remove(&oldest);
            }
        });
    }

    /// The instance has reported its load, with what of ours up to this leg; `None` = it does not say.
    pub fn reported(&mut self, instance: &InstanceId, seen: Option<LegId>) {
        self.change(instance, |account| account.reported(seen));
    }

    /// The stream to the instance is gone, and the legs on it with it. None is dispatched before the next one stands.
    pub fn detached(&mut self, instance: &InstanceId) {
        self.change(instance, |account| {
            for (leg, of) in std::mem::take(&mut account.legs) {
                if !account.cancelled.contains(&leg) {
                    account.settle(leg, of.work);
                }
            }
            account.cancelled.clear();
            (account.seen, account.over, account.computed) = Default::default();
        });
    }

    /// Changes an account, if there is one, and closes it if nothing is left in it.
    fn change(&mut self, instance: &InstanceId, change: impl FnOnce(&mut Account)) {
        if let Some(account) = self.accounts.get_mut(instance) {
            change(account);
            if account.is_empty() {
                self.accounts.remove(instance);
            }
        }
    }

    /// This coordinator's own work on an instance.
    pub fn own(&self, instance: &InstanceId) -> Work {
        self.accounts.get(instance).map(|account| account.own).unwrap_or_default()
    }

    /// The estimate from an instance's last report and what is known beside it.
    pub fn standing(&self, instance: &InstanceId, load: &Load) -> Standing {
        let (own, unseen, over) = match self.accounts.get(instance) {
            Some(account) => (account.own, account.unseen, account.over),
            None => Default::default(),
        };
        let sum =
            |reported: u64, unseen: u64, over: u64| reported.saturating_add(unseen).saturating_sub(over);
        let total = u64::from(load.kv_blocks_total);
        let used = total.saturating_sub(u64::from(load.kv_blocks_free));
        let used = sum(used, unseen.blocks, over.blocks).max(own.blocks);
        Standing {
            queued_prefill_tokens: sum(
                load.queued_prefill_tokens,
                unseen.prefill_tokens,
                over.prefill_tokens,
            ),
            queued_prefill_pairs: sum(load.queued_prefill_pairs, unseen.prefill_pairs, over.prefill_pairs),
            sequences: sum(u64::from(load.sequences), unseen.sequences, over.sequences),
            running: load.running.into(),
            sequences_most: load.sequences_most,
            waiting_room: load.waiting_room.map(|room| u64::from(room).saturating_sub(unseen.requests)),
            blocks_total: (total > 0).then_some(total),
            blocks_free: (total > 0).then(|| total.saturating_sub(used)),
            blocks_short: if total > 0 { used.saturating_sub(total) } else { 0 },
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros,
        }
    }
}

#[cfg(test)]
mod tests;
