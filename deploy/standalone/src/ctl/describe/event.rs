//! `describe event`: one event, those before and after it that concern the same instance or group, and what the instance
//! is now.

use baton_proto::v1::{FleetEvent, RoleView};

use super::{CtlError, Fleet, Page, events, list, now_unix_millis, or_dash, roles_section, since, time};

/// Events shown before it, and after it.
const AROUND: usize = 5;

pub(super) async fn describe(sequence: u64, fleet: &mut Fleet) -> Result<String, CtlError> {
    let all = fleet.events(0, false, "").await?.last(usize::MAX).await?;
    let Some(at) = all.iter().position(|event| event.sequence == sequence) else {
        let held = all.first().zip(all.last()).map(|(first, last)| (first.sequence, last.sequence));
        return Err(CtlError::NoEvent { sequence, held });
    };
    let roles = match all[at].instance_id.is_empty() {
        true => None,
        false => Some(fleet.roles().await),
    };
    Ok(page(&all[at], &around(&all, at), roles, now_unix_millis()))
}

/// Itself among those that concern the same instance, or without one the same group; without either, among all.
fn around(all: &[FleetEvent], at: usize) -> Vec<FleetEvent> {
    let FleetEvent { instance_id, group, .. } = &all[at];
    let near = |event: &&FleetEvent| match (instance_id.is_empty(), group.is_empty()) {
        (false, _) => event.instance_id == *instance_id,
        (true, false) => event.group == *group,
        (true, true) => true,
    };
    let mut before: Vec<_> = all[..at].iter().rev().filter(near).take(AROUND).cloned().collect();
    before.reverse();
    let after = all[at + 1..].iter().filter(near).take(AROUND).cloned();
    before.into_iter().chain([all[at].clone()]).chain(after).collect()
}

fn page(
    event: &FleetEvent,
    around: &[FleetEvent],
    roles: Option<Result<Vec<RoleView>, CtlError>>,
    now: u64,
) -> String {
    let mut page = Page::default();
    page.fact("Event", event.sequence.to_string());
    page.fact("Time", format!("{}, {} ago", time(event.unix_millis), since(event.unix_millis, now)));
    page.fact("Kind", &event.kind);
    page.fact("Group", or_dash(&event.group));
    page.fact("Instance", or_dash(&event.instance_id));
    let itself = "the controller itself".to_owned();
    page.fact("By", if event.actor.is_empty() { itself } else { event.actor.clone() });
    page.fact("Message", or_dash(&event.message));
    page.section("With what came before and after it");
    list(&mut page, &events::table(around));
    if let Some(roles) = roles {
        roles_section(&mut page, "Its instance now", roles, &[&event.instance_id]);
    }
    page.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::roles::tests::view;

    fn event(sequence: u64, instance: &str, group: &str) -> FleetEvent {
        FleetEvent {
            sequence,
            unix_millis: 1_000,
            kind: "role_taken".into(),
            instance_id: instance.into(),
            group: group.into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_event_stands_among_those_of_its_instance() {
        let mut all: Vec<_> = (0..20).map(|n| event(n, "server-0", "g")).collect();
        all.insert(10, event(99, "server-1", "g"));
        let numbers = |at| around(&all, at).iter().map(|event| event.sequence).collect::<Vec<_>>();
        assert_eq!(numbers(11), [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(numbers(0), [0, 1, 2, 3, 4, 5]);
        assert_eq!(numbers(10), [99], "of the other instance there is one");
        let groups = [event(1, "", "g"), event(2, "", "h"), event(3, "", "g"), event(4, "", "")];
        let numbers = |at| around(&groups, at).iter().map(|event| event.sequence).collect::<Vec<_>>();
        assert_eq!((numbers(0), numbers(3)), (vec![1, 3], vec![1, 2, 3, 4]));
    }

    #[test]
    fn an_event_shows_who_and_what_the_instance_is_now() {
        let it = FleetEvent { actor: "alice".into(), message: "disk".into(), ..event(7, "server-0", "") };
        let text = page(&it, std::slice::from_ref(&it), Some(Ok(vec![view()])), 61_000);
        for line in [
            "Event:               7",
            "Time:                1970-01-01T00:00:01Z, 60s ago",
            "By:                  alice",
            "Message:             disk",
            "Its instance now",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} in\n{text}");
        }
        assert!(text.contains("fixed ratio 1:1"), "{text}");
        let text = page(&event(8, "", "g"), &[], None, 61_000);
        assert!(text.contains("the controller itself") && !text.contains("instance now"), "{text}");
    }
}
