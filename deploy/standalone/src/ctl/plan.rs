//! What becomes of instances by a plan, in lines and as objects. Pure; for [`super::change`], [`super::explain`] and
//! [`super::groups`].

use baton_proto::v1::{
    Forecast, GroupPlan, InstancePlan, Measured, MoveBudget, PlanResponse, Targets, instance_plan::Step,
};
use serde_json::{Value, json};

use super::{
    output::visible,
    words::{or_dash, policy, role, targets},
};

/// As in "waits".
pub(super) fn step(plan: &InstancePlan) -> &'static str {
    match Step::try_from(plan.step) {
        Ok(Step::Unspecified) => "-",
        Ok(Step::Keeps) => "keeps",
        Ok(Step::Changes) => "changes",
        Ok(Step::Waits) => "waits",
        Ok(Step::NotCounted) => "not counted",
        Err(_) => "unknown",
    }
}

/// As in "server-2: decode -> none (cordoned by alice: disk), waits for server-0 to be prefill".
pub(super) fn line(plan: &InstancePlan) -> String {
    let InstancePlan { instance_id, has, planned, reason, waits_for, .. } = plan;
    let why = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    let line = match plan.step() {
        Step::NotCounted => format!("{instance_id}: stays {}, not counted{why}", role(*has)),
        Step::Keeps => format!("{instance_id}: stays {}{why}", role(*planned)),
        Step::Changes | Step::Waits | Step::Unspecified => {
            format!("{instance_id}: {} -> {}{why}", role(*has), role(*planned))
        }
    };
    let waits = match (plan.step(), waits_for.is_empty()) {
        (Step::Waits, true) => ", waits",
        (Step::Waits, false) => ", waits for ",
        _ => return visible(&line),
    };
    visible(&format!("{line}{waits}{waits_for}"))
}

/// What a change brings about: a line for every instance that changes or waits, and for the one that was named.
pub(super) fn changes(answer: &PlanResponse, named: Option<&str>) -> String {
    let mut lines = Vec::new();
    if answer.dry_run {
        lines.push("dry run, nothing is changed; it would be:".to_owned());
    }
    for group in &answer.groups {
        let moves = |plan: &&InstancePlan| {
            matches!(plan.step(), Step::Changes | Step::Waits) || named == Some(plan.instance_id.as_str())
        };
        let moved: Vec<String> = group.instances.iter().filter(moves).map(line).collect();
        if !group.waits.is_empty() {
            lines.push(format!("group {}: not decided yet: {}", group.group, group.waits));
        } else if moved.is_empty() && named.is_none() {
            lines.push(format!("group {}: no instance changes its role{}", group.group, divided(group)));
        }
        lines.extend(moved);
    }
    let planned = answer.groups.iter().flat_map(|group| &group.instances);
    if let Some(named) = named.filter(|named| planned.clone().all(|plan| plan.instance_id != *named)) {
        lines.push(format!("{named}: is in no plan now; this holds for when it comes"));
    }
    lines.iter().map(|line| visible(line)).collect::<Vec<_>>().join("\n")
}

fn divided(group: &GroupPlan) -> String {
    group.targets.as_ref().map_or_else(String::new, |given| format!("; divided by {}", targets(given)))
}

/// For programs; forecasts that cannot keep up are null.
pub(super) fn object(answer: &PlanResponse) -> Value {
    json!({ "dry_run": answer.dry_run, "groups": answer.groups.iter().map(group_object).collect::<Value>() })
}

pub(super) fn group_object(group: &GroupPlan) -> Value {
    let instances = group.instances.iter().map(|plan| {
        json!({
            "instance_id": plan.instance_id,
            "has": role(plan.has),
            "planned": role(plan.planned),
            "reason": plan.reason,
            "step": step(plan).replace(' ', "_"),
            "waits_for": plan.waits_for,
        })
    });
    json!({
        "group": group.group,
        "targets": group.targets.as_ref().map(targets_object),
        "targets_set": group.targets_set,
        "measured": group.measured.as_ref().map(measured_object),
        "waits": group.waits,
        "prefill_wanted": group.prefill_wanted,
        "decode_wanted": group.decode_wanted,
        "moves": group.moves.as_ref().map(moves_object),
        "instances": instances.collect::<Value>(),
    })
}

fn targets_object(targets: &Targets) -> Value {
    json!({
        "policy": policy(targets.policy),
        "prefill": targets.prefill,
        "decode": targets.decode,
        "ttft_millis": targets.ttft_millis,
        "tpot_millis": targets.tpot_millis,
    })
}

fn moves_object(moves: &MoveBudget) -> Value {
    json!({
        "made": moves.made,
        "most": moves.most,
        "period_millis": moves.period_millis,
        "wait_millis": moves.wait_millis,
    })
}

/// As in "4 of at most 4 in 60 s; the next may be made in 12 s".
pub(super) fn moves(moves: &MoveBudget) -> String {
    let MoveBudget { made, most, period_millis, wait_millis } = moves;
    let mut text = format!("{made} of at most {most} in {} s", period_millis / 1000);
    if *wait_millis > 0 {
        text += &format!("; the next may be made in {} s", wait_millis.div_ceil(1000));
    }
    text
}

