//! `get roles`: what every instance should be beside what it is. Pure.

use baton_proto::v1::{Intent, Role, RoleView};
use serde_json::{Value, json};

use super::{
    output::{Column, Row, Table},
    words::{phase, role},
};

const COLUMNS: &[Column] = &[
    Column::new("INSTANCE"),
    Column::new("DESIRED"),
    Column::new("EPOCH"),
    Column::new("OBSERVED"),
    Column::new("EPOCH"),
    Column::new("PHASE"),
    Column::new("INTENT"),
    Column::new("REASON"),
];

pub(super) fn table(mut roles: Vec<RoleView>) -> Table {
    roles.sort_by(|a, b| a.instance_id.cmp(&b.instance_id));
    Table {
        kind: "instance",
        nothing: "no roles are assigned",
        columns: COLUMNS,
        rows: roles.iter().map(row).collect(),
    }
}

fn row(view: &RoleView) -> Row {
    let cells = vec![
        view.instance_id.clone(),
        role(view.desired_role),
        view.desired_epoch.to_string(),
        role(view.observed_role),
        view.observed_epoch.to_string(),
        if view.registered { phase(view.phase) } else { "gone".to_owned() },
        intent(view.intent.as_ref()),
        because(view),
    ];
    Row { key: view.instance_id.clone(), names: vec![view.instance_id.clone()], cells, object: object(view) }
}

/// In a word: who and why stand in the reason, and in `describe`.
/// What matters most of why it is as it is.
fn because(view: &RoleView) -> String {
    let ill = ["", "healthy", "probation"].iter().all(|well| view.health != *well);
    if !view.stuck.is_empty() {
        format!("stuck: {}", view.stuck)
    } else if ill && !view.reason.contains(&view.health) {
        format!("{}; {}", view.health, view.reason)
    } else {
        view.reason.clone()
    }
}

fn intent(intent: Option<&Intent>) -> String {
    match intent {
        Some(intent) if intent.cordoned.is_some() => "cordoned".to_owned(),
        Some(intent) if intent.pinned() != Role::Unspecified => format!("pinned {}", role(intent.pinned)),
        _ => "-".to_owned(),
    }
}

pub(super) fn object(view: &RoleView) -> Value {
    let intent = view.intent.clone().unwrap_or_default();
    let cordoned = intent.cordoned.map(|cordoned| {
        json!({
            "by": cordoned.by,
            "reason": cordoned.reason,
            "unix_millis": cordoned.unix_millis,
            "drain_millis": cordoned.drain_millis,
            "force": cordoned.force,
        })
    });
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
        "health": view.health,
        "intent": { "cordoned": cordoned, "pinned": role(intent.pinned), "pinned_by": intent.pinned_by },
    })
}

#[cfg(test)]
pub(super) mod tests {
    use baton_proto::v1::{Cordoned, Phase};

    use super::*;
    use crate::ctl::output::Output;

    pub(in crate::ctl) fn view() -> RoleView {
        RoleView {
            instance_id: "server-0".into(),
            desired_role: Role::Prefill.into(),
            desired_epoch: 7,
            reason: "fixed ratio 1:1".into(),
            observed_role: Role::Mixed.into(),
            observed_epoch: 6,
            phase: Phase::Switching.into(),
            registered: true,
            stuck: String::new(),
            health: String::new(),
            intent: None,
        }
    }

    #[test]
    fn roles_show_intent_beside_observation() {
        let gone = RoleView { registered: false, instance_id: "x".into(), ..view() };
        let stuck = RoleView { stuck: "has not taken on its role".into(), ..gone.clone() };
        let text = table(vec![view(), gone, stuck]).text(Output::Table, true, false);
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1][..7], ["server-0", "prefill", "7", "mixed", "6", "switching", "-"]);
        assert_eq!(lines[2][5], "gone");
        assert!(text.contains("fixed ratio 1:1"));
        assert!(lines[3].join(" ").ends_with("stuck: has not taken on its role"), "{text}");
    }

    #[test]
    fn what_operators_want_is_seen() {
        let cordoned = Intent {
            cordoned: Some(Cordoned { by: "alice".into(), ..Default::default() }),
            ..Default::default()
        };
        let pinned = Intent { pinned: Role::Decode.into(), ..Default::default() };
        let table = table(vec![
            RoleView { instance_id: "a".into(), intent: Some(cordoned), ..view() },
            RoleView { instance_id: "b".into(), intent: Some(pinned), ..view() },
        ]);
        assert_eq!([&table.rows[0].cells[6], &table.rows[1].cells[6]], ["cordoned", "pinned decode"]);
        assert_eq!(table.rows[0].object["intent"]["cordoned"]["by"], "alice");
        assert_eq!(table.rows[1].object["intent"]["pinned"], "decode");
    }
}
