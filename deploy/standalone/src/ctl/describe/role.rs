//! `describe role`: what `explain role` knows, and what became of the role of late.

use baton_proto::v1::{FleetEvent, GroupPlan, RoleView};

use super::{CtlError, Fleet, explain, past, past_section};

/// Kinds of events that are about an instance's role.
const KINDS: [&str; 8] = [
    "role_decided",
    "role_taken",
    "instance_stuck",
    "instance_quarantined",
    "instance_released",
    "cordoned",
    "uncordoned",
    "pinned",
];

pub(super) async fn describe(name: &str, fleet: &mut Fleet) -> Result<String, CtlError> {
    let (view, plan) = explain::one_role(fleet, name).await?;
    let past = past(fleet, name, |event| KINDS.contains(&event.kind.as_str())).await;
    Ok(page(&view, plan.as_ref(), past))
}

fn page(view: &RoleView, plan: Option<&GroupPlan>, past: Result<Vec<FleetEvent>, CtlError>) -> String {
    let mut page = explain::role_page(view, plan);
    past_section(&mut page, past);
    page.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::{plan::tests::group, roles::tests::view};

    #[test]
    fn a_role_shows_why_and_what_became_of_it() {
        let event =
            FleetEvent { kind: "role_taken".into(), message: "is prefill".into(), ..Default::default() };
        let mut plan = group();
        plan.instances.truncate(1);
        let text = page(&view(), Some(&plan), Ok(vec![event]));
        assert!(
            text.starts_with("Instance:            server-0\nShould be:           prefill, epoch 7"),
            "{text}"
        );
        assert!(text.contains("Group:               default"), "{text}");
        assert!(text.ends_with("is prefill") && text.contains("\nLast events\n"), "{text}");
        let text = page(&view(), None, Err(CtlError::Usage("no answer")));
        assert!(text.contains("none counts with it") && text.ends_with("  not known: no answer"), "{text}");
    }
}
