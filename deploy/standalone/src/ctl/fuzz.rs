//! What the target `ctl` in `integration-tests/fuzz` calls: answers of controllers and coordinators, as `baton ctl` shows them.
//! Whatever stands in them, a terminal is sent nothing that it obeys, and programs are given JSON and YAML.

use baton_proto::v1;
use prost::Message;
use serde_json::Value;

use super::{
    coordinators, describe, events, explain, groups, instances, links,
    output::{Output, Table, json, yaml},
    placement, plan, requests, roles,
};

const NOW: u64 = 1_764_000_000_000;

/// The first byte says whose answer the rest is.
pub fn ctl(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind % 8 {
        0 => {
            let Some(answer) = decoded::<v1::ListInstancesResponse>(rest) else { return };
            answer.instances.iter().for_each(|one| shown(&describe::fuzz_pages(Some(one), None, NOW)));
            table(&instances::table(answer.instances, NOW));
        }
        1 => {
            let Some(answer) = decoded::<v1::ListRolesResponse>(rest) else { return };
            answer.roles.iter().for_each(|one| shown(&explain::role_page(one, None).end()));
            table(&roles::table(answer.roles));
        }
        2 => {
            let Some(answer) = decoded::<v1::ListCoordinatorsResponse>(rest) else { return };
            answer.coordinators.iter().for_each(|one| shown(&describe::fuzz_pages(None, Some(one), NOW)));
            table(&coordinators::table(answer.coordinators, NOW));
        }
        3 => {
            let Some(answer) = decoded::<v1::ListLinksResponse>(rest) else { return };
            table(&links::table(answer.links));
        }
        4 => {
            let Some(answer) = decoded::<v1::PlanResponse>(rest) else { return };
            shown(&plan::changes(&answer, None));
            value(&plan::object(&answer));
            answer.groups.iter().for_each(|group| shown(&explain::group(group, group.targets.as_ref())));
            table(&groups::table(answer.groups));
        }
        5 => {
            let Some(event) = decoded::<v1::FleetEvent>(rest) else { return };
            table(&events::table(&[event]));
        }
        6 => {
            let Some(answer) = decoded::<v1::ExplainPlacementResponse>(rest) else { return };
            shown(&placement::page("c", &answer));
            value(&placement::object("c", &answer));
        }
        _ => {
            let Some(answer) = decoded::<v1::ListRequestsResponse>(rest) else { return };
            let all: Vec<_> = answer.requests.into_iter().map(|view| ("c".to_owned(), view)).collect();
            table(&requests::table(&all));
        }
    }
}

fn decoded<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    M::decode(bytes).ok()
}

/// All ways to show a list.
fn table(table: &Table) {
    for output in [Output::Table, Output::Wide] {
        let text = table.text(output, true, false);
        shown(&text);
        assert_eq!(text.lines().count(), table.rows.len() + 1);
    }
    for row in &table.rows {
        assert_eq!(row.cells.len(), table.columns.len());
        value(&row.object);
    }
}

/// The same for programs, who read what was written.
fn value(value: &Value) {
    let text = json(value);
    shown(&text);
    assert!(same(&serde_json::from_str(&text).expect("JSON"), value), "{text}");
    let text = yaml(value);
    assert!(!text.is_empty(), "{value}");
    // In a text of several lines a tab is written as it is, for programs; to a terminal it is no more than space.
    shown(&text.replace('\t', " "));
}

/// Whether both say the same; of numbers the last digit may be lost in reading.
fn same(read: &Value, written: &Value) -> bool {
    match (read, written) {
        (Value::Number(read), Value::Number(written)) => {
            let (read, written) = (read.as_f64().unwrap_or(0.0), written.as_f64().unwrap_or(0.0));
            (read - written).abs() <= written.abs() * 1e-12
        }
        (Value::Array(read), Value::Array(written)) => {
            read.len() == written.len() && read.iter().zip(written).all(|(read, written)| same(read, written))
        }
        (Value::Object(read), Value::Object(written)) => {
            let alike = |((name, read), (other, written)): ((&String, &Value), (&String, &Value))| {
                name == other && same(read, written)
            };
            read.len() == written.len() && read.iter().zip(written).all(alike)
        }
        _ => read == written,
    }
}

/// Lines, and nothing else that terminals obey.
fn shown(text: &str) {
    let obeyed = text.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(obeyed, None, "{text:?}");
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_is_taken() {
        baton_fuzz::replay("ctl", super::ctl);
    }
}
