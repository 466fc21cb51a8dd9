//! The processes: three members of etcd, two controllers, two coordinators and six servers, each on a host of its own,
//! and what can be done to each.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use baton_integration_tests::{APART, binary, eventually, model, process, tokens::Tokens};
use baton_proto::v1::{self, Phase, Role, fleet_admin_client::FleetAdminClient};
use rustix::process::Signal;
use serde_json::json;
use tonic::{
    Request, Response, Status,
    metadata::AsciiMetadataValue,
    transport::{Channel, Endpoint},
};

use crate::net::{self, Host, Way};

/// For whoever is asked whether it is well.
const ANSWER_WITHIN: Duration = Duration::from_millis(800);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Etcd,
    Controller,
    Coordinator,
    Server,
}

/// How many of each there are, in this order.
const COUNTS: [(Kind, usize); 4] =
    [(Kind::Etcd, 3), (Kind::Controller, 2), (Kind::Coordinator, 2), (Kind::Server, 6)];

/// What is done to a process or its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Harm {
    /// It is killed with -9, and started again later.
    Kill,
    /// It is stopped, and goes on later.
    Freeze,
    /// Nothing reaches it, and nothing of it anybody.
    Cut,
}

pub(crate) struct Member {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) host: Host,
    child: Option<Child>,
    starts: usize,
    harm: Option<Harm>,
}

pub(crate) struct Fleet {
    dir: PathBuf,
    members: Vec<Member>,
    tokens: Tokens,
}

/// An instance as the leading controller sees it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) member: usize,
    pub(crate) role: Role,
    /// It is registered and ready in its role.
    pub(crate) serves: bool,
}

fn url(ip: Ipv4Addr, port: u16, path: &str) -> String {
    format!("http://{ip}:{port}{path}")
}

impl Fleet {
    /// Starts all of it, with its logs in a folder, and waits until it serves with three of each role.
    pub(crate) async fn start(dir: &Path) -> Self {
        net::bridge();
        let mut members = Vec::new();
        let kinds = COUNTS.into_iter().flat_map(|(kind, count)| (0..count).map(move |index| (kind, index)));
        for (number, (kind, index)) in (2..).zip(kinds) {
            let name = format!("{kind:?}-{index}").to_lowercase();
            members.push(Member { kind, name, host: Host::new(number), child: None, starts: 0, harm: None });
        }
        let mut fleet = Self { dir: dir.to_owned(), members, tokens: Tokens::write(dir) };
        for member in 0..fleet.members.len() {
            fleet.spawn(member);
        }
        fleet.is_whole().await;
        fleet
    }

    pub(crate) fn members(&self) -> impl Iterator<Item = (usize, &Member)> {
        self.members.iter().enumerate()
    }

    pub(crate) fn member(&self, member: usize) -> &Member {
        &self.members[member]
    }

    pub(crate) fn of(&self, kind: Kind) -> Vec<usize> {
        self.members().filter(|(_, member)| member.kind == kind).map(|(index, _)| index).collect()
    }

    /// Where clients ask each coordinator.
    pub(crate) fn coordinators(&self) -> Vec<String> {
        self.of(Kind::Coordinator).into_iter().map(|it| url(self.members[it].host.ip, 8000, "")).collect()
    }

    fn ips(&self, kind: Kind) -> Vec<Ipv4Addr> {
        self.of(kind).into_iter().map(|it| self.members[it].host.ip).collect()
    }

