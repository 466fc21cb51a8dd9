//! `describe`: all that is known of one thing, in sections. Beside the thing itself, what lies around it is shown as far
//! as it is answered.

use baton_process::one_line;
use baton_proto::v1::{
    Coordinator, FleetEvent, GroupPlan, Instance, InstancePlan, Link, ListLinksResponse, RoleView,
    ServedModel,
};
use clap::Subcommand;

use super::{
    coordinators,
    error::CtlError,
    events, explain,
    fleet::Fleet,
    instances, links,
    output::{Output, Table},
    page::Page,
    placement, roles,
    words::{age, doing, micros, now_unix_millis, or_dash, role, since, time},
};
use crate::screen::say;

mod event;
mod link;
mod request;
mod role;

/// Events shown.
const EVENTS: usize = 10;

#[derive(Debug, Clone, Subcommand)]
pub(super) enum DescribeWhat {
    /// What an instance is, does, should do and why, and what happened to it.
    Instance { name: String },
    /// By what a group is divided, from which numbers, its links and what happened in it.
    Group { name: String },
    /// Where a coordinator serves, what it carries and over which links.
    Coordinator { name: String },
    /// What role an instance should have and has, why, what is planned, and what became of it.
    Role {
        /// The instance.
        name: String,
    },
    /// How far a request has come, on which instances, and why it went there.
    Request {
        /// Its id, as its answer's header x-request-id says it.
        id: String,
    },
    /// How KV caches travel from one instance to another: by which coordinators' requests, how well, and what happened.
    Link {
        /// The instance where they come from.
        prefill: String,
        /// The instance where they go.
        decode: String,
    },
    /// What happened, what happened around it, and what the instance is now.
    Event {
        /// Its number, as `get events -o wide` shows it.
        sequence: u64,
    },
}

pub(super) async fn run(what: DescribeWhat, fleet: &mut Fleet) -> Result<(), CtlError> {
    let page = match what {
        DescribeWhat::Instance { name } => describe_instance(&name, fleet).await?,
        DescribeWhat::Group { name } => describe_group(&name, fleet).await?,
        DescribeWhat::Coordinator { name } => describe_coordinator(&name, fleet).await?,
        DescribeWhat::Role { name } => role::describe(&name, fleet).await?,
        DescribeWhat::Request { id } => request::describe(&id, fleet).await?,
        DescribeWhat::Link { prefill, decode } => link::describe(&prefill, &decode, fleet).await?,
        DescribeWhat::Event { sequence } => event::describe(sequence, fleet).await?,
    };
    say(&page);
    Ok(())
}

async fn describe_instance(name: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let all = fleet.instances().await?;
    let roles = fleet.roles().await?;
    let instance = all.iter().find(|instance| instances::id(instance) == name);
    let view = roles.iter().find(|view| view.instance_id == name);
    if instance.is_none() && view.is_none() {
        let known = roles.into_iter().map(|view| view.instance_id).collect();
        return Err(CtlError::Unknown { kind: "instance", name: name.to_owned(), known });
    }
    let group = instance.and_then(|instance| instance.spec.as_ref()).map_or("", |spec| &spec.group);
    let plan = fleet.plans(group, None).await.map(|groups| {
        groups.into_iter().flat_map(|group| group.instances).find(|plan| plan.instance_id == name)
    });
    let past = past(fleet, name, |_| true).await;
    Ok(instance_page(name, instance, view, plan, past, now_unix_millis()))
}

async fn describe_group(name: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let plan = explain::one_group(fleet, name, None).await?;
    let links = fleet.links().await;
    let past = past(fleet, "", |event| event.group == name).await;
    Ok(group_page(&plan, links, past))
}

async fn describe_coordinator(name: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let all = fleet.coordinators().await?;
    let Some(coordinator) = all.iter().find(|coordinator| coordinators::id(coordinator) == name) else {
        let known = all.iter().map(|coordinator| coordinators::id(coordinator).to_owned()).collect();
        return Err(CtlError::Unknown { kind: "coordinator", name: name.to_owned(), known });
    };
    Ok(coordinator_page(coordinator, now_unix_millis()))
}

