//! `explain placement`: why a request went where it went. Asks every coordinator; the one that carries the request, or
//! has carried it, answers.

use baton_process::one_line;
use baton_proto::v1::{
    CandidateView, ExplainPlacementRequest, ExplainPlacementResponse, PlacementView,
    request_admin_client::RequestAdminClient,
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tonic::Code;

use super::{
    connect::{COORDINATOR, MAX_ANSWER_BYTES, Reach},
    error::CtlError,
    fleet::Fleet,
    output::{Column, Layout, Row},
    page::Page,
    requests::{AT_ONCE, Place, places, request_object},
    words::{age, millis},
};
use crate::screen::complain;

const CANDIDATES: &[Column] = &[
    Column::new("INSTANCE"),
    Column::new("PART"),
    Column::new("COST"),
    Column::new("TTFT"),
    Column::new("TPOT"),
    Column::new("TAKEN"),
    Column::new("CACHED"),
    Column::new("QUEUED"),
    Column::new("PREFILL"),
    Column::new("SEQUENCES"),
    Column::new("STEP"),
    Column::new("BLOCKS"),
];

/// The coordinator that knows the request, and what it says. Of several the one where the request came last.
pub(super) async fn find(
    fleet: &mut Fleet,
    request: &str,
) -> Result<(String, ExplainPlacementResponse), CtlError> {
    let places = places(fleet).await?;
    let reach = fleet.reach().clone();
    let asked = stream::iter(places).map(|place| {
        let reach = reach.clone();
        async move { (place.name.clone(), ask(&reach, &place, request).await) }
    });
    let answers: Vec<_> = asked.buffered(AT_ONCE).collect().await;
    let (mut found, mut silent) = (Vec::new(), Vec::new());
    for (name, answer) in answers {
        match answer {
            Ok(Some(answer)) => found.push((name, answer)),
            Ok(None) => {}
            Err(error) => silent.push(error),
        }
    }
    let arrived = |(_, answer): &(String, ExplainPlacementResponse)| {
        answer.request.as_ref().map_or(u64::MAX, |request| request.age_millis)
    };
    let last = found.into_iter().min_by_key(arrived);
    // Where nobody knows it, somebody who does not answer may.
    let unheard = silent.pop();
    silent.iter().for_each(|error| complain(&format!("not asked: {}", one_line(error))));
    match (last, unheard) {
        (Some(found), _) => Ok(found),
        (None, Some(error)) => Err(error),
        (None, None) => Err(CtlError::NoRequest(request.to_owned())),
    }
}

/// `None`: the coordinator does not know the request.
async fn ask(
    reach: &Reach,
    place: &Place,
    request: &str,
) -> Result<Option<ExplainPlacementResponse>, CtlError> {
    let line = reach.open(COORDINATOR, &place.address).await?;
    let mut client =
        RequestAdminClient::new(line.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
    let asked = ExplainPlacementRequest { request_id: request.to_owned() };
    match client.explain_placement(asked).await {
        Ok(answer) => Ok(Some(answer.into_inner())),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(line.refused(&status)),
    }
}

pub(super) fn page(coordinator: &str, answer: &ExplainPlacementResponse) -> String {
    let mut page = Page::default();
    facts(&mut page, coordinator, answer);
    sections(&mut page, answer);
    page.end()
}

/// What the request is.
pub(super) fn facts(page: &mut Page, coordinator: &str, answer: &ExplainPlacementResponse) {
    if let Some(request) = &answer.request {
        page.fact("Request", &request.request_id);
        page.fact("Model", &request.model);
        page.fact("Stage", &request.stage);
        page.fact("Came", format!("{} ago, to coordinator {coordinator}", age(request.age_millis)));
        if !request.error.is_empty() {
            page.fact("Error", &request.error);
        }
    }
    match (answer.left_out, answer.placements.is_empty()) {
        (_, true) if answer.request.as_ref().is_some_and(|request| request.stage == "ended") => {
            page.fact("Placed", "never");
        }
        (_, true) => page.fact("Placed", "not yet"),
        (0, false) => {}
        (left_out, false) => page.fact("Left out", format!("{left_out} earlier placements are not kept")),
    }
}

/// Each of its placements, and where it would go now if it waits.
pub(super) fn sections(page: &mut Page, answer: &ExplainPlacementResponse) {
    for placement in &answer.placements {
        page.section(&format!("Placed {} ago: {}", age(placement.age_millis), way_of(placement)));
        section(page, placement);
    }
    if let Some(waiting) = &answer.waiting {
        page.section(&format!("Waits: {}", waiting.because));
        match &waiting.place {
            Some(place) => {
                page.fact("Would go", way_of(place));
                section(page, place);
            }
            None => page.fact("Would go", "nowhere"),
        }
    }
}

fn section(page: &mut Page, placement: &PlacementView) {
    if !placement.because.is_empty() {
        page.fact("After", &placement.because);
    }
    if placement.waited_millis > 0 {
        page.fact("Waited", format!("{} in line", millis(placement.waited_millis as f64)));
    }
    let PlacementView { prompt_tokens, expected_tokens, choices, candidates, .. } = placement;
    let of_each = if *choices == 1 { String::new() } else { format!(" of each of {choices} choices") };
    page.fact("Reckoned with", format!("{prompt_tokens} prompt tokens, {expected_tokens} to come{of_each}"));
    if !placement.policy.is_empty() {
        page.fact("Policy", &placement.policy);
    }
    if placement.cost_micros > 0 {
        let cost = millis(placement.cost_micros as f64 / 1e3);
        let handoff = match placement.handoff_micros {
            0 => String::new(),
            micros => format!(", {} of it for the handoff", millis(micros as f64 / 1e3)),
        };
        page.fact("Cost", format!("{cost}{handoff}"));
    }
    if let Some(other) = &placement.runner_up {
        let (to, cost) = (way(&other.prefill_instance, &other.decode_instance), other.cost_micros);
        page.fact("Next best", format!("{to}, {}", millis(cost as f64 / 1e3)));
    }
    let left_aside = left_aside(placement);
    if !left_aside.is_empty() {
        page.fact("Left aside", left_aside);
    }
    page.fact("Candidates", format!("{candidates}; the cheapest for each part:"));
    let rows: Vec<Row> = placement.cheapest.iter().map(row).collect();
    page.text(&Layout::new(CANDIDATES, true).text(&rows, true));
}

fn way_of(placement: &PlacementView) -> String {
    way(&placement.prefill_instance, &placement.decode_instance)
}

fn way(prefill: &str, decode: &str) -> String {
    match prefill == decode {
        true => format!("all of it on {prefill}"),
        false => format!("prefill on {prefill}, decode on {decode}"),
    }
}

/// Who runs the model and was left aside: how many, and why.
fn left_aside(placement: &PlacementView) -> String {
    let reasons = [
        (placement.away, "not ready"),
        (placement.avoided, "avoided after failures"),
        (placement.full, "with a full queue"),
        (placement.too_small, "too small"),
    ];
    let told = reasons.iter().filter(|(many, _)| *many > 0);
    told.map(|(many, why)| format!("{many} {why}")).collect::<Vec<_>>().join(", ")
}

fn row(candidate: &CandidateView) -> Row {
    let measured = |value: u64, unit: &str| match value {
        0 => "not measured".to_owned(),
        value => format!("{value}{unit}"),
    };
    let predicted = |micros: u64| if micros == 0 { "-".to_owned() } else { millis(micros as f64 / 1e3) };
    let blocks = match candidate.kv_blocks_free {
        Some(free) => format!("{} of {free} free", candidate.kv_blocks_wanted),
        None => format!("{} of not known", candidate.kv_blocks_wanted),
    };
    let cells = vec![
        candidate.instance_id.clone(),
        candidate.part.clone(),
        millis(candidate.cost_micros as f64 / 1e3),
        predicted(candidate.ttft_micros),
        predicted(candidate.tpot_micros),
        if candidate.taken { "yes" } else { "-" }.to_owned(),
        format!("{} tokens", candidate.cached_tokens),
        format!("{} tokens", candidate.queued_prefill_tokens),
        measured(candidate.prefill_tokens_per_second, " tokens/s"),
        candidate.sequences.to_string(),
        match candidate.decode_step_micros {
            0 => "not measured".to_owned(),
            micros => millis(micros as f64 / 1e3),
        },
        blocks,
    ];
    Row { key: candidate.instance_id.clone(), names: Vec::new(), cells, object: Value::Null }
}

pub(super) fn object(coordinator: &str, answer: &ExplainPlacementResponse) -> Value {
    json!({
        "request": answer.request.as_ref().map(|request| request_object(coordinator, request)),
        "left_out": answer.left_out,
        "placements": answer.placements.iter().map(placement_object).collect::<Vec<_>>(),
        "waiting": answer.waiting.as_ref().map(|waiting| json!({
            "because": waiting.because,
            "place": waiting.place.as_ref().map(placement_object),
        })),
    })
}

fn placement_object(placement: &PlacementView) -> Value {
    json!({
        "age_millis": placement.age_millis,
        "because": placement.because,
        "waited_millis": placement.waited_millis,
        "prefill_instance": placement.prefill_instance,
        "decode_instance": placement.decode_instance,
        "prompt_tokens": placement.prompt_tokens,
        "expected_tokens": placement.expected_tokens,
        "choices": placement.choices,
        "candidates": placement.candidates,
        "policy": placement.policy,
        "cost_micros": placement.cost_micros,
        "handoff_micros": placement.handoff_micros,
        "runner_up": placement.runner_up.as_ref().map(|other| json!({
            "prefill_instance": other.prefill_instance,
            "decode_instance": other.decode_instance,
            "cost_micros": other.cost_micros,
        })),
        "left_aside": {
            "away": placement.away,
            "avoided": placement.avoided,
            "full": placement.full,
            "too_small": placement.too_small,
        },
        "cheapest": placement.cheapest.iter().map(candidate_object).collect::<Vec<_>>(),
    })
}

fn candidate_object(candidate: &CandidateView) -> Value {
    json!({
        "instance_id": candidate.instance_id,
        "part": candidate.part,
        "cost_micros": candidate.cost_micros,
        "taken": candidate.taken,
        "queued_prefill_tokens": candidate.queued_prefill_tokens,
        "prefill_tokens_per_second": candidate.prefill_tokens_per_second,
        "sequences": candidate.sequences,
        "decode_step_micros": candidate.decode_step_micros,
        "kv_blocks_free": candidate.kv_blocks_free,
        "kv_blocks_wanted": candidate.kv_blocks_wanted,
        "cached_tokens": candidate.cached_tokens,
        "ttft_micros": candidate.ttft_micros,
        "tpot_micros": candidate.tpot_micros,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use baton_proto::v1::{RequestView, RunnerUpView, WaitingView};

    use super::*;

    /// Of a request that was placed twice.
    pub(in crate::ctl) fn answer(request: &str) -> ExplainPlacementResponse {
        let candidate = |name: &str, part: &str, taken| CandidateView {
            instance_id: name.into(),
            part: part.into(),
            cost_micros: 12_500,
            taken,
            queued_prefill_tokens: 300,
            sequences: 2,
            decode_step_micros: 8_000,
            kv_blocks_free: Some(90),
            kv_blocks_wanted: 5,
            cached_tokens: 32,
            ttft_micros: if part == "prefill" { 20_000 } else { 0 },
            tpot_micros: if part == "decode" { 9_000 } else { 0 },
            ..Default::default()
        };
        let placement = |because: &str| PlacementView {
            age_millis: 1_500,
            because: because.into(),
            prefill_instance: "server-0".into(),
            decode_instance: "server-1".into(),
            prompt_tokens: 40,
            expected_tokens: 16,
            choices: 1,
            candidates: 3,
            policy: "predicted".into(),
            waited_millis: if because.is_empty() { 40 } else { 0 },
            cost_micros: 25_400,
            handoff_micros: 400,
            runner_up: Some(RunnerUpView {
                prefill_instance: "server-0".into(),
                decode_instance: "server-2".into(),
                cost_micros: 31_000,
            }),
            away: 1,
            full: 2,
            avoided: 0,
            too_small: 0,
            cheapest: vec![
                candidate("server-0", "prefill", true),
                candidate("server-1", "decode", true),
                candidate("server-2", "decode", false),
            ],
        };
        let view = RequestView {
            request_id: request.into(),
            model: "m".into(),
            stage: "decode".into(),
            age_millis: 2_000,
            ..Default::default()
        };
        let placements = vec![placement(""), placement("instance server-3 is lost")];
        ExplainPlacementResponse { request: Some(view), placements, left_out: 0, waiting: None }
    }

    #[test]
    fn a_placement_shows_who_could_have_taken_it_and_at_which_cost() {
        let text = page("c-0", &answer("r-1"));
        for line in [
            "Came:                2.0s ago, to coordinator c-0",
            "Placed 1.5s ago: prefill on server-0, decode on server-1",
            "  Cost:                25.4ms, 0.40ms of it for the handoff",
            "  Next best:           prefill on server-0, decode on server-2, 31.0ms",
            "  Left aside:          1 not ready, 2 with a full queue",
            "  After:               instance server-3 is lost",
            "  Waited:              40.0ms in line",
            "  Reckoned with:       40 prompt tokens, 16 to come",
            "  Policy:              predicted",
            "  Candidates:          3; the cheapest for each part:",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        let row = text.lines().find(|line| line.trim_start().starts_with("server-2")).expect("a row");
        let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        let expected = [
            "server-2",
            "decode",
            "12.5ms",
            "-",
            "9.00ms",
            "-",
            "32 tokens",
            "300 tokens",
            "not measured",
            "2",
            "8.00ms",
            "5 of 90 free",
        ];
        assert_eq!(cells, expected);
        assert_eq!(object("c-0", &answer("r-1"))["placements"][1]["cheapest"][2]["taken"], false);
    }

    #[test]
    fn what_is_not_placed_or_not_kept_is_said() {
        let mut few = answer("r-1");
        few.left_out = 3;
        assert!(page("c", &few).contains("3 earlier placements are not kept"));
        let place = few.placements.pop();
        few.placements.clear();
        assert!(page("c", &few).contains("not yet"));
        few.waiting = Some(WaitingView { because: "no instance has room for it".into(), place });
        let text = page("c", &few);
        assert!(text.contains("Waits: no instance has room for it"), "{text}");
        assert!(text.contains("prefill on server-0, decode on server-1"), "{text}");
        assert_eq!(object("c", &few)["waiting"]["place"]["candidates"], 3);
        few.waiting = Some(WaitingView::default());
        assert!(page("c", &few).contains("nowhere"));
        few.waiting = None;
        let request = few.request.as_mut().expect("named");
        (request.stage, request.error) = ("ended".into(), "model `m`: all instances are busy".into());
        let text = page("c", &few);
        assert!(text.contains("all instances are busy") && text.contains("never"), "{text}");
    }
}
