//! One term's work: messages taken in, commands and answers carried out, what became of writes.

use std::{collections::BTreeMap, time::Duration};

use baton_proto::{ApiError, InstanceId};
use baton_registry::{Fenced, Leadership, LeaseId, StoreError, Txn};
use tokio::time::Instant;
use tracing::{debug, error, warn};

use super::answers::{Answer, Answers};
use crate::{
    desk::{Line, Message, Plans, Report},
    fleet::{SessionId, health::Verdict},
    journal::{Journal, News},
    metrics::ControllerMetrics,
    reconcile::{Change, Command, Event, Reconciler, Record, Write},
};

/// Keys written in one transaction; etcd takes 128 operations unless told otherwise.
const WRITES_PER_TXN: usize = 100;
/// A store that goes on failing is warned of so often.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// The fleet's keys, under way to the store.
pub(super) async fn make(leadership: &Leadership, lease: LeaseId, writes: Vec<Write>) -> Written {
    let operations = writes.iter().map(|write| write.operation(lease)).collect();
    let outcome = leadership.txn(Txn { conditions: Vec::new(), operations }).await;
    Written { writes, outcome }
}

/// What became of them.
pub(super) struct Written {
    writes: Vec<Write>,
    outcome: Result<Fenced, StoreError>,
}

fn plans_of(mind: &Reconciler, now: Instant) -> Plans {
    Plans { plans: mind.plans(now) }
}

/// What follows for the next write.
pub(super) enum After {
    GoOn,
    Wait,
    LeaseGone,
    Deposed,
}

/// What a term consists of besides its futures.
pub(super) struct Leading<'a> {
    pub(super) mind: Reconciler,
    lines: BTreeMap<SessionId, Line>,
    /// Changes by operators that are not stored yet.
    answers: Answers,
    journal: &'a Journal,
    metrics: &'a ControllerMetrics,
    changes: u64,
    /// So many keys are written alone, because the store refused one of them.
    one_by_one: usize,
    /// When a failed write was last warned of.
    last_warned: Option<Instant>,
    /// Of the store, since it last took something.
    last_error: Option<String>,
}

impl<'a> Leading<'a> {
    pub(super) fn new(mind: Reconciler, journal: &'a Journal, metrics: &'a ControllerMetrics) -> Self {
        let (lines, answers) = (BTreeMap::new(), Answers::default());
        Self {
            mind,
            lines,
            answers,
            journal,
            metrics,
            changes: 0,
            one_by_one: 0,
            last_warned: None,
            last_error: None,
        }
    }

    pub(super) fn take(&mut self, message: Message, now: Instant) {
        match message {
            Message::Hello { event, session, line } => {
                self.lines.insert(session, line);
                self.handle(event, now);
            }
            Message::Event(event) => {
                if let Event::Closed { session } = &event {
                    self.lines.remove(session);
                }
                self.handle(event, now);
            }
            Message::Report(answer) => {
                let members = self.mind.members().clone();
                let gone = self.mind.remembered();
                let remembered = gone.map(|(id, desired)| (id.clone(), desired.clone())).collect();
                let intents = self.mind.intents().clone();
                let held = |id: &InstanceId| (id.clone(), self.mind.verdict(id));
                let verdicts =
                    members.keys().map(held).filter(|(_, verdict)| *verdict != Verdict::Healthy).collect();
                // Whoever asked may have gone.
                answer.send(Report { members, remembered, verdicts, intents, at: now }).ok();
            }
            Message::Links(answer) => {
                let degraded = self.mind.degraded_links(now).map(|(ends, share)| (ends.clone(), share));
                answer.send(degraded.collect()).ok();
            }
            Message::Plan { what_if, answer } => {
                answer.send(self.plans_with(what_if, now)).ok();
            }
            Message::Change { change, news, answer } => self.change(change, news, answer, now),
        }
    }

    /// What is planned; after a change, without making it, if there is one.
    fn plans_with(&self, what_if: Option<Change>, now: Instant) -> Result<Plans, ApiError> {
        let Some(change) = what_if else { return Ok(plans_of(&self.mind, now)) };
        let mut mind = self.mind.clone();
        mind.change(change)?;
        Ok(plans_of(&mind, now))
    }

