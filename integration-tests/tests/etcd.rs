//! What becomes of a fleet when its etcd loses members or runs out of space: changes stop, traffic goes on, and all is
//! well again when etcd is.

use baton_integration_tests::{Build, Fleet, eventually, process};
use baton_registry::{KeyRange, Revision, Store, StoreError, Txn, keys, testing::EtcdServer};
use rustix::process::Signal;
use serde_json::{Value, json};

fn endpoints(members: &[EtcdServer]) -> Vec<String> {
    members.iter().map(|member| member.endpoint().to_owned()).collect()
}

/// The index of the member that leads etcd.
async fn leading(members: &[EtcdServer]) -> usize {
    eventually("a member of etcd that leads", || async {
        for (index, member) in members.iter().enumerate().filter(|(_, member)| member.pid().is_some()) {
            let metrics = reqwest::get(format!("http://{}/metrics", member.endpoint()))
                .await
                .ok()?
                .text()
                .await
                .ok()?;
            if baton_integration_tests::metrics::sum(&metrics, "etcd_server_is_leader", "") == Some(1.0) {
                return Some(index);
            }
        }
        None
    })
    .await
}

fn sorted_epochs(roles: &[Value]) -> Vec<(String, u64)> {
    let entry =
        |view: &Value| (view["instance_id"].to_string(), view["observed_epoch"].as_u64().expect("a number"));
    let mut epochs: Vec<_> = roles.iter().map(entry).collect();
    epochs.sort();
    epochs
}

fn sorted_without(epochs: &[(String, u64)], name: &str) -> Vec<(String, u64)> {
    epochs.iter().filter(|(id, _)| !id.contains(name)).cloned().collect()
}

/// For how long the coordinator has gone on with what it knew.
async fn stale_seconds(fleet: &Fleet) -> Option<f64> {
    let metrics = reqwest::get(format!("{}/metrics", fleet.url())).await.ok()?.text().await.ok()?;
    baton_integration_tests::metrics::sum(&metrics, "baton_coordinator_fleet_stale_seconds", "")
}

#[tokio::test]
async fn one_member_may_freeze_or_die_and_two_stop_changes_only() {
    let mut members = EtcdServer::start_cluster(3).await;
    let mut fleet = Fleet::start(&endpoints(&members), Build::this()).await;
    let before = sorted_epochs(&fleet.roles().await.expect("a leader"));

    // etcd's leader freezes, with all connections to it as they are: the others go on, roles can be given.
    let frozen = leading(&members).await;
    let frozen = members[frozen].pid().expect("it runs");
    process::signal(frozen, Signal::STOP);
    fleet.answers().await;
    fleet.server("gamma");
    fleet.serves("gamma").await;
    process::signal(frozen, Signal::CONT);
    let after = sorted_epochs(&fleet.roles().await.expect("a leader"));
    assert_eq!(sorted_without(&after, "gamma"), before, "nobody else was moved");

    // It dies, and the same holds.
    let first = leading(&members).await;
    members[first].kill();
    // Nobody can resume a watch from before this: whoever watched there lists again.
    compact(members.iter().find(|member| member.pid().is_some()).expect("two live")).await;
    fleet.answers().await;
    fleet.server("delta");
    fleet.serves("delta").await;
    let before = after;
    let after = sorted_epochs(&fleet.roles().await.expect("a leader"));
    assert_eq!(sorted_without(&after, "delta"), before, "nobody else was moved");

    // Without a majority nothing is changed, after a while nobody leads, and requests are answered all the same.
    let second = leading(&members).await;
    members[second].kill();
    eventually("controllers that lead no more", || async { fleet.roles().await.is_none().then_some(()) })
        .await;
    fleet.answers().await;
    fleet.server("epsilon");
    fleet.says(&["the state store cannot be reached"]).await;
    eventually("a view of the fleet that is stale", || async {
        stale_seconds(&fleet).await.filter(|seconds| *seconds > 0.0)
    })
    .await;
    fleet.answers().await;

    for member in [first, second] {
        members[member].restart().await;
    }
    eventually("one that is current", || async {
        stale_seconds(&fleet).await.filter(|seconds| *seconds == 0.0)
    })
    .await;
    fleet.has_roles(&["decode", "decode", "decode", "prefill", "prefill"]).await;
    let epochs = sorted_epochs(&fleet.roles().await.expect("a leader"));
    let kept = epochs.iter().filter(|entry| after.contains(entry)).count();
    assert_eq!(kept, 4, "those that had a role keep it: {after:?}, {epochs:?}");
}

