//! Which role each instance should have. Pure: members in, roles out.
//!
//! Within a group, prefill and decode instances have to understand each other's KV caches, so the group's largest
//! party that is set up alike is planned and the rest gets [`Role::None`] with the reason. Of those, builds that do not
//! understand each other, as in a rolling upgrade over one that changes how caches are handed over, are planned each on its
//! own, so that none waits for the other to be gone. One instance alone is [`Role::Mixed`]. Who is pinned to a role has it; the others are divided so that the whole fits the policy, with at
//! least one of each, if need be against a pin. What is measured divides as [`auto`] says. By a ratio, of `n >= 2`, the
//! ideal number of prefill instances is `n * prefill / (prefill + decode)` of the policy; any number less than one away
//! from it will do, and of those the plan takes the one that changes the fewest present roles, then the nearest to the
//! ideal, then the one with less prefill. So the plan is stable: planned again with its own result it changes nothing,
//! and one instance more or less moves at most one other, unless it has to.
//!
//! Called by [`crate::reconcile`], which knows who counts as a member and when a change may be made.

pub mod auto;
mod split;

use std::{collections::BTreeMap, ops::RangeInclusive};

use baton_proto::{InstanceId, InstanceSpec, Protocols, Role};

use auto::Measured;
pub use split::Split;

/// How a group is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    Ratio(Ratio),
    /// As near to the ratio as it goes without moving anyone.
    Keep(Ratio),
    /// So that as little as can be misses its targets. By the ratio beside one that is mixed, whose share nobody measures.
    Measured(Measured, Ratio),
}

impl Policy {
    /// For some of the instances, who get as large a part of the group's requests.
    fn of_part(self, part: usize, whole: usize) -> Self {
        let Self::Measured(mut measured, ratio) = self else { return self };
        measured.demand.requests_per_second *= part as f64 / whole as f64;
        Self::Measured(measured, ratio)
    }
}

/// Prefill to decode; at least 1 each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratio {
    pub prefill: u32,
    pub decode: u32,
}

/// An instance to be planned.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    pub spec: &'a InstanceSpec,
    /// The role it was given last.
    pub role: Option<Role>,
    /// Whether it serves that role now: the last to be moved.
    pub serving: bool,
    /// The role that it was asked to have, and by whom: "alice" or "its label `role`".
    pub pin: Option<(Role, &'a str)>,
}

impl Candidate<'_> {
    fn is_pinned(&self, role: Role) -> bool {
        self.pin.is_some_and(|(pin, _)| pin == role)
    }

    /// What its pin decides, if there is room for it.
    fn pinned(&self) -> Option<Decision> {
        let (role, by) = self.pin?;
        Some(Decision { role, reason: format!("pinned to {} by {by}", role.name()) })
    }
}

/// A role and, for people, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub role: Role,
    pub reason: String,
}

/// Decides for one group. `candidates` are distinct; their order does not matter.
pub fn plan<'a>(policy: Policy, candidates: &[Candidate<'a>]) -> BTreeMap<&'a InstanceId, Decision> {
    let mut candidates = candidates.to_vec();
    candidates.sort_unstable_by_key(|candidate| &candidate.spec.id);
    let Some(reference) = reference(&candidates) else { return BTreeMap::new() };
    let mut decisions = BTreeMap::new();
    let mut alike = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        match different_setup(reference, candidate.spec) {
            None => alike.push(candidate),
            Some(difference) => {
                let reason = format!("cannot join the group's other instances: {difference}");
                decisions.insert(&candidate.spec.id, Decision { role: Role::None, reason });
            }
        }
    }
    let versions = Protocols::parties(alike.iter().map(|candidate| candidate.spec.handoff_protocols));
    let whole = alike.len();
    for version in &versions {
        let party: Vec<_> =
            alike.extract_if(.., |candidate| candidate.spec.handoff_protocols.contains(*version)).collect();
        divide(policy.of_part(party.len(), whole), &party, &mut decisions);
        for Candidate { spec, .. } in party.iter().filter(|_| versions.len() > 1) {
            let Some(decision) = decisions.get_mut(&spec.id) else { continue };
            decision.reason +=
                &format!("; its build is planned apart, with version {version} of the handoff protocol");
        }
    }
    decisions
}

