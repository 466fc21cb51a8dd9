//! What a fleet of thousands costs a controller: sessions and beats of instances that do nothing else, a real
//! `baton-controller`, a real etcd, and a coordinator's view of the fleet.
//!
//! `cargo bench -p baton-controller --bench fleet -- --help`. Instances live in this process, each over a connection of
//! its own; the controller's processor time and memory are what the system says of its process. Everything shares the
//! machine, so times are upper bounds.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    process::{Child, Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use baton_controller::plan::{Candidate, Policy, Ratio, plan};
use baton_proto::{
    InstanceSpec, Phase, Role,
    v1::{self, control_client::ControlClient, controller_order::Order, instance_report::Report},
};
use baton_registry::{
    FleetWatch, FleetWatchConfig, KeyRange, Store,
    testing::{EtcdServer, instance_spec},
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use rand::RngExt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tabled::{builder::Builder, settings::Style};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Streaming, transport::Endpoint};

/// A measurement that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// Sessions that are opened at a time.
const OPENING: usize = 64;
/// Changes of phase that a coordinator's view is watched for.
const CHANGES: u32 = 200;
const CHANGE_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, Parser)]
#[command(name = "fleet", about = "What a fleet of thousands costs a controller")]
struct Args {
    /// Instances.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    instances: u32,
    /// Seconds between two reports of an instance.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=60))]
    beat: u64,
    /// Seconds that the fleet is watched for at rest.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    rest: u64,
    /// As `cargo bench` passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    match runtime.block_on(run(&args)) {
        Ok(table) => {
            println!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<String, Failed> {
    // A connection an instance, here and in the controller, which inherits the limit.
    let most = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most })?;
    let etcd = EtcdServer::start().await;
    let controller = Controller::start(&etcd, args)?;
    let store: Arc<dyn Store> = Arc::new(etcd.store());
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let fleet = FleetWatch::start(store.clone(), FleetWatchConfig::default(), stop.clone(), &tasks);

    let bar = bar("opening sessions", args.instances.into());
    let began = Instant::now();
    let mut phases = Vec::new();
    let mut opening = JoinSet::new();
    let beat = Duration::from_secs(args.beat);
    for number in 0..args.instances {
        if opening.len() == OPENING {
            opening.join_next().await.expect("one is opening")??;
        }
        let (phase, changes) = watch::channel(v1::Phase::Waiting);
        phases.push(phase);
        let endpoint = controller.endpoint.clone();
        let bar = bar.clone();
        opening.spawn(async move {
            let instance = Instance::join(&endpoint, number, changes, beat).await?;
            bar.inc(1);
            tokio::spawn(instance.live());
            Ok::<_, Failed>(())
        });
    }
    while let Some(opened) = opening.join_next().await {
        opened??;
    }
    bar.set_message("waiting for every role");
    let all = args.instances as usize;
    let mut seen = fleet.subscribe();
    let serving =
        seen.wait_for(|fleet| fleet.instances.values().filter(|i| i.serving().is_some()).count() == all);
    tokio::time::timeout(PATIENCE, serving)
        .await
        .map_err(|_| "not every instance was given a role in time")??;
    let to_serve = began.elapsed();

    bar.set_message("at rest");
    let (cpu, revision, from) = (controller.cpu()?, revision(&*store).await?, Instant::now());
    tokio::time::sleep(Duration::from_secs(args.rest)).await;
    let seconds = from.elapsed().as_secs_f64();
    let cpu = (controller.cpu()? - cpu) / seconds;
    let writes = (self::revision(&*store).await? - revision) as f64 / seconds;
    let memory = controller.memory()?;

    bar.set_message("changing phases");
    let mut delays = Vec::new();
    for _ in 0..CHANGES {
        delays.push(change(&phases, &fleet).await?);
        tokio::time::sleep(CHANGE_EVERY).await;
    }
    bar.finish_and_clear();
    stop.cancel();
    delays.sort_unstable();
    let planned = plan_time(args.instances);

