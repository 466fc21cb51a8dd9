//! A server that is stopped for longer than its place is kept, and then goes on: the others do without it, and it takes
//! its part again.

use std::time::Duration;

use baton_integration_tests::{
    Cluster,
    chat::{ask, request},
    eventually,
};
use rustix::process::Signal;

#[tokio::test]
async fn a_frozen_server_is_done_without_and_comes_back() {
    let cluster = Cluster::start(&[]).await;
    let body = request(cluster.model(), "What is the capital of France?", 12, false);
    let before = cluster.role_epochs().await;
    let (frozen, other) = (cluster.instance_of("decode").await, cluster.instance_of("prefill").await);

    cluster.kill(&frozen, Signal::STOP);
    eventually("the other serves alone", || async {
        let roles = cluster.role_epochs().await;
        (roles.len() == 1 && roles.get(&other)?.0 == "mixed").then_some(())
    })
    .await;
    let alone = cluster.role_epochs().await;
    assert!(alone[&other].1 > before[&other].1, "{before:?}, {alone:?}");
    let answer = tokio::time::timeout(Duration::from_secs(30), ask(cluster.url(), &body)).await;
    assert!(answer.expect("it is not sent to the frozen one").contains("Paris"));

    // Its session has ended meanwhile: it is the same process, and registers anew.
    let pid = cluster.kill(&frozen, Signal::CONT);
    eventually("both serve again", || async {
        let roles = cluster.role_epochs().await;
        let role = |name: &String| roles.get(name).map(|(role, _)| role.as_str());
        (role(&frozen) == Some("decode") && role(&other) == Some("prefill")).then_some(())
    })
    .await;
    assert_eq!(cluster.pids()[&frozen], pid, "it was not started again");
    let after = cluster.role_epochs().await;
    assert!(
        after[&frozen].1 > before[&frozen].1 && after[&other].1 > alone[&other].1,
        "{before:?}, {after:?}"
    );
    assert!(ask(cluster.url(), &body).await.contains("Paris"));
    cluster.assert_nothing_held().await;
}
