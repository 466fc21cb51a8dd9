//! `drain`: a cordon with a deadline, and then the wait until the instance takes no requests and runs none.

use std::{fmt::Write, time::Duration};

use baton_process::duration;
use baton_process::one_line;
use baton_proto::v1::{Instance, InstancePlan, Phase, Role, RoleView, instance_plan::Step};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::{
    change::{Cordoning, ask_cordon, show},
    error::CtlError,
    fleet::Fleet,
    instances,
    output::{Output, visible},
    targets::wire_millis,
    words::{phase, role},
};
use crate::screen::{Screen, complain, say};

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// How long an instance must be missing to count as gone: after a change of leader it may not be registered yet.
const MISSING: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, clap::Args)]
pub(super) struct DrainArgs {
    #[command(flatten)]
    what: Cordoning,

    /// How long its running requests may take; then they go on elsewhere [default: as for any change of role].
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    within: Option<Duration>,

    /// How long to wait here. The instance stays cordoned either way.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, default_value = "5m")]
    timeout: Duration,
}

pub(super) async fn run(args: DrainArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let drain_millis = args.within.map_or(Ok(0), wire_millis)?;
    let answer = ask_cordon(&args.what, drain_millis, fleet).await?;
    show(&answer, Some(&args.what.name), Output::Table);
    if answer.dry_run {
        return Ok(());
    }
    let name = args.what.name;
    let mut told = Told::new(&name);
    let begin = Instant::now();
    let mut last_seen = begin;
    loop {
        let seen = look(fleet, &name).await;
        let text = match &seen {
            Ok(seen) => {
                if seen.role.is_some() {
                    last_seen = Instant::now();
                }
                if seen.is_drained() || (seen.role.is_none() && last_seen.elapsed() >= MISSING) {
                    told.end();
                    say(&format!("{name}: {}", if seen.role.is_some() { "drained" } else { "has left" }));
                    return Ok(());
                }
                seen.words()
            }
            // Its drain goes on without the controller, and so does the wait.
            Err(error) => one_line(error),
        };
        told.say(&text);
        if begin.elapsed() >= args.timeout {
            told.end();
            return Err(CtlError::TookTooLong {
                what: format!("{name}: {text}"),
                after: duration::format(args.timeout),
                advice: format!(
                    "it stays cordoned; wait on with the same command, or take it back in with `baton ctl uncordon {name}`"
                ),
            });
        }
        tokio::time::sleep(EVERY.min(args.timeout.saturating_sub(begin.elapsed()))).await;
    }
}

async fn look(fleet: &mut Fleet, name: &str) -> Result<Seen, CtlError> {
    let role = fleet.roles().await?.into_iter().find(|view| view.instance_id == name && view.registered);
    let instances = fleet.instances().await?;
    let instance = instances.into_iter().find(|instance| instances::id(instance) == name);
    let group = instance.iter().find_map(|instance| instance.spec.as_ref()).map(|spec| spec.group.clone());
    // Only the reason of a wait would be missing.
    let plans = match group {
        Some(group) => fleet.plans(&group, None).await.unwrap_or_default(),
        None => Vec::new(),
    };
    let plan = plans.into_iter().flat_map(|plan| plan.instances).find(|plan| plan.instance_id == name);
    Ok(Seen { role, instance, plan })
}

/// What is known of the instance now.
#[derive(Debug, Default)]
struct Seen {
    /// Absent if it is not registered.
    role: Option<RoleView>,
    instance: Option<Instance>,
    plan: Option<InstancePlan>,
}

impl Seen {
    /// Legs and transfers, both of which want its memory.
    fn busy(&self) -> Option<(u32, u32)> {
        let load = self.instance.as_ref()?.beat.as_ref()?.load?;
        Some((
            load.running_sequences.saturating_add(load.waiting_sequences),
            load.outgoing_transfers.saturating_add(load.incoming_transfers),
        ))
    }

