//! The controller's state in the words of the admin services. Pure.

use std::{collections::BTreeMap, time::Duration};

use baton_proto::{CoordinatorBeat, GroupName, InstanceSpec, Intent, LinkUse, Role, v1};
use baton_registry::DesiredRole;
use tokio::time::Instant;

use crate::{
    coordinators::Registered,
    desk::Plans,
    fleet::{Member, health::Ends},
    journal::Entry,
    plan::auto::{Measured, Outlook},
    reconcile::{Aim, Budget, GroupPlan, MemberPlan, Step},
};

pub(super) fn instance(member: &Member, now: Instant) -> v1::Instance {
    let age = now.duration_since(member.last_beat);
    v1::Instance {
        spec: Some(InstanceSpec::clone(&member.spec).into()),
        beat: Some(member.beat.into()),
        registered_unix_millis: member.registered_unix_millis,
        last_beat_age_millis: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    }
}

/// `member` is none for an instance that is gone.
pub(super) fn role(
    id: &str,
    desired: Option<&DesiredRole>,
    member: Option<&Member>,
    intent: Option<&Intent>,
) -> v1::RoleView {
    let member = member.filter(|member| member.is_registered());
    v1::RoleView {
        instance_id: id.to_owned(),
        desired_role: desired.map_or(v1::Role::Unspecified, |desired| desired.role.to_wire()).into(),
        desired_epoch: desired.map_or(0, |desired| desired.epoch.0),
        reason: desired.map(|desired| desired.reason.clone()).unwrap_or_default(),
        observed_role: member.map_or(v1::Role::Unspecified, |member| member.beat.role.to_wire()).into(),
        observed_epoch: member.map_or(0, |member| member.beat.role_epoch.0),
        phase: member.map_or(v1::Phase::Unspecified, |member| member.beat.phase.to_wire()).into(),
        registered: member.is_some(),
        stuck: member.and_then(|member| member.stuck.as_ref()).map(ToString::to_string).unwrap_or_default(),
        intent: intent.cloned().map(v1::Intent::from),
        health: String::new(),
    }
}

/// Of one group, or of all.
pub(super) fn plans(plans: Plans, group: Option<&GroupName>, dry_run: bool) -> v1::PlanResponse {
    let of = plans.plans.into_iter().filter(|plan| group.is_none_or(|group| plan.group == *group));
    v1::PlanResponse { groups: of.map(group_plan).collect(), dry_run }
}

fn group_plan(plan: GroupPlan) -> v1::GroupPlan {
    let count = |count: Option<usize>| count.map_or(0, |count| u32::try_from(count).unwrap_or(u32::MAX));
    let measured = plan.measured.map(|measured| {
        let has = |member: &MemberPlan| member.has;
        let planned = |member: &MemberPlan| (member.step != Step::NotCounted).then_some(member.decision.role);
        v1::Measured {
            present: forecast(&measured, &plan.members, has),
            planned: forecast(&measured, &plan.members, planned),
            ..measurements(&measured)
        }
    });
    v1::GroupPlan {
        group: plan.group.into(),
        targets: Some(targets(&plan.aim)),
        targets_set: plan.aim.set,
        measured,
        waits: plan.waits.unwrap_or_default(),
        instances: plan.members.into_iter().map(member_plan).collect(),
        prefill_wanted: count(plan.wanted.map(|wanted| wanted.prefill)),
        decode_wanted: count(plan.wanted.map(|wanted| wanted.decode)),
        moves: Some(moves(&plan.moves)),
    }
}

