//! Which phases a group serves now, by circles that understand each other's caches. Pure.

use std::{
    collections::BTreeMap,
    ops::{Add, Sub},
};

use baton_proto::{GroupName, InstanceSpec, Protocols, Role};

use super::Reconciler;
use crate::{
    fleet::Member,
    journal::NewsKind,
    plan::{Split, alike},
};

/// Those who are set up alike and speak a version. One who speaks several is in several: whoever can hand caches to each
/// other share one.
struct Circle<'a> {
    like: &'a InstanceSpec,
    version: u32,
    /// Of how many each phase is served.
    served: Split,
}

impl Circle<'_> {
    fn includes(&self, member: &Member) -> bool {
        member.spec.handoff_protocols.contains(self.version) && alike(self.like, &member.spec)
    }
}

/// See the module.
pub(super) struct Cover<'a> {
    circles: Vec<Circle<'a>>,
}

impl<'a> Cover<'a> {
    /// By what the members do now.
    pub(super) fn of(group: &[&'a Member]) -> Self {
        Self::by(group, |member| phases(member.beat.role))
    }

    /// By what members that serve do now and go on doing when those for whom it is `due` become what they are to be. The
    /// stuck stay what they are.
    pub(super) fn once(group: &[&'a Member], due: impl Fn(&Member) -> bool) -> Self {
        Self::by(group, |member| {
            let now = phases(member.beat.role);
            let changes = member.desired.as_ref().filter(|_| member.stuck.is_none() && due(member));
            let next = changes.map_or(now, |desired| phases(desired.role));
            now.with(next, usize::min)
        })
    }

    fn by(group: &[&'a Member], does: impl Fn(&Member) -> Split) -> Self {
        let serving: Vec<&'a Member> = group.iter().copied().filter(|member| member.is_serving()).collect();
        let versions = Protocols::meeting_points(serving.iter().map(|member| member.spec.handoff_protocols));
        let mut circles: Vec<Circle<'a>> = Vec::new();
        for member in serving {
            let more = does(member);
            for version in versions.iter().copied().filter(|it| member.spec.handoff_protocols.contains(*it)) {
                let own = |circle: &&mut Circle<'_>| circle.version == version && circle.includes(member);
                match circles.iter_mut().find(own) {
                    Some(circle) => circle.served = circle.served.with(more, usize::add),
                    None => circles.push(Circle { like: &member.spec, version, served: more }),
                }
            }
        }
        Self { circles }
    }

    /// Whether requests can be served now.
    pub(super) fn serves(&self) -> bool {
        self.circles.iter().any(|circle| circle.served.prefill > 0 && circle.served.decode > 0)
    }

    /// Whether requests can be served while the member, which serves, changes to this role; always if they cannot be
    /// served now.
    pub(super) fn spares(&self, member: &Member, role: Role) -> bool {
        let ceases = phases(member.beat.role).with(phases(role), usize::saturating_sub);
        let after = |circle: &Circle<'_>| {
            let own = usize::from(circle.includes(member));
            circle.served.prefill > own * ceases.prefill && circle.served.decode > own * ceases.decode
        };
        !self.serves() || self.circles.iter().any(after)
    }

    /// From here on without what the member ceases to do with this role.
    pub(super) fn give(&mut self, member: &Member, role: Role) {
        let ceases = phases(member.beat.role).with(phases(role), usize::saturating_sub);
        for circle in self.circles.iter_mut().filter(|circle| circle.includes(member)) {
            circle.served = circle.served.with(ceases, usize::sub);
        }
    }

    /// Whether requests can be served now and while the member is out of service.
    pub(super) fn can_do_without(&self, member: &Member) -> bool {
        self.serves() && self.spares(member, Role::None)
    }
}

impl Reconciler {
    /// Tells when a group begins to serve, or ceases to.
    pub(super) fn watch_service(&mut self) {
        let mut groups: BTreeMap<GroupName, Vec<&Member>> = BTreeMap::new();
        for member in self.members.values() {
            groups.entry(member.spec.group.clone()).or_default().push(member);
        }
        let served: Vec<_> =
            groups.into_iter().map(|(group, members)| (group, Cover::of(&members).serves())).collect();
        for (name, serves) in served {
            let group = self.groups.entry(name.clone()).or_default();
            // One that has never served is on its way, not degraded.
            let before = group.served;
            group.served = (serves || before.is_some()).then_some(serves);
            match (before, serves) {
                (None | Some(false), true) => {
                    self.tell_group(NewsKind::GroupServing, &name, "both phases are served");
                }
                (Some(true), false) => {
                    let message = "no prefill and decode that understand each other serve";
                    self.tell_group(NewsKind::GroupDegraded, &name, message);
                }
                _ => {}
            }
        }
    }

    /// Whether requests can be served, by group; of those that have been able to once.
    pub fn served(&self) -> BTreeMap<&str, bool> {
        self.groups.iter().filter_map(|(name, group)| Some((name.as_str(), group.served?))).collect()
    }
}

/// How much of prefill and of decode it serves.
pub(super) fn phases(role: Role) -> Split {
    let serves = |phase| usize::from(role == phase || role == Role::Mixed);
    Split { prefill: serves(Role::Prefill), decode: serves(Role::Decode) }
}
