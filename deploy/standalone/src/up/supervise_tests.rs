//! The supervisor with real processes: shells that live, die and listen as the tests ask.

use std::{fs, net::TcpStream};

use super::*;
use crate::{run_file::tests::example, up::addresses::Addresses};

const PATIENCE: Duration = Duration::from_secs(20);

struct Bench {
    directory: tempfile::TempDir,
    addresses: Addresses,
}

impl Bench {
    fn new() -> Self {
        let addresses = Addresses::bind(&baton_process::Listen::loopback(), None).unwrap();
        Self { directory: tempfile::tempdir().unwrap(), addresses }
    }

    fn shell(&self, name: &str, service: Service, script: &str, sockets: Vec<Socket>) -> ChildSpec {
        let args = vec!["-c".to_owned(), script.to_owned()];
        let config = self.directory.path().join("none.toml");
        let grace = Duration::from_secs(10);
        ChildSpec { name: name.to_owned(), service, program: "/bin/sh".into(), args, config, sockets, grace }
    }

    fn start(&self, plan: Vec<ChildSpec>) -> Supervisor {
        let directory = self.directory.path().to_owned();
        let listeners = self.addresses.listeners.clone();
        Supervisor::start(plan, listeners, example(std::process::id(), 1), directory, Screen::new(), false)
            .unwrap()
    }

