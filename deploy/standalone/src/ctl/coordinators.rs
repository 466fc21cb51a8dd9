//! `get coordinators`: who takes clients' requests. Pure.

use baton_proto::v1::{Coordinator, CoordinatorSpec};
use serde_json::{Value, json};

use super::{
    output::{Column, Row, Table},
    words::{age, or_dash, since},
};

const COLUMNS: &[Column] = &[
    Column::new("COORDINATOR"),
    Column::new("STATE"),
    Column::new("MODELS"),
    Column::new("RUNNING"),
    Column::new("QUEUED"),
    Column::new("REQUESTS"),
    Column::new("FAILURES"),
    Column::new("HTTP"),
    Column::new("ADMIN"),
    Column::new("LAST BEAT").passing(),
    Column::wide("LINKS"),
    Column::wide("VERSION"),
    Column::wide("AGE").passing(),
];

pub(super) fn id(coordinator: &Coordinator) -> &str {
    coordinator.spec.as_ref().map_or("", |spec| &spec.coordinator_id)
}

pub(super) fn table(mut coordinators: Vec<Coordinator>, now: u64) -> Table {
    coordinators.sort_by(|a, b| id(a).cmp(id(b)));
    Table {
        kind: "coordinator",
        nothing: "no coordinators are known to the controller",
        columns: COLUMNS,
        rows: coordinators.iter().map(|coordinator| row(coordinator, now)).collect(),
    }
}

/// As in "draining".
pub(super) fn state(coordinator: &Coordinator) -> &'static str {
    if coordinator.beat.as_ref().is_some_and(|beat| beat.draining) { "draining" } else { "serving" }
}

/// The names by which answers call what it serves.
pub(super) fn models(spec: &CoordinatorSpec) -> Vec<String> {
    spec.models.iter().filter_map(|model| model.names.first().cloned()).collect()
}

fn row(coordinator: &Coordinator, now: u64) -> Row {
    let (spec, beat) =
        (coordinator.spec.clone().unwrap_or_default(), coordinator.beat.clone().unwrap_or_default());
    let cells = vec![
        spec.coordinator_id.clone(),
        state(coordinator).to_owned(),
        or_dash(&models(&spec).join(",")),
        beat.running.to_string(),
        beat.queued.to_string(),
        beat.requests.to_string(),
        beat.failures.to_string(),
        or_dash(&spec.http_endpoint),
        or_dash(&spec.admin_endpoint),
        age(coordinator.last_beat_age_millis),
        beat.links.len().to_string(),
        or_dash(&spec.version),
        since(coordinator.registered_unix_millis, now),
    ];
    let key = spec.coordinator_id;
    Row { key: key.clone(), names: vec![key], cells, object: object(coordinator) }
}

fn object(coordinator: &Coordinator) -> Value {
    let (spec, beat) =
        (coordinator.spec.clone().unwrap_or_default(), coordinator.beat.clone().unwrap_or_default());
    let links = beat.links.iter().map(|link| {
        json!({
            "prefill_instance": link.prefill_instance,
            "decode_instance": link.decode_instance,
            "handoffs": link.handoffs,
            "failures": link.failures,
            "mean_micros": link.mean_micros,
        })
    });
    let models = spec.models.iter().map(|model| json!({ "names": model.names, "revision": model.revision }));
    json!({
        "coordinator_id": spec.coordinator_id,
        "incarnation": spec.incarnation,
        "http_endpoint": spec.http_endpoint,
        "admin_endpoint": spec.admin_endpoint,
        "version": spec.version,
        "models": models.collect::<Value>(),
        "requests": beat.requests,
        "failures": beat.failures,
        "running": beat.running,
        "queued": beat.queued,
        "draining": beat.draining,
        "links": links.collect::<Value>(),
        "registered_unix_millis": coordinator.registered_unix_millis,
        "last_beat_age_millis": coordinator.last_beat_age_millis,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use baton_proto::v1::{CoordinatorBeat, LinkBeat, ServedModel};

    use super::*;
    use crate::ctl::output::Output;

    fn model(names: &[&str]) -> ServedModel {
        let names = names.iter().map(|&name| name.to_owned()).collect();
        ServedModel { names, revision: "r".into() }
    }

    pub(in crate::ctl) fn coordinator(id: &str, admin_endpoint: &str) -> Coordinator {
        let spec = CoordinatorSpec {
            coordinator_id: id.into(),
            http_endpoint: "h:8000".into(),
            admin_endpoint: admin_endpoint.into(),
            models: vec![model(&["small", "cheap"]), model(&["large"])],
            ..Default::default()
        };
        let link = LinkBeat { prefill_instance: "p".into(), handoffs: 4, ..Default::default() };
        let beat = CoordinatorBeat { requests: 12, running: 2, links: vec![link], ..Default::default() };
        Coordinator {
            spec: Some(spec),
            beat: Some(beat),
            registered_unix_millis: 1_000,
            last_beat_age_millis: 300,
        }
    }

    #[test]
    fn coordinators_say_what_they_carry() {
        let mut draining = coordinator("c-1", "");
        draining.beat.as_mut().unwrap().draining = true;
        let table = table(vec![draining, coordinator("c-0", "h:8001")], 4_000);
        let text = table.text(Output::Wide, false, false);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            lines[0],
            [
                "c-0",
                "serving",
                "small,large",
                "2",
                "0",
                "12",
                "0",
                "h:8000",
                "h:8001",
                "0.3s",
                "1",
                "-",
                "3.0s"
            ]
        );
        assert_eq!(lines[1][1], "draining");
        assert_eq!(table.rows[0].object["links"][0]["handoffs"], 4);
        assert_eq!(table.rows[0].object["models"][0]["names"], json!(["small", "cheap"]));
    }
}
