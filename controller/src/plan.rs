//! Which role each instance should have. Pure: members in, roles out.
//!
//! Within a group, prefill and decode instances have to understand each other's KV caches, so the group's largest
//! party of compatible instances is planned and the rest gets [`Role::None`] with the reason. One instance alone is
//! [`Role::Mixed`]. What is measured divides as [`auto`] says. By a ratio, of `n >= 2`, the ideal number of prefill instances is `n * prefill / (prefill + decode)` of the
//! policy; any number less than one away from it will do, at least one of each kind there is, and of those the plan
//! takes the one that changes the fewest present roles, then the nearest to the ideal, then the one with less prefill.
//! So the plan is stable: planned again with its own result it changes nothing, and one instance more or less moves
//! at most one other, unless it has to.
//!
//! Called by [`crate::reconcile`], which knows who counts as a member and when a change may be made.

pub mod auto;

use std::collections::BTreeMap;

use baton_proto::{InstanceId, InstanceSpec, Role};

use auto::Measured;

/// How a group is divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Policy {
    Ratio(Ratio),
    /// As near to the ratio as it goes without moving anyone.
    Keep(Ratio),
    /// So that as little as can be misses its targets.
    Measured(Measured),
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
    let mut party = Vec::new();
    for candidate in candidates {
        match incompatibility(reference, candidate.spec) {
            None => party.push(candidate),
            Some(difference) => {
                let reason = format!("cannot join the group's other instances: {difference}");
                decisions.insert(&candidate.spec.id, Decision { role: Role::None, reason });
            }
        }
    }
    divide(policy, &party, &mut decisions);
    decisions
}

/// The instance whose like the group is made of: of the party with the most members that serve, then the most that
/// have a serving role, then the most members, then the first name.
fn reference<'a>(candidates: &[Candidate<'a>]) -> Option<&'a InstanceSpec> {
    let mut parties: Vec<(&InstanceSpec, [usize; 3])> = Vec::new();
    for candidate in candidates {
        let holds = candidate.role.is_some_and(|role| role != Role::None);
        let weight = [usize::from(holds && candidate.serving), usize::from(holds), 1];
        match parties.iter_mut().find(|(spec, _)| compatible(spec, candidate.spec)) {
            Some((_, sum)) => sum.iter_mut().zip(weight).for_each(|(sum, more)| *sum += more),
            None => parties.push((candidate.spec, weight)),
        }
    }
    // `max_by_key` takes the last of equals; the first name should win.
    parties.into_iter().rev().max_by_key(|(_, weight)| *weight).map(|(spec, _)| spec)
}

/// Whether the two can hand caches to each other.
pub(crate) fn compatible(one: &InstanceSpec, other: &InstanceSpec) -> bool {
    incompatibility(one, other).is_none()
}

/// Why caches of one cannot be handed to the other. An equivalence: none for equals, and for all of a party.
fn incompatibility(reference: &InstanceSpec, other: &InstanceSpec) -> Option<String> {
    let differs = |what: &str, theirs: &dyn std::fmt::Display, ours: &dyn std::fmt::Display| {
        Some(format!("its {what} is {ours}, that of {} is {theirs}", reference.id))
    };
    let (a, b) = (reference, other);
    let (model, layout) = (&a.model, &a.kv_layout);
    if model.name != b.model.name {
        differs("model", &model.name, &b.model.name)
    } else if model.revision != b.model.revision {
        differs("model revision", &model.revision, &b.model.revision)
    } else if model != &b.model {
        Some(format!("it describes the model differently than {}: another version?", a.id))
    } else if a.device != b.device {
        differs("device type", &a.device, &b.device)
    } else if a.device_count != b.device_count {
        differs("device count", &a.device_count, &b.device_count)
    } else if layout.fingerprint != b.kv_layout.fingerprint {
        differs("KV layout", &layout.fingerprint, &b.kv_layout.fingerprint)
    } else {
        None
    }
}

fn divide<'a>(policy: Policy, party: &[Candidate<'a>], decisions: &mut BTreeMap<&'a InstanceId, Decision>) {
    if let [alone] = party {
        let reason = "alone in its group: serves both phases".to_owned();
        decisions.insert(&alone.spec.id, Decision { role: Role::Mixed, reason });
        return;
    }
    let held = |role: Role| party.iter().filter(move |candidate| candidate.role == Some(role));
    let n = party.len();
    let present = (held(Role::Prefill).count(), held(Role::Decode).count());
    let (prefill, reason) = match policy {
        Policy::Ratio(ratio) | Policy::Keep(ratio) => {
            let mut prefill = prefill_count(ratio, n, present.0, present.1);
            if matches!(policy, Policy::Keep(_)) {
                let fewest = present.0.clamp(1, n - 1);
                prefill = prefill.clamp(fewest, (n - present.1).clamp(fewest, n - 1));
            }
            let (decode, Ratio { prefill: of, decode: to }) = (n - prefill, ratio);
            (
                prefill,
                format!("{prefill} prefill and {decode} decode of {n} instances, for a ratio of {of}:{to}"),
            )
        }
        Policy::Measured(measured) => {
            let division = auto::divide(n, present, &measured);
            (division.prefill, division.to_string())
        }
    };

    // Who has a role keeps it; those who are too many, the idle before the serving, join the ones without.
    let mut places = [(Role::Prefill, prefill), (Role::Decode, party.len() - prefill)];
    let mut chosen: Vec<(Candidate<'_>, Role)> = Vec::with_capacity(party.len());
    let mut free: Vec<Candidate<'_>> =
        party.iter().filter(|c| !matches!(c.role, Some(Role::Prefill | Role::Decode))).copied().collect();
    for (role, places) in &mut places {
        let mut holders: Vec<_> = held(*role).copied().collect();
        holders.sort_by_key(|candidate| !candidate.serving);
        free.extend(holders.split_off(holders.len().min(*places)));
        *places -= holders.len();
        chosen.extend(holders.into_iter().map(|candidate| (candidate, *role)));
    }
    // One that was mixed has caches of running requests: it goes on decoding rather than be emptied.
    free.sort_by_key(|candidate| candidate.role == Some(Role::Mixed));
    for candidate in free {
        let role = if places[0].1 > 0 { Role::Prefill } else { Role::Decode };
        places[0].1 = places[0].1.saturating_sub(1);
        chosen.push((candidate, role));
    }
    for (candidate, role) in chosen {
        decisions.insert(&candidate.spec.id, Decision { role, reason: reason.clone() });
    }
}

/// How many of `n >= 2` prefill, when `prefilling` and `decoding` of them do so already.
fn prefill_count(ratio: Ratio, n: usize, prefilling: usize, decoding: usize) -> usize {
    // In units of 1 / (prefill + decode), so that all is exact.
    let (share, whole) = (u64::from(ratio.prefill), u64::from(ratio.prefill) + u64::from(ratio.decode));
    let ideal = n as u64 * share;
    let cost = |prefill: &usize| {
        let off = (*prefill as u64 * whole).abs_diff(ideal);
        let too_far = if off < whole { 0 } else { off };
        let moved = prefilling.saturating_sub(*prefill) + decoding.saturating_sub(n - *prefill);
        (too_far, moved, off, *prefill)
    };
    (1..n).min_by_key(cost).unwrap_or(1)
}

#[cfg(test)]
mod tests;