    let mut table = Builder::default();
    table.push_record([
        &format!("{} instances, a beat every {} s", args.instances, args.beat),
        "measured",
        "target",
    ]);
    table.push_record(["controller, processor", &format!("{:.1} % of one core", cpu * 100.0), ""]);
    table.push_record(["controller, memory", &format!("{memory} MiB"), ""]);
    table.push_record(["writes to etcd at rest", &format!("{writes:.2} / s"), ""]);
    table.push_record(["a full plan of roles", &format!("{:.1} ms", planned.as_secs_f64() * 1e3), "< 50 ms"]);
    table.push_record(["first hello to all serving", &format!("{:.1} s", to_serve.as_secs_f64()), ""]);
    let millis =
        |share: usize| format!("{:.0} ms", delays[(delays.len() - 1) * share / 100].as_secs_f64() * 1e3);
    table.push_record(["a change is seen by a coordinator, median", &millis(50), ""]);
    table.push_record(["the same, p99", &millis(99), "< 500 ms"]);
    Ok(table.build().with(Style::markdown()).to_string())
}

fn bar(message: &'static str, length: u64) -> ProgressBar {
    let style =
        ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed}").expect("a good template");
    ProgressBar::new(length).with_style(style).with_message(message)
}

/// The store's count of changes.
async fn revision(store: &dyn Store) -> Result<u64, Failed> {
    Ok(store.range(KeyRange::exact("/none")).await?.revision.0)
}

/// Lets some instance say another phase; how long until the view of the fleet has it.
async fn change(phases: &[watch::Sender<v1::Phase>], fleet: &FleetWatch) -> Result<Duration, Failed> {
    let number = rand::rng().random_range(0..phases.len());
    let to =
        if *phases[number].borrow() == v1::Phase::Ready { v1::Phase::Draining } else { v1::Phase::Ready };
    let id = instance_spec(&name(number as u32), 1).id;
    let wanted = Phase::from_wire(to.into())?;
    let mut seen = fleet.subscribe();
    let began = Instant::now();
    phases[number].send_replace(to);
    let has = |fleet: &Arc<baton_registry::FleetSnapshot>| {
        fleet
            .instances
            .get(&id)
            .and_then(|instance| instance.status)
            .is_some_and(|status| status.phase == wanted)
    };
    tokio::time::timeout(PATIENCE, seen.wait_for(has))
        .await
        .map_err(|_| "a change was not seen in time")??;
    Ok(began.elapsed())
}