/// The last of an instance's events, or of all, that are of interest.
async fn past(
    fleet: &mut Fleet,
    instance: &str,
    wanted: impl Fn(&FleetEvent) -> bool,
) -> Result<Vec<FleetEvent>, CtlError> {
    let mut events = fleet.events(0, false, instance).await?.last(usize::MAX).await?;
    events.retain(wanted);
    events.drain(..events.len().saturating_sub(EVENTS));
    Ok(events)
}

fn instance_page(
    name: &str,
    instance: Option<&Instance>,
    view: Option<&RoleView>,
    plan: Result<Option<InstancePlan>, CtlError>,
    past: Result<Vec<FleetEvent>, CtlError>,
    now: u64,
) -> String {
    let mut page = Page::default();
    page.fact("Name", name);
    match instance {
        Some(instance) => {
            spec_facts(&mut page, instance, now);
            beat_facts(&mut page, instance);
        }
        None => page.fact("Registered", "no: what follows is what is remembered of it"),
    }
    page.section("Role");
    match view {
        Some(view) => explain::role_facts(&mut page, view),
        None => page.text("none was ever given"),
    }
    match plan {
        Ok(Some(plan)) => explain::plan_facts(&mut page, &plan),
        Ok(None) => page.fact("Plan", "none counts with it"),
        Err(error) => page.fact("Plan", not_known(&error)),
    }
    past_section(&mut page, past);
    page.end()
}

fn spec_facts(page: &mut Page, instance: &Instance, now: u64) {
    let spec = instance.spec.clone().unwrap_or_default();
    page.fact("Group", &spec.group);
    page.fact("Device", format!("{}x{}", spec.device_count, spec.device));
    page.fact("Version", or_dash(&spec.version));
    page.fact("Incarnation", spec.incarnation.to_string());
    let (at, ago) = (time(instance.registered_unix_millis), since(instance.registered_unix_millis, now));
    page.fact("Registered", format!("{at}, {ago} ago"));
    page.facts("Labels", &instances::labels(instance));

    page.section("Endpoints");
    page.fact("Inference", or_dash(&spec.inference_endpoint));
    page.fact("Handoff", or_dash(&spec.handoff_endpoint));
    page.fact("Metrics", or_dash(&spec.metrics_endpoint));
    page.fact("Transports", or_dash(&spec.transports.join(", ")));

    let model = spec.model.unwrap_or_default();
    page.section("Model");
    page.fact("Name", &model.name);
    page.fact("Architecture", &model.architecture);
    page.fact("Revision", &model.revision);
    page.fact("Context", format!("{} tokens", model.context_tokens));
    page.fact("Vocabulary", format!("{} tokens", model.vocabulary_size));

    let layout = spec.kv_layout.unwrap_or_default();
    page.section("KV layout");
    page.fact("Fingerprint", &layout.fingerprint);
    page.fact("Format", format!("{} of {}", layout.format, layout.dtype));
    page.fact(
        "Block",
        format!(
            "{} tokens, {} bytes in each of {} layers",
            layout.block_tokens, layout.block_bytes, layout.layers
        ),
    );
    page.fact("Heads", format!("{} of {}", layout.kv_heads, layout.head_dim));
    page.fact("Tensor parallel", layout.tensor_parallel.to_string());
}

