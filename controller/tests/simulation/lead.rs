//! What a controller of the simulation does while it leads: the loop of `lead.rs`, with the real fence and the real
//! reconciler.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    task::{Context, Poll, Waker},
    time::Duration,
};

use baton_controller::{
    fleet::SessionId,
    reconcile::{Command, Event, Order, Reconciler},
};
use baton_registry::{Fenced, Leadership, Lease, LeaseId, Store, StoreError, Txn};
use futures::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use crate::{
    batch::Batch,
    checks::{Findings, Roles},
    controller::{Out, Said},
    store::Client,
};

pub(crate) const RETRY: Duration = Duration::from_millis(250);
/// As small as to have several transactions for a fleet of a few.
const WRITES_PER_TXN: usize = 4;

/// A call of the store: a future that is polled by hand.
pub(crate) type Call<T> = Option<BoxFuture<'static, T>>;

/// The lease of the leadership: as `Leadership::hold` does.
pub(crate) struct Hold {
    lease: LeaseId,
    ttl: Duration,
    renewed: Instant,
    asked: Instant,
    again: Instant,
    call: Call<Result<Duration, StoreError>>,
}

impl Hold {
    pub(crate) fn new(lease: LeaseId, ttl: Duration, asked: Instant) -> Self {
        Self { lease, ttl, renewed: asked, asked, again: asked + ttl / 3, call: None }
    }

    /// Leaves one that is not used any more.
    pub(crate) fn take(&mut self, now: Instant) -> Self {
        let left = Self::new(self.lease, self.ttl, now);
        std::mem::replace(self, left)
    }

    pub(crate) fn lost(&mut self, store: &Client, now: Instant) -> bool {
        let ends = self.renewed + self.ttl;
        match poll(&mut self.call) {
            Some(Ok(_)) => (self.renewed, self.again) = (self.asked, now + self.ttl / 3),
            Some(Err(StoreError::LeaseNotFound(_))) => return true,
            Some(Err(_)) if now >= ends => return true,
            Some(Err(_)) => self.again = now + RETRY.min(ends - now),
            None if self.call.is_some() && now >= ends => return true,
            None => {}
        }
        if self.call.is_none() && self.again <= now {
            let (store, lease) = (store.clone(), self.lease);
            self.asked = now;
            self.call = Some(async move { store.keep_alive(lease).await }.boxed());
            poll_once(&mut self.call);
        }
        false
    }

    pub(crate) fn wake(&self) -> Instant {
        if self.call.is_some() { self.renewed + self.ttl } else { self.again }
    }
}

pub(crate) struct Leading {
    pub(crate) mind: Reconciler,
    store: Client,
    pub(crate) leadership: Leadership,
    pub(crate) hold: Hold,
    pub(crate) lines: BTreeSet<SessionId>,
    /// Sessions that were welcomed, and when each was last heard, by this clock.
    pub(crate) welcomed: BTreeMap<SessionId, Instant>,
    records: Lease,
    records_at: Instant,
    renewal: Call<Result<Duration, StoreError>>,
    grant: Call<Result<Lease, StoreError>>,
    write: Call<(Batch, Result<Fenced, StoreError>)>,
    write_after: Instant,
    one_by_one: usize,
}

impl Leading {
    pub(crate) fn new(
        mind: Reconciler,
        store: Client,
        leadership: Leadership,
        hold: Hold,
        records: Lease,
        now: Instant,
    ) -> Self {
        Self {
            mind,
            store,
            leadership,
            hold,
            lines: BTreeSet::new(),
            welcomed: BTreeMap::new(),
            records,
            records_at: now + records.ttl / 3,
            renewal: None,
            grant: None,
            write: None,
            write_after: now,
            one_by_one: 0,
        }
    }

    /// Until there is nothing to do at this time. Says whether it was deposed.
    pub(crate) fn run(
        &mut self,
        inbox: &mut VecDeque<(SessionId, Said)>,
        now: Instant,
        findings: &mut Findings,
        out: &mut Vec<Out>,
    ) -> bool {
        loop {
            let (before, changes) = (Roles::of(&self.mind), self.mind.role_changes());
            let commands = self.mind.conclude(now);
            if self.mind.role_changes() != changes {
                findings.decided(&before, &self.mind);
            }
            self.carry_out(commands, now, out);
            self.keep_records(now);
            if self.write.is_none() && self.write_after <= now && self.mind.has_writes() {
                self.start_write();
            }
            if let Some((batch, outcome)) = poll(&mut self.write) {
                if self.written(batch, outcome, now, out) {
                    return true;
                }
            } else if let Some((session, said)) = inbox.pop_front() {
                self.take(session, said, now, out);
            } else {
                return false;
            }
        }
    }

