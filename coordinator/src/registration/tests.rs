//! Scripted controllers take the registration.

use baton_process::{Essential, Tls, tls::Role};
use baton_proto::{ApiError, CoordinatorId, ErrorCode, InstanceId, LinkUse, ServedModel};
use baton_registry::Leader;
use prometheus_client::registry::Registry;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::*;
use crate::{config::ApiKeysConfig, handoffs::Handoff, keys::Source};

const PATIENCE: Duration = Duration::from_secs(10);

type Answers = ReceiverStream<Result<v1::CoordinatorOrder, Status>>;

/// A call, until the test lets go of it.
struct Call {
    reports: Streaming<v1::CoordinatorReport>,
    orders: mpsc::Sender<Result<v1::CoordinatorOrder, Status>>,
}

/// Hands every call to the test, or refuses all.
struct Scripted(Result<mpsc::Sender<Call>, (ErrorCode, mpsc::Sender<()>)>);

#[tonic::async_trait]
impl v1::control_server::Control for Scripted {
    type SessionStream = ReceiverStream<Result<v1::ControllerOrder, Status>>;
    async fn session(
        &self,
        _: Request<Streaming<v1::InstanceReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        Err(Status::unimplemented("for coordinators only"))
    }

    type CoordinateStream = Answers;
    async fn coordinate(
        &self,
        request: Request<Streaming<v1::CoordinatorReport>>,
    ) -> Result<Response<Answers>, Status> {
        match &self.0 {
            Ok(calls) => {
                let (orders, answers) = mpsc::channel(8);
                let call = Call { reports: request.into_inner(), orders };
                calls.send(call).await.map_err(|_| Status::unavailable("the test is over"))?;
                Ok(Response::new(ReceiverStream::new(answers)))
            }
            Err((code, counted)) => {
                counted.send(()).await.ok();
                Err(ApiError::new(*code, "as scripted").into())
            }
        }
    }
}

impl Call {
    async fn order(&self, beat_millis: u32) {
        self.answer(v1::CoordinatorOrder { beat_millis, ..Default::default() }).await;
    }

    async fn answer(&self, order: v1::CoordinatorOrder) {
        self.orders.send(Ok(order)).await.expect("it listens");
    }

    /// None at the end of the stream.
    async fn report(&mut self) -> Option<Report> {
        let report = timeout(PATIENCE, self.reports.message()).await.expect("nothing is reported");
        report.ok().flatten().map(|report| report.report.expect("a report of a known kind"))
    }

    async fn hello(&mut self) -> v1::CoordinatorHello {
        match self.report().await {
            Some(Report::Hello(hello)) => hello,
            other => panic!("expected a hello, got {other:?}"),
        }
    }

    async fn beat(&mut self) -> v1::CoordinatorBeat {
        match self.report().await {
            Some(Report::Beat(beat)) => beat,
            other => panic!("expected a beat, got {other:?}"),
        }
    }
}

/// Serves a controller; returns where.
async fn serve(controller: Scripted) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let service = v1::control_server::ControlServer::new(controller);
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
    );
    address
}

async fn controller() -> (String, mpsc::Receiver<Call>) {
    let (calls, taken) = mpsc::channel(1);
    (serve(Scripted(Ok(calls))).await, taken)
}

async fn call(calls: &mut mpsc::Receiver<Call>) -> Call {
    timeout(PATIENCE, calls.recv()).await.expect("nobody calls").expect("the controller is there")
}

fn fleet(endpoint: &str, epoch: u64) -> Arc<FleetSnapshot> {
    let controller_id = "c".to_owned();
    let leader = Leader { controller_id, endpoint: endpoint.to_owned(), epoch: LeaderEpoch(epoch) };
    Arc::new(FleetSnapshot { leader: Some(leader), ..FleetSnapshot::default() })
}

struct Rig {
    metrics: Arc<Metrics>,
    handoffs: Arc<Handoffs>,
    shutdown: CancellationToken,
    stop: CancellationToken,
    done: JoinHandle<()>,
}

