//! Coordinators, as scripts, register with a controller, and operators see them and their links.

use std::time::{Duration, Instant};

use crate::cluster::{Node, PATIENCE, config, on_etcd};
use baton_proto::{
    LEADER_METADATA,
    v1::{self, control_client::ControlClient, coordinator_report::Report},
};
use baton_registry::testing::EtcdServer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

fn spec(id: &str, incarnation: u64) -> v1::CoordinatorSpec {
    v1::CoordinatorSpec {
        coordinator_id: id.into(),
        incarnation,
        http_endpoint: "127.0.0.1:8000".into(),
        admin_endpoint: "127.0.0.1:8001".into(),
        version: "1".into(),
        models: vec![v1::ServedModel { names: vec!["m".into()], revision: "r".into() }],
    }
}

/// A beat of a coordinator that has served so many requests over the one link.
fn beat(requests: u64) -> v1::CoordinatorBeat {
    let link = v1::LinkBeat {
        prefill_instance: "p".into(),
        decode_instance: "d".into(),
        handoffs: requests,
        failures: 1,
        mean_micros: 100 * requests,
    };
    let links = vec![link];
    v1::CoordinatorBeat {
        requests,
        failures: 1,
        running: 2,
        queued: 3,
        draining: false,
        links,
        all_links: true,
    }
}

struct Coordinator {
    reports: mpsc::Sender<v1::CoordinatorReport>,
    orders: Streaming<v1::CoordinatorOrder>,
}

impl Coordinator {
    async fn call(
        endpoint: &str,
        spec: v1::CoordinatorSpec,
        beat: v1::CoordinatorBeat,
    ) -> Result<Self, Status> {
        let client = ControlClient::connect(format!("http://{endpoint}")).await;
        let mut client = client.map_err(|error| Status::unavailable(error.to_string()))?;
        let (reports, receiver) = mpsc::channel(4);
        let hello = v1::CoordinatorHello { spec: Some(spec), beat: Some(beat) };
        reports.try_send(v1::CoordinatorReport { report: Some(Report::Hello(hello)) }).expect("room");
        let mut orders = client.coordinate(ReceiverStream::new(receiver)).await?.into_inner();
        let order = orders.message().await?.expect("an order comes first");
        assert_eq!(order.beat_millis, 100, "as the controller's configuration has it");
        Ok(Self { reports, orders })
    }

