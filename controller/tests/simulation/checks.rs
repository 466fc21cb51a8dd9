//! What must hold at every step, and in the end.

use std::collections::{BTreeMap, BTreeSet};

use baton_controller::{
    fleet::{Member, health::Verdict},
    reconcile::Reconciler,
};
use baton_proto::{InstanceId, InstanceSpec, Phase, Protocols, Role, RoleEpoch};
use baton_registry::{
    DesiredRole, HealthRecord, Standing,
    keys::{self, Key},
    records,
};
use tokio::time::Instant;

use crate::{store::Keeper, world::World};

/// What a mind had decided.
pub(crate) struct Roles(BTreeMap<InstanceId, (Role, RoleEpoch)>);

impl Roles {
    pub(crate) fn of(mind: &Reconciler) -> Self {
        let role = |(id, member): (&InstanceId, &Member)| {
            member.desired.as_ref().map(|desired| (id.clone(), (desired.role, desired.epoch)))
        };
        Self(mind.members().iter().filter_map(role).collect())
    }

    /// What is another now, for the log.
    pub(crate) fn since(&self, mind: &Reconciler) -> Vec<String> {
        let text = |(id, member): (&InstanceId, &Member)| {
            let desired = member.desired.as_ref()?;
            let same = self.0.get(id) == Some(&(desired.role, desired.epoch));
            (!same).then(|| format!("{id} as {} {}: {}", desired.role.name(), desired.epoch, desired.reason))
        };
        mind.members().iter().filter_map(text).collect()
    }
}

/// How much happened, so that a simulation in which nothing does is noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) steps: u64,
    pub(crate) terms: u64,
    /// Transactions of controllers that led no more.
    pub(crate) fenced: u64,
    pub(crate) lost_answers: u64,
    pub(crate) welcomes: u64,
    pub(crate) refusals: u64,
    pub(crate) orders: u64,
    pub(crate) late_orders: u64,
    pub(crate) moves: u64,
    /// Quarantines that a new leader found.
    pub(crate) inherited: u64,
    /// Virtual time from the end of faults until all is as it should be.
    pub(crate) calm_ms: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.terms += other.terms;
        self.fenced += other.fenced;
        self.lost_answers += other.lost_answers;
        self.welcomes += other.welcomes;
        self.refusals += other.refusals;
        self.orders += other.orders;
        self.late_orders += other.late_orders;
        self.moves += other.moves;
        self.inherited += other.inherited;
        self.calm_ms += other.calm_ms;
    }
}

#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// The first.
    pub(crate) violation: Option<String>,
    pub(crate) counts: Counts,
    /// The latest epoch that each instance was told by who led.
    told: BTreeMap<String, RoleEpoch>,
    /// Since when each group is served, by layout.
    served: BTreeMap<Circle, u64>,
}

