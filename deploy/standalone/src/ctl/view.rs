//! Answers of the admin services as tables for people and JSON for programs. Pure.

use baton_proto::v1::{Instance, InstanceBeat, Phase, RequestView, Role, RoleView};
use serde_json::{Value, json};
use tabled::{builder::Builder, settings::Style};

/// The same things twice: columns for people, all fields for programs.
#[derive(Debug)]
pub(super) struct Table {
    header: &'static [&'static str],
    rows: Vec<Vec<String>>,
    nothing: &'static str,
    json: Value,
}

impl Table {
    pub(super) fn text(&self) -> String {
        if self.rows.is_empty() {
            return self.nothing.to_owned();
        }
        let mut builder = Builder::default();
        builder.push_record(self.header.iter().copied());
        self.rows.iter().for_each(|row| builder.push_record(row));
        let table = builder.build().with(Style::blank()).to_string();
        table
            .lines()
            .map(|line| line.trim_end().strip_prefix(' ').unwrap_or(line))
            .collect::<Vec<_>>()
            .join("\n")
    }

    pub(super) fn json(&self) -> String {
        format!("{:#}", self.json)
    }
}

/// As in "prefill"; what this build does not know is "unknown".
pub(crate) fn role(role: i32) -> String {
    let known = baton_proto::Role::from_wire(role).map(baton_proto::Role::name);
    if role == Role::Unspecified as i32 { "-".to_owned() } else { known.unwrap_or("unknown").to_owned() }
}

/// As in "loading".
pub(crate) fn phase(phase: i32) -> String {
    let known = baton_proto::Phase::from_wire(phase).map(baton_proto::Phase::name);
    if phase == Phase::Unspecified as i32 { "-".to_owned() } else { known.unwrap_or("unknown").to_owned() }
}

pub(super) fn instances(mut instances: Vec<Instance>) -> Table {
    let id = |instance: &Instance| {
        instance.spec.as_ref().map_or_else(String::new, |spec| spec.instance_id.clone())
    };
    instances.sort_by_key(id);
    let row = |instance: &Instance| {
        let (spec, beat) = (instance.spec.clone().unwrap_or_default(), instance.beat.unwrap_or_default());
        let load = beat.load.unwrap_or_default();
        let used = load.kv_blocks_total.saturating_sub(load.kv_blocks_free);
        vec![
            spec.instance_id,
            role(beat.role),
            doing(&beat),
            format!("{}x{}", spec.device_count, spec.device),
            load.running_sequences.to_string(),
            load.waiting_sequences.to_string(),
            format!("{used}/{}", load.kv_blocks_total),
            format!("{}/{}", load.outgoing_transfers, load.incoming_transfers),
            spec.inference_endpoint,
            age(instance.last_beat_age_millis),
        ]
    };
    Table {
        header: &[
            "INSTANCE",
            "ROLE",
            "PHASE",
            "DEVICE",
            "RUNNING",
            "WAITING",
            "KV BLOCKS",
            "KV OUT/IN",
            "ENDPOINT",
            "LAST BEAT",
        ],
        rows: instances.iter().map(row).collect(),
        nothing: "no instances are registered",
        json: instances.iter().map(instance_json).collect(),
    }
}

fn doing(beat: &InstanceBeat) -> String {
    match beat.phase() {
        Phase::Loading => format!("loading {}%", beat.load_permille / 10),
        phase_now => phase(phase_now.into()),
    }
}

fn instance_json(instance: &Instance) -> Value {
    let (spec, beat) = (instance.spec.clone().unwrap_or_default(), instance.beat.unwrap_or_default());
    let (load, model, layout) =
        (beat.load.unwrap_or_default(), spec.model.unwrap_or_default(), spec.kv_layout.unwrap_or_default());
    json!({
        "instance_id": spec.instance_id,
        "incarnation": spec.incarnation,
        "group": spec.group,
        "device": spec.device,
        "device_count": spec.device_count,
        "version": spec.version,
        "labels": spec.labels,
        "transports": spec.transports,
        "model": {
            "name": model.name,
            "revision": model.revision,
            "architecture": model.architecture,
            "context_tokens": model.context_tokens,
            "vocabulary_size": model.vocabulary_size,
        },
        "kv_layout": {
            "fingerprint": layout.fingerprint,
            "dtype": layout.dtype,
            "block_tokens": layout.block_tokens,
            "layers": layout.layers,
            "tensor_parallel": layout.tensor_parallel,
        },
        "inference_endpoint": spec.inference_endpoint,
        "handoff_endpoint": spec.handoff_endpoint,
        "metrics_endpoint": spec.metrics_endpoint,
        "role": role(beat.role),
        "role_epoch": beat.role_epoch,
        "phase": phase(beat.phase),
        "load_permille": beat.load_permille,
        "load": {
            "running_sequences": load.running_sequences,
            "waiting_sequences": load.waiting_sequences,
            "queued_prefill_tokens": load.queued_prefill_tokens,
            "kv_blocks_total": load.kv_blocks_total,
            "kv_blocks_free": load.kv_blocks_free,
            "prefill_tokens_per_second": load.prefill_tokens_per_second,
            "decode_step_micros": load.decode_step_micros,
            "outgoing_transfers": load.outgoing_transfers,
            "incoming_transfers": load.incoming_transfers,
            "prefilled_requests": load.prefilled_requests,
            "prefilled_tokens": load.prefilled_tokens,
            "decoded_tokens": load.decoded_tokens,
            "decode_steps": load.decode_steps,
            "finished_requests": load.finished_requests,
            "finished_tokens": load.finished_tokens,
            "max_sequences": load.max_sequences,
        },
        "registered_unix_millis": instance.registered_unix_millis,
        "last_beat_age_millis": instance.last_beat_age_millis,
    })
}