    /// Calls until the controller leads.
    async fn join(endpoint: &str, spec: v1::CoordinatorSpec, beat: v1::CoordinatorBeat) -> Self {
        let until = Instant::now() + PATIENCE;
        loop {
            match Self::call(endpoint, spec.clone(), beat.clone()).await {
                Ok(coordinator) => return coordinator,
                Err(status) if status.code() == Code::Unavailable => {}
                Err(status) => panic!("refused: {status}"),
            }
            assert!(Instant::now() < until, "{endpoint} never takes it");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn beat(&self, beat: v1::CoordinatorBeat) {
        let report = v1::CoordinatorReport { report: Some(Report::Beat(beat)) };
        self.reports.send(report).await.expect("the stream stands");
    }

    /// How the controller ends the stream.
    async fn end(&mut self) -> Option<Status> {
        let end = tokio::time::timeout(PATIENCE, self.orders.message()).await.expect("the stream goes on");
        end.map(|order| assert_eq!(order, None, "an order came")).err()
    }
}

async fn listed(node: &Node) -> Result<Vec<v1::Coordinator>, Status> {
    let answer = node.admin().await.list_coordinators(v1::ListCoordinatorsRequest {}).await?;
    Ok(answer.into_inner().coordinators)
}

async fn links(node: &Node) -> Vec<v1::Link> {
    let answer = node.admin().await.list_links(v1::ListLinksRequest {}).await.expect("links");
    answer.into_inner().links
}

/// Waits until the listing is as wanted, and returns it.
async fn until(node: &Node, what: &str, wanted: impl Fn(&[v1::Coordinator]) -> bool) -> Vec<v1::Coordinator> {
    let until = Instant::now() + PATIENCE;
    loop {
        let coordinators = listed(node).await.expect("it leads");
        if wanted(&coordinators) {
            return coordinators;
        }
        assert!(Instant::now() < until, "never came true: {what}; there are {coordinators:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn requests(of: &[v1::Coordinator]) -> Vec<u64> {
    of.iter().map(|coordinator| coordinator.beat.as_ref().expect("a beat").requests).collect()
}

#[tokio::test]
async fn coordinators_are_listed_with_their_beats_and_links_and_leave() {
    let node = Node::start(config());
    let a = Coordinator::join(&node.endpoint, spec("a", 1), beat(1)).await;
    let b = Coordinator::join(&node.endpoint, spec("b", 1), beat(30)).await;
    a.beat(beat(10)).await;
    let both = until(&node, "both and a's beat", |all| requests(all) == [10, 30]).await;
    assert_eq!(both[0].spec, Some(spec("a", 1)));
    assert_eq!(both[0].beat, Some(beat(10)));
    assert!(both[0].registered_unix_millis > 1_700_000_000_000);
    assert!(both[0].last_beat_age_millis < 5_000);
    let link = v1::Link {
        prefill_instance: "p".into(),
        decode_instance: "d".into(),
        handoffs: 40,
        failures: 2,
        mean_micros: (10 * 1000 + 30 * 3000) / 40,
        ..v1::Link::default()
    };
    assert_eq!(links(&node).await, [link]);
    let left = Instant::now();
    drop(a);
    until(&node, "a has left", |all| requests(all) == [30]).await;
    assert!(left.elapsed() < Duration::from_millis(700), "who says goodbye is not waited for");
    drop(b);
    until(&node, "b has left", |all| all.is_empty()).await;
    assert_eq!(links(&node).await, []);
}

#[tokio::test]
async fn answers_fit_a_message_however_many_links_there_are() {
    let mut config = config();
    config.sessions.lease = PATIENCE;
    let node = Node::start(config);
    let long = "x".repeat(60);
    let mut all = Vec::new();
    for coordinator in 0..5_usize {
        let links = (0..4096).map(|number| v1::LinkBeat {
            prefill_instance: format!("{coordinator}-{}{:02}", &long[..55], number % 100),
            decode_instance: format!("{}{:02}", &long[..59], number / 100),
            handoffs: number as u64,
            failures: u64::MAX,
            mean_micros: u64::MAX,
        });
        let beat = v1::CoordinatorBeat { links: links.collect(), ..beat(1) };
        all.push(Coordinator::join(&node.endpoint, spec(&format!("c{coordinator}"), 1), beat).await);
    }
    let listed = listed(&node).await.expect("it leads");
    let links = |of: &v1::Coordinator| of.beat.as_ref().expect("a beat").links.len();
    assert_eq!(listed.iter().map(links).collect::<Vec<_>>(), [16_384 / 5; 5]);
    let answer = node.admin().await.list_links(v1::ListLinksRequest {}).await.expect("links").into_inner();
    assert_eq!((answer.links.len(), answer.left_out), (16_384, 5 * 4096 - 16_384));
    assert!(answer.links.is_sorted_by(|a, b| a.handoffs >= b.handoffs), "the most used come first");
}

#[tokio::test]
async fn a_silent_coordinator_goes_after_its_lease_and_its_stream_is_ended() {
    let node = Node::start(config());
    let mut silent = Coordinator::join(&node.endpoint, spec("a", 1), beat(1)).await;
    let lively = Coordinator::join(&node.endpoint, spec("b", 1), beat(2)).await;
    let beats = async {
        loop {
            lively.beat(beat(2)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let began = Instant::now();
    let end = tokio::select! {
        end = silent.end() => end.expect("a reason"),
        () = beats => unreachable!("it beats for ever"),
    };
    assert_eq!(end.code(), Code::DeadlineExceeded);
    assert!(began.elapsed() > Duration::from_millis(700), "the lease is 800 ms");
    lively.beat(beat(2)).await;
    assert_eq!(requests(&listed(&node).await.expect("it leads")), [2]);
}

#[tokio::test]
async fn a_later_process_takes_the_place_of_an_earlier_one() {
    let node = Node::start(config());
    let mut first = Coordinator::join(&node.endpoint, spec("a", 1), beat(1)).await;
    let _second = Coordinator::join(&node.endpoint, spec("a", 2), beat(2)).await;
    first.beat(beat(1)).await;
    assert_eq!(first.end().await.expect("a reason").code(), Code::AlreadyExists);
    let refused = Coordinator::call(&node.endpoint, spec("a", 1), beat(1)).await.err().expect("a refusal");
    assert_eq!(refused.code(), Code::AlreadyExists);
    let listed = listed(&node).await.expect("it leads");
    assert_eq!(requests(&listed), [2]);
    assert_eq!(listed[0].spec, Some(spec("a", 2)));
}

#[tokio::test]
async fn what_cannot_be_taken_is_refused_by_name() {
    let node = Node::start(config());
    drop(Coordinator::join(&node.endpoint, spec("a", 1), beat(1)).await);
    let call = |spec, beat| Coordinator::call(&node.endpoint, spec, beat);
    let nameless = call(spec("Not A Name", 1), beat(1)).await.err().expect("a refusal");
    assert_eq!(nameless.code(), Code::InvalidArgument);
    let many = v1::CoordinatorBeat { links: vec![beat(1).links[0].clone(); 4097], ..beat(1) };
    let many = call(spec("b", 1), many).await.err().expect("a refusal");
    assert_eq!(many.code(), Code::InvalidArgument);
    assert!(many.message().contains("links"), "{}", many.message());
    let mut later = call(spec("c", 1), beat(1)).await.expect("is good");
    later.beat(v1::CoordinatorBeat { links: vec![v1::LinkBeat::default()], ..beat(1) }).await;
    assert_eq!(later.end().await.expect("a reason").code(), Code::InvalidArgument);
}

#[tokio::test]
async fn the_next_leader_is_called_and_begins_with_nothing() {
    let etcd = EtcdServer::start().await;
    let mut leader = Node::start(on_etcd("c1", &etcd.endpoint()));
    let mut a = Coordinator::join(&leader.endpoint, spec("a", 1), beat(7)).await;
    let standby = Node::start(on_etcd("c2", &etcd.endpoint()));
    let refused = Coordinator::call(&standby.endpoint, spec("a", 1), beat(7)).await.err().expect("a refusal");
    assert_eq!(refused.code(), Code::Unavailable);
    let named = refused.metadata().get(LEADER_METADATA).and_then(|named| named.to_str().ok());
    assert_eq!(named, Some(leader.endpoint.as_str()));
    assert_eq!(listed(&standby).await.expect_err("it does not lead").code(), Code::Unavailable);

    leader.kill();
    a.end().await;
    let _b = Coordinator::join(&standby.endpoint, spec("b", 1), beat(8)).await;
    assert_eq!(requests(&listed(&standby).await.expect("it leads")), [8]);
    let _a = Coordinator::join(&standby.endpoint, spec("a", 1), beat(7)).await;
    assert_eq!(requests(&listed(&standby).await.expect("it leads")), [7, 8]);
}

#[tokio::test]
async fn each_is_told_how_many_they_are_once_that_is_known_and_when_it_changes() {
    async fn told(of: &mut Coordinator) -> u32 {
        let beats = async {
            loop {
                of.reports.send(v1::CoordinatorReport { report: Some(Report::Beat(beat(7))) }).await.ok();
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            order = tokio::time::timeout(PATIENCE, of.orders.message()) => {
                order.expect("nothing is ordered").expect("the stream stands").expect("an order").coordinators
            }
            () = beats => unreachable!("it beats for ever"),
        }
    }
    let node = Node::start(config());
    let mut a = Coordinator::join(&node.endpoint, spec("a", 1), beat(7)).await;
    assert_eq!(told(&mut a).await, 1, "a lease after it came, as others may have come, too");
    let b = Coordinator::join(&node.endpoint, spec("b", 1), beat(7)).await;
    assert_eq!(told(&mut a).await, 2);
    drop(b.reports);
    assert_eq!(told(&mut a).await, 1);
}

#[tokio::test]
async fn a_leader_that_loses_its_store_ends_the_streams_and_lists_nobody() {
    let mut etcd = EtcdServer::start().await;
    let leader = Node::start(on_etcd("c1", &etcd.endpoint()));
    let mut a = Coordinator::join(&leader.endpoint, spec("a", 1), beat(7)).await;
    etcd.kill();
    let beats = async {
        loop {
            let report = v1::CoordinatorReport { report: Some(Report::Beat(beat(7))) };
            a.reports.send(report).await.ok();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // How many there are may be ordered anew meanwhile.
    let reason = async {
        loop {
            match a.orders.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("no reason"),
                Err(status) => break status,
            }
        }
    };
    let reason = tokio::select! {
        reason = tokio::time::timeout(PATIENCE, reason) => reason.expect("the stream goes on"),
        () = beats => unreachable!("it beats for ever"),
    };
    assert_eq!(reason.code(), Code::Unavailable);
    assert_eq!(listed(&leader).await.expect_err("it does not lead").code(), Code::Unavailable);
    etcd.restart().await;
    // The same process leads again, and knows nobody from before.
    let _b = Coordinator::join(&leader.endpoint, spec("b", 1), beat(8)).await;
    assert_eq!(requests(&listed(&leader).await.expect("it leads")), [8]);
}