    /// An instance that never had a role takes no requests either.
    fn is_drained(&self) -> bool {
        let Some(role) = &self.role else { return false };
        let idle = matches!(role.observed_role(), Role::None | Role::Unspecified);
        let settled = !matches!(role.phase(), Phase::Draining | Phase::Switching);
        let wanted = matches!(role.desired_role(), Role::None | Role::Unspecified);
        wanted && idle && settled && self.busy() == Some((0, 0))
    }

    fn words(&self) -> String {
        let Some(view) = &self.role else { return "is not registered".to_owned() };
        let mut text = format!("{}, {}", role(view.observed_role), phase(view.phase));
        if let Some((legs, transfers)) = self.busy() {
            let _ = write!(text, ", {legs} running");
            if transfers > 0 {
                let _ = write!(text, ", {transfers} KV caches under way");
            }
        }
        if !view.stuck.is_empty() {
            let _ = write!(text, "; stuck: {}", view.stuck);
        }
        if let Some(plan) = self.plan.as_ref().filter(|plan| plan.step() == Step::Waits) {
            let _ = write!(text, "; waits for {}", plan.waits_for);
        }
        visible(&text)
    }
}

/// Progress: one line that changes on a terminal, a line for each change elsewhere.
#[derive(Debug)]
struct Told {
    name: String,
    bar: Option<ProgressBar>,
    last: String,
}

impl Told {
    fn new(name: &str) -> Self {
        let bar = Screen::new().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            let style = ProgressStyle::with_template("{spinner} {prefix}: {msg} ({elapsed})");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self { name: name.to_owned(), bar, last: String::new() }
    }

    fn say(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(text.to_owned()),
            None if self.last != text => complain(&format!("{}: {text}", self.name)),
            None => {}
        }
        text.clone_into(&mut self.last);
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::{instances::tests::instance, plan::tests::instance as plan, roles::tests::view};

    fn seen(role: Role, phase: Phase, running: u32) -> Seen {
        let mut instance = instance("server-0", phase);
        let load = instance.beat.as_mut().unwrap().load.as_mut().unwrap();
        load.running_sequences = running;
        let view = RoleView {
            desired_role: Role::None.into(),
            observed_role: role.into(),
            phase: phase.into(),
            ..view()
        };
        Seen { role: Some(view), instance: Some(instance), plan: None }
    }

    #[test]
    fn drained_is_who_takes_none_and_runs_none() {
        assert!(seen(Role::None, Phase::Ready, 0).is_drained());
        assert!(seen(Role::Unspecified, Phase::Waiting, 0).is_drained());
        for other in [
            seen(Role::None, Phase::Ready, 1),
            seen(Role::None, Phase::Switching, 0),
            seen(Role::Decode, Phase::Draining, 0),
            seen(Role::Decode, Phase::Ready, 0),
            Seen { instance: None, ..seen(Role::None, Phase::Ready, 0) },
            Seen::default(),
        ] {
            assert!(!other.is_drained(), "{other:?}");
        }
        let mut kept = seen(Role::None, Phase::Ready, 0);
        kept.role.as_mut().unwrap().desired_role = Role::Decode.into();
        assert!(!kept.is_drained(), "it is on its way back");
    }

    #[test]
    fn progress_says_what_is_waited_for() {
        let mut busy = seen(Role::Decode, Phase::Draining, 3);
        busy.instance.as_mut().unwrap().beat.as_mut().unwrap().load.as_mut().unwrap().incoming_transfers = 2;
        assert_eq!(busy.words(), "decode, draining, 3 running, 2 KV caches under way");
        let mut waits = seen(Role::Decode, Phase::Ready, 1);
        waits.plan = Some(plan("server-0", Role::Decode, Role::None, Step::Waits));
        assert_eq!(waits.words(), "decode, ready, 1 running; waits for server-0 to be prefill");
        assert_eq!(Seen::default().words(), "is not registered");
    }
}
