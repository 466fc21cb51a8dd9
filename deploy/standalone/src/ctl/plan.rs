//! What becomes of instances by a plan, in lines and as objects. Pure; for [`super::explain`] and
//! [`super::groups`].

use baton_proto::v1::{Forecast, GroupPlan, InstancePlan, Measured, Targets, instance_plan::Step};
use serde_json::{Value, json};

use super::{
    output::visible,
    words::{or_dash, policy, role},
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

/// For programs; forecasts that cannot keep up are null.
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
        let group = group_object(&group);
        assert_eq!(group["instances"][2]["waits_for"], "server-0 to be prefill");
        assert_eq!(group["instances"][0]["step"], "keeps");
        assert!(group["measured"]["present"]["ttft_millis"].is_null());
        assert_eq!(group["measured"]["present"]["tpot_millis"], 9.5);
        assert!(group["measured"]["planned"].is_null());
    }
}
