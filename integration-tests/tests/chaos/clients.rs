//! Clients behind one Service: a request goes to a coordinator that says it is ready. One whose own coordinator was
//! harmed meanwhile is sent again, as it was; of every other the first answer has to come, and has to be the right one.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::sleep;

use crate::answers::{Answer, Question, Times, Unanswered, ask};

/// No answer may take longer, whatever happens.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a client waits for a coordinator that is harmed before it asks another.
const WAITS: Duration = Duration::from_secs(5);
/// How often one request is sent again.
const RESENT_MOST: usize = 8;
/// How often each coordinator is asked whether it is ready.
const PROBE_EVERY: Duration = Duration::from_millis(200);

/// A question with the answer that it has when nothing happens.
pub(crate) type Known = (Question, Answer);

/// A request from the client's first attempt to its answer.
#[derive(Debug, Clone)]
pub(crate) struct Flight {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    /// How often it was sent again because its coordinator was harmed.
    pub(crate) resent: usize,
    /// Longest time between two events of its stream.
    pub(crate) gap: Duration,
    pub(crate) failure: Option<String>,
    /// What was asked, and of which coordinators.
    pub(crate) told: String,
}

impl Flight {
    pub(crate) fn took(&self) -> Duration {
        self.ended - self.began
    }

    pub(crate) fn overlaps(&self, from: Instant, to: Instant) -> bool {
        self.began < to && self.ended > from
    }
}

#[derive(Debug, Default)]
struct Standing {
    ready: bool,
    /// When it was harmed, and when it was well again.
    absences: Vec<(Instant, Option<Instant>)>,
}

/// The coordinators as clients find them.
pub(crate) struct Service {
    urls: Vec<String>,
    standings: Mutex<Vec<Standing>>,
}

impl Service {
    pub(crate) fn new(urls: Vec<String>) -> Self {
        let standings = urls.iter().map(|_| Standing { ready: true, ..Standing::default() }).collect();
        Self { urls, standings: Mutex::new(standings) }
    }

    fn with<T>(&self, coordinator: usize, what: impl FnOnce(&mut Standing) -> T) -> T {
        what(&mut self.standings.lock().expect("nobody panics with it")[coordinator])
    }

    /// It is about to be harmed.
    pub(crate) fn gone(&self, coordinator: usize) {
        self.with(coordinator, |standing| standing.absences.push((Instant::now(), None)));
    }

    /// It is well again.
    pub(crate) fn back(&self, coordinator: usize) {
        let end = |standing: &mut Standing| {
            let open = standing.absences.iter_mut().filter(|(_, until)| until.is_none());
            open.for_each(|(_, until)| *until = Some(Instant::now()));
        };
        self.with(coordinator, end);
    }

    fn was_absent(&self, coordinator: usize, since: Instant) -> bool {
        let ended_before = |until: &Option<Instant>| until.is_some_and(|until| until < since);
        self.with(coordinator, |standing| standing.absences.iter().any(|(_, until)| !ended_before(until)))
    }

    fn is_absent(&self, coordinator: usize) -> bool {
        self.with(coordinator, |standing| standing.absences.iter().any(|(_, until)| until.is_none()))
    }

    /// Does what a Service does: keeps up to date who is ready. Runs until it is dropped.
    pub(crate) async fn watch(&self) {
        let client = client();
        loop {
            let ready = self.urls.iter().map(async |url| {
                let asked = client.get(format!("{url}/readiness")).timeout(3 * PROBE_EVERY).send().await;
                asked.is_ok_and(|answer| answer.status().is_success())
            });
            for (coordinator, ready) in join_all(ready).await.into_iter().enumerate() {
                self.with(coordinator, |standing| standing.ready = ready);
            }
            sleep(PROBE_EVERY).await;
        }
    }

    /// One that is ready, as soon as there is one; none in all the time that an answer may take.
    async fn pick(&self, rng: &mut StdRng) -> Option<usize> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let ready = |coordinator: &usize| self.with(*coordinator, |standing| standing.ready);
            let ready: Vec<_> = (0..self.urls.len()).filter(ready).collect();
            if !ready.is_empty() {
                return Some(ready[rng.random_range(0..ready.len())]);
            }
            sleep(PROBE_EVERY / 4).await;
        }
        None
    }

    /// One attempt; the longest gap beside it.
    async fn attempt(
        &self,
        client: &reqwest::Client,
        coordinator: usize,
        question: &Question,
    ) -> (Result<Answer, Unanswered>, Duration) {
        let began = Instant::now();
        let times = Mutex::new(Times { last: began, gap: Duration::ZERO });
        let now = || *times.lock().expect("nobody panics with it");
        let answered = ask(client, &self.urls[coordinator], question, |came| {
            *times.lock().expect("nobody panics with it") = came;
        });
        let given_up = async {
            loop {
                let limit = if self.is_absent(coordinator) { WAITS } else { PATIENCE };
                if now().last.elapsed() > limit || began.elapsed() > PATIENCE {
                    return limit;
                }
                sleep(PROBE_EVERY).await;
            }
        };
        let result = tokio::select! {
            answered = answered => answered,
            limit = given_up => Err(Unanswered::Slow(limit)),
        };
        (result, now().gap)
    }

    /// Asks until there is an answer, or none that is excused.
    async fn ask(&self, client: &reqwest::Client, rng: &mut StdRng, (question, expected): &Known) -> Flight {
        let began = Instant::now();
        let mut flight = Flight {
            began,
            ended: began,
            resent: 0,
            gap: Duration::ZERO,
            failure: None,
            told: question.name.clone(),
        };
        loop {
            let Some(coordinator) = self.pick(rng).await else {
                flight.failure = Some(format!("no coordinator was ready within {PATIENCE:?}"));
                flight.ended = Instant::now();
                return flight;
            };
            let sent = Instant::now();
            let (answer, gap) = self.attempt(client, coordinator, question).await;
            flight.gap = flight.gap.max(gap);
            flight.told += &format!("; {:.1?} at {coordinator}", sent.elapsed());
            let excused = self.was_absent(coordinator, sent) && flight.resent < RESENT_MOST;
            flight.failure = match answer {
                Ok(answer) if answer == *expected => None,
                Ok(answer) => Some(format!("expected {expected:?}\n     got {answer:?}")),
                Err(why) if excused && why.may_be_of_the_harm() => {
                    flight.resent += 1;
                    sleep(PROBE_EVERY).await;
                    continue;
                }
                Err(why) => Some(why.to_string()),
            };
            flight.ended = Instant::now();
            return flight;
        }
    }

    /// One client: asks one thing after the other until then.
    pub(crate) async fn client(
        self: Arc<Self>,
        known: Arc<Vec<Known>>,
        seed: u64,
        until: Instant,
    ) -> Vec<Flight> {
        let (client, mut rng) = (client(), StdRng::seed_from_u64(seed));
        let mut flights = Vec::new();
        while Instant::now() < until {
            let question = rng.random_range(0..known.len());
            let flight = self.ask(&client, &mut rng, &known[question]).await;
            flights.push(flight);
            sleep(Duration::from_millis(rng.random_range(0..300))).await;
        }
        flights
    }
}

pub(crate) fn client() -> reqwest::Client {
    reqwest::Client::builder().connect_timeout(Duration::from_secs(3)).build().expect("a client")
}
