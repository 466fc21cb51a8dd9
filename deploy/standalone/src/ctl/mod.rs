//! `baton ctl`: looks inside a cluster over the admin gRPC services. [`view`] turns answers into rows; this file finds
//! the endpoints, asks, and prints.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use baton_proto::v1::{
    ListInstancesRequest, ListRequestsRequest, ListRolesRequest, fleet_admin_client::FleetAdminClient,
    request_admin_client::RequestAdminClient,
};
use clap::{Subcommand, ValueEnum};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{
    run_file::{RunFile, living, runs_directory},
    screen::{complain, say},
};

mod view;

pub(crate) use view::{phase, role};

const PATIENCE: Duration = Duration::from_secs(5);

/// Look inside a running cluster.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CtlArgs {
    /// Run directory of the cluster to look into, as given to `baton up --run-dir` [default: the cluster that runs
    /// here]. An address given with --controller or --coordinator wins.
    #[arg(long, value_name = "DIR", global = true)]
    run_dir: Option<PathBuf>,

    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Debug, Clone, Subcommand)]
enum CtlCommand {
    /// List things: instances (from the controller), roles (intent beside observation), requests (from a coordinator).
    Get(GetArgs),
}

#[derive(Debug, Clone, clap::Args)]
struct GetArgs {
    #[arg(value_enum)]
    what: What,

    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,

    /// The controller's gRPC address [default: that of the cluster that `baton up` runs here].
    #[arg(long, value_name = "HOST:PORT", env = "BATON_CTL_CONTROLLER")]
    controller: Option<String>,

    /// A coordinator's admin gRPC address [default: that of the cluster that `baton up` runs here].
    #[arg(long, value_name = "HOST:PORT", env = "BATON_CTL_COORDINATOR")]
    coordinator: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    #[value(alias = "instance")]
    Instances,
    #[value(alias = "role")]
    Roles,
    #[value(alias = "request")]
    Requests,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    #[error(
        "no cluster runs here: start one with `baton up`, or say where one is with --run-dir DIR or --{0} HOST:PORT"
    )]
    NoCluster(&'static str),
    #[error("no cluster runs in {dir}: start one with `baton up --run-dir {dir}`, or say where one is with --{service} HOST:PORT", dir = .run_dir.display())]
    NotInRunDir { run_dir: PathBuf, service: &'static str },
    #[error("`{0}` is not an address; expected HOST:PORT, as in 127.0.0.1:7000")]
    Address(String),
    #[error("the {service} at {address} does not answer: {reason}")]
    Unreachable { service: &'static str, address: String, reason: String },
    #[error("the {service} at {address} refused: {message}")]
    Refused { service: &'static str, address: String, message: String },
}

/// Answers one question.
pub(crate) async fn run(args: CtlArgs) -> Result<(), CtlError> {
    let run_dir = args.run_dir;
    let run_dir = run_dir.as_deref();
    let CtlCommand::Get(args) = args.command;
    let table = match args.what {
        What::Instances => {
            let (address, channel) =
                connect("controller", args.controller, run_dir, |run| run.controller).await?;
            let answer = FleetAdminClient::new(channel).list_instances(ListInstancesRequest {}).await;
            view::instances(answer.map_err(refused("controller", &address))?.into_inner().instances)
        }
        What::Roles => {
            let (address, channel) =
                connect("controller", args.controller, run_dir, |run| run.controller).await?;
            let answer = FleetAdminClient::new(channel).list_roles(ListRolesRequest {}).await;
            view::roles(answer.map_err(refused("controller", &address))?.into_inner().roles)
        }
        What::Requests => {
            let (address, channel) =
                connect("coordinator", args.coordinator, run_dir, |run| run.coordinator).await?;
            let answer = RequestAdminClient::new(channel).list_requests(ListRequestsRequest {}).await;
            view::requests(answer.map_err(refused("coordinator", &address))?.into_inner().requests)
        }
    };
    say(&match args.output {
        Output::Table => table.text(),
        Output::Json => table.json(),
    });
    Ok(())
}

async fn connect(
    service: &'static str,
    given: Option<String>,
    run_dir: Option<&Path>,
    of: impl FnOnce(RunFile) -> String,
) -> Result<(String, Channel), CtlError> {
    let address = match given {
        Some(address) => address,
        None => of(cluster(service, run_dir)?),
    };
    let bare = address.trim_start_matches("http://").trim_end_matches('/');
    let endpoint = Endpoint::from_shared(format!("http://{bare}")).ok().filter(|_| bare.contains(':'));
    let endpoint = endpoint.ok_or_else(|| CtlError::Address(address.clone()))?;
    // A socket may take the connection and its process never answer; the second timeout covers that.
    let endpoint = endpoint.connect_timeout(PATIENCE).timeout(PATIENCE);
    match endpoint.connect().await {
        Ok(channel) => Ok((bare.to_owned(), channel)),
        Err(error) => {
            let reason = crate::screen::one_line(&error);
            Err(CtlError::Unreachable { service, address: bare.to_owned(), reason })
        }
    }
}

/// The one of the run directory; without one, that which runs here; the latest, if there are several.
fn cluster(service: &'static str, run_dir: Option<&Path>) -> Result<RunFile, CtlError> {
    if let Some(directory) = run_dir {
        let run = RunFile::read(directory).filter(RunFile::is_alive);
        return run.ok_or_else(|| CtlError::NotInRunDir { run_dir: directory.to_owned(), service });
    }
    let mut found = runs_directory().map(|runs| living(&runs)).unwrap_or_default();
    if found.len() > 1 {
        complain(&format!("{} clusters run here: showing the latest, {}", found.len(), found[0].url));
    }
    if found.is_empty() { Err(CtlError::NoCluster(service)) } else { Ok(found.swap_remove(0)) }
}

fn refused(service: &'static str, address: &str) -> impl FnOnce(Status) -> CtlError {
    let address = address.to_owned();
    move |status| match status.code() {
        tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::DeadlineExceeded => {
            CtlError::Unreachable { service, address, reason: status.message().to_owned() }
        }
        code => CtlError::Refused { service, address, message: format!("{} ({code:?})", status.message()) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_does_not_answer_is_named() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap().to_string();
        drop(held);
        let text = connect("controller", Some(address.clone()), None, |run| run.controller)
            .await
            .unwrap_err()
            .to_string();
        assert!(text.starts_with(&format!("the controller at {address} does not answer: ")), "{text}");
        let text = connect("controller", Some("nowhere".into()), None, |run| run.controller)
            .await
            .unwrap_err()
            .to_string();
        assert!(text.contains("expected HOST:PORT"), "{text}");
    }

    #[test]
    fn a_run_directory_says_where_its_cluster_is() {
        let directory = tempfile::tempdir().unwrap();
        let text = cluster("controller", Some(directory.path())).unwrap_err().to_string();
        assert!(text.starts_with(&format!("no cluster runs in {}: ", directory.path().display())), "{text}");
        let run = crate::run_file::tests::example(std::process::id(), 1);
        run.write(directory.path()).unwrap();
        assert_eq!(cluster("controller", Some(directory.path())).unwrap(), run);
    }

    #[test]
    fn the_run_directory_may_stand_after_the_question() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            ctl: CtlArgs,
        }
        for line in [["x", "get", "roles", "--run-dir", "/d"], ["x", "--run-dir", "/d", "get", "roles"]] {
            let line = <Line as clap::Parser>::try_parse_from(line).unwrap();
            assert_eq!(line.ctl.run_dir.as_deref(), Some(Path::new("/d")));
        }
    }
}
