//! Two builds at a time, as while a deployment moves from one to the next: every service is replaced under load, no request
//! fails, and prefill and decode of different builds are paired if they understand each other, and only then.
//!
//! `BATON_TEST_NEXT_BUILD`: a folder with a server that speaks the next version of the handoff protocol and no other, as
//! `deploy/run test` makes it. `BATON_TEST_EARLIER_BUILD`: one with the services of an earlier revision, as
//! `deploy/run test-upgrade` makes it; without it what that would show is left out.

use std::{
    collections::BTreeSet,
    env,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use baton_integration_tests::{Build, Fleet, chat, eventually, required};
use baton_registry::testing::EtcdServer;
use serde_json::Value;
use tokio::task::JoinSet;

/// Streams that are asked for at a time.
const STREAMS: usize = 4;
const TOKENS: u32 = 48;

fn body(client: usize) -> Value {
    let prompt = format!("{} Client {client} asks: what comes next?", chat::long_prompt(60));
    chat::request("SmolLM2-135M-Instruct", &prompt, TOKENS, true)
}

type Answers = [AtomicUsize; STREAMS];

/// How many there are of each client.
fn count(answered: &Answers) -> [usize; STREAMS] {
    answered.each_ref().map(|answers| answers.load(Ordering::Relaxed))
}

/// Clients that stream one answer after the other, and hold each to what was said before anything changed.
struct Load {
    url: Arc<Mutex<String>>,
    /// By each client.
    answered: Arc<Answers>,
    ends: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

impl Load {
    async fn start(url: &str) -> Self {
        let url = Arc::new(Mutex::new(url.to_owned()));
        let (answered, ends) = (Arc::<Answers>::default(), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for client in 0..STREAMS {
            let (expected, error) = Self::ask(&url, client).await;
            assert_eq!(error, None);
            let (url, answered, ends) = (url.clone(), answered.clone(), ends.clone());
            clients.spawn(async move {
                while !ends.load(Ordering::Relaxed) {
                    let (text, error) = Self::ask(&url, client).await;
                    assert_eq!(error, None, "a stream failed");
                    assert_eq!(text, expected, "another text");
                    answered[client].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { url, answered, ends, clients }
    }

    async fn ask(url: &Mutex<String>, client: usize) -> (String, Option<Value>) {
        let url = url.lock().expect("nobody panicked").clone();
        chat::Events::open(&url, &body(client)).await.rest().await
    }

    /// From here on clients go there.
    fn go_to(&self, url: &str) {
        *self.url.lock().expect("nobody panicked") = url.to_owned();
    }

    /// Waits until each client has begun and ended an answer from here on.
    async fn goes_on(&mut self) {
        let Self { answered, clients, .. } = self;
        let before = count(answered);
        // The first may have begun before.
        let more = eventually("two more answers of each client", || async {
            count(answered).iter().zip(&before).all(|(now, before)| *now >= before + 2).then_some(())
        });
        tokio::select! {
            () = more => {}
            ended = clients.join_next() => panic!("a client ended: {ended:?}"),
        }
    }

    /// How many answers there were.
    async fn end(mut self) -> usize {
        self.ends.store(true, Ordering::Relaxed);
        while let Some(ended) = self.clients.join_next().await {
            ended.expect("no client fails");
        }
        count(&self.answered).iter().sum()
    }
}

/// The handoffs that coordinators have seen, by who handed to whom; fails if one did not come about.
async fn handoffs(fleet: &Fleet) -> BTreeSet<(String, String)> {
    let coordinators = eventually("the coordinators", || fleet.ctl("coordinators")).await;
    let links = coordinators.iter().flat_map(|coordinator| coordinator["links"].as_array().expect("links"));
    let name = |link: &Value, end: &str| link[end].as_str().expect("a name").to_owned();
    links
        .map(|link| {
            assert_eq!(link["failures"], 0, "{link}");
            (name(link, "prefill_instance"), name(link, "decode_instance"))
        })
        .collect()
}

/// The reason for which an instance has its role.
async fn reason(fleet: &Fleet, instance: &str) -> String {
    let roles = eventually("roles", || fleet.roles()).await;
    let view = roles.iter().find(|view| view["instance_id"] == instance);
    view.unwrap_or_else(|| panic!("no {instance}: {roles:?}"))["reason"]
        .as_str()
        .expect("a reason")
        .to_owned()
}

async fn etcd() -> (EtcdServer, Vec<String>) {
    let etcd = EtcdServer::start().await;
    let endpoints = vec![etcd.endpoint().to_owned()];
    (etcd, endpoints)
}

/// As a rolling update does it: the new come, then the old leave.
async fn replace_servers(fleet: &mut Fleet, load: &mut Load, next: Build) {
    fleet.change_build(next);
    for (old, new) in [("alpha", "gamma"), ("beta", "delta")] {
        fleet.server(new);
        fleet.serves(new).await;
        load.goes_on().await;
        fleet.stop(old).await;
        load.goes_on().await;
    }
    fleet.has_roles(&["decode", "prefill"]).await;
    load.goes_on().await;
}

/// The handoff protocol has changed, and the new servers do not speak what the old ones do.
#[tokio::test]
async fn builds_that_do_not_understand_each_other_serve_side_by_side() {
    let next = Build::at(&PathBuf::from(required("BATON_TEST_NEXT_BUILD")));
    let (_etcd, endpoints) = etcd().await;
    let mut fleet = Fleet::start(&endpoints, Build::this()).await;
    let mut load = Load::start(fleet.url()).await;

    // Both at full strength.
    fleet.change_build(next);
    fleet.server("gamma");
    fleet.server("delta");
    fleet.has_roles(&["decode", "decode", "prefill", "prefill"]).await;
    let said = reason(&fleet, "gamma").await;
    assert!(said.ends_with("its build is planned apart, with version 2 of the handoff protocol"), "{said}");
    let both = eventually("handoffs of both builds", || async {
        let pairs = handoffs(&fleet).await;
        (pairs.len() >= 2).then_some(pairs)
    })
    .await;
    let of = |name: &str| matches!(name, "gamma" | "delta");
    assert!(both.iter().all(|(prefill, decode)| of(prefill) == of(decode)), "{both:?}");

    // The old leave one by one: the last of them serves alone until it goes, too.
    for old in ["alpha", "beta"] {
        fleet.stop(old).await;
        load.goes_on().await;
    }
    fleet.has_roles(&["decode", "prefill"]).await;
    let pairs = handoffs(&fleet).await;
    assert!(pairs.iter().all(|(prefill, decode)| of(prefill) == of(decode)), "{pairs:?}");
    println!("{} answers, all of them the same before and after; {pairs:?}", load.end().await);
}

/// One after the other, and there is never more than one of each build: the pair of a build alone is one mixed instance.
#[tokio::test]
async fn servers_are_replaced_one_by_one() {
    let next = Build::at(&PathBuf::from(required("BATON_TEST_NEXT_BUILD")));
    let (_etcd, endpoints) = etcd().await;
    let mut fleet = Fleet::start(&endpoints, Build::this()).await;
    let mut load = Load::start(fleet.url()).await;
    replace_servers(&mut fleet, &mut load, next).await;
    println!("{} answers", load.end().await);
}

/// A fleet of an earlier build under load; none: there is no such build.
async fn earlier() -> Option<(EtcdServer, Fleet, Load)> {
    let Some(earlier) = env::var_os("BATON_TEST_EARLIER_BUILD") else {
        println!("left out: no earlier build (deploy/run test-upgrade)");
        return None;
    };
    let (etcd, endpoints) = etcd().await;
    let mut fleet = Fleet::start(&endpoints, Build::at(&PathBuf::from(earlier))).await;
    let mut load = Load::start(fleet.url()).await;
    load.goes_on().await;
    fleet.change_build(Build::this());
    Some((etcd, fleet, load))
}

async fn replace_controllers(fleet: &mut Fleet, load: &mut Load) {
    for (place, old, new) in [(0, "c0", "d0"), (1, "c1", "d1")] {
        fleet.stop(old).await;
        fleet.controller(place, new);
        load.goes_on().await;
    }
    fleet.has_roles(&["decode", "prefill"]).await;
}

async fn replace_coordinator(fleet: &mut Fleet, load: &mut Load) {
    fleet.coordinator("next");
    fleet.is_ready().await;
    load.go_to(fleet.url());
    // Whoever was about to go to the old one has gone.
    load.goes_on().await;
    fleet.stop("coordinator").await;
    load.goes_on().await;
}

/// Old and new understand each other: meanwhile they are one pool, and hand caches across.
async fn replace_pool(fleet: &mut Fleet, load: &mut Load) {
    fleet.server("gamma");
    fleet.server("delta");
    fleet.has_roles(&["decode", "decode", "prefill", "prefill"]).await;
    let of = |name: &str| matches!(name, "gamma" | "delta");
    eventually("a handoff from one build to the other", || async {
        handoffs(fleet).await.iter().any(|(prefill, decode)| of(prefill) != of(decode)).then_some(())
    })
    .await;
    for old in ["alpha", "beta"] {
        fleet.stop(old).await;
        load.goes_on().await;
    }
    fleet.has_roles(&["decode", "prefill"]).await;
}

#[tokio::test]
async fn an_earlier_build_is_replaced_by_this_one() {
    let Some((_etcd, mut fleet, mut load)) = earlier().await else { return };
    replace_controllers(&mut fleet, &mut load).await;
    replace_coordinator(&mut fleet, &mut load).await;
    replace_pool(&mut fleet, &mut load).await;
    println!("{} answers", load.end().await);
}

/// With the other order, each service of either build has met each of the other: what replaces all at once meets nothing else.
#[tokio::test]
async fn an_earlier_build_is_replaced_in_the_other_order() {
    let Some((_etcd, mut fleet, mut load)) = earlier().await else { return };
    replace_pool(&mut fleet, &mut load).await;
    replace_coordinator(&mut fleet, &mut load).await;
    replace_controllers(&mut fleet, &mut load).await;
    println!("{} answers", load.end().await);
}