fn beat_facts(page: &mut Page, instance: &Instance) {
    let beat = instance.beat.unwrap_or_default();
    let load = beat.load.unwrap_or_default();
    page.section("Load");
    page.fact("Last beat", format!("{} ago", age(instance.last_beat_age_millis)));
    page.fact("Does", format!("{}, epoch {}, {}", role(beat.role), beat.role_epoch, doing(&beat)));
    let most = if load.max_sequences > 0 { format!(" of {}", load.max_sequences) } else { String::new() };
    page.fact(
        "Sequences",
        format!("{}{most} running, {} waiting", load.running_sequences, load.waiting_sequences),
    );
    page.fact("Prompts queued", format!("{} tokens", load.queued_prefill_tokens));
    let used = load.kv_blocks_total.saturating_sub(load.kv_blocks_free);
    page.fact("KV blocks", format!("{used} of {} in use", load.kv_blocks_total));
    page.fact("KV transfers", format!("{} out, {} in", load.outgoing_transfers, load.incoming_transfers));
    let speed = match load.prefill_tokens_per_second {
        0 => "-".to_owned(),
        speed => format!("{speed} tokens/s"),
    };
    page.fact("Prefill speed", speed);
    page.fact("Decode step", micros(load.decode_step_micros));
    page.fact("Prefilled", format!("{} prompts, {} tokens", load.prefilled_requests, load.prefilled_tokens));
    page.fact("Decoded", format!("{} tokens in {} steps", load.decoded_tokens, load.decode_steps));
    page.fact("Finished", format!("{} completions, {} tokens", load.finished_requests, load.finished_tokens));
}

fn group_page(
    plan: &GroupPlan,
    all: Result<ListLinksResponse, CtlError>,
    past: Result<Vec<FleetEvent>, CtlError>,
) -> String {
    let mut page = Page::default();
    page.text(&explain::group(plan, None));
    page.section("Links");
    match all {
        Ok(mut answer) => {
            let left_out = links::left_out(&answer);
            let is_here = |name: &String| plan.instances.iter().any(|plan| plan.instance_id == *name);
            answer.links.retain(|link| is_here(&link.prefill_instance) || is_here(&link.decode_instance));
            list(&mut page, &links::table(answer.links));
            left_out.into_iter().for_each(|text| page.text(&text));
        }
        Err(error) => page.text(&not_known(&error)),
    }
    past_section(&mut page, past);
    page.end()
}

fn coordinator_page(coordinator: &Coordinator, now: u64) -> String {
    let (spec, beat) =
        (coordinator.spec.clone().unwrap_or_default(), coordinator.beat.clone().unwrap_or_default());
    let mut page = Page::default();
    page.fact("Name", &spec.coordinator_id);
    page.fact("State", coordinators::state(coordinator));
    page.facts("Models", &spec.models.iter().map(served).collect::<Vec<_>>());
    page.fact("Version", or_dash(&spec.version));
    page.fact("Incarnation", spec.incarnation.to_string());
    let (at, ago) =
        (time(coordinator.registered_unix_millis), since(coordinator.registered_unix_millis, now));
    page.fact("Registered", format!("{at}, {ago} ago"));
    page.fact("Last beat", format!("{} ago", age(coordinator.last_beat_age_millis)));
    page.section("Endpoints");
    page.fact("HTTP", or_dash(&spec.http_endpoint));
    page.fact("Admin", or_dash(&spec.admin_endpoint));
    page.section("Requests");
    page.fact("Now", format!("{} running, {} queued", beat.running, beat.queued));
    page.fact("Since it started", format!("{}, of which {} failed", beat.requests, beat.failures));
    page.section("Links");
    let of_it = beat.links.into_iter().map(|link| Link {
        prefill_instance: link.prefill_instance,
        decode_instance: link.decode_instance,
        handoffs: link.handoffs,
        failures: link.failures,
        mean_micros: link.mean_micros,
        ..Link::default()
    });
    list(&mut page, &links::table(of_it.collect()));
    page.end()
}

/// The pages of an instance and of a coordinator, for a fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(super) fn fuzz_pages(instance: Option<&Instance>, coordinator: Option<&Coordinator>, now: u64) -> String {
    let instance = instance.map(|one| instance_page("a", Some(one), None, Ok(None), Ok(Vec::new()), now));
    let coordinator = coordinator.map(|one| coordinator_page(one, now));
    instance.into_iter().chain(coordinator).collect()
}

/// As in "small, also cheap (revision 5f1c)".
fn served(model: &ServedModel) -> String {
    format!("{} (revision {})", model.names.join(", also "), or_dash(&model.revision))
}