/// Forgets all history.
async fn compact(member: &EtcdServer) {
    let store = member.store();
    let listing = eventually("an etcd that can be read", || async {
        store.range(KeyRange::prefix(keys::ROOT)).await.ok()
    })
    .await;
    store.compact(listing.revision).await.expect("etcd compacts");
}

/// Fills etcd until it refuses, and says what the store made of that.
async fn fill(store: &dyn Store) -> StoreError {
    for index in 0..1000 {
        let txn = Txn::new().put(format!("/fill/{index}"), vec![7; 1 << 20], None);
        match store.txn(txn).await {
            Ok(_) => {}
            Err(error @ StoreError::Refused(_)) => return error,
            Err(error) => panic!("filling: {error}"),
        }
    }
    panic!("etcd has no quota");
}

/// What an operator does with etcdctl: compact, defragment, disarm.
async fn make_room(members: &[EtcdServer]) {
    let etcd = &members[0];
    let store = etcd.store();
    let Revision(revision) = store.txn(Txn::new().delete_prefix("/fill/")).await.expect("deleting").revision;
    let post_to = async |etcd: &EtcdServer, what: &str, body: Value| {
        let url = format!("http://{}/v3/{what}", etcd.endpoint());
        let answer = reqwest::Client::new().post(url).json(&body).send().await.expect("etcd answers");
        assert!(answer.status().is_success(), "{what}: {:?}", answer.text().await);
        answer.json::<Value>().await.expect("JSON")
    };
    post_to(etcd, "kv/compaction", json!({"revision": revision.to_string(), "physical": true})).await;
    for member in members {
        post_to(member, "maintenance/defragment", json!({})).await;
    }
    let alarms = post_to(etcd, "maintenance/alarm", json!({"action": "GET"})).await;
    for alarm in alarms["alarms"].as_array().expect("an alarm stands") {
        let member = &alarm["memberID"];
        let disarm = json!({"action": "DEACTIVATE", "memberID": member, "alarm": "NOSPACE"});
        post_to(etcd, "maintenance/alarm", disarm).await;
    }
}

#[tokio::test]
async fn a_full_etcd_is_called_by_its_name_and_stops_changes_only() {
    let quota = (24 << 20).to_string();
    let members = EtcdServer::start_cluster_with(3, &["--quota-backend-bytes", &quota]).await;
    let mut fleet = Fleet::start(&endpoints(&members), Build::this()).await;
    let store = members[0].store();

    let refused = fill(&store).await.to_string();
    for word in ["NOSPACE", "compact", "defragment", "disarm"] {
        assert!(refused.contains(word), "no {word} in: {refused}");
    }
    fleet.answers().await;
    // A third would be given a role, which cannot be written.
    fleet.server("gamma");
    fleet.says(&["NOSPACE", "disarm"]).await;
    fleet.answers().await;
    let roles = store.range(KeyRange::prefix(keys::ROLES)).await.expect("it can be read").items;
    assert_eq!(roles.len(), 2);

    // Nobody can take over while it is full, and traffic does not need that.
    for controller in ["c0", "c1"] {
        fleet.kill(controller);
    }
    fleet.answers().await;
    for (index, controller) in ["d0", "d1"].into_iter().enumerate() {
        fleet.controller(index, controller);
    }
    fleet.says(&["cannot stand for leadership", "NOSPACE", "disarm"]).await;
    fleet.answers().await;

    make_room(&members).await;
    fleet.has_roles(&["decode", "decode", "prefill"]).await;
}
