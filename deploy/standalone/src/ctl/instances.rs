//! `get instances`: what is registered, and how busy it is. Pure.

use baton_proto::v1::Instance;
use serde_json::{Value, json};

use super::{
    output::{Column, Row, Table},
    words::{age, doing, micros, or_dash, phase, role, since},
};

const COLUMNS: &[Column] = &[
    Column::new("INSTANCE"),
    Column::new("ROLE"),
    Column::new("PHASE"),
    Column::new("MODEL"),
    Column::new("DEVICE"),
    Column::new("RUNNING"),
    Column::new("WAITING"),
    Column::new("KV BLOCKS"),
    Column::new("KV OUT/IN"),
    Column::new("ENDPOINT"),
    Column::new("LAST BEAT").passing(),
    Column::wide("GROUP"),
    Column::wide("STEP").passing(),
    Column::wide("VERSION"),
    Column::wide("AGE").passing(),
    Column::wide("LABELS"),
];

pub(super) fn id(instance: &Instance) -> &str {
    instance.spec.as_ref().map_or("", |spec| &spec.instance_id)
}

pub(super) fn table(mut instances: Vec<Instance>, now: u64) -> Table {
    instances.sort_by(|a, b| id(a).cmp(id(b)));
    Table {
        kind: "instance",
        nothing: "no instances are registered",
        columns: COLUMNS,
        rows: instances.iter().map(|instance| row(instance, now)).collect(),
    }
}

fn row(instance: &Instance, now: u64) -> Row {
    let (spec, beat) = (instance.spec.clone().unwrap_or_default(), instance.beat.unwrap_or_default());
    let load = beat.load.unwrap_or_default();
    let used = load.kv_blocks_total.saturating_sub(load.kv_blocks_free);
    let cells = vec![
        spec.instance_id.clone(),
        role(beat.role),
        doing(&beat),
        or_dash(spec.model.as_ref().map_or("", |model| &model.name)),
        format!("{}x{}", spec.device_count, spec.device),
        load.running_sequences.to_string(),
        load.waiting_sequences.to_string(),
        format!("{used}/{}", load.kv_blocks_total),
        format!("{}/{}", load.outgoing_transfers, load.incoming_transfers),
        spec.inference_endpoint.clone(),
        age(instance.last_beat_age_millis),
        or_dash(&spec.group),
        micros(load.decode_step_micros),
        or_dash(&spec.version),
        since(instance.registered_unix_millis, now),
        or_dash(&labels(instance).join(",")),
    ];
    Row { key: spec.instance_id.clone(), names: vec![spec.instance_id], cells, object: object(instance) }
}

/// As in `zone=a`, in order.
pub(super) fn labels(instance: &Instance) -> Vec<String> {
    let labels = instance.spec.iter().flat_map(|spec| &spec.labels);
    let mut labels: Vec<String> = labels.map(|(key, value)| format!("{key}={value}")).collect();
    labels.sort();
    labels
}

fn object(instance: &Instance) -> Value {
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
            "format": layout.format,
            "dtype": layout.dtype,
            "block_tokens": layout.block_tokens,
            "block_bytes": layout.block_bytes,
            "layers": layout.layers,
            "kv_heads": layout.kv_heads,
            "head_dim": layout.head_dim,
            "rope_dim": layout.rope_dim,
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

#[cfg(test)]
pub(super) mod tests {
    use baton_proto::v1::{InstanceBeat, InstanceLoad, InstanceSpec, ModelIdentity, Phase, Role};

    use super::*;
    use crate::ctl::output::Output;

    pub(in crate::ctl) fn instance(id: &str, phase: Phase) -> Instance {
        let spec = InstanceSpec {
            instance_id: id.into(),
            group: "default".into(),
            device: "cpu".into(),
            device_count: 1,
            model: Some(ModelIdentity { name: "m".into(), ..Default::default() }),
            inference_endpoint: "127.0.0.1:9".into(),
            labels: [("zone".to_owned(), "a".to_owned()), ("name".to_owned(), id.to_owned())].into(),
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
        let table =
            table(vec![instance("server-1", Phase::Loading), instance("server-0", Phase::Ready)], 5_001);
        let text = table.text(Output::Table, true, false);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0][..3], ["INSTANCE", "ROLE", "PHASE"]);
        assert_eq!(
            lines[1],
            ["server-0", "decode", "ready", "m", "1xcpu", "3", "0", "10/100", "0/0", "127.0.0.1:9", "0.2s"]
        );
        assert_eq!(lines[2][..4], ["server-1", "decode", "loading", "45%"]);
        let json: Value = serde_json::from_str(&table.text(Output::Json, true, false)).unwrap();
        assert_eq!(json[1]["load_permille"], 457);
        assert_eq!(json[0]["load"]["kv_blocks_free"], 90);
        let wide = table.text(Output::Wide, true, false);
        assert!(wide.lines().nth(1).unwrap().ends_with("5.0s   name=server-0,zone=a"), "{wide}");
    }
}
