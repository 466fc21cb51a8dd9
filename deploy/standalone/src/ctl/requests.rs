//! `get requests`: what the coordinators carry. Asks every coordinator that the controller lists, at once, and shows
//! those that answer; the others are named on standard error.

use baton_process::one_line;
use baton_proto::v1::{ListRequestsRequest, RequestView, request_admin_client::RequestAdminClient};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::{
    connect::{COORDINATOR, MAX_ANSWER_BYTES, Reach},
    coordinators,
    error::CtlError,
    fleet::Fleet,
    output::{Column, Row, Table},
    words::{age, or_dash},
};
use crate::screen::complain;

/// Coordinators asked at a time.
pub(super) const AT_ONCE: usize = 32;

const COLUMNS: &[Column] = &[
    Column::new("REQUEST"),
    Column::new("MODEL"),
    Column::new("STAGE"),
    Column::new("PREFILL"),
    Column::new("DECODE"),
    Column::new("PROMPT"),
    Column::new("GENERATED"),
    Column::new("AGE").passing(),
    Column::wide("COORDINATOR"),
    Column::wide("API KEY"),
];

/// A coordinator and where it is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: String,
    pub(super) address: String,
}

/// What of the coordinators answers. An error only if none of them does.
pub(super) async fn list(fleet: &mut Fleet) -> Result<Table, CtlError> {
    let places = places(fleet).await?;
    let reach = fleet.reach().clone();
    let asked = stream::iter(places).map(|place| {
        let reach = reach.clone();
        async move { (place.name.clone(), ask(&reach, &place).await) }
    });
    let answers: Vec<_> = asked.buffered(AT_ONCE).collect().await;
    let (mut found, mut failure, mut answered) = (Vec::new(), None, false);
    for (name, answer) in answers {
        match answer {
            Ok(requests) => {
                answered = true;
                found.extend(requests.into_iter().map(|request| (name.clone(), request)));
            }
            Err(error) => {
                // The last one ends the command if there is nothing else to show.
                if let Some(earlier) = failure.replace(error) {
                    complain(&format!("not shown: {}", one_line(&earlier)));
                }
            }
        }
    }
    match failure {
        Some(error) if !answered => return Err(error),
        Some(error) => complain(&format!("not shown: {}", one_line(&error))),
        None => {}
    }
    Ok(table(&found))
}

/// Those that were named; those that the controller knows; the one of the cluster that runs here.
pub(super) async fn places(fleet: &mut Fleet) -> Result<Vec<Place>, CtlError> {
    let named = fleet.reach().coordinators();
    if !named.is_empty() {
        let place = |address: &String| Place { name: address.clone(), address: address.clone() };
        return Ok(named.iter().map(place).collect());
    }
    let listed = fleet.coordinators().await;
    let scheme = if fleet.is_secure() { "https://" } else { "" };
    let places: Vec<Place> = listed
        .iter()
        .flatten()
        .filter_map(|coordinator| {
            let address = &coordinator.spec.as_ref()?.admin_endpoint;
            let place = Place {
                name: coordinators::id(coordinator).to_owned(),
                address: format!("{scheme}{address}"),
            };
            (!address.is_empty()).then_some(place)
        })
        .collect();
    if !places.is_empty() {
        return Ok(places);
    }
    match (fleet.reach().coordinator_here(), listed) {
        (Some(address), _) => Ok(vec![Place { name: address.clone(), address }]),
        (None, Err(error)) => Err(error),
        // Asked, and there are none.
        (None, Ok(_)) => Ok(Vec::new()),
    }
}

async fn ask(reach: &Reach, place: &Place) -> Result<Vec<RequestView>, CtlError> {
    let line = reach.open(COORDINATOR, &place.address).await?;
    let mut client =
        RequestAdminClient::new(line.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
    let answer = client.list_requests(ListRequestsRequest {}).await;
    answer.map(|answer| answer.into_inner().requests).map_err(|status| line.refused(&status))
}

pub(super) fn table(requests: &[(String, RequestView)]) -> Table {
    Table {
        kind: "request",
        nothing: "no requests are running",
        columns: COLUMNS,
        rows: requests.iter().map(|(coordinator, view)| row(coordinator, view)).collect(),
    }
}

fn row(coordinator: &str, view: &RequestView) -> Row {
    let cells = vec![
        view.request_id.clone(),
        view.model.clone(),
        view.stage.clone(),
        or_dash(&view.prefill_instance),
        or_dash(&view.decode_instance),
        view.prompt_tokens.to_string(),
        view.completion_tokens.to_string(),
        age(view.age_millis),
        coordinator.to_owned(),
        or_dash(&view.api_key),
    ];
    Row {
        key: view.request_id.clone(),
        names: vec![view.request_id.clone()],
        cells,
        object: request_object(coordinator, view),
    }
}

pub(super) fn request_object(coordinator: &str, view: &RequestView) -> Value {
    json!({
        "request_id": view.request_id,
        "coordinator": coordinator,
        "model": view.model,
        "stage": view.stage,
        "prefill_instance": view.prefill_instance,
        "decode_instance": view.decode_instance,
        "prompt_tokens": view.prompt_tokens,
        "completion_tokens": view.completion_tokens,
        "age_millis": view.age_millis,
        "api_key": view.api_key,
        "error": view.error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::output::Output;

    #[test]
    fn nothing_is_said_in_words_and_as_an_empty_list() {
        let table = table(&[]);
        assert_eq!(table.text(Output::Table, true, false), "no requests are running");
        assert_eq!(table.text(Output::Json, true, false), "[]");
    }

    #[test]
    fn a_request_says_where_it_is() {
        let view = RequestView {
            request_id: "r".into(),
            model: "m".into(),
            stage: "decode".into(),
            decode_instance: "server-1".into(),
            prompt_tokens: 5,
            completion_tokens: 7,
            age_millis: 1_500,
            ..Default::default()
        };
        let table = table(&[("c-0".into(), view)]);
        assert_eq!(table.rows[0].cells, ["r", "m", "decode", "-", "server-1", "5", "7", "1.5s", "c-0", "-"]);
        assert_eq!(table.rows[0].object["coordinator"], "c-0");
    }
}