fn rig(controllers: Controllers) -> Rig {
    let metrics = Metrics::register(&mut Registry::default());
    let (handoffs, shutdown, stop) =
        (Arc::<Handoffs>::default(), CancellationToken::new(), CancellationToken::new());
    let keys = Source::default();
    let (config, drained) = (ApiKeysConfig::default(), CancellationToken::new());
    let essential = Essential::new(TaskTracker::new(), shutdown.clone());
    let keys = Keys::start(keys, &config, metrics.clone(), drained, &essential);
    let registration = Registration {
        dial: Tls::plaintext().dial(Role::Controller),
        spec: CoordinatorSpec {
            id: CoordinatorId::new("coordinator-3").expect("a good id"),
            incarnation: Incarnation(7),
            http_endpoint: "h:1".into(),
            admin_endpoint: "h:2".into(),
            version: "1".into(),
            models: vec![ServedModel { names: vec!["m".into()], revision: "r".into() }],
        },
        controllers,
        metrics: metrics.clone(),
        handoffs: handoffs.clone(),
        keys,
        shutdown: shutdown.clone(),
        stop: stop.clone(),
    };
    Rig { metrics, handoffs, shutdown, stop, done: tokio::spawn(registration.run()) }
}

impl Rig {
    async fn ends(self) {
        self.stop.cancel();
        timeout(PATIENCE, self.done).await.expect("it goes on").expect("no panic");
    }
}

#[tokio::test]
async fn says_who_it_is_how_it_is_that_it_drains_and_goodbye() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let mut call = call(&mut calls).await;
    let hello = call.hello().await;
    let spec = hello.spec.expect("a spec");
    assert_eq!((spec.coordinator_id.as_str(), spec.models[0].names[0].as_str()), ("coordinator-3", "m"));
    assert_eq!(hello.beat, Some(v1::CoordinatorBeat { all_links: true, ..Default::default() }));

    let (p, d) = (InstanceId::new("p").expect("good"), InstanceId::new("d").expect("good"));
    Handoff::new(&rig.handoffs, &p, &d).done(Some(Duration::from_micros(250)));
    rig.metrics.ended.inc_by(9);
    rig.metrics.failed.inc_by(2);
    rig.metrics.in_flight.set(3);
    rig.metrics.queued.set(4);
    call.order(20).await;
    let link = LinkUse { prefill: p, decode: d, handoffs: 1, failures: 0, mean_micros: 250 };
    let expected = CoordinatorBeat {
        requests: 9,
        failures: 2,
        running: 3,
        queued: 4,
        draining: false,
        links: vec![link],
        all_links: true,
    };
    for _ in 0..3 {
        assert_eq!(call.beat().await, expected.clone().into());
    }
    rig.shutdown.cancel();
    while !call.beat().await.draining {}
    // It lives on until it has drained.
    assert!(call.beat().await.draining);
    let stop = rig.stop.clone();
    stop.cancel();
    while call.report().await.is_some() {}
    drop(call);
    rig.ends().await;
}

#[tokio::test]
async fn who_merges_links_is_told_of_those_that_were_used_since_and_of_all_after_a_break() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let (p, d) = (InstanceId::new("p").expect("good"), InstanceId::new("d").expect("good"));
    Handoff::new(&rig.handoffs, &p, &d).done(None);
    let mut first = call(&mut calls).await;
    let hello = first.hello().await.beat.expect("a beat");
    assert!(hello.all_links && hello.links.len() == 1);
    first.answer(v1::CoordinatorOrder { beat_millis: 20, merges_links: true, coordinators: 0 }).await;
    // It was used long ago by then.
    while !first.beat().await.links.is_empty() {}
    for _ in 0..3 {
        let beat = first.beat().await;
        assert!(!beat.all_links && beat.links.is_empty());
    }
    Handoff::new(&rig.handoffs, &d, &p).failed();
    let told = loop {
        let beat = first.beat().await;
        if !beat.links.is_empty() {
            break beat;
        }
    };
    assert_eq!((told.all_links, told.links.len(), told.links[0].failures), (false, 1, 1));
    drop(first);
    let mut second = call(&mut calls).await;
    let hello = second.hello().await.beat.expect("a beat");
    assert!(hello.all_links && hello.links.len() == 2);
    rig.stop.cancel();
    drop(second);
    rig.ends().await;
}

#[tokio::test]
async fn how_many_coordinators_there_are_is_taken_from_every_order_that_says_it() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let sharers = || rig.metrics.keys.sharers.get();
    assert_eq!(sharers(), 1, "as it is configured");
    let mut call = call(&mut calls).await;
    call.hello().await;
    for (coordinators, known) in [(3, 3), (0, 3), (2, 2)] {
        call.answer(v1::CoordinatorOrder { beat_millis: 20, merges_links: true, coordinators }).await;
        // It reads orders before it beats again.
        call.beat().await;
        call.beat().await;
        assert_eq!(sharers(), known);
    }
    rig.stop.cancel();
    drop(call);
    rig.ends().await;
}