    fn spawn(&mut self, index: usize) {
        let mut command = self.command(index);
        let member = &mut self.members[index];
        member.starts += 1;
        let log = self.dir.join(format!("{}.{}.log", member.name, member.starts));
        let log = fs::File::create(log).expect("a log file");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be shared")).stderr(log);
        member.child = Some(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")));
    }

    fn command(&self, index: usize) -> Command {
        let member = &self.members[index];
        let (name, ip) = (&member.name, member.host.ip);
        let endpoints: Vec<_> = self.ips(Kind::Etcd).iter().map(|ip| format!("{ip}:2379")).collect();
        let set = |command: &mut Command, settings: &[(&str, String)]| {
            for (key, value) in settings {
                command.args(["--set", &format!("{key}={value}")]);
            }
        };
        match member.kind {
            Kind::Etcd => {
                let of = |index: usize| {
                    format!("{}={}", self.members[index].name, url(self.members[index].host.ip, 2380, ""))
                };
                let cluster: Vec<_> = self.of(Kind::Etcd).into_iter().map(of).collect();
                let (client, peer) = (url(ip, 2379, ""), url(ip, 2380, ""));
                let mut command = member.host.command("etcd");
                command.args(["--name", name, "--data-dir"]).arg(self.dir.join(format!("{name}.data")));
                command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
                command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
                command.args(["--initial-cluster", &cluster.join(","), "--logger", "zap"]);
                command
            }
            Kind::Controller => {
                let mut command = member.host.command(binary("baton-controller"));
                set(
                    &mut command,
                    &[
                        ("controller_id", name.clone()),
                        ("listen", format!("{ip}:7100")),
                        ("metrics_listen", format!("{ip}:7101")),
                        ("store.kind", "etcd".into()),
                        ("store.etcd.endpoints", json!(endpoints).to_string()),
                        ("roles.prefill", "3".into()),
                        ("roles.decode", "3".into()),
                    ],
                );
                command.args(["--set", &self.tokens.setting()]);
                command
            }
            Kind::Coordinator => {
                let mut command = member.host.command(binary("baton-coordinator"));
                command.arg("--model").arg(model());
                // Of some coordinators decode computes prompts as well.
                if index.is_multiple_of(2) {
                    command.args(["--set", APART]);
                }
                set(
                    &mut command,
                    &[
                        ("id", name.clone()),
                        ("listen", format!("{ip}:8000")),
                        ("admin_listen", format!("{ip}:8001")),
                        // Answers are short: each that can leave an instance which drains does.
                        ("carry.move_after", "0s".into()),
                        ("store.etcd.endpoints", json!(endpoints).to_string()),
                    ],
                );
                command
            }
            Kind::Server => {
                let controllers: Vec<_> =
                    self.ips(Kind::Controller).iter().map(|ip| format!("{ip}:7100")).collect();
                let mut command = member.host.command(binary("baton-server"));
                command.args(["--instance-id", name, "--model"]).arg(model());
                set(
                    &mut command,
                    &[
                        ("controllers", json!(controllers).to_string()),
                        ("listen", format!("{ip}:7200")),
                        ("metrics_listen", format!("{ip}:7201")),
                        ("kv_data_listen", format!("{ip}:7202")),
                        ("runtime.threads", "1".into()),
                        ("runtime.packed_copies", self.dir.join("packed").display().to_string()),
                        // Few, so that caches are evicted and sequences preempted as well.
                        ("runtime.kv_blocks", "192".into()),
                        // Their machines are not one.
                        ("handoff.transports", json!(["tcp"]).to_string()),
                    ],
                );
                command
            }
        }
    }

    /// Does it, unless something is done to it already.
    pub(crate) fn harm(&mut self, index: usize, harm: Harm) {
        let member = &mut self.members[index];
        assert!(member.harm.replace(harm).is_none(), "{} is harmed already", member.name);
        match (harm, &mut member.child) {
            (Harm::Cut, _) => member.host.link(false),
            (_, None) => panic!("{} does not run", member.name),
            (Harm::Freeze, Some(child)) => process::signal(child.id(), Signal::STOP),
            (Harm::Kill, Some(child)) => {
                child.kill().expect("a child can be killed");
                child.wait().expect("a child can be waited for");
                member.child = None;
            }
        }
    }

    /// Ends what is done to it.
    pub(crate) fn mend(&mut self, index: usize) {
        let member = &mut self.members[index];
        match member.harm.take().expect("it is harmed") {
            Harm::Cut => member.host.link(true),
            Harm::Freeze => process::signal(member.child.as_ref().expect("it runs").id(), Signal::CONT),
            Harm::Kill => self.spawn(index),
        }
    }

    /// Cuts the way between two, or opens it.
    pub(crate) fn lose(&self, pair: (usize, usize), way: Way) {
        self.members[pair.0].host.lose(&self.members[pair.1].host, way);
    }

    pub(crate) fn find(&self, pair: (usize, usize), way: Way) {
        self.members[pair.0].host.find(&self.members[pair.1].host, way);
    }

    /// Processes that have ended and were not killed.
    pub(crate) fn deaths(&mut self) -> Vec<String> {
        let mut dead = Vec::new();
        for member in &mut self.members {
            let status = member.child.as_mut().and_then(|child| child.try_wait().expect("it is a child"));
            if let Some(status) = status {
                dead.push(format!("{} ended by itself: {status}", member.name));
                member.child = None;
            }
        }
        dead
    }

    /// Lines that say that a task has panicked.
    pub(crate) fn panics(&self) -> Vec<String> {
        let mut found = Vec::new();
        for path in fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.extension().is_some_and(|extension| extension == "log") {
                let log = String::from_utf8_lossy(&fs::read(&path).expect("a log can be read")).into_owned();
                let panics = process::panics(&log);
                found.extend(panics.map(|line| format!("{}: {line}", path.display())));
            }
        }
        found
    }