fn measured_object(measured: &Measured) -> Value {
    json!({
        "requests_per_second": measured.requests_per_second,
        "prompt_tokens": measured.prompt_tokens,
        "completion_tokens": measured.completion_tokens,
        "prefill_tokens_per_second": measured.prefill_tokens_per_second,
        "step_base_millis": measured.step_base_millis,
        "step_per_sequence_millis": measured.step_per_sequence_millis,
        "present": measured.present.as_ref().map(forecast_object),
        "planned": measured.planned.as_ref().map(forecast_object),
    })
}

fn forecast_object(forecast: &Forecast) -> Value {
    json!({
        "prefill": forecast.prefill,
        "decode": forecast.decode,
        "ttft_millis": forecast.ttft_millis,
        "tpot_millis": forecast.tpot_millis,
    })
}

/// How many instances have, or are planned to have, a role.
pub(super) fn count(group: &GroupPlan, wanted: i32, of: impl Fn(&InstancePlan) -> i32) -> usize {
    group.instances.iter().filter(|plan| of(plan) == wanted).count()
}

/// What it waits for, in words; "-" if nothing.
pub(super) fn waits_for(plan: &InstancePlan) -> String {
    if plan.step() == Step::Waits { or_dash(&plan.waits_for) } else { "-".to_owned() }
}

#[cfg(test)]
pub(super) mod tests {
    use baton_proto::v1::Role;

    use super::*;

    pub(in crate::ctl) fn instance(id: &str, has: Role, planned: Role, step: Step) -> InstancePlan {
        InstancePlan {
            instance_id: id.into(),
            has: has.into(),
            planned: planned.into(),
            reason: "cordoned by alice: disk".into(),
            step: step.into(),
            waits_for: if step == Step::Waits { "server-0 to be prefill".into() } else { String::new() },
        }
    }

    pub(in crate::ctl) fn group() -> GroupPlan {
        let mut stays = instance("server-0", Role::Prefill, Role::Prefill, Step::Keeps);
        stays.reason = "ratio 1:1".into();
        GroupPlan {
            group: "default".into(),
            targets: Some(Targets { policy: 1, prefill: 1, decode: 1, ..Default::default() }),
            instances: vec![
                stays,
                instance("server-1", Role::Prefill, Role::Decode, Step::Changes),
                instance("server-2", Role::Decode, Role::None, Step::Waits),
            ],
            ..Default::default()
        }
    }

    #[test]
    fn a_change_tells_what_becomes_of_each_instance_that_moves() {
        let answer = PlanResponse { groups: vec![group()], dry_run: false };
        let why = "(cordoned by alice: disk)";
        let moved = format!(
            "server-1: prefill -> decode {why}\nserver-2: decode -> none {why}, waits for server-0 to be prefill"
        );
        assert_eq!(changes(&answer, None), moved);
        assert_eq!(changes(&answer, Some("server-2")), moved);
        let with_named = changes(&answer, Some("server-0"));
        assert_eq!(with_named, format!("server-0: stays prefill (ratio 1:1)\n{moved}"));
        let dry = changes(&PlanResponse { dry_run: true, ..answer }, None);
        assert_eq!(dry, format!("dry run, nothing is changed; it would be:\n{moved}"));
    }

    #[test]
    fn a_change_that_moves_nobody_says_so() {
        let mut group = group();
        group.instances.truncate(1);
        let answer = |group: &GroupPlan| PlanResponse { groups: vec![group.clone()], dry_run: false };
        let text = changes(&answer(&group), None);
        assert_eq!(text, "group default: no instance changes its role; divided by ratio 1:1");
        let text = changes(&answer(&group), Some("server-9"));
        assert_eq!(text, "server-9: is in no plan now; this holds for when it comes");
        group.waits = "instances may still come".into();
        assert_eq!(
            changes(&answer(&group), None),
            "group default: not decided yet: instances may still come"
        );
    }

    #[test]
    fn who_is_not_counted_is_told_as_such() {
        let mut gone = instance("server-3", Role::Decode, Role::None, Step::NotCounted);
        gone.reason = "stuck".into();
        assert_eq!(line(&gone), "server-3: stays decode, not counted (stuck)");
    }

    #[test]
    fn programs_see_the_whole_plan() {
        let mut group = group();
        let forecast = Forecast { prefill: 1, decode: 2, ttft_millis: f64::INFINITY, tpot_millis: 9.5 };
        group.measured = Some(Measured { present: Some(forecast), ..Default::default() });
        let object = object(&PlanResponse { groups: vec![group], dry_run: true });
        assert_eq!(object["dry_run"], true);
        let group = &object["groups"][0];
        assert_eq!(group["instances"][2]["waits_for"], "server-0 to be prefill");
        assert_eq!(group["instances"][0]["step"], "keeps");
        assert!(group["measured"]["present"]["ttft_millis"].is_null());
        assert_eq!(group["measured"]["present"]["tpot_millis"], 9.5);
        assert!(group["measured"]["planned"].is_null());
    }
}
