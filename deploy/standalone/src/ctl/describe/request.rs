//! `describe request`: how far it has come, the instances that work at it and the link between them, and what
//! `explain placement` knows.

use baton_proto::v1::{ExplainPlacementResponse, Link, RoleView};

use super::{CtlError, Fleet, Page, links, list, not_known, placement, roles_section};

pub(super) async fn describe(id: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let (coordinator, answer) = placement::find(fleet, id).await?;
    let is_placed = answer.request.as_ref().is_some_and(|request| !request.decode_instance.is_empty());
    let around = match is_placed {
        true => Some((fleet.roles().await, fleet.links().await.map(|answer| answer.links))),
        false => None,
    };
    Ok(page(&coordinator, &answer, around))
}

/// Roles and links, as far as they are answered; none of a request that is nowhere yet.
type Around = (Result<Vec<RoleView>, CtlError>, Result<Vec<Link>, CtlError>);

fn page(coordinator: &str, answer: &ExplainPlacementResponse, around: Option<Around>) -> String {
    let mut page = Page::default();
    placement::facts(&mut page, coordinator, answer);
    let request = answer.request.clone().unwrap_or_default();
    let (prefill, decode) = (request.prefill_instance.as_str(), request.decode_instance.as_str());
    page.fact("Prompt", format!("{} tokens", request.prompt_tokens));
    page.fact("Generated", format!("{} tokens", request.completion_tokens));
    if let Some((roles, all)) = around {
        roles_section(&mut page, "Its instances now", roles, &[prefill, decode]);
        if prefill != decode {
            page.section("The link between them");
            match all {
                Ok(mut all) => {
                    all.retain(|link| link.prefill_instance == prefill && link.decode_instance == decode);
                    list(&mut page, &links::table(all));
                }
                Err(error) => page.text(&not_known(&error)),
            }
        }
    }
    placement::sections(&mut page, answer);
    page.end()
}

#[cfg(test)]
mod tests {
    use baton_proto::v1::RequestView;

    use super::*;
    use crate::ctl::{placement::tests::answer, roles::tests::view};

    fn placed() -> ExplainPlacementResponse {
        let mut answer = answer("r-1");
        let request = answer.request.take().unwrap_or_default();
        answer.request = Some(RequestView {
            prefill_instance: "server-0".into(),
            decode_instance: "server-1".into(),
            prompt_tokens: 40,
            completion_tokens: 7,
            ..request
        });
        answer
    }

    #[test]
    fn a_request_shows_where_it_is_and_why() {
        let link = |from: &str, to: &str| Link {
            prefill_instance: from.into(),
            decode_instance: to.into(),
            handoffs: 12,
            ..Default::default()
        };
        let links = vec![link("server-0", "server-1"), link("server-0", "server-9")];
        let other = RoleView { instance_id: "server-7".into(), ..view() };
        let text = page("c-0", &placed(), Some((Ok(vec![view(), other]), Ok(links))));
        for line in [
            "Request:             r-1",
            "Came:                2.0s ago, to coordinator c-0",
            "Prompt:              40 tokens",
            "Generated:           7 tokens",
            "Its instances now",
            "The link between them",
            "Placed 1.5s ago: prefill on server-0, decode on server-1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(text.contains("fixed ratio 1:1") && !text.contains("server-7"), "{text}");
        assert!(text.contains("  server-0   server-1   12") && !text.contains("server-9"), "{text}");
    }

    #[test]
    fn what_is_nowhere_yet_or_not_answered_is_said() {
        let mut waits = answer("r-1");
        waits.placements.clear();
        let text = page("c-0", &waits, None);
        assert!(text.contains("not yet") && !text.contains("instances now"), "{text}");
        let failed = || CtlError::Usage("no answer");
        let text = page("c-0", &placed(), Some((Err(failed()), Err(failed()))));
        assert_eq!(text.matches("  not known: no answer").count(), 2, "{text}");
    }
}