    /// Whether it can do its work, by its own account.
    pub(crate) async fn is_well(&self, client: &reqwest::Client, index: usize) -> bool {
        let member = &self.members[index];
        let url = match member.kind {
            Kind::Etcd => url(member.host.ip, 2379, "/health"),
            Kind::Controller => url(member.host.ip, 7101, "/health"),
            Kind::Coordinator => url(member.host.ip, 8000, "/readiness"),
            Kind::Server => url(member.host.ip, 7201, "/readiness"),
        };
        let answer = client.get(url).timeout(ANSWER_WITHIN).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// The metrics of a server or coordinator.
    pub(crate) async fn metrics(&self, client: &reqwest::Client, index: usize) -> Option<String> {
        let member = &self.members[index];
        let port = if member.kind == Kind::Coordinator { 8000 } else { 7201 };
        let asked = client.get(url(member.host.ip, port, "/metrics")).timeout(ANSWER_WITHIN).send();
        asked.await.ok()?.text().await.ok()
    }

    /// What the controller that leads answers; `None` if nobody leads who can be asked.
    async fn ask_leader<Q: Clone, A>(
        &self,
        question: Q,
        ask: impl AsyncFn(FleetAdminClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Option<A> {
        let token = fs::read_to_string(self.tokens.of("alice")).expect("a token");
        let bearer: AsciiMetadataValue =
            format!("Bearer {}", token.trim()).parse().expect("a token is ASCII");
        for ip in self.ips(Kind::Controller) {
            let endpoint = Endpoint::new(url(ip, 7100, "")).expect("a good address");
            let Ok(channel) = endpoint.connect_timeout(ANSWER_WITHIN).timeout(ANSWER_WITHIN).connect().await
            else {
                continue;
            };
            let mut request = Request::new(question.clone());
            request.metadata_mut().insert("authorization", bearer.clone());
            if let Ok(answer) = ask(FleetAdminClient::new(channel), request).await {
                return Some(answer.into_inner());
            }
        }
        None
    }

    /// The servers as the controller that leads sees them.
    pub(crate) async fn seen(&self) -> Option<Vec<Seen>> {
        let list = async |mut client: FleetAdminClient<_>, request| client.list_roles(request).await;
        let listed = self.ask_leader(v1::ListRolesRequest {}, list).await?;
        Some(listed.roles.iter().filter_map(|view| self.see(view)).collect())
    }

    /// Has a server drained, as an operator does. False: it may be, or not, as nobody has answered.
    pub(crate) async fn drain(&self, member: usize) -> bool {
        let cordon = v1::CordonRequest {
            instance_id: self.members[member].name.clone(),
            reason: "chaos".to_owned(),
            ..Default::default()
        };
        let ask = async |mut client: FleetAdminClient<_>, request| client.cordon(request).await;
        self.ask_leader(cordon, ask).await.is_some()
    }

    /// Has it back. False: nobody has answered.
    pub(crate) async fn undrain(&self, member: usize) -> bool {
        let instance_id = self.members[member].name.clone();
        let ask = async |mut client: FleetAdminClient<_>, request| client.uncordon(request).await;
        self.ask_leader(v1::UncordonRequest { instance_id, dry_run: false }, ask).await.is_some()
    }

    fn see(&self, view: &v1::RoleView) -> Option<Seen> {
        let (member, _) = self.members().find(|(_, member)| member.name == view.instance_id)?;
        let role = view.observed_role();
        let serves = view.registered
            && view.phase() == Phase::Ready
            && role == view.desired_role()
            && role != Role::None
            && !view.health.starts_with("quarantined");
        Some(Seen { member, role, serves })
    }

    /// Waits until nobody is harmed and everybody does their part, three as prefill and three as decode.
    pub(crate) async fn is_whole(&self) {
        let client = reqwest::Client::new();
        let begin = Instant::now();
        eventually("everybody to be well", || async {
            for (index, member) in self.members() {
                if !self.is_well(&client, index).await {
                    if begin.elapsed() > Duration::from_secs(60) {
                        eprintln!("{} is not well", member.name);
                    }
                    return None;
                }
            }
            Some(())
        })
        .await;
        eventually("three servers of each role", || async {
            let seen = self.seen().await?;
            let count = |role| seen.iter().filter(|it| it.serves && it.role == role).count();
            (count(Role::Prefill) == 3 && count(Role::Decode) == 3).then_some(())
        })
        .await;
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
