//! The work this coordinator has placed and not seen done, per instance. Pure.
//!
//! Instances report the load of all coordinators together, but late. What is placed here counts from the instant it is
//! placed: an estimate is *others' work* (what was reported, less what of it was ours at that time) plus *our work now*.

use std::collections::HashMap;

use baton_proto::InstanceId;

use crate::fleet::Load;

/// An amount of work on one instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    pub prefill_tokens: u64,
    pub sequences: u64,
    pub blocks: u64,
}

impl Work {
    fn add(&mut self, other: Work) {
        self.prefill_tokens += other.prefill_tokens;
        self.sequences += other.sequences;
        self.blocks += other.blocks;
    }

    fn take(&mut self, other: Work) {
        self.prefill_tokens = self.prefill_tokens.saturating_sub(other.prefill_tokens);
        self.sequences = self.sequences.saturating_sub(other.sequences);
        self.blocks = self.blocks.saturating_sub(other.blocks);
    }

    fn is_none(&self) -> bool {
        *self == Work::default()
    }
}

/// How an instance is estimated to stand now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    pub queued_prefill_tokens: u64,
    pub sequences: u64,
    /// With how many sequences the decode step was measured.
    pub measured_sequences: u64,
    /// `None`: the instance has not said.
    pub blocks_total: Option<u64>,
    pub blocks_free: Option<u64>,
    /// 0 = not measured.
    pub prefill_tokens_per_second: u64,
    /// 0 = not measured.
    pub decode_step_micros: u64,
}

#[derive(Debug, Default)]
struct Account {
    now: Work,
    /// `now` at the instance's last report.
    at_report: Work,
}

/// Work in flight, per instance.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: HashMap<InstanceId, Account>,
}

impl Ledger {
    /// Work has been placed on an instance.
    pub fn credit(&mut self, instance: &InstanceId, work: Work) {
        match self.accounts.get_mut(instance) {
            Some(account) => account.now.add(work),
            None => {
                let account = Account { now: work, at_report: Work::default() };
                self.accounts.insert(instance.clone(), account);
            }
        }
    }

    /// Work is done, or will not be done there.
    pub fn release(&mut self, instance: &InstanceId, work: Work) {
        if let Some(account) = self.accounts.get_mut(instance) {
            account.now.take(work);
            if account.now.is_none() && account.at_report.is_none() {
                self.accounts.remove(instance);
            }
        }
    }

    /// The instance has just reported its load.
    pub fn reported(&mut self, instance: &InstanceId) {
        if let Some(account) = self.accounts.get_mut(instance) {
            account.at_report = account.now;
            if account.now.is_none() {
                self.accounts.remove(instance);
            }
        }
    }

    /// The instance's streams are gone and its last report with them.
    pub fn forget_report(&mut self, instance: &InstanceId) {
        if let Some(account) = self.accounts.get_mut(instance) {
            account.at_report = Work::default();
            if account.now.is_none() {
                self.accounts.remove(instance);
            }
        }
    }

    /// This coordinator's own work on an instance.
    pub fn own(&self, instance: &InstanceId) -> Work {
        self.accounts.get(instance).map(|account| account.now).unwrap_or_default()
    }

    /// The estimate from an instance's last report and what has been placed and done since.
    pub fn standing(&self, instance: &InstanceId, load: &Load) -> Standing {
        let (now, then) = match self.accounts.get(instance) {
            Some(account) => (account.now, account.at_report),
            None => Default::default(),
        };
        let sum = |reported: u64, then: u64, now: u64| reported.saturating_sub(then).saturating_add(now);
        let total = u64::from(load.kv_blocks_total);
        let used = total.saturating_sub(u64::from(load.kv_blocks_free));
        Standing {
            queued_prefill_tokens: sum(load.queued_prefill_tokens, then.prefill_tokens, now.prefill_tokens),
            sequences: sum(u64::from(load.sequences), then.sequences, now.sequences),
            measured_sequences: u64::from(load.sequences),
            blocks_total: (total > 0).then_some(total),
            blocks_free: (total > 0).then(|| total.saturating_sub(sum(used, then.blocks, now.blocks))),
            prefill_tokens_per_second: load.prefill_tokens_per_second,
            decode_step_micros: load.decode_step_micros,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> InstanceId {
        InstanceId::new("a").expect("a good id")
    }

    fn work(prefill_tokens: u64, sequences: u64, blocks: u64) -> Work {
        Work { prefill_tokens, sequences, blocks }
    }

    fn load(queued_prefill_tokens: u64, sequences: u32, kv_blocks_free: u32) -> Load {
        Load { queued_prefill_tokens, sequences, kv_blocks_total: 100, kv_blocks_free, ..Load::default() }
    }

    #[test]
    fn work_counts_from_the_instant_it_is_placed() {
        let mut ledger = Ledger::default();
        ledger.credit(&id(), work(50, 1, 4));
        let standing = ledger.standing(&id(), &load(200, 3, 60));
        assert_eq!((standing.queued_prefill_tokens, standing.sequences), (250, 4));
        assert_eq!(standing.blocks_free, Some(56));
    }

    #[test]
    fn a_report_that_contains_our_work_does_not_count_it_twice() {
        let mut ledger = Ledger::default();
        ledger.credit(&id(), work(50, 1, 4));
        ledger.reported(&id());
        let report = load(250, 4, 56);
        assert_eq!(ledger.standing(&id(), &report).queued_prefill_tokens, 250);
        ledger.release(&id(), work(50, 0, 0));
        ledger.credit(&id(), work(10, 1, 1));
        let standing = ledger.standing(&id(), &report);
        assert_eq!((standing.queued_prefill_tokens, standing.sequences), (210, 5));
        assert_eq!(standing.blocks_free, Some(55));
    }

    #[test]
    fn accounts_end_with_their_work() {
        let mut ledger = Ledger::default();
        ledger.credit(&id(), work(50, 1, 4));
        ledger.reported(&id());
        ledger.release(&id(), work(50, 1, 4));
        ledger.reported(&id());
        assert!(ledger.accounts.is_empty());
        assert_eq!(ledger.standing(&id(), &Load::default()).blocks_free, None);
    }

    #[test]
    fn forgetting_the_report_of_an_idle_instance_forgets_its_account() {
        let mut ledger = Ledger::default();
        ledger.credit(&id(), work(50, 1, 4));
        ledger.reported(&id());
        ledger.forget_report(&id());
        assert_eq!(ledger.own(&id()), work(50, 1, 4), "our work is still there");
        ledger.reported(&id());
        ledger.release(&id(), work(50, 1, 4));
        assert_eq!(ledger.accounts.len(), 1, "the report still counts it");
        ledger.forget_report(&id());
        assert!(ledger.accounts.is_empty());
    }
}