fn moves(budget: &Budget) -> v1::MoveBudget {
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    v1::MoveBudget {
        made: count(budget.made),
        most: count(budget.most),
        period_millis: millis(budget.period),
        wait_millis: millis(budget.wait),
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn targets(aim: &Aim) -> v1::Targets {
    v1::Targets {
        policy: aim.policy.to_wire().into(),
        prefill: aim.ratio.prefill,
        decode: aim.ratio.decode,
        ttft_millis: millis(aim.targets.ttft),
        tpot_millis: millis(aim.targets.tpot),
    }
}

fn measurements(measured: &Measured) -> v1::Measured {
    let Measured { demand, speed, .. } = measured;
    v1::Measured {
        requests_per_second: demand.requests_per_second,
        prompt_tokens: demand.prompt_tokens,
        completion_tokens: demand.completion_tokens,
        prefill_tokens_per_second: speed.prefill_tokens_per_second,
        step_base_millis: speed.step_base * 1e3,
        step_per_sequence_millis: speed.step_per_sequence * 1e3,
        present: None,
        planned: None,
    }
}

/// None where nobody prefills or nobody decodes.
fn forecast(
    measured: &Measured,
    members: &[MemberPlan],
    role: impl Fn(&MemberPlan) -> Option<Role>,
) -> Option<v1::Forecast> {
    let count = |phase| {
        let serves = |member: &&MemberPlan| role(member).is_some_and(|is| is == phase || is == Role::Mixed);
        members.iter().filter(serves).count()
    };
    let (prefill, decode) = (count(Role::Prefill), count(Role::Decode));
    let outlook = (prefill > 0 && decode > 0).then(|| Outlook::of(measured, prefill, decode))?;
    let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
    Some(v1::Forecast {
        prefill: count(prefill),
        decode: count(decode),
        ttft_millis: outlook.ttft.seconds * 1e3,
        tpot_millis: outlook.tpot.seconds * 1e3,
    })
}

fn member_plan(member: MemberPlan) -> v1::InstancePlan {
    let MemberPlan { id, has, decision, step } = member;
    let (step, waits_for) = match step {
        Step::Keeps => (v1::instance_plan::Step::Keeps, String::new()),
        Step::Changes => (v1::instance_plan::Step::Changes, String::new()),
        Step::Waits(what) => (v1::instance_plan::Step::Waits, what),
        Step::NotCounted => (v1::instance_plan::Step::NotCounted, String::new()),
    };
    v1::InstancePlan {
        instance_id: id.into(),
        has: has.map_or(v1::Role::Unspecified, Role::to_wire).into(),
        planned: decision.role.to_wire().into(),
        reason: decision.reason,
        step: step.into(),
        waits_for,
    }
}

/// With so many of its links.
pub(super) fn coordinator(registered: Registered, links: usize, now: Instant) -> v1::Coordinator {
    let age = now.saturating_duration_since(registered.last_beat);
    let links = registered.links.iter().take(links).cloned().collect();
    let beat = CoordinatorBeat { links, all_links: true, ..registered.beat };
    v1::Coordinator {
        spec: Some(registered.spec.into()),
        beat: Some(beat.into()),
        registered_unix_millis: registered.registered_unix_millis,
        last_beat_age_millis: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Among those that are degraded, or not.
pub(super) fn link(link: LinkUse, degraded: &BTreeMap<Ends, f64>) -> v1::Link {
    let ends = Ends { prefill: link.prefill, decode: link.decode };
    let failing = degraded.get(&ends).copied();
    v1::Link {
        prefill_instance: ends.prefill.into(),
        decode_instance: ends.decode.into(),
        handoffs: link.handoffs,
        failures: link.failures,
        mean_micros: link.mean_micros,
        degraded: failing.is_some(),
        failing: failing.unwrap_or_default(),
    }
}

pub(super) fn event(entry: Entry) -> v1::FleetEvent {
    let Entry { sequence, unix_millis, news } = entry;
    v1::FleetEvent {
        sequence,
        unix_millis,
        kind: news.kind.name().to_owned(),
        group: news.group.map(String::from).unwrap_or_default(),
        instance_id: news.instance.map(String::from).unwrap_or_default(),
        message: news.message,
        actor: news.actor.unwrap_or_default(),
    }
}