#[tokio::test]
async fn a_later_order_says_anew_how_often_to_beat_and_whether_links_are_merged() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let mut call = call(&mut calls).await;
    call.hello().await;
    // The first beat of this would come later than the test waits.
    call.order(60_000).await;
    call.order(20).await;
    for _ in 0..3 {
        let beat = timeout(Duration::from_secs(5), call.beat()).await.expect("it waits for its first beat");
        assert!(beat.all_links);
    }
    call.answer(v1::CoordinatorOrder { beat_millis: 20, merges_links: true, coordinators: 0 }).await;
    let merged = async { while call.beat().await.all_links {} };
    timeout(PATIENCE, merged).await.expect("it tells all links with every beat");
    rig.stop.cancel();
    drop(call);
    rig.ends().await;
}

#[tokio::test]
async fn a_drain_is_told_at_once() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let mut call = call(&mut calls).await;
    call.hello().await;
    // The first regular beat comes later than the test waits.
    call.order(60_000).await;
    // Until the order has been read the drain would be in a later hello only.
    tokio::time::sleep(Duration::from_millis(50)).await;
    rig.shutdown.cancel();
    let told = timeout(Duration::from_secs(5), call.beat()).await.expect("it waits for its beat");
    assert!(told.draining);
    rig.ends().await;
}

#[tokio::test]
async fn comes_back_after_a_break_and_after_silence() {
    let (address, mut calls) = controller().await;
    let rig = rig(Controllers::One(address));
    let mut first = call(&mut calls).await;
    first.hello().await;
    first.order(20).await;
    first.beat().await;
    drop(first);
    let mut second = call(&mut calls).await;
    second.hello().await;
    // It is never answered.
    let mut third = call(&mut calls).await;
    third.hello().await;
    drop(second);
    third.order(20).await;
    third.beat().await;
    drop(third);
    rig.ends().await;
}

#[tokio::test]
async fn goes_where_the_leaders_record_says_and_stays_while_nobody_is_named() {
    let ((a, mut calls_a), (b, mut calls_b)) = (controller().await, controller().await);
    let (fleet_is, seen) = watch::channel(Arc::<FleetSnapshot>::default());
    let rig = rig(Controllers::Leader(seen));
    fleet_is.send_replace(fleet(&a, 1));
    let mut at_a = call(&mut calls_a).await;
    at_a.hello().await;
    at_a.order(20).await;
    // The record is gone for a while, as when its lease has ended: the stream stands.
    fleet_is.send_replace(Arc::default());
    for _ in 0..3 {
        at_a.beat().await;
    }
    fleet_is.send_replace(fleet(&b, 2));
    let mut at_b = call(&mut calls_b).await;
    at_b.hello().await;
    at_b.order(20).await;
    at_b.beat().await;
    while at_a.report().await.is_some() {}
    // The watch ends with the shutdown; the drain is told all the same.
    drop(fleet_is);
    rig.shutdown.cancel();
    while !at_b.beat().await.draining {}
    drop(at_b);
    rig.ends().await;
}

#[tokio::test]
async fn without_a_leader_it_waits_and_can_be_ended() {
    let (fleet_is, seen) = watch::channel(Arc::<FleetSnapshot>::default());
    let waiting = rig(Controllers::Leader(seen.clone()));
    drop(fleet_is);
    waiting.ends().await;
    // A process that stops before any controller answered is not held up.
    let unreachable = rig(Controllers::One("127.0.0.1:1".into()));
    unreachable.ends().await;
}

#[tokio::test]
async fn who_is_refused_asks_ever_less_often() {
    let (counted, mut counts) = mpsc::channel(1000);
    let address = serve(Scripted(Err((ErrorCode::AlreadyExists, counted)))).await;
    let rig = rig(Controllers::One(address));
    let calls = async {
        let mut times = Vec::new();
        while times.len() < 5 {
            counts.recv().await.expect("the controller is there");
            times.push(Instant::now());
        }
        times
    };
    let times = timeout(PATIENCE, calls).await.expect("it has given up");
    let gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[3] > FIRST_PAUSE * 4, "{gaps:?}");
    rig.ends().await;
}

#[tokio::test]
async fn a_bug_ends_a_call_and_not_the_registration() {
    let bug = async { panic!("as the test wants it") };
    assert!(matches!(survived(bug).await, Err(Broken::Bug)));
    assert!(matches!(survived(async { Err(Broken::Moved) }).await, Err(Broken::Moved)));
    assert!(survived(async { Ok(()) }).await.is_ok());
}
