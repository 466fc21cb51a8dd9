//! `baton ctl`: looks inside a cluster over the admin gRPC services. This file
//! holds the verbs; [`connect`] and [`fleet`] ask, a file for each kind makes rows of the answers ([`output`]), a file
//! for each verb does the rest.

use clap::Subcommand;

mod connect;
mod coordinators;
mod describe;
mod error;
mod events;
mod explain;
#[cfg(test)]
mod fake;
mod fleet;
mod get;
mod groups;
mod instances;
mod links;
mod output;
mod page;
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

/// Look inside a running cluster.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  baton ctl get instances                          what is registered, and how busy it is
  baton ctl get roles -w                           roles, and then each change
  baton ctl get events -w -o json                  what happens, an object a line
  baton ctl describe instance server-2             all that is known of it
  baton ctl explain group default --ratio 1:3      what a ratio of 1:3 would change

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

    /// All that is known of one instance, group or coordinator.
    #[command(subcommand)]
    Describe(describe::DescribeWhat),

    /// Why roles are as they are: numbers in, decision out.
    #[command(after_help = "\
Examples:
  baton ctl explain                                every group
  baton ctl explain role server-2                  why it has its role, and what it waits for
  baton ctl explain group default --ttft 300ms     how it would be divided by this target")]
    Explain(explain::ExplainArgs),
}

/// Answers one question.
pub(crate) async fn run(args: CtlArgs) -> Result<(), CtlError> {
    let fleet = &mut fleet::Fleet::new(connect::Reach::new(&args.reach)?);
    match args.command {
        CtlCommand::Get(args) => get::run(args, fleet).await,
        CtlCommand::Describe(what) => describe::run(what, fleet).await,
        CtlCommand::Explain(args) => explain::run(args, fleet).await,
    }
}
