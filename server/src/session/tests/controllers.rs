//! Several controllers: who is called, how soon, and how the silence of the one that leads is noticed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use tokio::net::TcpStream;

use super::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A controller that does not lead, and names the one that does.
struct Standby {
    leader: Option<String>,
    calls: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl v1::control_server::Control for Standby {
    type CoordinateStream = ReceiverStream<Result<v1::CoordinatorOrder, Status>>;

    async fn coordinate(
        &self,
        _: Request<Streaming<v1::CoordinatorReport>>,
    ) -> Result<Response<Self::CoordinateStream>, Status> {
        Err(Status::unimplemented("for servers only"))
    }

    type SessionStream = Answers;

    async fn session(&self, _: Request<Streaming<v1::InstanceReport>>) -> Result<Response<Answers>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut refusal = Status::unavailable("this controller does not lead");
        if let Some(leader) = &self.leader {
            refusal.metadata_mut().insert(LEADER_METADATA, leader.parse().expect("an address"));
        }
        Err(refusal)
    }
}

async fn standby(leader: Option<&str>) -> (String, Arc<AtomicUsize>) {
    let calls = Arc::default();
    (serve(Standby { leader: leader.map(str::to_owned), calls: Arc::clone(&calls) }).await, calls)
}

/// An address at which nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").to_string()
}

async fn in_time<T>(what: &str, waited: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, waited).await.unwrap_or_else(|_| panic!("{what} never came"))
}

#[tokio::test]
async fn goes_straight_to_the_leader_that_a_standby_names() {
    let (accepted, sessions) = mpsc::channel(1);
    let leader = serve(Scripted(accepted)).await;
    let (named, calls) = standby(Some(&leader)).await;
    let mut rig = rig_calling(vec![named], sessions);
    in_time("the session", rig.sessions.recv()).await.expect("a session");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_leader_that_is_named_and_gone_keeps_nobody() {
    let (accepted, sessions) = mpsc::channel(1);
    let leader = serve(Scripted(accepted)).await;
    let (named, calls) = standby(Some(&nobody().await)).await;
    let mut rig = rig_calling(vec![named, leader], sessions);
    in_time("the session", rig.sessions.recv()).await.expect("a session");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn all_controllers_are_asked_before_a_pause_grows() {
    let (mut controllers, mut calls) = (Vec::new(), Vec::new());
    for _ in 0..6 {
        let (address, called) = standby(None).await;
        controllers.push(address);
        calls.push(called);
    }
    let since = Instant::now();
    let _rig = rig_calling(controllers, mpsc::channel(1).1);
    // Four rounds with pauses of at most 100, 200 and 400 ms between them.
    in_time("the fourth round", async {
        while calls.iter().any(|called| called.load(Ordering::SeqCst) < 4) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(since.elapsed() < Duration::from_secs(3), "it took {:?}", since.elapsed());
}

/// Hands bytes on to a controller and back until it is frozen: then it answers nothing, as a process that was stopped.
async fn freezable(controller: String) -> (String, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (freeze, frozen) = watch::channel(false);
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.expect("a connection");
            let (controller, mut frozen) = (controller.clone(), frozen.clone());
            tokio::spawn(async move {
                let mut far = TcpStream::connect(controller).await.expect("the controller");
                tokio::select! {
                    () = async { let _ = frozen.wait_for(|frozen| *frozen).await; } => std::future::pending().await,
                    _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                }
            });
        }
    });
    (address, freeze)
}

#[tokio::test]
async fn a_frozen_controller_is_noticed_well_before_the_lease_ends() {
    let (beat_millis, lease) = (200, Duration::from_secs(2));
    let (accepted, sessions) = mpsc::channel(1);
    let leader = serve(Scripted(accepted)).await;
    let (through, freeze) = freezable(leader.clone()).await;
    let mut rig = rig_calling(vec![leader, through], sessions);
    let next = async |rig: &mut Rig| {
        let (mut reports, orders) = in_time("a session", rig.sessions.recv()).await.expect("a session");
        hello(&mut reports).await;
        orders.send(welcome(beat_millis)).await.expect("sent");
        report(&mut reports).await;
        (reports, orders)
    };
    // The first session tells the lease; it breaks, and the next goes to the controller that will freeze.
    drop(next(&mut rig).await);
    let _held = next(&mut rig).await;
    let since = Instant::now();
    freeze.send_replace(true);
    next(&mut rig).await;
    assert!(since.elapsed() < lease, "noticed after {:?}", since.elapsed());
}
