//! Instances for a part of a request, and the best of them.

use std::cmp::Ordering;

use baton_proto::attention_pairs;

use crate::{
    Ask, Assignee, Scored, Side,
    cost::{Price, blocks_wanted},
    view::Row,
};

/// Candidates for each part whose pairs are looked at.
const PAIRED_MOST: usize = 8;

/// An instance for a part of the work.
#[derive(Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) row: &'a Row,
    pub(super) side: Side,
    pub(super) cached: u32,
    pub(super) price: Price,
    /// As many wait there as may: it comes after all others.
    pub(super) full: bool,
    /// By the policy: of two the lower is better.
    pub(super) rank: f64,
    /// Of equal ranks whoever was chosen longest ago is better, and then chance decides.
    pub(super) tie: (u64, u64),
}

impl Candidate<'_> {
    pub(super) fn order(&self, other: &Self) -> Ordering {
        let rank = self.rank.total_cmp(&other.rank);
        self.full.cmp(&other.full).then(rank).then(self.tie.cmp(&other.tie))
    }

    pub(super) fn assignee(&self, ask: &Ask<'_>) -> Assignee {
        let spec = &self.row.spec;
        let uncached_tokens = u64::from(ask.prompt_tokens().saturating_sub(self.cached));
        Assignee {
            instance: spec.id.clone(),
            incarnation: spec.incarnation,
            role_epoch: self.row.role_epoch.unwrap_or_default(),
            model: spec.model.clone(),
            handoff_endpoint: spec.handoff_endpoint.clone(),
            blocks: blocks_wanted(self.row, ask, self.side, self.cached),
            uncached_tokens,
            uncached_pairs: attention_pairs(uncached_tokens, ask.prompt_tokens().into()),
            waits: self.price.wait_micros > 0.0,
        }
    }

    pub(super) fn scored(&self, ask: &Ask<'_>) -> Scored {
        Scored {
            instance: self.row.spec.id.clone(),
            side: self.side,
            cost_micros: self.price.micros as u64,
            ttft_micros: self.price.ttft_micros as u64,
            tpot_micros: self.price.tpot_micros as u64,
            standing: self.row.standing,
            blocks: blocks_wanted(self.row, ask, self.side, self.cached),
            cached_tokens: self.cached,
        }
    }
}

/// The best candidates of a kind, best first.
#[derive(Default)]
pub(super) struct Best<'a> {
    pub(super) held: Vec<Candidate<'a>>,
    /// One of them can never hold the request.
    pub(super) too_small: bool,
    /// On one of them it would wait no longer than it may.
    pub(super) roomy: bool,
}

impl<'a> Best<'a> {
    pub(super) fn offer(&mut self, candidate: Candidate<'a>) {
        if self.held.len() == PAIRED_MOST {
            if self.held.last().is_some_and(|worst| worst.order(&candidate).is_le()) {
                return;
            }
            self.held.pop();
        }
        let at = self.held.partition_point(|held| held.order(&candidate).is_le());
        self.held.insert(at, candidate);
    }

    /// `None`: one that can never hold the request.
    pub(super) fn take(&mut self, offered: Option<Candidate<'a>>, room_micros: f64) {
        match offered {
            Some(candidate) => {
                self.roomy |= candidate.price.wait_micros <= room_micros;
                self.offer(candidate);
            }
            None => self.too_small = true,
        }
    }

    pub(super) fn first(&self) -> Option<&Candidate<'a>> {
        self.held.first()
    }

    /// Nobody is there, small or large.
    pub(super) fn is_vacant(&self) -> bool {
        self.held.is_empty() && !self.too_small
    }
}
