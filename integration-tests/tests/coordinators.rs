//! Coordinators as operators see them: who is there, what they have served, over which links; and how little it matters
//! to them that somebody looks.

use baton_integration_tests::{
    Cluster,
    chat::{ask, request},
    eventually,
};
use baton_proto::v1::{self, fleet_admin_client::FleetAdminClient};
use rustix::process::Signal;

/// The one coordinator and the links, once the controller leads and has heard of both.
async fn seen(cluster: &Cluster) -> Option<(v1::Coordinator, Vec<v1::Link>)> {
    let mut admin = FleetAdminClient::connect(format!("http://{}", cluster.controller())).await.ok()?;
    let listed = admin.list_coordinators(v1::ListCoordinatorsRequest {}).await.ok()?.into_inner();
    let links = admin.list_links(v1::ListLinksRequest {}).await.ok()?.into_inner().links;
    assert!(listed.coordinators.len() <= 1, "{listed:?}");
    Some((listed.coordinators.into_iter().next()?, links))
}

fn beat(of: &v1::Coordinator) -> &v1::CoordinatorBeat {
    of.beat.as_ref().expect("a beat")
}

fn spec(of: &v1::Coordinator) -> &v1::CoordinatorSpec {
    of.spec.as_ref().expect("a spec")
}

#[tokio::test]
async fn a_coordinator_and_its_link_are_seen_and_outlive_the_controller() {
    let cluster = Cluster::start(&[]).await;
    let (before, unused) =
        eventually("a coordinator that is listed", || async { seen(&cluster).await }).await;
    assert_eq!(format!("http://{}", spec(&before).http_endpoint), cluster.url());
    assert_eq!(spec(&before).coordinator_id, "coordinator-0");
    let handoffs = |links: &[v1::Link]| links.iter().map(|link| link.handoffs).sum::<u64>();

    let body = request(cluster.model(), "What is the capital of France?", 12, false);
    ask(cluster.url(), &body).await;
    let (served, links) = eventually("a request that is counted", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let one_more = beat(&coordinator).requests == beat(&before).requests + 1;
        (one_more && handoffs(&links) == handoffs(&unused) + 1).then_some((coordinator, links))
    })
    .await;
    assert_eq!(beat(&served).failures, beat(&before).failures);
    assert_eq!(links.len(), 1, "{links:?}");
    assert_eq!(links[0].prefill_instance, cluster.instance_of("prefill").await);
    assert_eq!(links[0].decode_instance, cluster.instance_of("decode").await);
    assert!(links[0].mean_micros > 0 && links[0].failures == 0, "{links:?}");

    let killed = cluster.kill("controller", Signal::KILL);
    let answer = ask(cluster.url(), &body).await;
    assert!(answer.contains("Paris"), "{answer}");
    cluster.assert_restarted("controller", killed).await;
    let (after, links_after) = eventually("the coordinator registered again", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let one_more = beat(&coordinator).requests == beat(&served).requests + 1;
        (one_more && handoffs(&links) == handoffs(&unused) + 2).then_some((coordinator, links))
    })
    .await;
    assert_eq!(spec(&after), spec(&served), "the same process");
    assert_eq!(links_after.len(), 1);

    let killed = cluster.kill("coordinator", Signal::KILL);
    cluster.assert_restarted("coordinator", killed).await;
    let restarted = eventually("the next coordinator in its place", || async {
        let (coordinator, links) = seen(&cluster).await?;
        let later = spec(&coordinator).incarnation > spec(&after).incarnation;
        later.then_some((coordinator, links))
    })
    .await;
    assert_eq!(handoffs(&restarted.1), 0, "links are counted since the process started");
}
