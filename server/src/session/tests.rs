//! A scripted controller drives the session.

use super::*;
use baton_process::{Tls, tls};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status};

type Answers = ReceiverStream<Result<v1::ControllerOrder, Status>>;
type Accepted = (Streaming<v1::InstanceReport>, mpsc::Sender<Result<v1::ControllerOrder, Status>>);

/// Hands every session to the test.
struct Scripted(mpsc::Sender<Accepted>);

#[tonic::async_trait]
impl v1::control_server::Control for Scripted {
    type CoordinateStream = ReceiverStream<Result<v1::CoordinatorOrder, Status>>;

    async fn coordinate(
        &self,
        _: Request<Streaming<v1::CoordinatorReport>>,
    ) -> Result<Response<Self::CoordinateStream>, Status> {
        Err(Status::unimplemented("for servers only"))
    }

    type SessionStream = Answers;

    async fn session(
        &self,
        request: Request<Streaming<v1::InstanceReport>>,
    ) -> Result<Response<Answers>, Status> {
        let (answer, answers) = mpsc::channel(8);
        self.0
            .send((request.into_inner(), answer))
            .await
            .map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

struct Rig {
    sessions: mpsc::Receiver<Accepted>,
    events: mpsc::Receiver<Event>,
    role: watch::Sender<RoleView>,
    shutdown: CancellationToken,
    settled: oneshot::Receiver<Incarnation>,
    done: tokio::task::JoinHandle<Result<(), Replaced>>,
}

/// Of the process before its incarnation is raised.
const OWN: Incarnation = Incarnation(5);

fn spec() -> InstanceSpec {
    let spec = v1::InstanceSpec {
        instance_id: "s".into(),
        incarnation: OWN.0,
        group: "g".into(),
        model: Some(v1::ModelIdentity { name: "m".into(), ..Default::default() }),
        kv_layout: Some(v1::KvLayout::default()),
        inference_endpoint: "127.0.0.1:1".into(),
        handoff_endpoint: "127.0.0.1:2".into(),
        ..Default::default()
    };
    spec.try_into().expect("a spec")
}

/// Serves a controller; returns where.
async fn serve(controller: impl v1::control_server::Control) -> String {
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

async fn rig() -> Rig {
    let (accepted, sessions) = mpsc::channel(1);
    rig_calling(vec![serve(Scripted(accepted)).await], sessions)
}

/// A session that calls these controllers, one of which may be the script that hands `sessions` over.
fn rig_calling(controllers: Vec<String>, sessions: mpsc::Receiver<Accepted>) -> Rig {
    let (role, role_seen) = watch::channel(RoleView::default());
    let (events_in, events) = mpsc::channel(8);
    let shutdown = CancellationToken::new();
    let (settle, settled) = oneshot::channel();
    let session = Session {
        dial: Tls::plaintext().dial(tls::Role::Controller),
        spec: spec(),
        settle: Some(settle),
        controllers,
        role: role_seen,
        load: watch::channel(Load::default()).1,
        events: events_in,
        shutdown: shutdown.clone(),
    };
    Rig { sessions, events, role, shutdown, settled, done: tokio::spawn(session.run()) }
}

fn welcome(beat_millis: u32) -> Result<v1::ControllerOrder, Status> {
    let welcome = v1::controller_order::Welcome {
        controller_id: "c".into(),
        leader_epoch: 1,
        beat_millis,
        lease_millis: 10 * beat_millis,
    };
    Ok(v1::ControllerOrder { order: Some(v1::controller_order::Order::Welcome(welcome)) })
}

async fn report(reports: &mut Streaming<v1::InstanceReport>) -> v1::instance_report::Report {
    reports.message().await.expect("a report").expect("an open stream").report.expect("a report")
}

async fn hello(reports: &mut Streaming<v1::InstanceReport>) -> v1::InstanceHello {
    match report(reports).await {
        v1::instance_report::Report::Hello(hello) => hello,
        other => panic!("expected hello, got {other:?}"),
    }
}

#[tokio::test]
async fn says_hello_beats_takes_orders_and_says_goodbye() {
    let mut rig = rig().await;
    let (mut reports, orders) = rig.sessions.recv().await.expect("a session");
    let first = hello(&mut reports).await;
    assert_eq!(first.spec.expect("a spec").instance_id, "s");
    assert_eq!(first.beat.expect("a beat").phase(), v1::Phase::Loading);
    // A long interval: the beat after a change of phase must not wait for it.
    orders.send(welcome(10_000)).await.expect("sent");
    let v1::instance_report::Report::Beat(_) = report(&mut reports).await else { panic!("expected a beat") };
    rig.role.send_modify(|view| view.phase = Phase::Waiting);
    match report(&mut reports).await {
        v1::instance_report::Report::Beat(beat) => assert_eq!(beat.phase(), v1::Phase::Waiting),
        other => panic!("expected a beat, got {other:?}"),
    }
    let assign = v1::AssignRole {
        role: v1::Role::None.into(),
        epoch: 7,
        drain_millis: 5,
        cordoned: true,
        ..Default::default()
    };
    let order = v1::ControllerOrder { order: Some(v1::controller_order::Order::Assign(assign)) };
    orders.send(Ok(order)).await.expect("sent");
    let drain = Duration::from_millis(5);
    let expected = Assignment { role: Role::None, epoch: RoleEpoch(7), drain, cordoned: true };
    assert_eq!(rig.events.recv().await, Some(Event::Assigned(expected)));
    rig.shutdown.cancel();
    loop {
        match report(&mut reports).await {
            v1::instance_report::Report::Beat(_) => {}
            v1::instance_report::Report::Bye(_) => break,
            other => panic!("expected goodbye, got {other:?}"),
        }
    }
    drop(orders);
    assert_eq!(rig.done.await.expect("the session ends"), Ok(()));
}

#[tokio::test]
async fn comes_back_with_its_role_after_a_break() {
    let mut rig = rig().await;
    let (mut reports, orders) = rig.sessions.recv().await.expect("a session");
    hello(&mut reports).await;
    orders.send(welcome(50)).await.expect("sent");
    rig.role.send_replace(RoleView {
        role: Role::Prefill,
        epoch: RoleEpoch(4),
        phase: Phase::Ready,
        load_permille: 1000,
        cordoned: false,
    });
    drop((reports, orders));
    let (mut reports, _orders) = rig.sessions.recv().await.expect("another session");
    let beat = hello(&mut reports).await.beat.expect("a beat");
    assert_eq!((beat.role(), beat.role_epoch, beat.phase()), (v1::Role::Prefill, 4, v1::Phase::Ready));
}

/// A session whose hello is refused because this incarnation is known; returns the hello's own.
async fn refuse(rig: &mut Rig, held_incarnation: u64) -> Incarnation {
    let (mut reports, orders) = rig.sessions.recv().await.expect("a session");
    let own = hello(&mut reports).await.spec.expect("a spec").incarnation;
    let refuse = v1::Refuse { reason: None, held_incarnation };
    orders
        .send(Ok(v1::ControllerOrder { order: Some(v1::controller_order::Order::Refuse(refuse)) }))
        .await
        .expect("sent");
    Incarnation(own)
}

#[tokio::test]
async fn a_refusal_is_tried_again() {
    let mut rig = rig().await;
    assert_eq!(refuse(&mut rig, 0).await, OWN);
    assert_eq!(refuse(&mut rig, OWN.0 - 1).await, OWN);
    rig.sessions.recv().await.expect("another session");
    assert_eq!(rig.settled.await, Ok(OWN));
}

#[tokio::test]
async fn a_start_with_a_clock_that_was_set_back_goes_on_above_the_earlier_one() {
    let mut rig = rig().await;
    assert_eq!(refuse(&mut rig, 100).await, OWN);
    assert_eq!((&mut rig.settled).await, Ok(Incarnation(101)));
    // Settled: whoever is later now has replaced this process.
    assert_eq!(refuse(&mut rig, 200).await, Incarnation(101));
    assert_eq!(replaced(rig).await, Replaced { own: Incarnation(101), by: Incarnation(200) });
}

#[tokio::test]
async fn a_process_that_is_known_or_at_work_never_changes_its_incarnation() {
    let mut welcomed = rig().await;
    let (mut reports, orders) = welcomed.sessions.recv().await.expect("a session");
    hello(&mut reports).await;
    orders.send(welcome(50)).await.expect("sent");
    assert_eq!((&mut welcomed.settled).await, Ok(OWN));
    drop((reports, orders));
    // A twin of an earlier start is nothing to this one.
    assert_eq!(refuse(&mut welcomed, OWN.0 - 1).await, OWN);
    assert_eq!(refuse(&mut welcomed, 100).await, OWN);
    assert_eq!(replaced(welcomed).await, Replaced { own: OWN, by: Incarnation(100) });

    let mut at_work = rig().await;
    at_work.settled.close();
    assert_eq!(refuse(&mut at_work, 100).await, OWN);
    assert_eq!(replaced(at_work).await, Replaced { own: OWN, by: Incarnation(100) });
}

#[tokio::test]
async fn a_process_that_is_replaced_in_the_midst_of_a_session_ends_it() {
    let mut rig = rig().await;
    let (mut reports, orders) = rig.sessions.recv().await.expect("a session");
    hello(&mut reports).await;
    orders.send(welcome(50)).await.expect("sent");
    let refuse = v1::Refuse { reason: None, held_incarnation: 9 };
    let order = v1::ControllerOrder { order: Some(v1::controller_order::Order::Refuse(refuse)) };
    orders.send(Ok(order)).await.expect("sent");
    assert_eq!(replaced(rig).await, Replaced { own: OWN, by: Incarnation(9) });
}

/// Why the session ends.
async fn replaced(rig: Rig) -> Replaced {
    let ended = tokio::time::timeout(Duration::from_secs(10), rig.done).await.expect("it goes on");
    ended.expect("no panic").expect_err("it ends well")
}

#[tokio::test]
async fn progress_of_loading_goes_with_the_regular_beats() {
    let mut rig = rig().await;
    let (mut reports, orders) = rig.sessions.recv().await.expect("a session");
    hello(&mut reports).await;
    // The first beat comes at once, the next in ten seconds.
    orders.send(welcome(10_000)).await.expect("sent");
    report(&mut reports).await;
    for permille in 1..=100 {
        rig.role.send_modify(|view| view.load_permille = permille);
        tokio::task::yield_now().await;
    }
    rig.role.send_modify(|view| view.phase = Phase::Waiting);
    let v1::instance_report::Report::Beat(beat) = report(&mut reports).await else {
        panic!("expected a beat")
    };
    assert_eq!((beat.phase(), beat.load_permille), (v1::Phase::Waiting, 100));
}

mod controllers;

#[test]
fn pauses_grow_to_a_bound_and_are_spread() {
    let longest = Duration::from_secs(1);
    assert_eq!(pause(0, longest, 0.0), Duration::from_millis(50));
    assert_eq!(pause(1, longest, 0.0), Duration::from_millis(100));
    assert!(pause(3, longest, 0.9) > pause(3, longest, 0.1));
    assert_eq!(pause(60, longest, 1.0), longest);
}
