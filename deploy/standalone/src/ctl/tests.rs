//! `ctl` from the command line to the wire, against [`super::fake`].

use baton_proto::v1::{FleetEvent, Link, Phase};
use clap::Parser;

use super::{
    CtlArgs, CtlError,
    connect::{Reach, ReachArgs},
    fake::{Fake, Says},
    fleet::Fleet,
    instances::tests::instance,
    plan::tests::group,
    roles::tests::view,
};

mod ask;
mod change;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    ctl: CtlArgs,
}

fn parse(line: &str) -> Result<CtlArgs, clap::Error> {
    Command::try_parse_from(["ctl"].into_iter().chain(line.split_whitespace())).map(|line| line.ctl)
}

async fn run(line: &str, fake: &Fake) -> Result<(), CtlError> {
    super::run(parse(&format!("{line} --controller {}", fake.address)).unwrap()).await
}

fn reach(controllers: &[&str]) -> ReachArgs {
    ReachArgs {
        controller: controllers.iter().map(|&address| address.to_owned()).collect(),
        ..Default::default()
    }
}

fn fleet(args: &ReachArgs) -> Fleet {
    Fleet::new(Reach::new(args).unwrap())
}

fn link() -> Link {
    Link { prefill_instance: "server-0".into(), decode_instance: "server-1".into(), ..Default::default() }
}

fn says() -> Says {
    Says {
        instances: vec![instance("server-0", Phase::Ready)],
        roles: vec![vec![view()]],
        groups: vec![group()],
        links: vec![link()],
        events: vec![FleetEvent { sequence: 7, instance_id: "server-0".into(), ..Default::default() }],
        ..Default::default()
    }
}

#[test]
fn every_question_is_understood() {
    for line in [
        "get instances",
        "get instances server-0 server-1 -o wide",
        "get inst -l zone=a,!gpu --no-headers",
        "get roles -w",
        "get role server-0 -o yaml --watch",
        "get requests --coordinator a:1,b:1",
        "get coordinators -o json",
        "get links server-0",
        "get events default -w -o json",
        "get groups",
        "describe instance server-0",
        "describe group default",
        "describe coordinator c-0 --controller https://c:7100",
        "describe role server-0",
        "describe request r-1 --coordinator a:1",
        "describe link server-0 server-1",
        "describe event 1048579",
        "explain",
        "explain -o yaml",
        "explain role server-0",
        "explain group default --policy auto --ttft 500ms",
        "get roles --token-file t --ca-file a --trust-domain d",
        "get roles --token-file t --ca-file a --cert-file b --key-file c --tls-server-name n",
    ] {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn questions_that_make_no_sense_are_refused() {
    for (line, says) in [
        ("get", "WHAT"),
        ("get pods", "possible values"),
        ("get instances -l =", "selects no label"),
        ("describe roles x", "unrecognized"),
        ("describe link server-0", "<DECODE>"),
        ("describe event last", "invalid digit"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(says), "{line}: {error}");
    }
}

#[test]
fn where_the_cluster_is_may_stand_after_the_question() {
    for line in ["get roles --run-dir /d", "--run-dir /d get roles", "explain role x --run-dir /d"] {
        let args = parse(line).unwrap();
        assert_eq!(args.reach.run_dir.as_deref(), Some(std::path::Path::new("/d")), "{line}");
    }
}
