//! A fleet at load, whose processes are killed and frozen, drained and cut off, at random: prefill, decode,
//! coordinators, controllers and members of etcd. Every request is answered, every answer is the one of an undisturbed
//! run, and at the end nobody holds anything.
//!
//! `short` runs for 45 seconds with a seed that does not change; `long`, which is run when asked for, for ten. Both listen
//! to BATON_CHAOS_SECONDS and BATON_CHAOS_SEED, and keep all logs in BATON_CHAOS_DIR, an empty folder. The seed gives the
//! schedule: which fault is possible when, and what runs at that moment, is up to the machine.

mod answers;
mod clients;
mod faults;
mod fleet;
mod net;
mod report;

use std::{
    env,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use answers::questions;
use clients::{Flight, Known, Service};
use faults::Schedule;
use fleet::Fleet;
use futures::StreamExt;
use report::Moves;

/// Of one run's clients; each asks one thing after the other.
const CLIENTS: u64 = 8;
const SEED: u64 = 6;
/// So many of the requests that took longest are told.
const SLOWEST: usize = 5;
/// For blocks and legs to come back once nothing is asked any more: the lease of a handoff, and more.
const FREE_WITHIN: Duration = Duration::from_secs(30);

#[test]
fn short() {
    run("short", 45);
}

#[test]
#[ignore = "takes ten minutes"]
fn long() {
    run("long", 600);
}

fn setting(variable: &str, default: u64) -> u64 {
    env::var(variable).map_or(default, |value| {
        value.parse().unwrap_or_else(|_| panic!("{variable}: expected a number, not `{value}`"))
    })
}

fn run(test: &str, seconds: u64) {
    if let Some(passed) = net::entered(test) {
        assert!(passed, "see above");
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(chaos(
        Duration::from_secs(setting("BATON_CHAOS_SECONDS", seconds)),
        setting("BATON_CHAOS_SEED", SEED),
    ));
}

/// The answers when nothing happens.
async fn undisturbed(urls: &[String]) -> Vec<Known> {
    let client = clients::client();
    let asked = questions().into_iter().enumerate().map(|(index, question)| {
        let (client, url) = (client.clone(), urls[index % urls.len()].clone());
        async move {
            let answer = answers::ask(&client, &url, &question, |_| {}).await;
            let answer = answer.unwrap_or_else(|why| panic!("{}: {why}", question.name));
            assert!(answer.is_whole(), "{}: {answer:?}", question.name);
            (question, answer)
        }
    });
    futures::stream::iter(asked).buffered(4).collect().await
}

async fn chaos(lasts: Duration, seed: u64) {
    // Kept if anything fails: a panic leaves it, too.
    let own = env::var_os("BATON_CHAOS_DIR").map(PathBuf::from);
    let dir = own.clone().unwrap_or_else(|| tempfile::tempdir().expect("a temporary directory").keep());
    eprintln!("seed {seed}, {lasts:?}; logs are in {}", dir.display());
    let mut fleet = Fleet::start(&dir).await;
    let urls = fleet.coordinators();
    let known = Arc::new(undisturbed(&urls).await);
    eprintln!("{} answers are known", known.len());

    let (service, moves) = (Arc::new(Service::new(urls.clone())), Arc::new(Moves::default()));
    let watches = [
        tokio::spawn({
            let service = service.clone();
            async move { service.watch().await }
        }),
        tokio::spawn({
            let moves = moves.clone();
            async move { moves.watch(&urls).await }
        }),
    ];
    let until = Instant::now() + lasts;
    let client = |number| tokio::spawn(service.clone().client(known.clone(), seed ^ (number << 32), until));
    let asking: Vec<_> = (1..=CLIENTS).map(client).collect();
    let (faults, ended) = Schedule::new(&mut fleet, &service, seed).run(until).await;
    let (mut flights, mut failures): (Vec<Flight>, Vec<String>) = Default::default();
    for client in asking {
        if !ended.is_empty() {
            client.abort(); // what it could not have is not what was wrong
            continue;
        }
        flights.extend(client.await.expect("no client panics"));
    }
    flights.sort_by_key(Flight::took);
    // A run in which next to nothing happened shows nothing.
    let (seconds, harmed) =
        (lasts.as_secs() as usize, faults.iter().filter(|fault| fault.of_a_server).count());
    let few = faults.len() < seconds / 12 || harmed == 0 || flights.len() < seconds / 3;
    if ended.is_empty() && few {
        let (faults, flights) = (faults.len(), flights.len());
        failures
            .push(format!("only {faults} faults, {harmed} of servers, and {flights} requests in {lasts:?}"));
    }
    let at = |flight: &Flight| (flight.began - (until - lasts)).as_secs_f64();
    let told = |flight: &Flight| format!("begun at {:.2} s: {}", at(flight), flight.told);
    let wrong = |flight: &Flight| Some(format!("{}: {}", told(flight), flight.failure.as_ref()?));
    failures.extend(flights.iter().filter_map(wrong));
    eprintln!("\n{}\n", report::table(&faults, &flights, &moves));
    flights.iter().rev().take(SLOWEST).for_each(|flight| eprintln!("slow: {}", told(flight)));

    // Whoever ended by itself never will be well, and what the others hold says nothing then.
    if ended.is_empty() {
        fleet.is_whole().await;
        let begin = Instant::now();
        let mut held = report::held(&fleet).await;
        while !held.is_empty() && begin.elapsed() < FREE_WITHIN {
            tokio::time::sleep(Duration::from_millis(200)).await;
            held = report::held(&fleet).await;
        }
        failures.extend(held.into_iter().map(|held| format!("{FREE_WITHIN:?} after the last answer {held}")));
    }
    failures.extend(ended);
    failures.extend(fleet.panics());
    watches.iter().for_each(tokio::task::JoinHandle::abort);
    drop(fleet);
    assert!(
        failures.is_empty(),
        "{} failures; BATON_CHAOS_SEED={seed}, logs in {}:\n{}",
        failures.len(),
        dir.display(),
        failures.join("\n")
    );
    if own.is_none() {
        std::fs::remove_dir_all(dir).expect("the folder can be removed");
    }
}