fn past_section(page: &mut Page, past: Result<Vec<FleetEvent>, CtlError>) {
    page.section("Last events");
    match past {
        Ok(past) => list(page, &events::table(&past)),
        Err(error) => page.text(&not_known(&error)),
    }
}

/// The roles of these instances, in a section of its own.
fn roles_section(page: &mut Page, title: &str, all: Result<Vec<RoleView>, CtlError>, of: &[&str]) {
    page.section(title);
    match all {
        Ok(mut views) => {
            views.retain(|view| of.contains(&view.instance_id.as_str()));
            list(page, &roles::table(views));
        }
        Err(error) => page.text(&not_known(&error)),
    }
}

fn list(page: &mut Page, table: &Table) {
    page.text(&table.text(Output::Table, true, false));
}

fn not_known(error: &CtlError) -> String {
    format!("not known: {}", one_line(error))
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::{Cordoned, Intent, Phase, Role, instance_plan::Step};

    use super::*;
    use crate::ctl::{
        coordinators::tests::coordinator,
        instances::tests::instance,
        plan::tests::{group, instance as plan},
        roles::tests::view,
    };

    fn assert_lines(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line:?} in\n{text}");
        }
    }

    #[test]
    fn an_instance_shows_intent_beside_observation_and_its_past() {
        let by_alice = Cordoned { by: "alice".into(), reason: "disk".into(), ..Default::default() };
        let intent = Intent { cordoned: Some(by_alice), ..Default::default() };
        let view = RoleView { intent: Some(intent), stuck: "does not answer".into(), ..view() };
        let waits = plan("server-0", Role::Decode, Role::None, Step::Waits);
        let event = FleetEvent {
            unix_millis: 1_000,
            kind: "cordoned".into(),
            instance_id: "server-0".into(),
            message: "disk".into(),
            ..Default::default()
        };
        let shown = instance("server-0", Phase::Ready);
        let text =
            instance_page("server-0", Some(&shown), Some(&view), Ok(Some(waits)), Ok(vec![event]), 61_001);
        assert_lines(
            &text,
            &[
                "Name:                server-0",
                "Registered:          1970-01-01T00:00:00Z, 61s ago",
                "Labels:              name=server-0",
                "                     zone=a",
                "  Inference:           127.0.0.1:9",
                "  KV blocks:           10 of 100 in use",
                "  Operators want:      cordoned by alice: disk",
                "  Stuck:               does not answer",
                "  Plan:                decode -> none (cordoned by alice: disk), waits for server-0 to be prefill",
                "  1970-01-01T00:00:01Z   cordoned   -       server-0   -    disk",
            ],
        );
    }

    #[test]
    fn what_is_gone_or_not_answered_is_said() {
        let failed = || CtlError::Usage("no answer");
        let text = instance_page("x", None, Some(&view()), Err(failed()), Err(failed()), 0);
        assert_lines(
            &text,
            &[
                "Registered:          no: what follows is what is remembered of it",
                "  Plan:                not known: no answer",
                "  not known: no answer",
            ],
        );
        assert!(!text.contains("KV layout"), "{text}");
    }

    #[test]
    fn a_group_shows_its_links_only() {
        let link = |from: &str, to: &str| Link {
            prefill_instance: from.into(),
            decode_instance: to.into(),
            ..Default::default()
        };
        let links = vec![link("server-0", "server-1"), link("else", "where")];
        let text = group_page(&group(), Ok(ListLinksResponse { links, left_out: 3 }), Ok(vec![]));
        assert!(text.contains("3 more links are left out"), "{text}");
        assert!(text.contains("  server-0   server-1") && !text.contains("where"), "{text}");
        assert_lines(&text, &["Group:               default", "Last events", "  no events"]);
    }

    #[test]
    fn a_coordinator_shows_what_it_carries() {
        let text = coordinator_page(&coordinator("c-0", "h:8001"), 4_000);
        assert_lines(
            &text,
            &[
                "  Admin:               h:8001",
                "Models:              small, also cheap (revision r)",
                "                     large (revision r)",
                "  Now:                 2 running, 0 queued",
                "  Since it started:    12, of which 0 failed",
            ],
        );
    }
}
