//! Instances whose caches fit each other, and how busy those of them are that prefill.

use std::time::Duration;

use baton_proto::GroupName;
use tokio::time::Instant;

use super::Row;

/// Of what span of time the share is in which prefill is busy.
const BUSY_SPAN: Duration = Duration::from_secs(30);

/// Instances that can hand KV caches to each other, as they have them alike and speak a version.
#[derive(Debug, Clone)]
pub struct Class {
    group: GroupName,
    layout: String,
    /// Of the handoff protocol, one of [`baton_proto::Protocols::meeting_points`]. Who speaks several is of several classes.
    version: u32,
    /// Instances that prefill, and those of them that have something to compute.
    prefills: usize,
    computing: usize,
    /// The share of the latter, of late.
    busy: f64,
    at: Instant,
}

impl Class {
    /// With nobody in it yet.
    pub(super) fn new(group: &GroupName, layout: &str, version: u32, now: Instant) -> Self {
        let (group, layout) = (group.clone(), layout.to_owned());
        Self { group, layout, version, prefills: 0, computing: 0, busy: 0.0, at: now }
    }

    /// The same, as busy as it was, with nobody in it.
    pub(super) fn emptied(&self) -> Self {
        Self { prefills: 0, computing: 0, ..self.clone() }
    }

    pub(super) fn key(&self) -> (&GroupName, &str, u32) {
        (&self.group, &self.layout, self.version)
    }

    /// How many of it prefill.
    pub fn prefills(&self) -> usize {
        self.prefills
    }

    pub(super) fn count(&mut self, row: &Row) {
        self.prefills += usize::from(row.is_prefill());
        self.computing += usize::from(row.is_busy());
    }

    pub(super) fn discount(&mut self, row: &Row) {
        self.prefills -= usize::from(row.is_prefill());
        self.computing -= usize::from(row.is_busy());
    }

    /// A request has come, which finds so many of them busy.
    pub(super) fn arrived(&mut self, now: Instant) {
        let found = self.computing as f64 / self.prefills.max(1) as f64;
        let passed = now.saturating_duration_since(self.at).as_secs_f64() / BUSY_SPAN.as_secs_f64();
        self.busy += (1.0 - (-passed).exp()) * (found - self.busy);
        self.at = now;
    }

    /// How many requests wait for a second of work, on average, while one more is computed: load / (1 - load), as in a line
    /// before one counter.
    pub fn waiting(&self, most: f64) -> f64 {
        (self.busy / (1.0 - self.busy).max(1e-9)).min(most)
    }
}
