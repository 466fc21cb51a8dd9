//! What the reconciler has to tell: collected while it works, taken by whoever keeps the journal.

use baton_proto::{GroupName, InstanceId};

use super::{Change, Reconciler};
use crate::{
    fleet::health::LinkChange,
    journal::{News, NewsKind},
};

impl Reconciler {
    /// What is new since this was last called.
    pub fn take_news(&mut self) -> Vec<News> {
        std::mem::take(&mut self.news)
    }

    /// Of a member.
    pub(super) fn tell(&mut self, kind: NewsKind, id: &InstanceId, message: impl Into<String>) {
        let group = self.members.get(id).map(|member| member.spec.group.clone());
        self.tell_of(kind, id, group, message);
    }

    /// Of one that is not a member, or no longer.
    pub(super) fn tell_of(
        &mut self,
        kind: NewsKind,
        id: &InstanceId,
        group: Option<GroupName>,
        message: impl Into<String>,
    ) {
        let (instance, message) = (Some(id.clone()), message.into());
        self.news.push(News { kind, group, instance, message, actor: None });
    }

    /// Of a link, entered for the instance at its beginning.
    pub(super) fn tell_of_link(&mut self, change: &LinkChange) {
        let LinkChange { ends, degraded, failing } = change;
        let kind = if *degraded { NewsKind::LinkDegraded } else { NewsKind::LinkRecovered };
        let how = failing.map_or_else(
            || "hardly any of its handoffs fail".to_owned(),
            |share| format!("{:.0} % of its handoffs fail", share * 100.0),
        );
        self.tell(kind, &ends.prefill, format!("{ends}: {how}"));
    }

    /// Of a group.
    pub(super) fn tell_group(&mut self, kind: NewsKind, group: &GroupName, message: impl Into<String>) {
        let (group, message) = (Some(group.clone()), message.into());
        self.news.push(News { kind, group, instance: None, message, actor: None });
    }
}

impl Change {
    /// As it is entered once it is made.
    pub fn news(&self, actor: &str) -> News {
        let (kind, instance, group, message) = match self {
            Self::Cordon { id, cordoned, .. } => {
                (NewsKind::Cordoned, Some(id), None, cordoned.reason.clone())
            }
            Self::Uncordon { id, .. } => (NewsKind::Uncordoned, Some(id), None, String::new()),
            Self::Pin { id, pinned } => {
                let role = pinned.as_ref().map(|pinned| pinned.role.name());
                let role = role.unwrap_or("whatever the planner chooses");
                (NewsKind::Pinned, Some(id), None, format!("to {role}"))
            }
            Self::Divide { group, targets } => {
                let message =
                    targets.as_ref().map_or_else(|| "as configured".to_owned(), ToString::to_string);
                (NewsKind::TargetsSet, None, Some(group), message)
            }
            Self::Rebalance { group } => (NewsKind::Rebalanced, None, Some(group), String::new()),
        };
        let (instance, group) = (instance.cloned(), group.cloned());
        News { kind, group, instance, message, actor: Some(actor.to_owned()) }
    }
}
