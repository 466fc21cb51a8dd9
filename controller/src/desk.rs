//! Where sessions and operators bring what they have for the leading controller.
//!
//! Between the gRPC adapters ([`crate::session`], [`crate::admin`]) and the task that leads ([`crate::lead`]). There
//! is an inbox only while this controller leads; without one the adapters refuse.

use std::collections::BTreeMap;

use baton_proto::{ApiError, GroupName, InstanceId, Intent, LeaderEpoch};
use baton_registry::{DesiredRole, Leadership, Term};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::sync::DropGuard;

use crate::{
    fleet::{
        Members, SessionId,
        health::{Ends, Verdict},
    },
    journal::News,
    reconcile::{Change, Event, GroupPlan, Order},
};

/// Messages that wait for the leading task. When it is full, whoever brings one waits, and so does its instance.
pub const INBOX_CAPACITY: usize = 1024;

/// Orders that wait for an instance to read them. One more and its session is ended: it can call again.
pub const ORDERS_CAPACITY: usize = 32;

/// What is brought.
#[derive(Debug)]
pub enum Message {
    /// A hello, and the way back to the instance.
    Hello {
        event: Event,
        session: SessionId,
        line: Line,
    },
    Event(Event),
    Report(oneshot::Sender<Report>),
    /// Asks for the links that are degraded, and the share of their handoffs that fail.
    Links(oneshot::Sender<BTreeMap<Ends, f64>>),
    /// What is planned, or would be after a change.
    Plan {
        what_if: Option<Change>,
        answer: oneshot::Sender<Result<Plans, ApiError>>,
    },
    /// A change to make, and what is entered in the journal for it. Answered with the plan once it is stored.
    Change {
        change: Change,
        news: News,
        answer: oneshot::Sender<Result<Plans, ApiError>>,
    },
}

/// The way to an instance. Dropping it ends the session once it has read what it was sent.
#[derive(Debug)]
pub struct Line {
    pub orders: mpsc::Sender<Order>,
    pub end: DropGuard,
}

/// The fleet as operators see it.
#[derive(Debug)]
pub struct Report {
    pub members: Members,
    /// Roles of instances that are gone.
    pub remembered: Vec<(InstanceId, DesiredRole)>,
    /// What is held of those that are not healthy.
    pub verdicts: BTreeMap<InstanceId, Verdict>,
    /// What operators want.
    pub intents: BTreeMap<InstanceId, Intent>,
    pub at: Instant,
}

/// What is planned.
#[derive(Debug)]
pub struct Plans {
    pub plans: Vec<GroupPlan>,
}

impl Plans {
    /// The group that the instance is planned in.
    pub fn group_of(&self, id: &InstanceId) -> Option<GroupName> {
        let has = |plan: &&GroupPlan| plan.members.iter().any(|member| member.id == *id);
        self.plans.iter().find(has).map(|plan| plan.group.clone())
    }
}

/// The leading task's inbox, for the time of its term.
#[derive(Debug, Clone)]
pub struct Inbox {
    pub messages: mpsc::Sender<Message>,
    pub epoch: LeaderEpoch,
    /// For what the store does not guard.
    pub term: Term,
    /// For records that the leading task has nothing to do with.
    pub leadership: Leadership,
}

impl Inbox {
    /// Brings a message and waits for its answer; none once the term is over.
    pub async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.messages.send(message(answer)).await.ok()?;
        answered.await.ok()
    }
}

/// The adapters' end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Desk {
    inbox: watch::Receiver<Option<Inbox>>,
}

impl Desk {
    /// A desk and what opens and closes it.
    pub fn new() -> (watch::Sender<Option<Inbox>>, Self) {
        let (sender, inbox) = watch::channel(None);
        (sender, Self { inbox })
    }

    /// None unless this controller leads.
    pub fn inbox(&self) -> Option<Inbox> {
        self.inbox.borrow().clone()
    }

    /// The inbox of this term, or once there is one of the next. Never, if the controller ends before.
    pub async fn opened(&self) -> Inbox {
        let mut inbox = self.inbox.clone();
        let open = |inbox: &Option<Inbox>| inbox.as_ref().is_some_and(|it| !it.messages.is_closed());
        let opened = inbox.wait_for(open).await.ok().and_then(|inbox| inbox.clone());
        match opened {
            Some(inbox) => inbox,
            None => std::future::pending().await,
        }
    }
}