/// The median of some plans of a fleet in which a tenth has just lost its roles.
fn plan_time(instances: u32) -> Duration {
    let specs: Vec<InstanceSpec> = (0..instances).map(|number| instance_spec(&name(number), 1)).collect();
    let candidate = |(number, spec)| {
        let role = match number % 10 {
            0 => None,
            1..4 => Some(Role::Prefill),
            _ => Some(Role::Decode),
        };
        Candidate { spec, role, serving: role.is_some(), pin: None }
    };
    let candidates: Vec<_> = specs.iter().enumerate().map(candidate).collect();
    let mut times: Vec<Duration> = (0..21)
        .map(|_| {
            let began = Instant::now();
            let decisions: BTreeMap<_, _> = plan(Policy::Ratio(Ratio { prefill: 1, decode: 2 }), &candidates);
            assert_eq!(decisions.len(), candidates.len(), "everyone is given a role");
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn name(number: u32) -> String {
    format!("i{number:06}")
}

/// One session. It beats, takes on every role at once, and says the phase it is told to.
struct Instance {
    state: v1::InstanceBeat,
    reports: mpsc::Sender<v1::InstanceReport>,
    orders: Streaming<v1::ControllerOrder>,
    phase: watch::Receiver<v1::Phase>,
    beat: Duration,
}

impl Instance {
    async fn join(
        endpoint: &str,
        number: u32,
        phase: watch::Receiver<v1::Phase>,
        beat: Duration,
    ) -> Result<Self, Failed> {
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))?.connect().await?;
        let mut client = ControlClient::new(channel);
        let (reports, queue) = mpsc::channel(4);
        let state = v1::InstanceBeat { phase: v1::Phase::Waiting.into(), ..Default::default() };
        let spec = Some(v1::InstanceSpec::from(instance_spec(&name(number), 1)));
        let hello = Report::Hello(v1::InstanceHello { spec, beat: Some(state) });
        reports.send(v1::InstanceReport { report: Some(hello) }).await?;
        let mut orders = client.session(ReceiverStream::new(queue)).await?.into_inner();
        match orders.message().await?.and_then(|order| order.order) {
            Some(Order::Welcome(_)) => Ok(Self { state, reports, orders, phase, beat }),
            other => Err(format!("instance {number} is not welcome: {other:?}").into()),
        }
    }

    /// Until the session ends.
    async fn live(mut self) {
        let first = tokio::time::Instant::now() + self.beat.mul_f64(rand::random());
        let mut beats = tokio::time::interval_at(first, self.beat);
        loop {
            tokio::select! {
                order = self.orders.message() => match order.ok().flatten().and_then(|order| order.order) {
                    Some(Order::Assign(assign)) => {
                        self.state.role = assign.role;
                        self.state.role_epoch = assign.epoch;
                        self.state.phase = v1::Phase::Ready.into();
                    }
                    _ => return,
                },
                changed = self.phase.changed() => match changed {
                    Ok(()) => self.state.phase = (*self.phase.borrow_and_update()).into(),
                    Err(_) => return,
                },
                _ = beats.tick() => {}
            }
            let report = v1::InstanceReport { report: Some(Report::Beat(self.state)) };
            if self.reports.send(report).await.is_err() {
                return;
            }
        }
    }
}

/// A `baton-controller`, killed when dropped.
struct Controller {
    child: Child,
    endpoint: String,
}

impl Controller {
    fn start(etcd: &EtcdServer, args: &Args) -> Result<Self, Failed> {
        let settings = [
            "listen=127.0.0.1:0".to_owned(),
            "metrics_listen=127.0.0.1:0".to_owned(),
            "store.kind=etcd".to_owned(),
            format!("store.etcd.endpoints=[\"{}\"]", etcd.endpoint()),
            format!("sessions.beat={}s", args.beat),
            format!("sessions.lease={}s", args.beat * 6),
            format!("sessions.max_instances={}", args.instances),
            "process.log.format=json".to_owned(),
        ];
        let mut child = Command::new(env!("CARGO_BIN_EXE_baton-controller"))
            .args(settings.iter().flat_map(|setting| ["--set", setting]))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut lines = BufReader::new(child.stderr.take().ok_or("no pipe")?).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("\"address\":\"")?;
            rest.split_once('"').map(|(address, _)| address.to_owned())
        });
        let leads = lines.by_ref().map_while(Result::ok).any(|line| line.contains("the term begins"));
        if !leads {
            return Err("baton-controller ended before it led".into());
        }
        // Read on, so that the process never waits for room in the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { child, endpoint: address.ok_or("baton-controller did not say where it listens")? })
    }

    fn proc(&self, file: &str) -> Result<String, Failed> {
        Ok(std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id()))?)
    }

    /// Seconds of processor time so far.
    fn cpu(&self) -> Result<f64, Failed> {
        let stat = self.proc("stat")?;
        let fields: Vec<&str> =
            stat.rsplit_once(')').ok_or("an odd /proc/PID/stat")?.1.split_whitespace().collect();
        // utime and stime, the 14th and 15th fields of proc(5); the first two stand before the parenthesis.
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
    }

    /// MiB that are resident.
    fn memory(&self) -> Result<u64, Failed> {
        let status = self.proc("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? / 1024)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