    fn written(&self, file: &str) -> String {
        fs::read_to_string(self.directory.path().join(file)).unwrap_or_default()
    }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn entry(supervisor: &Supervisor, index: usize) -> ProcessEntry {
    supervisor.run_file().processes[index].clone()
}

fn gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_killed_process_is_started_again_and_all_are_reaped() {
    let bench = Bench::new();
    let supervisor =
        bench.start(vec![bench.shell("server-0", Service::Server, "exec sleep 3600", Vec::new())]);
    supervisor.mark_ready();
    until("a first life", || entry(&supervisor, 0).pid.is_some()).await;
    let first = entry(&supervisor, 0).pid.unwrap();
    kill_process(Pid::from_raw(first as i32).unwrap(), Signal::KILL).unwrap();
    until("a second life", || entry(&supervisor, 0).pid.is_some_and(|pid| pid != first)).await;
    let second = entry(&supervisor, 0);
    assert_eq!(second.restarts, 1);
    assert!(RunFile::read(bench.directory.path()).unwrap().processes[0] == second, "the run file follows");
    supervisor.stop(&CancellationToken::new()).await;
    assert!(gone(first) && gone(second.pid.unwrap()));
    assert!(RunFile::read(bench.directory.path()).is_none());
}

#[tokio::test]
async fn what_dies_at_every_start_is_given_up_with_its_last_error() {
    let bench = Bench::new();
    let script = "echo starting; echo 'error: model x is damaged' >&2; exit 1";
    let supervisor = bench.start(vec![bench.shell("server-0", Service::Server, script, Vec::new())]);
    let text = tokio::time::timeout(PATIENCE, supervisor.gave_up()).await.unwrap().to_string();
    assert!(text.starts_with("server-0 ended 3 times in a row while starting"), "{text}");
    assert!(text.contains("exit status 1") && text.contains("model x is damaged"), "{text}");
    assert_eq!(bench.written("server-0.log").matches("starting").count(), 3);
    supervisor.stop(&CancellationToken::new()).await;
}

#[tokio::test]
async fn a_stop_goes_coordinator_servers_controller() {
    let bench = Bench::new();
    let trail = bench.directory.path().join("trail");
    let child = |name: &str, service| {
        let trail = trail.display();
        let script =
            format!("trap 'echo {name} >> {trail}; exit 0' TERM; echo up; while :; do sleep 0.01; done");
        bench.shell(name, service, &script, Vec::new())
    };
    let plan = vec![
        child("controller", Service::Controller),
        child("server-0", Service::Server),
        child("coordinator", Service::Coordinator),
    ];
    let supervisor = bench.start(plan);
    for name in ["controller", "server-0", "coordinator"] {
        until("a trap", || bench.written(&format!("{name}.log")).contains("up")).await;
    }
    assert_eq!(supervisor.stop(&CancellationToken::new()).await, Stop::InOrder);
    assert_eq!(bench.written("trail"), "coordinator\nserver-0\ncontroller\n");
}

#[tokio::test]
async fn a_second_stop_kills_what_does_not_listen() {
    let bench = Bench::new();
    let script = "trap '' TERM; echo up; while :; do sleep 0.01; done";
    let mut spec = bench.shell("server-0", Service::Server, script, Vec::new());
    spec.grace = Duration::from_secs(3600);
    let supervisor = bench.start(vec![spec]);
    until("a trap", || bench.written("server-0.log").contains("up")).await;
    let pid = entry(&supervisor, 0).pid.unwrap();
    let kill = CancellationToken::new();
    kill.cancel();
    assert_eq!(tokio::time::timeout(PATIENCE, supervisor.stop(&kill)).await.unwrap(), Stop::Forced);
    assert!(gone(pid));
}

#[tokio::test]
async fn a_second_stop_starts_nothing_again() {
    let bench = Bench::new();
    // The coordinator's child holds its output open, so that its end takes a while to be seen: long enough for those
    // whose turn has not come to be started again, were they taken to have died.
    let drains = "trap 'echo draining' TERM; sleep 5 & echo up; while :; do sleep 0.01; done";
    let mut coordinator = bench.shell("coordinator", Service::Coordinator, drains, Vec::new());
    coordinator.grace = Duration::from_secs(3600);
    let other = |name, service| bench.shell(name, service, "exec sleep 3600", Vec::new());
    let supervisor = bench.start(vec![
        other("controller", Service::Controller),
        other("server-0", Service::Server),
        other("server-1", Service::Server),
        coordinator,
    ]);
    supervisor.mark_ready();
    until("all to run", || {
        let up = bench.written("coordinator.log").contains("up");
        up && (0..4).all(|index| entry(&supervisor, index).pid.is_some())
    })
    .await;
    let before = supervisor.run_file().processes;
    let (shared, kill) = (supervisor.shared.clone(), CancellationToken::new());
    let stopping = tokio::spawn({
        let kill = kill.clone();
        async move { supervisor.stop(&kill).await }
    });
    until("a drain", || bench.written("coordinator.log").contains("draining")).await;
    kill.cancel();
    assert_eq!(tokio::time::timeout(PATIENCE, stopping).await.unwrap().unwrap(), Stop::Forced);
    // A death would have been written there, and a new life too.
    assert_eq!(locked(&shared.run).processes, before);
    assert!(before.iter().all(|process| gone(process.pid.unwrap())));
}

#[tokio::test]
async fn a_process_that_outstays_its_grace_is_killed() {
    let bench = Bench::new();
    let script = "trap '' TERM; echo up; while :; do sleep 0.01; done";
    let mut spec = bench.shell("server-0", Service::Server, script, Vec::new());
    spec.grace = Duration::from_millis(50);
    let supervisor = bench.start(vec![spec]);
    until("a trap", || bench.written("server-0.log").contains("up")).await;
    tokio::time::timeout(PATIENCE, supervisor.stop(&CancellationToken::new())).await.unwrap();
}

#[tokio::test]
async fn connections_made_while_a_process_is_down_reach_its_next_life() {
    let bench = Bench::new();
    // The first life leaves at once; the second answers whoever waited on the inherited socket.
    let mark = bench.directory.path().join("second");
    let script = format!(
        "if [ ! -e {mark} ]; then touch {mark}; exit 1; fi; \
         exec python3 -c 'import socket; c, _ = socket.socket(fileno=4).accept(); c.sendall(b\"served\"); c.close()'",
        mark = mark.display()
    );
    let spec =
        bench.shell("coordinator", Service::Coordinator, &script, vec![Socket::Controller, Socket::Http]);
    let mut client = TcpStream::connect(bench.addresses.http).unwrap();
    let supervisor = bench.start(vec![spec]);
    supervisor.mark_ready();
    let answer = tokio::task::spawn_blocking(move || {
        let mut answer = String::new();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        io::Read::read_to_string(&mut client, &mut answer).unwrap();
        answer
    });
    assert_eq!(answer.await.unwrap(), "served");
    assert!(entry(&supervisor, 0).restarts >= 1);
    supervisor.stop(&CancellationToken::new()).await;
}