/// The instance whose like the group is made of: of the kind with the most members that serve, then the most that
/// have a serving role, then the most members, then the first name.
fn reference<'a>(candidates: &[Candidate<'a>]) -> Option<&'a InstanceSpec> {
    let mut kinds: Vec<(&InstanceSpec, [usize; 3])> = Vec::new();
    for candidate in candidates {
        let holds = candidate.role.is_some_and(|role| role != Role::None);
        let weight = [usize::from(holds && candidate.serving), usize::from(holds), 1];
        match kinds.iter_mut().find(|(spec, _)| alike(spec, candidate.spec)) {
            Some((_, sum)) => sum.iter_mut().zip(weight).for_each(|(sum, more)| *sum += more),
            None => kinds.push((candidate.spec, weight)),
        }
    }
    // `max_by_key` takes the last of equals; the first name should win.
    kinds.into_iter().rev().max_by_key(|(_, weight)| *weight).map(|(spec, _)| spec)
}

/// Whether the two can hand caches to each other.
pub(crate) fn compatible(one: &InstanceSpec, other: &InstanceSpec) -> bool {
    one.handoff_protocols.common(other.handoff_protocols).is_some() && alike(one, other)
}

/// Whether the two can hand caches to each other as far as their builds can.
pub(crate) fn alike(one: &InstanceSpec, other: &InstanceSpec) -> bool {
    different_setup(one, other).is_none()
}

/// How the other is set up differently, for operators to mend; no difference is an equivalence.
fn different_setup(reference: &InstanceSpec, other: &InstanceSpec) -> Option<String> {
    let differs = |what: &str, theirs: &dyn std::fmt::Display, ours: &dyn std::fmt::Display| {
        Some(format!("its {what} is {ours}, that of {} is {theirs}", reference.id))
    };
    let (a, b) = (reference, other);
    let (model, layout) = (&a.model, &a.kv_layout);
    if model.revision != b.model.revision {
        // What a model is called is no difference, but says one to people better than a digest does.
        if model.name == b.model.name {
            differs("model revision", &model.revision, &b.model.revision)
        } else {
            differs("model", &model.name, &b.model.name)
        }
    } else if !model.is_same(&b.model) {
        Some(format!("it describes the model differently than {}: another version?", a.id))
    } else if a.device != b.device {
        differs("device type", &a.device, &b.device)
    } else if a.device_count != b.device_count {
        // Nodes hand over from one rank to one: they map no cache between different numbers of devices.
        let (ours, theirs) = (b.device_count, a.device_count);
        Some(format!(
            "its device count is {ours}, that of {} is {theirs}: those of a group have equally many devices",
            a.id
        ))
    } else if layout.handover_class() == b.kv_layout.handover_class() {
        None
    } else if layout.fingerprint == b.kv_layout.fingerprint {
        Some(format!(
            "it and {} differ in `handoff.convert`, or in having tcp or shm to map caches over",
            a.id
        ))
    } else if layout.dtype != b.kv_layout.dtype {
        differs("type of KV cache", &layout.dtype, &b.kv_layout.dtype)
    } else {
        differs("KV layout", &layout.handover_class(), &b.kv_layout.handover_class())
    }
}

fn divide<'a>(policy: Policy, party: &[Candidate<'a>], decisions: &mut BTreeMap<&'a InstanceId, Decision>) {
    if let [alone] = party {
        let mut reason = "alone: serves both phases".to_owned();
        if let Some((role @ (Role::Prefill | Role::Decode), by)) = alone.pin {
            reason += &format!("; pinned to {} by {by}, once there is another", role.name());
        }
        decisions.insert(&alone.spec.id, Decision { role: Role::Mixed, reason });
        return;
    }
    let (mixed, party): (Vec<_>, Vec<_>) = party.iter().copied().partition(|it| it.is_pinned(Role::Mixed));
    decisions.extend(mixed.iter().filter_map(|candidate| Some((&candidate.spec.id, candidate.pinned()?))));
    let n = party.len();
    if n == 0 {
        return;
    }
    let pinned = |role| party.iter().filter(|candidate| candidate.is_pinned(role)).count();
    // Both phases are served by those who are mixed; otherwise there is one of each, whatever is pinned.
    let fewest = usize::from(mixed.is_empty());
    let lowest = pinned(Role::Prefill).max(fewest).min(n - fewest);
    let range = lowest..=(n - pinned(Role::Decode).max(fewest).min(n - fewest)).max(lowest);
    let held = |role: Role| party.iter().filter(|candidate| candidate.role == Some(role)).count();
    let present = Split { prefill: held(Role::Prefill), decode: held(Role::Decode) };
    let (prefill, reason) = count(policy, n, present, range);
    for (candidate, role) in assign(&party, prefill) {
        let decision = match candidate.pinned() {
            Some(pinned) if pinned.role == role => pinned,
            Some(pinned) => {
                let kept = format!("{}, but nobody else could be {}", pinned.reason, role.name());
                Decision { role, reason: kept }
            }
            None => Decision { role, reason: reason.clone() },
        };
        decisions.insert(&candidate.spec.id, decision);
    }
}