impl Findings {
    pub(crate) fn violated(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// A new leader has taken over what earlier ones held of instances: who was quarantined is, for no longer than it was
    /// to be when that was written, whatever the clocks show; and how often it was is known.
    pub(crate) fn inherited(
        &mut self,
        health: &BTreeMap<InstanceId, HealthRecord>,
        mind: &Reconciler,
        now: Instant,
    ) {
        for (id, record) in health {
            let as_it_was = match (&record.standing, mind.verdict(id)) {
                (Standing::Quarantined { .. }, Verdict::Quarantined { until, times, .. }) => {
                    self.counts.inherited += 1;
                    until <= now + record.left && times == record.times
                }
                (Standing::Probation, Verdict::Probation { until }) => until <= now + record.left,
                (Standing::Well, Verdict::Healthy) => record.times > 0,
                _ => false,
            };
            if !as_it_was {
                self.violated(format!(
                    "{id} was {record:?}, and the next leader holds {:?}",
                    mind.verdict(id)
                ));
            }
        }
    }

    /// A mind has decided: what served is moved one at a time, and both phases go on being served.
    pub(crate) fn decided(&mut self, before: &Roles, mind: &Reconciler) {
        let mut groups: BTreeMap<&str, Vec<&Member>> = BTreeMap::new();
        for member in mind.members().values() {
            groups.entry(member.spec.group.as_str()).or_default().push(member);
        }
        for (group, members) in groups {
            let moved: Vec<&Member> = members
                .iter()
                .copied()
                .filter(|member| {
                    let Some((role, epoch)) = before.0.get(&member.spec.id) else { return false };
                    let desired = member.desired.as_ref().expect("roles are not taken away");
                    // To be told in time to stay what it is moves nobody.
                    member.is_serving()
                        && desired.role != member.beat.role
                        && *role != Role::None
                        && desired.role != *role
                        && desired.epoch > *epoch
                })
                .collect();
            if moved.is_empty() {
                continue;
            }
            self.counts.moves += 1;
            // One that was told before to have none delays nobody.
            let counts = |member: &&&Member| {
                let none = member.desired.as_ref().is_some_and(|desired| desired.role == Role::None);
                is_moving(member) && (!none || moved.iter().any(|moved| moved.spec.id == member.spec.id))
            };
            let moving: Vec<_> = members.iter().filter(counts).map(|m| m.spec.id.to_string()).collect();
            if moving.len() > 1 {
                self.violated(format!("several of {group} are moved at a time: {moving:?}"));
            }
            let served = |role_of: &dyn Fn(&Member) -> (bool, bool)| {
                let prefills = members.iter().filter(|member| role_of(member).0);
                let decodes =
                    |of: &Member| members.iter().any(|m| role_of(m).1 && understand(&m.spec, &of.spec));
                prefills.into_iter().any(|member| decodes(member))
            };
            let now = |member: &Member| {
                if member.is_serving() { phases(member.beat.role) } else { (false, false) }
            };
            let after = |member: &Member| {
                let desired = member.desired.as_ref().map_or(Role::None, |desired| desired.role);
                let (now, next) = (now(member), phases(desired));
                if member.stuck.is_some() { now } else { (now.0 && next.0, now.1 && next.1) }
            };
            // What was told before cannot be taken back, whatever has happened since.
            let before = |member: &Member| if member.knows_its_role() { after(member) } else { now(member) };
            if served(&before) && !served(&after) {
                let moved: Vec<_> = moved.iter().map(|m| (m.spec.id.as_str(), &m.desired)).collect();
                self.violated(format!("{group} is not served while {moved:?} is moved"));
            }
        }
    }

    /// An order leaves a controller.
    pub(crate) fn told(&mut self, name: &str, desired: &DesiredRole, by_who_leads: bool, keeper: &Keeper) {
        self.counts.orders += 1;
        let id = InstanceId::new(name).expect("a good id");
        if !keeper.was_stored(keys::role(&id), desired) {
            self.violated(format!("{name} is told {desired:?}, which was never stored"));
        }
        if by_who_leads {
            let last = self.told.entry(name.to_owned()).or_default();
            if desired.epoch < *last {
                let last = *last;
                self.violated(format!("{name} is told {desired:?} after {last}"));
            } else {
                *last = desired.epoch;
            }
        }
    }

    /// What each group's instances do now, by circle: those that are ready, and those with what others on their way from
    /// one role to another have in both. `moved`: what changed it is that an instance of this group leaves its role,
    /// and nothing has happened to any instance.
    pub(crate) fn serving(
        &mut self,
        ready: &Circles,
        on_their_way: &Circles,
        moved: Option<usize>,
        now: u64,
    ) {
        let served = |circles: &Circles, circle: &Circle| circles.get(circle) == Some(&(true, true));
        if let Some(moved) = moved {
            let of_group = |circle: &&Circle| circle.0 == moved;
            // Nobody can know yet what has just begun.
            let was = self.served.iter().any(|(party, since)| of_group(&party) && now > since + KNOWN_AFTER);
            let is = on_their_way.keys().filter(of_group).any(|party| served(on_their_way, party));
            if was && !is {
                self.violated(format!("group {moved} is served no more by a move: {on_their_way:?}"));
            }
        }
        self.served.retain(|party, _| served(ready, party));
        for party in ready.keys().filter(|party| served(ready, party)) {
            self.served.entry(*party).or_insert(now);
        }
    }
}

/// Who understand each other: a group, a layout of it, and a version of the handoff protocol, of which one may speak several.
pub(crate) type Circle = (usize, u8, u32);
/// What they do of prefill and decode.
pub(crate) type Circles = BTreeMap<Circle, (bool, bool)>;

/// By then a leader knows what its instances do, if it hears them at all, and what it decided before that is told.
const KNOWN_AFTER: u64 = 6_000;

/// Whether it is on its way from one role to another.
fn is_moving(member: &Member) -> bool {
    let Some(desired) = &member.desired else { return false };
    let other = desired.role != member.beat.role && desired.epoch > member.beat.role_epoch;
    let left = matches!(member.beat.phase, Phase::Draining | Phase::Switching);
    let had = member.beat.role != Role::None && (member.is_serving() || left);
    member.is_registered() && member.stuck.is_none() && had && other
}

fn phases(role: Role) -> (bool, bool) {
    (matches!(role, Role::Prefill | Role::Mixed), matches!(role, Role::Decode | Role::Mixed))
}

/// Whether everything is as it should be; else what is not.
pub(crate) fn converged(world: &World) -> Result<(), String> {
    let leaders: Vec<_> = world.leaders().collect();
    let [controller] = leaders[..] else { return Err(format!("{} controllers lead", leaders.len())) };
    let leading = controller.leading().ok_or("the leader still reads what there is")?;
    if world.keeper.leader() != controller.epoch() {
        return Err("the store has another leader".into());
    }
    let (mind, members) = (&leading.mind, leading.mind.members());
    if mind.has_writes() {
        return Err("something is to be written".into());
    }
    let live: BTreeSet<&str> = world.live().map(|process| world.name(process)).collect();
    let known: BTreeSet<&str> = members.keys().map(InstanceId::as_str).collect();
    if live != known {
        return Err(format!("{live:?} live, {known:?} are known"));
    }
    let expected = |prefix: &str| live.iter().map(|name| format!("{prefix}{name}")).collect::<Vec<_>>();
    for prefix in [keys::INSTANCES, keys::STATUS] {
        if world.keeper.keys_under(prefix) != expected(prefix) {
            return Err(format!("the store has {:?}", world.keeper.keys_under(prefix)));
        }
    }
    for (id, member) in members {
        let session = member.session().ok_or(format!("{id} has no session"))?;
        let desired = member.desired.as_ref().ok_or(format!("{id} has no role"))?;
        let process = world.process_at(session).ok_or(format!("{id} is not at its session"))?;
        let held = (process.role, process.epoch, process.phase);
        if held != (desired.role, desired.epoch, Phase::Ready) || !member.has_converged() {
            return Err(format!("{id} should be {desired:?} and is {held:?}"));
        }
        if member.stuck.is_some() {
            return Err(format!("{id} is stuck"));
        }
        let role = world.keeper.role(&keys::role(id));
        if role.as_ref() != Some(desired) {
            return Err(format!("{id} should be {desired:?}, and the store has {role:?}"));
        }
        let spec = world.keeper.value(&keys::instance(id)).and_then(|value| records::decode_spec(value).ok());
        let status = world.keeper.value(&keys::status(id));
        if spec.as_ref() != Some(&*member.spec) || status != Some(&*member.status().encode()) {
            return Err(format!("the store has another spec or status of {id} than the leader's mind"));
        }
    }
    let kept =
        |key: &str| world.keeper.value(key).map(|value| HealthRecord::decode(value).expect("a record"));
    for key in world.keeper.keys_under(keys::HEALTH) {
        let Key::Health(id) = Key::parse(key) else { return Err(format!("{key} is of nobody")) };
        let (record, verdict) = (kept(key).expect("it is there"), mind.verdict(&id));
        let same = match record.standing {
            Standing::Quarantined { .. } => verdict.is_quarantined(),
            Standing::Probation => matches!(verdict, Verdict::Probation { .. }),
            Standing::Well => matches!(verdict, Verdict::Healthy | Verdict::Suspect(_)),
        };
        if !same {
            return Err(format!("the store has {record:?} of {id}, and the leader holds {verdict:?}"));
        }
    }
    for (id, member) in members {
        let verdict = mind.verdict(id);
        let lasts = verdict.is_quarantined() || matches!(verdict, Verdict::Probation { .. });
        if lasts && kept(&keys::health(id)).is_none_or(|record| record.group != member.spec.group) {
            return Err(format!("{id} is {verdict:?}, and the store does not know"));
        }
        if lasts {
            return Err(format!("{id} is {verdict:?}, which time will change"));
        }
    }
    divided(world, members.values())
}

/// Whether every group has the roles that its policy wants.
fn divided<'a>(world: &World, members: impl Iterator<Item = &'a Member>) -> Result<(), String> {
    /// What instances speak, and are to be.
    type Members = Vec<(Protocols, Role)>;
    let mut groups: BTreeMap<&str, BTreeMap<&str, Members>> = BTreeMap::new();
    for member in members {
        let layouts = groups.entry(member.spec.group.as_str()).or_default();
        let role = member.desired.as_ref().map_or(Role::None, |desired| desired.role);
        let alike = layouts.entry(&member.spec.kv_layout.fingerprint).or_default();
        alike.push((member.spec.handoff_protocols, role));
    }
    for (group, layouts) in groups {
        let serves = |alike: &&Members| alike.iter().any(|(_, role)| *role != Role::None);
        let mut serving = layouts.values().filter(serves);
        let (Some(alike), None) = (serving.next(), serving.next()) else {
            return Err(format!("{group} has the layouts {layouts:?}"));
        };
        let mut left = alike.clone();
        for version in Protocols::parties(alike.iter().map(|(protocols, _)| *protocols)) {
            let party = left.extract_if(.., |(protocols, _)| protocols.contains(version));
            let roles: Vec<Role> = party.map(|(_, role)| role).collect();
            if !is_well_divided(world, &roles) {
                return Err(format!("{group} is divided as {alike:?}"));
            }
        }
    }
    Ok(())
}

/// Whether the two can hand caches to each other.
fn understand(one: &InstanceSpec, other: &InstanceSpec) -> bool {
    one.kv_layout.fingerprint == other.kv_layout.fingerprint
        && one.handoff_protocols.common(other.handoff_protocols).is_some()
}

/// Whether one party has the roles that the policy wants.
fn is_well_divided(world: &World, roles: &[Role]) -> bool {
    let count = |wanted| roles.iter().filter(|role| **role == wanted).count();
    let (n, prefill, decode) = (roles.len(), count(Role::Prefill), count(Role::Decode));
    let (share, whole) = (world.ratio().0, world.ratio().0 + world.ratio().1);
    let near = n == 2 || (prefill * whole).abs_diff(n * share) < whole;
    let least = prefill >= 1 && decode >= 1 && (near || prefill == 1 || decode == 1);
    if n == 1 { roles[0] == Role::Mixed } else { prefill + decode == n && least }
}
