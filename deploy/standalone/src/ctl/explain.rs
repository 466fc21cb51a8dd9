//! `explain`: why roles are as they are, the numbers that a plan is made of and what comes of them; and why a request is
//! where it is.

use baton_proto::v1::{
    Forecast, GroupPlan, InstancePlan, Measured, Role, RoleView, Targets, instance_plan::Step,
};
use clap::Subcommand;
use serde_json::{Value, json};

use super::{
    error::CtlError,
    fleet::Fleet,
    groups::{having, state, wanted},
    output::{self, Column, Layout, Output, Row, yaml},
    page::Page,
    placement,
    plan::{group_object, line, moves, step, waits_for},
    roles,
    targets::TargetArgs,
    words::{intent, millis, phase, role, targets},
};
use crate::screen::say;

const DECISIONS: &[Column] = &[
    Column::new("INSTANCE"),
    Column::new("HAS"),
    Column::new("PLANNED"),
    Column::new("NOW"),
    Column::new("WAITS FOR"),
    Column::new("REASON"),
];
const FORECASTS: &[Column] = &[
    Column::new("DIVISION"),
    Column::new("PREFILL"),
    Column::new("DECODE"),
    Column::new("TTFT"),
    Column::new("TPOT"),
];

#[derive(Debug, Clone, clap::Args)]
pub(super) struct ExplainArgs {
    #[command(subcommand)]
    what: Option<ExplainWhat>,

    #[arg(short, long, value_enum, default_value_t = Output::Table, global = true)]
    output: Output,
}

#[derive(Debug, Clone, Subcommand)]
enum ExplainWhat {
    /// Why an instance has its role, and what it waits for.
    Role {
        /// The instance.
        name: String,
    },
    /// How a group is divided and why; with targets, how it would be by these.
    Group {
        name: String,
        #[command(flatten)]
        what_if: TargetArgs,
    },
    /// Why a request went where it went: who could have taken it, at which cost.
    Placement {
        /// The request's id, as its answer's header x-request-id says it.
        request: String,
    },
}

pub(super) async fn run(args: ExplainArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    match args.what {
        None => {
            let groups = fleet.plans("", None).await?;
            let objects = groups.iter().map(group_object).collect();
            let pages: Vec<String> = groups.iter().map(|plan| group(plan, None)).collect();
            let text = if pages.is_empty() {
                "no groups: no instances are registered".to_owned()
            } else {
                pages.join("\n\n\n")
            };
            show(args.output, &objects, text);
        }
        Some(ExplainWhat::Group { name, what_if }) => {
            let what_if = what_if.targets()?;
            let plan = one_group(fleet, &name, what_if).await?;
            show(args.output, &group_object(&plan), group(&plan, what_if.as_ref()));
        }
        Some(ExplainWhat::Placement { request }) => {
            let (coordinator, answer) = placement::find(fleet, &request).await?;
            show(
                args.output,
                &placement::object(&coordinator, &answer),
                placement::page(&coordinator, &answer),
            );
        }
        Some(ExplainWhat::Role { name }) => {
            let (view, plan) = one_role(fleet, &name).await?;
            let object = json!({ "role": roles::object(&view), "plan": plan.as_ref().map(group_object) });
            show(args.output, &object, role_page(&view, plan.as_ref()).end());
        }
    }
    Ok(())
}

fn show(output: Output, object: &Value, text: String) {
    say(&match output {
        Output::Json => output::json(object),
        Output::Yaml => yaml(object),
        Output::Table | Output::Wide => text,
    });
}

/// The role of an instance, and the plan of its group with this instance alone; none, if no plan counts with it.
pub(super) async fn one_role(
    fleet: &mut Fleet,
    name: &str,
) -> Result<(RoleView, Option<GroupPlan>), CtlError> {
    let mut roles = fleet.roles().await?;
    let Some(at) = roles.iter().position(|view| view.instance_id == name) else {
        let known = roles.into_iter().map(|view| view.instance_id).collect();
        return Err(CtlError::Unknown { kind: "instance", name: name.to_owned(), known });
    };
    let groups = fleet.plans("", None).await?;
    let is = |plan: &InstancePlan| plan.instance_id == name;
    let mut plan = groups.into_iter().find(|group| group.instances.iter().any(is));
    if let Some(plan) = &mut plan {
        plan.instances.retain(is);
    }
    Ok((roles.swap_remove(at), plan))
}

