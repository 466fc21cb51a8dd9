//! `describe link`: how KV caches travel from one instance to another, over all coordinators and for each of them, what
//! its ends are now, and when it was degraded.

use baton_proto::v1::{Coordinator, FleetEvent, Link, RoleView};
use serde_json::Value;

use super::{
    CtlError, Fleet, Page, coordinators, links, list, micros, not_known, past, past_section, roles_section,
};
use crate::{
    ctl::output::{Column, Row, Table},
    screen::complain,
};

const SHARES: &[Column] =
    &[Column::new("COORDINATOR"), Column::new("HANDOFFS"), Column::new("FAILURES"), Column::new("MEAN")];

pub(super) async fn describe(prefill: &str, decode: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let answer = fleet.links().await?;
    let is = |link: &&Link| link.prefill_instance == prefill && link.decode_instance == decode;
    let Some(link) = answer.links.iter().find(is) else {
        // It may be among those.
        links::left_out(&answer).into_iter().for_each(|text| complain(&text));
        let name = format!("{prefill} -> {decode}");
        let known = answer.links.iter().map(links::name).collect();
        return Err(CtlError::Unknown { kind: "link", name, known });
    };
    let (coordinators, roles) = (fleet.coordinators().await, fleet.roles().await);
    // Entered for the instance at its beginning, with its name in front.
    let begins = format!("{}: ", links::name(link));
    let of_it = |event: &FleetEvent| event.kind.starts_with("link_") && event.message.starts_with(&begins);
    let past = past(fleet, prefill, of_it).await;
    Ok(page(link, coordinators, roles, past))
}

fn page(
    link: &Link,
    coordinators: Result<Vec<Coordinator>, CtlError>,
    roles: Result<Vec<RoleView>, CtlError>,
    past: Result<Vec<FleetEvent>, CtlError>,
) -> String {
    let mut page = Page::default();
    page.fact("Prefill", &link.prefill_instance);
    page.fact("Decode", &link.decode_instance);
    page.fact("Handoffs", format!("{}, and {} that failed", link.handoffs, link.failures));
    page.fact("Failed", links::failed(link));
    page.fact("Mean", micros(link.mean_micros));
    page.fact("Health", links::health(link));
    page.section("By coordinator, since it started");
    match coordinators {
        Ok(all) => list(&mut page, &shares(link, &all)),
        Err(error) => page.text(&not_known(&error)),
    }
    let ends = [link.prefill_instance.as_str(), link.decode_instance.as_str()];
    roles_section(&mut page, "Its ends now", roles, &ends);
    past_section(&mut page, past);
    page.end()
}

/// What each coordinator has seen of it.
fn shares(link: &Link, all: &[Coordinator]) -> Table {
    let of = |coordinator: &Coordinator| {
        let links = coordinator.beat.as_ref()?.links.iter();
        let mut same = links.filter(|beat| {
            beat.prefill_instance == link.prefill_instance && beat.decode_instance == link.decode_instance
        });
        let beat = same.next()?;
        let name = coordinators::id(coordinator).to_owned();
        let cells = vec![
            name.clone(),
            beat.handoffs.to_string(),
            beat.failures.to_string(),
            micros(beat.mean_micros),
        ];
        Some(Row { key: name.clone(), names: vec![name], cells, object: Value::Null })
    };
    let nothing = "no coordinator that is there now has used it";
    Table { kind: "coordinator", nothing, columns: SHARES, rows: all.iter().filter_map(of).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::{coordinators::tests::coordinator, roles::tests::view};

    #[test]
    fn a_link_shows_who_used_it_its_ends_and_its_past() {
        let link = Link {
            prefill_instance: "server-0".into(),
            decode_instance: "server-1".into(),
            handoffs: 6,
            failures: 2,
            mean_micros: 12_345,
            degraded: true,
            failing: 0.4,
        };
        let mut used = coordinator("c-0", "h:8001");
        let beat = &mut used.beat.as_mut().unwrap().links[0];
        (beat.prefill_instance, beat.decode_instance) = ("server-0".into(), "server-1".into());
        let all = vec![used, coordinator("c-1", "h:8002")];
        let event = FleetEvent { kind: "link_degraded".into(), ..Default::default() };
        let text = page(&link, Ok(all), Ok(vec![view()]), Ok(vec![event]));
        for line in [
            "Handoffs:            6, and 2 that failed",
            "Failed:              25.0%",
            "Mean:                12.3ms",
            "Health:              degraded: 40 % fail of late",
            "By coordinator, since it started",
            "Its ends now",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(text.contains("  c-0           4") && !text.contains("c-1"), "{text}");
        assert!(text.contains("link_degraded") && text.contains("fixed ratio 1:1"), "{text}");
        let failed = || CtlError::Usage("no answer");
        let text = page(&link, Err(failed()), Err(failed()), Err(failed()));
        assert_eq!(text.matches("  not known: no answer").count(), 3, "{text}");
        assert!(page(&link, Ok(vec![]), Ok(vec![]), Ok(vec![])).contains("no coordinator that is there now"));
    }
}
