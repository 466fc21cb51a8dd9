//! The verbs that change something: cordon, uncordon, set-role, set-targets, rebalance. Each prints what becomes of the
//! instances, as the controller answers it.

use baton_proto::v1::{
    CordonRequest, PlanResponse, RebalanceRequest, Role, SetRoleRequest, SetTargetsRequest, UncordonRequest,
};
use clap::ValueEnum;

use super::{
    error::CtlError,
    fleet::{Client, Fleet},
    output::{Output, json, yaml},
    plan::{changes, object},
    targets::TargetArgs,
};
use crate::screen::say;

/// How a change is made and shown.
#[derive(Debug, Clone, clap::Args)]
struct ChangeArgs {
    /// Only say what would become of it.
    #[arg(long)]
    dry_run: bool,

    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct CordonArgs {
    #[command(flatten)]
    what: Cordoning,

    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// What `cordon` and `drain` begin with.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Cordoning {
    /// The instance.
    pub(super) name: String,

    /// Why, for whoever looks at it later.
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,

    /// Even if nobody is left to serve.
    #[arg(long)]
    force: bool,

    /// Only say what would become of it.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct UncordonArgs {
    /// The instance.
    name: String,

    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct SetRoleArgs {
    /// The instance.
    name: String,

    #[arg(value_enum)]
    role: Pin,

    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pin {
    Prefill,
    Decode,
    Mixed,
    /// Whichever the planner chooses.
    Auto,
}

impl Pin {
    fn role(self) -> Role {
        match self {
            Self::Prefill => Role::Prefill,
            Self::Decode => Role::Decode,
            Self::Mixed => Role::Mixed,
            Self::Auto => Role::Unspecified,
        }
    }
}

#[derive(Debug, Clone, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["policy", "ratio", "ttft", "tpot", "reset"]))]
pub(super) struct SetTargetsArgs {
    group: String,

    #[command(flatten)]
    targets: TargetArgs,

    /// As the controller is configured, again.
    #[arg(long, conflicts_with_all = ["policy", "ratio", "ttft", "tpot"])]
    reset: bool,

    #[command(flatten)]
    change: ChangeArgs,
}

#[derive(Debug, Clone, clap::Args)]
pub(super) struct RebalanceArgs {
    /// Every group, if none is named.
    group: Option<String>,

    #[command(flatten)]
    change: ChangeArgs,
}

pub(super) async fn cordon(args: CordonArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let answer = ask_cordon(&args.what, 0, fleet).await?;
    show(&answer, Some(&args.what.name), args.output);
    Ok(())
}

/// `drain_millis` as on the wire.
pub(super) async fn ask_cordon(
    what: &Cordoning,
    drain_millis: u32,
    fleet: &mut Fleet,
) -> Result<PlanResponse, CtlError> {
    let question = CordonRequest {
        instance_id: what.name.clone(),
        reason: what.reason.clone(),
        drain_millis,
        force: what.force,
        dry_run: what.dry_run,
    };
    let call = |mut client: Client, question| async move { client.cordon(question).await };
    fleet.ask(question, call).await
}

pub(super) async fn uncordon(args: UncordonArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let question = UncordonRequest { instance_id: args.name.clone(), dry_run: args.change.dry_run };
    let call = |mut client: Client, question| async move { client.uncordon(question).await };
    let answer = fleet.ask(question, call).await?;
    show(&answer, Some(&args.name), args.change.output);
    Ok(())
}

pub(super) async fn set_role(args: SetRoleArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let question = SetRoleRequest {
        instance_id: args.name.clone(),
        role: args.role.role().into(),
        dry_run: args.change.dry_run,
    };
    let call = |mut client: Client, question| async move { client.set_role(question).await };
    let answer = fleet.ask(question, call).await?;
    show(&answer, Some(&args.name), args.change.output);
    Ok(())
}

pub(super) async fn set_targets(args: SetTargetsArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let targets = if args.reset { None } else { args.targets.targets()? };
    let question = SetTargetsRequest { group: args.group, targets, dry_run: args.change.dry_run };
    let call = |mut client: Client, question| async move { client.set_targets(question).await };
    let answer = fleet.ask(question, call).await?;
    show(&answer, None, args.change.output);
    Ok(())
}

pub(super) async fn rebalance(args: RebalanceArgs, fleet: &mut Fleet) -> Result<(), CtlError> {
    let groups = match args.group {
        Some(group) => vec![group],
        None => fleet.plans("", None).await?.into_iter().map(|plan| plan.group).collect(),
    };
    let dry_run = args.change.dry_run;
    let mut all = PlanResponse { groups: Vec::new(), dry_run };
    for group in groups {
        let call = |mut client: Client, question| async move { client.rebalance(question).await };
        all.groups.extend(fleet.ask(RebalanceRequest { group, dry_run }, call).await?.groups);
    }
    show(&all, None, args.change.output);
    Ok(())
}

pub(super) fn show(answer: &PlanResponse, named: Option<&str>, output: Output) {
    say(&match output {
        Output::Json => json(&object(answer)),
        Output::Yaml => yaml(&object(answer)),
        Output::Table | Output::Wide => changes(answer, named),
    });
}