/// The plan of a group that is there.
pub(super) async fn one_group(
    fleet: &mut Fleet,
    name: &str,
    what_if: Option<Targets>,
) -> Result<GroupPlan, CtlError> {
    let plans = fleet.plans(name, what_if).await?;
    if let Some(plan) = plans.into_iter().find(|plan| plan.group == name) {
        return Ok(plan);
    }
    let known = fleet.plans("", None).await?.into_iter().map(|plan| plan.group).collect();
    Err(CtlError::Unknown { kind: "group", name: name.to_owned(), known })
}

/// Numbers in, decision out.
pub(super) fn group(plan: &GroupPlan, what_if: Option<&Targets>) -> String {
    let mut page = Page::default();
    page.fact("Group", &plan.group);
    if what_if.is_some() {
        page.fact("What if", "nothing is changed; this is what would be planned by these targets");
    }
    let by = if what_if.is_some() {
        "asked about here"
    } else if plan.targets_set {
        "set by an operator"
    } else {
        "as configured"
    };
    let divided = plan.targets.as_ref().map_or_else(|| "-".to_owned(), targets);
    page.fact("Divided by", format!("{divided} ({by})"));
    page.fact("State", state(plan));

    page.section("Numbers in, means over the last minutes");
    match &plan.measured {
        Some(measured) => numbers(&mut page, measured),
        None => page.text("not measured, or the policy does not ask for it"),
    }
    if let Some(budget) = &plan.moves {
        page.fact("Moves", moves(budget));
    }

    page.section("Decision out");
    page.fact("Prefill", having(plan, Role::Prefill));
    page.fact("Decode", having(plan, Role::Decode));
    let fewest = match wanted(plan).as_str() {
        "-" => "not known".to_owned(),
        _ => format!("{} prefill, {} decode", plan.prefill_wanted, plan.decode_wanted),
    };
    page.fact("Fewest that do", fewest);
    let rows: Vec<Row> = plan.instances.iter().map(decision).collect();
    if !rows.is_empty() {
        page.text(&format!("\n{}", Layout::new(DECISIONS, true).text(&rows, true)));
    }
    page.end()
}

fn numbers(page: &mut Page, measured: &Measured) {
    let Measured { requests_per_second, prompt_tokens, completion_tokens, .. } = measured;
    page.fact("Requests", format!("{requests_per_second:.2}/s"));
    page.fact("Prompt", format!("{prompt_tokens:.0} tokens computed for a request"));
    page.fact("Completion", format!("{completion_tokens:.0} tokens for a request"));
    page.fact("Prefill speed", format!("{:.0} tokens/s of an instance", measured.prefill_tokens_per_second));
    let (base, each) = (millis(measured.step_base_millis), millis(measured.step_per_sequence_millis));
    page.fact("Decode step", format!("{base} and {each} for each sequence"));
    let forecasts = [("present", &measured.present), ("planned", &measured.planned)];
    let rows: Vec<Row> = forecasts
        .into_iter()
        .filter_map(|(name, forecast)| forecast.as_ref().map(|forecast| forecast_row(name, forecast)))
        .collect();
    if !rows.is_empty() {
        page.section("Forecasts");
        page.text(&Layout::new(FORECASTS, true).text(&rows, true));
    }
}

fn forecast_row(name: &str, forecast: &Forecast) -> Row {
    let Forecast { prefill, decode, ttft_millis, tpot_millis } = forecast;
    let cells = vec![
        name.to_owned(),
        prefill.to_string(),
        decode.to_string(),
        millis(*ttft_millis),
        millis(*tpot_millis),
    ];
    Row { key: name.to_owned(), names: Vec::new(), cells, object: Value::Null }
}

fn decision(plan: &InstancePlan) -> Row {
    let cells = vec![
        plan.instance_id.clone(),
        role(plan.has),
        role(plan.planned),
        step(plan).to_owned(),
        waits_for(plan),
        plan.reason.clone(),
    ];
    Row { key: plan.instance_id.clone(), names: Vec::new(), cells, object: Value::Null }
}

