//! `get groups`: by what each group is divided, and how far it is from its plan. Pure.

use baton_proto::v1::{GroupPlan, InstancePlan, Role, instance_plan::Step};

use super::{
    output::{Column, Row, Table},
    plan::{count, group_object},
    words::{millis, targets},
};

const COLUMNS: &[Column] = &[
    Column::new("GROUP"),
    Column::new("DIVIDED BY"),
    Column::new("SET BY"),
    Column::new("INSTANCES"),
    Column::new("PREFILL"),
    Column::new("DECODE"),
    Column::new("STATE"),
    Column::wide("WANTED"),
    Column::wide("REQUESTS").passing(),
    Column::wide("TTFT").passing(),
    Column::wide("TPOT").passing(),
];

pub(super) fn table(mut groups: Vec<GroupPlan>) -> Table {
    groups.sort_by(|a, b| a.group.cmp(&b.group));
    Table {
        kind: "group",
        nothing: "no groups: no instances are registered",
        columns: COLUMNS,
        rows: groups.iter().map(row).collect(),
    }
}

fn row(group: &GroupPlan) -> Row {
    let measured = group.measured.as_ref();
    let forecast = measured.and_then(|measured| measured.present.as_ref());
    let dash = || "-".to_owned();
    let cells = vec![
        group.group.clone(),
        group.targets.as_ref().map_or_else(dash, targets),
        if group.targets_set { "operator" } else { "config" }.to_owned(),
        group.instances.len().to_string(),
        having(group, Role::Prefill),
        having(group, Role::Decode),
        state(group),
        wanted(group),
        measured.map_or_else(dash, |measured| format!("{:.1}/s", measured.requests_per_second)),
        forecast.map_or_else(dash, |forecast| millis(forecast.ttft_millis)),
        forecast.map_or_else(dash, |forecast| millis(forecast.tpot_millis)),
    ];
    Row { key: group.group.clone(), names: vec![group.group.clone()], cells, object: group_object(group) }
}

/// As in "2", or "2 -> 3" if the plan is another.
pub(super) fn having(group: &GroupPlan, role: Role) -> String {
    let has = count(group, role.into(), |plan| plan.has);
    let planned = count(group, role.into(), |plan| plan.planned);
    if has == planned || !group.waits.is_empty() { has.to_string() } else { format!("{has} -> {planned}") }
}

/// As in "1 changes, 2 wait".
pub(super) fn state(group: &GroupPlan) -> String {
    if !group.waits.is_empty() {
        return format!("not decided: {}", group.waits);
    }
    let of = |step: Step| group.instances.iter().filter(|plan: &&InstancePlan| plan.step() == step).count();
    let parts = [
        (of(Step::Changes), "changing"),
        (of(Step::Waits), "waiting"),
        (of(Step::NotCounted), "not counted"),
    ];
    let parts: Vec<String> =
        parts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    if parts.is_empty() { "as planned".to_owned() } else { parts.join(", ") }
}

/// As in "1:2"; "-" if not known.
pub(super) fn wanted(group: &GroupPlan) -> String {
    match (group.prefill_wanted, group.decode_wanted) {
        (0, 0) => "-".to_owned(),
        (prefill, decode) => format!("{prefill}:{decode}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::plan::tests::group;

    #[test]
    fn a_group_says_how_far_it_is_from_its_plan() {
        let table = table(vec![group()]);
        let row = &table.rows[0];
        assert_eq!(
            row.cells[..7],
            ["default", "ratio 1:1", "config", "3", "2 -> 1", "1", "1 changing, 1 waiting"]
        );
        assert_eq!(row.object["group"], "default");
        let undecided = GroupPlan { waits: "others may come".into(), ..group() };
        assert_eq!(
            (state(&undecided).as_str(), having(&undecided, Role::Prefill).as_str()),
            ("not decided: others may come", "2")
        );
        let settled = GroupPlan {
            instances: group().instances[..1].to_vec(),
            prefill_wanted: 1,
            decode_wanted: 2,
            ..group()
        };
        assert_eq!((state(&settled).as_str(), wanted(&settled).as_str()), ("as planned", "1:2"));
    }
}
