//! When a change that a plan asks for is made.
//!
//! Who does not serve is given its role at once. Who serves is moved, or left without a role, one at a time in a group,
//! only once every other has taken on what it was given, and only if both phases go on being served. One that operators
//! cordon by force waits for nobody; one that is set aside otherwise goes only while the group is served without it. Two
//! that are to change places, with nobody else to serve meanwhile, pass through [`Role::Mixed`]. What was decided and could
//! not be told yet is taken back if the group would by now cease to be served by it. How many may be moved in a while is
//! for [`super::moves`] to say.

use std::collections::{BTreeMap, BTreeSet};

use baton_proto::{InstanceId, Role};
use baton_registry::DesiredRole;
use tokio::time::Instant;

use super::{Budget, Reconciler, cover::Cover};
use crate::{fleet::Member, plan::Decision};

/// What becomes of an instance now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It has what is planned.
    Keeps,
    /// The change is made now.
    Changes,
    /// The change is made later; for people, what it waits for.
    Waits(String),
    /// It is planned without.
    NotCounted,
}

impl Reconciler {
    /// Which of the decisions are carried out now, and when to look at the others again if time will change that.
    pub(super) fn steps(
        &self,
        group: &[&Member],
        decisions: &mut BTreeMap<&InstanceId, Decision>,
        budget: &Budget,
        now: Instant,
    ) -> (BTreeMap<InstanceId, Step>, Option<Instant>) {
        // While others with roles of the same time may be on their way back, who has a role keeps it.
        let hold =
            Some(self.began + self.roles_config.lost_grace).filter(|until| self.adopted && now < *until);
        let (mut steps, mut wait) = (BTreeMap::new(), None);
        let (mut moves, mut settling) = (Vec::new(), Vec::new());
        let untimely = self.untimely(group);
        for &member in group {
            let id = &member.spec.id;
            let Some(decision) = decisions.get_mut(id) else { continue };
            let has = member.desired.as_ref().map(|desired| desired.role);
            let unwanted = decision.role == Role::None;
            let step = if self.drains_too_long(member) || (unwanted && self.knows_not_why(member)) {
                Step::Changes
            } else if untimely.contains(id) && decision.role != member.beat.role {
                settling.push(id);
                decision.reason = format!(
                    "until another serves what it serves, not {}: {}",
                    decision.role.name(),
                    decision.reason
                );
                decision.role = member.beat.role;
                Step::Changes
            } else if has == Some(decision.role) {
                settling.extend(member.is_on_its_way().then_some(id));
                Step::Keeps
            } else if member.serving_role().is_none() || (unwanted && !member.is_serving()) {
                settling.extend((!unwanted).then_some(id));
                Step::Changes
            } else if unwanted && self.is_forced(id) {
                Step::Changes
            } else if hold.is_some() {
                wait = hold;
                Step::Waits("instances that this controller has yet to hear of".to_owned())
            } else if member.is_serving() {
                settling.extend(member.is_on_its_way().then_some(id));
                moves.push((member, decision.role));
                continue;
            } else if member.session().is_none() {
                // It may have come to serve since it was last heard: it is heard again, or its place given up, first.
                settling.push(id);
                Step::Waits("a sign of life of it".to_owned())
            } else {
                settling.push(id);
                Step::Changes
            };
            steps.insert(id.clone(), step);
        }
        // Those that are to leave may be gone at any moment.
        let covers = [Cover::of(group), Cover::once(group, |_| true)];
        let affordable = |member: &Member, role: Role| {
            covers.iter().all(|cover| match role {
                Role::None if self.aside(member).is_some() => cover.can_do_without(member),
                role => cover.spares(member, role),
            })
        };
        let has_room = |member: &Member, role: Role| self.has_room(budget, group, member, role);
        let mut first = None;
        if settling.is_empty() {
            let among = |may: &dyn Fn(&Member, Role) -> bool| {
                let (member, _) =
                    moves.iter().find(|(member, role)| may(member, *role) && has_room(member, *role))?;
                Some(&member.spec.id)
            };
            first = among(&affordable);
            if first.is_none() {
                first = among(&is_swap);
                if let Some(decision) = first.and_then(|id| decisions.get_mut(id)) {
                    decision.reason = format!("on its way to {}: {}", decision.role.name(), decision.reason);
                    decision.role = Role::Mixed;
                }
            }
        }
        for (member, role) in &moves {
            let id = &member.spec.id;
            let step = if first == Some(id) {
                Step::Changes
            } else if let Some(arriving) = settling.first() {
                Step::Waits(format!("{arriving} to take on its role"))
            } else if !has_room(member, *role) {
                wait = wait.into_iter().chain([now + budget.wait]).min();
                Step::Waits(room(budget))
            } else if !affordable(member, *role) {
                Step::Waits("another instance to serve what it serves".to_owned())
            } else {
                Step::Waits(
                    first.map_or_else(|| "its turn".to_owned(), |id| format!("{id}, which goes first")),
                )
            };
            steps.insert(id.clone(), step);
        }
        (steps, wait)
    }

    /// Members that serve and are to be something else, who were not told yet, and without whom the group would by now not
    /// be served: others have gone since that was decided, while the store or the member could not be reached.
    fn untimely<'a>(&self, group: &[&'a Member]) -> BTreeSet<&'a InstanceId> {
        let mut cover = Cover::once(group, Member::knows_its_role);
        let mut untimely = BTreeSet::new();
        for member in group.iter().filter(|member| member.is_serving() && !member.knows_its_role()) {
            let id = &member.spec.id;
            let Some(desired) = &member.desired else { continue };
            if cover.spares(member, desired.role) || self.is_forced(id) {
                cover.give(member, desired.role);
            } else {
                untimely.insert(id);
            }
        }
        untimely
    }

    /// Whether it has yet to finish what operators have since given it another time for.
    fn drains_too_long(&self, member: &Member) -> bool {
        let cordoned = self.intents.get(&member.spec.id).and_then(|intent| intent.cordoned.as_ref());
        let (Some(cordoned), Some(desired)) = (cordoned, &member.desired) else { return false };
        desired.role == Role::None
            && desired.drain != cordoned.drain
            && member.is_registered()
            && member.beat.role_epoch != desired.epoch
    }

    /// Whether it has no role, and is to learn that it was taken out of service, or is not any more.
    fn knows_not_why(&self, member: &Member) -> bool {
        let told = |desired: &DesiredRole| desired.cordoned != self.is_cordoned(&member.spec.id);
        member.desired.as_ref().is_some_and(|desired| desired.role == Role::None && told(desired))
    }

    fn is_forced(&self, id: &InstanceId) -> bool {
        let cordoned = self.intents.get(id).and_then(|intent| intent.cordoned.as_ref());
        cordoned.is_some_and(|cordoned| cordoned.force)
    }
}

/// For people: what a move waits for whose group has had as many as it may.
fn room(budget: &Budget) -> String {
    let Budget { made, most, period, wait } = budget;
    let (period, wait) = (period.as_secs_f64(), wait.as_secs_f64());
    format!("the group's next move, in {wait:.0} s: {made} of at most {most} were made in {period:.0} s")
}

/// Whether it is to go from one phase to the other.
fn is_swap(member: &Member, role: Role) -> bool {
    matches!((member.beat.role, role), (Role::Prefill, Role::Decode) | (Role::Decode, Role::Prefill))
}
