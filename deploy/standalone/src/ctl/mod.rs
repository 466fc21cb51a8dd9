//! `baton ctl`: looks inside a cluster and changes what operators may change, over the admin gRPC services. This file
//! holds the verbs; [`connect`] and [`fleet`] ask, a file for each kind makes rows of the answers ([`output`]), a file
//! for each verb does the rest.

use clap::Subcommand;

mod change;
mod completion;
mod connect;
mod coordinators;
mod describe;
mod drain;
mod error;
mod events;
mod explain;
#[cfg(test)]
mod fake;
mod fleet;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
mod get;
mod groups;
mod instances;
mod keys;
mod line;
mod links;
mod output;
mod page;
mod placement;
mod plan;
mod requests;
mod roles;
mod select;
mod targets;
#[cfg(test)]
mod tests;
mod watch;
mod words;

pub(crate) use error::CtlError;
pub(crate) use words::{phase, role};

/// Look inside a running cluster, and change what instances do.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  baton ctl get instances                          what is registered, and how busy it is
  baton ctl get roles -w                           roles, and then each change
  baton ctl get events -w -o json                  what happens, an object a line
  baton ctl describe instance server-2             all that is known of it
  baton ctl explain group default --ratio 1:3      what a ratio of 1:3 would change
  baton ctl drain server-2 --reason disk           out of service, once it runs nothing
  baton ctl uncordon server-2                      and back in
  baton ctl key add alice-2027 --tenant alice      lets a client in

The cluster is the one that `baton up` runs here, or the one of --controller:
  export BATON_CTL_CONTROLLER=controller.baton:7100 BATON_CTL_TOKEN_FILE=~/.baton/token
Exit status: 0 done, 1 failed, 2 the command line is wrong.")]
pub(crate) struct CtlArgs {
    #[command(flatten)]
    reach: connect::ReachArgs,

    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum CtlCommand {
    /// List things, or watch them change.
    #[command(after_help = "\
Examples:
  baton ctl get instances -l zone=a,gpu!=910b -o wide
  baton ctl get roles server-0 server-1
  baton ctl get instances server-0 -o yaml
  baton ctl get requests --coordinator 127.0.0.1:8001
  baton ctl get events default -w")]
    Get(get::GetArgs),

    /// All that is known of one instance, role, request, link, event, group or coordinator.
    #[command(
        subcommand,
        after_help = "\
Examples:
  baton ctl describe instance server-2
  baton ctl describe role server-2                 why it has it, and what became of it
  baton ctl describe request 3f1c                  where it is, and why it went there
  baton ctl describe link server-0 server-2        how KV caches travel from one to the other
  baton ctl describe event 1048579                 what happened before and after it"
    )]
    Describe(describe::DescribeWhat),

    /// Why roles are as they are: numbers in, decision out.
    #[command(after_help = "\
Examples:
  baton ctl explain                                every group
  baton ctl explain role server-2                  why it has its role, and what it waits for
  baton ctl explain group default --ttft 300ms     how it would be divided by this target")]
    Explain(explain::ExplainArgs),

    /// Take an instance out of service, until it is taken back in.
    #[command(after_help = "\
Running requests may finish, as with any change of role; `drain` waits for that. What would leave \
nobody to serve is refused without --force.

Examples:
  baton ctl cordon server-2 --reason 'disk fails' --dry-run
  baton ctl cordon server-2 --reason 'disk fails'")]
    Cordon(change::CordonArgs),

    /// Take an instance out of service and wait until it runs nothing.
    #[command(after_help = "\
Interrupted, or after --timeout, the instance stays cordoned and its drain goes on.

Examples:
  baton ctl drain server-2 --within 30s --reason upgrade
  baton ctl drain server-2 --timeout 30m && systemctl restart baton-server@2")]
    Drain(drain::DrainArgs),

    /// Take an instance back into service.
    Uncordon(change::UncordonArgs),

    /// Pin an instance to a role, or let the planner choose again.
    #[command(after_help = "\
Examples:
  baton ctl set-role server-2 decode
  baton ctl set-role server-2 auto")]
    SetRole(change::SetRoleArgs),

    /// Say by what a group is divided into prefill and decode, in place of the controller's configuration.
    #[command(after_help = "\
All targets of a group are set at once: those that are not given are as configured. --ratio alone \
means --policy ratio, --ttft and --tpot mean --policy auto.

Examples:
  baton ctl set-targets default --ratio 1:3
  baton ctl set-targets default --ttft 500ms --tpot 50ms --dry-run
  baton ctl set-targets default --reset")]
    SetTargets(change::SetTargetsArgs),

    /// Divide a group anew, without the caution that keeps small gains from moving instances.
    #[command(after_help = "\
Examples:
  baton ctl rebalance --dry-run
  baton ctl rebalance default")]
    Rebalance(change::RebalanceArgs),

    /// API keys for clients: make, list and revoke them.
    #[command(
        subcommand,
        after_help = "\
Examples:
  baton ctl key add alice-2027 --tenant alice --requests-per-minute 600
  baton ctl key list
  baton ctl key revoke alice-2026
  baton ctl key generate alice-2027 >> keys.toml   without etcd: for `api_keys.file`"
    )]
    Key(keys::KeyCommand),

    /// Print what a shell needs to complete these commands.
    #[command(after_help = "\
Examples:
  source <(baton ctl completion bash)
  baton ctl completion zsh > \"${fpath[1]}/_baton\"
  baton ctl completion fish > ~/.config/fish/completions/baton.fish")]
    Completion(completion::CompletionArgs),
}

/// Answers one question, or makes one change.
pub(crate) async fn run(args: CtlArgs) -> Result<(), CtlError> {
    if let CtlCommand::Completion(args) = args.command {
        completion::run(&args);
        return Ok(());
    }
    if let CtlCommand::Key(keys::KeyCommand::Generate(args)) = args.command {
        keys::generate(args);
        return Ok(());
    }
    let fleet = &mut fleet::Fleet::new(connect::Reach::new(&args.reach)?);
    match args.command {
        CtlCommand::Get(args) => get::run(args, fleet).await,
        CtlCommand::Describe(what) => describe::run(what, fleet).await,
        CtlCommand::Explain(args) => explain::run(args, fleet).await,
        CtlCommand::Cordon(args) => change::cordon(args, fleet).await,
        CtlCommand::Drain(args) => drain::run(args, fleet).await,
        CtlCommand::Uncordon(args) => change::uncordon(args, fleet).await,
        CtlCommand::SetRole(args) => change::set_role(args, fleet).await,
        CtlCommand::SetTargets(args) => change::set_targets(args, fleet).await,
        CtlCommand::Rebalance(args) => change::rebalance(args, fleet).await,
        CtlCommand::Key(command) => keys::run(command, fleet).await,
        CtlCommand::Completion(_) => Ok(()),
    }
}