    fn take(&mut self, session: SessionId, said: Said, now: Instant, out: &mut Vec<Out>) {
        let event = match said {
            Said::Hello(spec, beat) => {
                self.lines.insert(session);
                Event::Hello { session, spec, beat, unix_millis: 0 }
            }
            // Of a session of an earlier term.
            _ if !self.welcomed.contains_key(&session) => return,
            Said::Beat(beat) => Event::Beat { session, beat },
            Said::Bye => Event::Bye { session, reason: String::new() },
            Said::Closed => {
                self.lines.remove(&session);
                Event::Closed { session }
            }
        };
        let commands = self.mind.handle(event, now);
        self.carry_out(commands, now, out);
        let known = self.mind.members().values().any(|member| member.session() == Some(session));
        if let Some(heard) = self.welcomed.get_mut(&session).filter(|_| known) {
            *heard = now;
        }
    }

    fn carry_out(&mut self, commands: Vec<Command>, now: Instant, out: &mut Vec<Out>) {
        for command in commands {
            match command {
                Command::Order(session, order) if self.lines.contains(&session) => {
                    if order == Order::Welcome {
                        self.welcomed.insert(session, now);
                    }
                    out.push(Out::Order(session, order));
                }
                Command::Close(session) if self.lines.remove(&session) => out.push(Out::End(session)),
                _ => {}
            }
        }
    }

    fn keep_records(&mut self, now: Instant) {
        match poll(&mut self.renewal) {
            Some(Ok(_)) => self.records_at = now + self.records.ttl / 3,
            Some(Err(StoreError::LeaseNotFound(_))) => self.grant_records(),
            Some(Err(_)) => self.records_at = now + RETRY,
            None => {}
        }
        match poll(&mut self.grant) {
            Some(Ok(lease)) => {
                (self.records, self.records_at) = (lease, now + lease.ttl / 3);
                self.mind.lease_ended();
            }
            Some(Err(_)) => self.grant_records(),
            None => {}
        }
        if self.renewal.is_none() && self.grant.is_none() && self.records_at <= now {
            let (store, lease) = (self.store.clone(), self.records.id);
            self.renewal = Some(async move { store.keep_alive(lease).await }.boxed());
            poll_once(&mut self.renewal);
        }
    }

    fn grant_records(&mut self) {
        let (store, ttl) = (self.store.clone(), self.records.ttl);
        self.grant = Some(async move { store.grant_lease(ttl).await }.boxed());
        poll_once(&mut self.grant);
    }

    fn start_write(&mut self) {
        let alone = self.one_by_one > 0;
        self.one_by_one = self.one_by_one.saturating_sub(1);
        let batch = Batch::take(&mut self.mind, if alone { 1 } else { WRITES_PER_TXN });
        let operations = batch.operations(self.records.id);
        let leadership = self.leadership.clone();
        self.write = Some(
            async move {
                let outcome = leadership.txn(Txn { conditions: Vec::new(), operations }).await;
                (batch, outcome)
            }
            .boxed(),
        );
    }

    /// Says whether another controller has taken over.
    fn written(
        &mut self,
        batch: Batch,
        outcome: Result<Fenced, StoreError>,
        now: Instant,
        out: &mut Vec<Out>,
    ) -> bool {
        match outcome {
            Ok(Fenced::Applied(_)) => {
                for event in batch.stored() {
                    let commands = self.mind.handle(event, now);
                    self.carry_out(commands, now, out);
                }
            }
            Ok(Fenced::Deposed) => return true,
            Ok(Fenced::Conflict) => batch.give_back(&mut self.mind),
            Err(StoreError::Invalid(reason)) => match batch.refusal(reason) {
                Ok(event) => {
                    let commands = self.mind.handle(event, now);
                    self.carry_out(commands, now, out);
                }
                Err(batch) => {
                    self.one_by_one = batch.len();
                    batch.give_back(&mut self.mind);
                }
            },
            Err(error) => {
                batch.give_back(&mut self.mind);
                self.write_after = now + RETRY;
                if matches!(error, StoreError::LeaseNotFound(_)) {
                    self.renewal = None;
                    self.grant_records();
                }
            }
        }
        false
    }

    pub(crate) fn wake(&self) -> Instant {
        let mut wake = self.mind.next_deadline().min(self.hold.wake());
        if self.renewal.is_none() && self.grant.is_none() {
            wake = wake.min(self.records_at);
        }
        if self.write.is_none() && self.mind.has_writes() {
            wake = wake.min(self.write_after);
        }
        wake
    }
}

/// The result, once; none while there is no call or no answer.
pub(crate) fn poll<T>(call: &mut Call<T>) -> Option<T> {
    let ready = call.as_mut()?.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    match ready {
        Poll::Ready(value) => {
            *call = None;
            Some(value)
        }
        Poll::Pending => None,
    }
}

/// Sends the call off.
pub(crate) fn poll_once<T>(call: &mut Call<T>) {
    assert!(poll(call).is_none(), "no call is answered at once");
}