/// How many of `n` prefill, and why, when so many prefill and decode now.
fn count(policy: Policy, n: usize, present: Split, range: RangeInclusive<usize>) -> (usize, String) {
    let (fewest, most) = (*range.start(), *range.end());
    match policy {
        Policy::Measured(measured, _) if n >= 2 && fewest >= 1 && most < n => {
            let division = auto::divide(n, present, range, &measured);
            (division.prefill, division.to_string())
        }
        Policy::Ratio(ratio) | Policy::Keep(ratio) | Policy::Measured(_, ratio) => {
            let mut prefill = by_ratio(ratio, n, present, range);
            if matches!(policy, Policy::Keep(_)) {
                let least = present.prefill.clamp(fewest, most);
                prefill = prefill.clamp(least, (n - present.decode).clamp(least, most));
            }
            let (decode, Ratio { prefill: of, decode: to }) = (n - prefill, ratio);
            let counts = format!("{prefill} prefill and {decode} decode of {n} instances");
            (prefill, format!("{counts}, for a ratio of {of}:{to}"))
        }
    }
}

/// Who of the party is one of so many that prefill, and who decodes.
///
/// Who is pinned goes where it is pinned, as far as there are places. Of the others, who has a role keeps it; those
/// who are too many, the idle before the serving, join the ones without.
fn assign<'a>(party: &[Candidate<'a>], prefill: usize) -> Vec<(Candidate<'a>, Role)> {
    let mut places = [(Role::Prefill, prefill), (Role::Decode, party.len() - prefill)];
    let mut chosen = Vec::with_capacity(party.len());
    let mut free: Vec<Candidate<'_>> = party.to_vec();
    for (role, places) in &mut places {
        // By how hard it is to be taken from the place.
        let claim = |candidate: &Candidate<'_>| {
            let holds = candidate.role == Some(*role);
            [candidate.is_pinned(*role), holds, holds && candidate.serving]
        };
        let elsewhere = |candidate: &Candidate<'_>| candidate.pin.is_some() && !candidate.is_pinned(*role);
        let (mut holders, others): (Vec<_>, Vec<_>) =
            free.into_iter().partition(|it| (claim(it)[0] || claim(it)[1]) && !elsewhere(it));
        holders.sort_by_key(|candidate| std::cmp::Reverse(claim(candidate)));
        free = holders.split_off(holders.len().min(*places));
        free.extend(others);
        *places -= holders.len();
        chosen.extend(holders.into_iter().map(|candidate| (candidate, *role)));
    }
    // One that was mixed has caches of running requests: it goes on decoding rather than be emptied.
    free.sort_by_key(|candidate| (candidate.role == Some(Role::Mixed), candidate.spec.id.clone()));
    for candidate in free {
        let role = if places[0].1 > 0 { Role::Prefill } else { Role::Decode };
        places[0].1 = places[0].1.saturating_sub(1);
        chosen.push((candidate, role));
    }
    chosen
}

/// How many of `n` prefill by the ratio, when so many prefill and decode already.
fn by_ratio(ratio: Ratio, n: usize, present: Split, range: RangeInclusive<usize>) -> usize {
    // In units of 1 / (prefill + decode), so that all is exact.
    let (share, whole) = (u64::from(ratio.prefill), u64::from(ratio.prefill) + u64::from(ratio.decode));
    let ideal = n as u64 * share;
    let cost = |prefill: &usize| {
        let off = (*prefill as u64 * whole).abs_diff(ideal);
        let too_far = if off < whole { 0 } else { off };
        let moved = present.prefill.saturating_sub(*prefill) + present.decode.saturating_sub(n - *prefill);
        (too_far, moved, off, *prefill)
    };
    range.min_by_key(cost).unwrap_or(1)
}

#[cfg(test)]
mod tests;
