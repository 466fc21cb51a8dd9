//! `get events`: what has happened in the fleet, and with --watch what happens. Follows the controller's stream, over
//! its restarts too.

use std::time::Duration;

use baton_process::one_line;
use baton_proto::v1::FleetEvent;
use serde_json::{Value, json};

use super::{
    error::CtlError,
    fleet::Fleet,
    output::{Column, Row, Table},
    watch::Printer,
    words::{or_dash, time},
};
use crate::screen::complain;

/// How long after a broken stream the controller is asked again.
const PAUSE: Duration = Duration::from_secs(1);

const COLUMNS: &[Column] = &[
    Column::wide("SEQUENCE"),
    Column::new("TIME"),
    Column::new("KIND"),
    Column::new("GROUP"),
    Column::new("INSTANCE"),
    Column::new("BY"),
    Column::new("MESSAGE"),
];

/// Those of the groups and instances of `names`; all, if none is named.
pub(super) async fn list(fleet: &mut Fleet, names: &[String]) -> Result<Table, CtlError> {
    let events = fleet.events(0, false, "").await?.last(usize::MAX).await?;
    Ok(table(&chosen(events, names)))
}

/// Until the reader goes away. Only the first question may fail; later ones are repeated.
pub(super) async fn follow(
    fleet: &mut Fleet,
    names: &[String],
    printer: &mut Printer,
) -> Result<(), CtlError> {
    let mut seen = 0;
    let mut stream = fleet.events(seen, true, "").await?;
    loop {
        let broke = match stream.next().await {
            Ok(Some(event)) => {
                seen = seen.max(event.sequence);
                let table = table(&chosen(vec![event], names));
                if !printer.print(&table.rows) {
                    return Ok(());
                }
                continue;
            }
            Ok(None) => "the controller has ended the stream of events".to_owned(),
            Err(error) => one_line(&error),
        };
        complain(&format!("{broke}; asking again"));
        stream = loop {
            tokio::time::sleep(PAUSE).await;
            if let Ok(stream) = fleet.events(seen, true, "").await {
                break stream;
            }
        };
    }
}

fn chosen(mut events: Vec<FleetEvent>, names: &[String]) -> Vec<FleetEvent> {
    events.retain(|event| {
        names.is_empty() || names.iter().any(|name| [&event.instance_id, &event.group].contains(&name))
    });
    events
}

pub(super) fn table(events: &[FleetEvent]) -> Table {
    Table { kind: "event", nothing: "no events", columns: COLUMNS, rows: events.iter().map(row).collect() }
}

fn row(event: &FleetEvent) -> Row {
    let cells = vec![
        event.sequence.to_string(),
        time(event.unix_millis),
        event.kind.clone(),
        or_dash(&event.group),
        or_dash(&event.instance_id),
        or_dash(&event.actor),
        event.message.clone(),
    ];
    let key = event.sequence.to_string();
    Row { key, names: vec![event.instance_id.clone(), event.group.clone()], cells, object: object(event) }
}

fn object(event: &FleetEvent) -> Value {
    json!({
        // Beyond what readers of JSON keep exact in a number.
        "sequence": event.sequence.to_string(),
        "unix_millis": event.unix_millis,
        "kind": event.kind,
        "group": event.group,
        "instance_id": event.instance_id,
        "message": event.message,
        "actor": event.actor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::output::Output;

    #[test]
    fn events_are_chosen_by_instance_or_group() {
        let event = |sequence, group: &str, instance: &str| FleetEvent {
            sequence,
            unix_millis: 1_764_171_516_000,
            kind: "role_decided".into(),
            group: group.into(),
            instance_id: instance.into(),
            message: "is decode now".into(),
            actor: String::new(),
        };
        let events = vec![event(1, "g", "a"), event(2, "g", "b"), event(3, "h", "c")];
        let kept = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            chosen(events.clone(), &names).iter().map(|event| event.sequence).collect::<Vec<_>>()
        };
        assert_eq!(
            (kept(&[]), kept(&["b"]), kept(&["g"]), kept(&["a", "h"])),
            (vec![1, 2, 3], vec![2], vec![1, 2], vec![1, 3])
        );
        let late = FleetEvent { sequence: u64::MAX - 1, ..events[0].clone() };
        assert_eq!(object(&late)["sequence"], "18446744073709551614");
        assert_eq!(
            table(&events[..1]).text(Output::Table, false, false),
            "2025-11-26T15:38:36Z   role_decided   g       a          -    is decode now"
        );
    }
}