    fn change(&mut self, change: Change, news: News, answer: Answer, now: Instant) {
        let taken = self.answers.refuse().and_then(|()| self.mind.change(change));
        match taken {
            Ok(record) => {
                let plans = plans_of(&self.mind, now);
                match record {
                    Some(record) => self.answers.wait(record, news, plans, answer, now),
                    None => {
                        self.journal.enter(news);
                        answer.send(Ok(plans)).ok();
                    }
                }
            }
            Err(refusal) => drop(answer.send(Err(refusal))),
        }
    }

    pub(super) fn handle(&mut self, event: Event, now: Instant) {
        let commands = self.mind.handle(event, now);
        self.carry_out(commands, now);
    }

    pub(super) fn conclude(&mut self, now: Instant) {
        let commands = self.mind.conclude(now);
        self.carry_out(commands, now);
        self.answers.give_up(now, self.last_error.as_deref());
        self.mind.take_news().into_iter().for_each(|news| self.journal.enter(news));
        let changes = self.mind.role_changes();
        self.metrics.role_changes.inc_by(changes - std::mem::replace(&mut self.changes, changes));
        self.metrics.sessions.set(i64::try_from(self.lines.len()).unwrap_or(i64::MAX));
    }

    fn carry_out(&mut self, commands: Vec<Command>, now: Instant) {
        for command in commands {
            match command {
                Command::Close(session) => drop(self.lines.remove(&session)),
                Command::Order(session, order) => {
                    let told =
                        self.lines.get(&session).is_some_and(|line| line.orders.try_send(order).is_ok());
                    if !told && self.lines.remove(&session).is_some() {
                        warn!(%session, "an instance does not read its orders: its session is ended");
                        // Its answer would be to close this very session: nothing more to carry out.
                        self.mind.handle(Event::Closed { session }, now);
                    }
                }
            }
        }
    }

    pub(super) fn take_writes(&mut self) -> Vec<Write> {
        let alone = self.one_by_one > 0;
        self.one_by_one = self.one_by_one.saturating_sub(1);
        let writes = self.mind.take_writes(if alone { 1 } else { WRITES_PER_TXN });
        self.answers.sent(&writes);
        writes
    }

    fn give_back(&mut self, writes: Vec<Write>) {
        self.answers.given_back(&writes);
        self.mind.give_back(writes);
    }

    /// When something is due without a message.
    pub(super) fn next_deadline(&self) -> Instant {
        let mind = self.mind.next_deadline();
        self.answers.next_deadline().map_or(mind, |at| at.min(mind))
    }

    pub(super) fn written(&mut self, written: Written) -> After {
        let Written { writes, outcome } = written;
        match outcome {
            Ok(Fenced::Applied(revision)) => {
                debug!(%revision, keys = writes.len(), "written");
                self.metrics.store_writes.inc_by(writes.len() as u64);
                self.last_error = None;
                let now = Instant::now();
                for Write { record, epoch, .. } in writes {
                    for news in self.answers.stored(&record) {
                        self.journal.enter(news);
                    }
                    if let (Record::Role(id), Some(epoch)) = (record, epoch) {
                        self.handle(Event::RoleStored { id, epoch }, now);
                    }
                }
                After::GoOn
            }
            Ok(Fenced::Deposed) => After::Deposed,
            Ok(Fenced::Conflict) => {
                self.give_back(writes);
                After::GoOn
            }
            // Another try would be refused, too, and hold up everybody else's: the key at fault is left out for a while.
            Err(StoreError::Invalid(reason)) => {
                self.metrics.store_errors.inc();
                match writes.as_slice() {
                    [write] => {
                        error!(key = write.key(), reason, "the state store refuses this record");
                        let record = write.record.clone();
                        self.answers.refused(&record, &reason);
                        self.handle(Event::Refused { record, reason }, Instant::now());
                    }
                    _ => {
                        self.one_by_one = writes.len();
                        self.give_back(writes);
                    }
                }
                After::GoOn
            }
            Err(error) => {
                self.metrics.store_errors.inc();
                if self.last_warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                    self.last_warned = Some(Instant::now());
                    warn!(%error, keys = writes.len(), "changes were not written; trying again");
                }
                self.give_back(writes);
                self.last_error = Some(error.to_string());
                if matches!(error, StoreError::LeaseNotFound(_)) { After::LeaseGone } else { After::Wait }
            }
        }
    }
}