/// `group` is the plan of its group, with this instance alone.
pub(super) fn role_page(view: &RoleView, group: Option<&GroupPlan>) -> Page {
    let mut page = Page::default();
    page.fact("Instance", &view.instance_id);
    role_facts(&mut page, view);
    match group {
        Some(group) => {
            page.fact("Group", &group.group);
            page.fact("Divided by", group.targets.as_ref().map_or_else(|| "-".to_owned(), targets));
            if !group.waits.is_empty() {
                page.fact("Not decided", &group.waits);
            }
            group.instances.iter().for_each(|plan| plan_facts(&mut page, plan));
        }
        None => page.fact("Plan", "none counts with it"),
    }
    page
}

/// Intent beside observation.
pub(super) fn role_facts(page: &mut Page, view: &RoleView) {
    page.fact("Should be", format!("{}, epoch {}", role(view.desired_role), view.desired_epoch));
    page.fact("Because", &view.reason);
    page.fact("Operators want", intent(view.intent.as_ref()));
    if view.registered {
        page.fact(
            "Is",
            format!("{}, epoch {}, {}", role(view.observed_role), view.observed_epoch, phase(view.phase)),
        );
    } else {
        page.fact("Is", "gone");
    }
    if !view.health.is_empty() {
        page.fact("Health", &view.health);
    }
    if !view.stuck.is_empty() {
        page.fact("Stuck", &view.stuck);
    }
}

/// What is planned for an instance.
pub(super) fn plan_facts(page: &mut Page, plan: &InstancePlan) {
    let line = line(plan);
    page.fact("Plan", line.split_once(": ").map_or(line.as_str(), |(_, line)| line));
    page.fact(
        "Now",
        match plan.step() {
            Step::Keeps => "nothing: it has what is planned",
            Step::Changes => "the change is made",
            Step::Waits => "it waits",
            Step::NotCounted => "it is planned without",
            Step::Unspecified => "-",
        },
    );
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::MoveBudget;

    use super::*;
    use crate::ctl::plan::tests::group as example;
    use crate::ctl::roles::tests::view;

    #[test]
    fn a_group_shows_numbers_in_and_decision_out() {
        let mut plan = example();
        plan.targets = Some(Targets { policy: 2, ttft_millis: 500, tpot_millis: 50, ..Default::default() });
        plan.targets_set = true;
        (plan.prefill_wanted, plan.decode_wanted) = (1, 2);
        plan.moves = Some(MoveBudget { made: 4, most: 4, period_millis: 60_000, wait_millis: 11_500 });
        let forecast = |ttft_millis| Some(Forecast { prefill: 2, decode: 1, ttft_millis, tpot_millis: 20.5 });
        plan.measured = Some(Measured {
            requests_per_second: 3.25,
            prompt_tokens: 512.0,
            completion_tokens: 128.0,
            prefill_tokens_per_second: 8400.0,
            step_base_millis: 12.1,
            step_per_sequence_millis: 0.4,
            present: forecast(f64::INFINITY),
            planned: forecast(320.0),
        });
        let text = group(&plan, None);
        for line in [
            "Divided by:          auto, TTFT 500ms, TPOT 50ms (set by an operator)",
            "State:               1 changing, 1 waiting",
            "  Requests:            3.25/s",
            "  Decode step:         12.1ms and 0.40ms for each sequence",
            "  Moves:               4 of at most 4 in 60 s; the next may be made in 12 s",
            "  present    2         1        cannot keep up   20.5ms",
            "  planned    2         1        320ms            20.5ms",
            "  Prefill:             2 -> 1",
            "  Fewest that do:      1 prefill, 2 decode",
            "  server-2   decode    none      waits     server-0 to be prefill   cordoned by alice: disk",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(group(&plan, plan.targets.as_ref()).contains("nothing is changed"), "{text}");
    }

    #[test]
    fn what_is_not_measured_is_said() {
        let text = group(&example(), None);
        assert!(text.contains("not measured") && text.contains("Fewest that do:      not known"), "{text}");
        assert!(text.contains("ratio 1:1 (as configured)"), "{text}");
    }

    #[test]
    fn a_role_shows_intent_observation_and_plan() {
        let mut plan = example();
        plan.instances.drain(..2);
        let text = role_page(&view(), Some(&plan)).end();
        for line in [
            "Should be:           prefill, epoch 7",
            "Is:                  mixed, epoch 6, switching",
            "Plan:                decode -> none (cordoned by alice: disk), waits for server-0 to be prefill",
            "Now:                 it waits",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(role_page(&view(), None).end().contains("none counts with it"));
    }
}