pub(super) fn roles(mut roles: Vec<RoleView>) -> Table {
    roles.sort_by(|a, b| a.instance_id.cmp(&b.instance_id));
    let row = |view: &RoleView| {
        vec![
            view.instance_id.clone(),
            role(view.desired_role),
            view.desired_epoch.to_string(),
            role(view.observed_role),
            view.observed_epoch.to_string(),
            if view.registered { phase(view.phase) } else { "gone".to_owned() },
            if view.stuck.is_empty() { view.reason.clone() } else { format!("stuck: {}", view.stuck) },
        ]
    };
    let object = |view: &RoleView| {
        json!({
            "instance_id": view.instance_id,
            "desired_role": role(view.desired_role),
            "desired_epoch": view.desired_epoch,
            "observed_role": role(view.observed_role),
            "observed_epoch": view.observed_epoch,
            "phase": phase(view.phase),
            "registered": view.registered,
            "reason": view.reason,
            "stuck": view.stuck,
        })
    };
    Table {
        header: &["INSTANCE", "DESIRED", "EPOCH", "OBSERVED", "EPOCH", "PHASE", "REASON"],
        rows: roles.iter().map(row).collect(),
        nothing: "no roles are assigned",
        json: roles.iter().map(object).collect(),
    }
}

pub(super) fn requests(requests: Vec<RequestView>) -> Table {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let row = |view: &RequestView| {
        vec![
            view.request_id.clone(),
            view.model.clone(),
            view.stage.clone(),
            or_dash(&view.prefill_instance),
            or_dash(&view.decode_instance),
            view.prompt_tokens.to_string(),
            view.completion_tokens.to_string(),
            age(view.age_millis),
        ]
    };
    let object = |view: &RequestView| {
        json!({
            "request_id": view.request_id,
            "model": view.model,
            "stage": view.stage,
            "prefill_instance": view.prefill_instance,
            "decode_instance": view.decode_instance,
            "prompt_tokens": view.prompt_tokens,
            "completion_tokens": view.completion_tokens,
            "age_millis": view.age_millis,
        })
    };
    Table {
        header: &["REQUEST", "MODEL", "STAGE", "PREFILL", "DECODE", "PROMPT", "GENERATED", "AGE"],
        rows: requests.iter().map(row).collect(),
        nothing: "no requests are running",
        json: requests.iter().map(object).collect(),
    }
}

/// In seconds, with as many digits as matter.
fn age(millis: u64) -> String {
    match millis {
        0..10_000 => format!("{}.{}s", millis / 1000, millis % 1000 / 100),
        10_000..600_000 => format!("{}s", millis / 1000),
        _ => format!("{}m", millis / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{InstanceLoad, InstanceSpec};

    use super::*;

    fn instance(id: &str, phase: Phase) -> Instance {
        let spec = InstanceSpec {
            instance_id: id.into(),
            device: "cpu".into(),
            device_count: 1,
            inference_endpoint: "127.0.0.1:9".into(),
            ..Default::default()
        };
        let load = InstanceLoad {
            kv_blocks_total: 100,
            kv_blocks_free: 90,
            running_sequences: 3,
            ..Default::default()
        };
        let beat = InstanceBeat {
            role: Role::Decode.into(),
            phase: phase.into(),
            load_permille: 457,
            load: Some(load),
            ..Default::default()
        };
        Instance { spec: Some(spec), beat: Some(beat), registered_unix_millis: 1, last_beat_age_millis: 240 }
    }

    #[test]
    fn instances_are_sorted_and_say_what_they_do() {
        let table = instances(vec![instance("server-1", Phase::Loading), instance("server-0", Phase::Ready)]);
        let text = table.text();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][..3], ["INSTANCE", "ROLE", "PHASE"]);
        assert_eq!(
            lines[1],
            ["server-0", "decode", "ready", "1xcpu", "3", "0", "10/100", "0/0", "127.0.0.1:9", "0.2s"]
        );
        assert_eq!(lines[2][..4], ["server-1", "decode", "loading", "45%"]);
        let json: Value = serde_json::from_str(&table.json()).unwrap();
        assert_eq!(json[1]["load_permille"], 457);
        assert_eq!(json[0]["load"]["kv_blocks_free"], 90);
    }

    #[test]
    fn roles_show_intent_beside_observation() {
        let view = RoleView {
            instance_id: "server-0".into(),
            desired_role: Role::Prefill.into(),
            desired_epoch: 7,
            reason: "fixed ratio 1:1".into(),
            observed_role: Role::Mixed.into(),
            observed_epoch: 6,
            phase: Phase::Switching.into(),
            registered: true,
            stuck: String::new(),
            intent: None,
        };
        let gone = RoleView { registered: false, instance_id: "x".into(), ..view.clone() };
        let stuck = RoleView { stuck: "has not taken on its role".into(), ..gone.clone() };
        let text = roles(vec![view, gone, stuck]).text();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..6], ["server-0", "prefill", "7", "mixed", "6", "switching"]);
        assert_eq!(lines[2][5], "gone");
        assert!(text.contains("fixed ratio 1:1"));
        assert!(lines[3].join(" ").ends_with("stuck: has not taken on its role"), "{text}");
    }

    #[test]
    fn nothing_is_said_in_words_and_as_an_empty_list() {
        let table = requests(Vec::new());
        assert_eq!((table.text().as_str(), table.json().as_str()), ("no requests are running", "[]"));
        assert_eq!(role(99), "unknown");
    }

    #[test]
    fn ages_are_short() {
        assert_eq!([0, 1_250, 9_999, 61_000, 3_600_000].map(age), ["0.0s", "1.2s", "9.9s", "61s", "60m"]);
    }
}
