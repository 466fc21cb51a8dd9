//! The record of calls that were refused, under the target `audit`, beside that of changes that were made: who called,
//! for what, and why they were refused.
//!
//! Whoever reaches the port can have a line written, so lines are bounded: `TOLD_MOST` a second of callers who are
//! known, and as many of strangers, who so hide nothing that somebody known has tried. Of more, the number is told once
//! their second is over.

use std::{
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use tracing::info;

/// Of refused calls, lines in a second.
const TOLD_MOST: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
/// Characters of what a caller says of itself that are told.
const SAID_MOST: usize = 64;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// As the service calls it.
    pub name: &'static str,
    /// The instance or group that it is to change; empty = none.
    pub of: &'a str,
}

impl Call<'_> {
    /// One that changes nothing.
    pub fn look(name: &'static str) -> Self {
        Self { name, of: "" }
    }
}

/// A call that is refused.
#[derive(Debug)]
pub(super) struct Refused<'a> {
    /// Who it is, if that is known.
    pub(super) actor: Option<&'a str>,
    /// Without a network in between there is none.
    pub(super) from: Option<SocketAddr>,
    pub(super) call: Call<'a>,
    pub(super) why: &'a str,
}

#[derive(Debug, Default)]
struct Second {
    began: Option<Instant>,
    told: u32,
    left_out: u64,
}

impl Second {
    /// How many were left out of a second that is over.
    fn turn(&mut self, now: Instant) -> u64 {
        if self.began.is_some_and(|began| now.saturating_duration_since(began) < SECOND) {
            return 0;
        }
        std::mem::replace(self, Self { began: Some(now), ..Self::default() }).left_out
    }

    /// Whether one more is told.
    fn enter(&mut self) -> bool {
        let told = self.told < TOLD_MOST;
        if told {
            self.told += 1
        } else {
            self.left_out += 1
        }
        told
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    strangers: Mutex<Second>,
    known: Mutex<Second>,
}

impl Refusals {
    /// Records a refused call, or counts it.
    pub(super) fn enter(&self, refused: &Refused<'_>, now: Instant) {
        let second = if refused.actor.is_some() { &self.known } else { &self.strangers };
        self.turn(now);
        if !second.lock().unwrap_or_else(PoisonError::into_inner).enter() {
            return;
        }
        let Refused { actor, from, call: Call { name, of }, why } = refused;
        let from = from.map(|from| from.to_string()).unwrap_or_default();
        let of: String = of.chars().take(SAID_MOST).collect();
        info!(target: "audit", actor = actor.unwrap_or("anonymous"), refused = name, of, from, message = why);
    }

    /// Tells of those that were left out of seconds that are over.
    pub(super) fn turn(&self, now: Instant) {
        for (whose, second) in [("strangers", &self.strangers), ("known callers", &self.known)] {
            let left_out = second.lock().unwrap_or_else(PoisonError::into_inner).turn(now);
            if left_out > 0 {
                info!(target: "audit", left_out, "more calls of {whose} were refused within a second");
            }
        }
    }

    /// Tells of those that were left out even if no other call comes, until the shutdown.
    pub(super) async fn run(&self, shutdown: CancellationToken) {
        while shutdown.run_until_cancelled(tokio::time::sleep(SECOND)).await.is_some() {
            self.turn(Instant::now());
        }
        self.turn(Instant::now() + SECOND);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{fmt, sync::Arc};

    use tracing::{
        Event, Subscriber,
        field::{Field, Visit},
    };
    use tracing_subscriber::{Layer, Registry, layer::Context, layer::SubscriberExt};

    use super::*;

    /// Keeps what is entered in the record.
    #[derive(Clone, Default)]
    struct Ear(Arc<Mutex<Vec<String>>>);

    #[derive(Default)]
    struct Fields(Vec<String>);

    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
            self.0.push(format!("{}={value:?}", field.name()));
        }
    }

    impl<S: Subscriber> Layer<S> for Ear {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            assert_eq!(event.metadata().target(), "audit");
            let mut fields = Fields::default();
            event.record(&mut fields);
            self.0.lock().expect("not poisoned").push(fields.0.join(" "));
        }
    }

    /// What is recorded meanwhile, a line of fields each.
    pub(in super::super) fn recorded(work: impl FnOnce()) -> Vec<String> {
        let ear = Ear::default();
        tracing::subscriber::with_default(Registry::default().with(ear.clone()), work);
        let heard = ear.0.lock().expect("not poisoned");
        heard.clone()
    }

    #[test]
    fn a_flood_is_counted_and_hides_nobody_known() {
        let refusals = Refusals::default();
        let call = Call { name: "Cordon", of: &"x".repeat(1000) };
        let stranger = Refused { actor: None, from: None, call, why: "no token" };
        let bob = Refused { actor: Some("bob"), from: None, call: Call::look("ListRoles"), why: "no" };
        let start = Instant::now();
        let (soon, later) = (start + SECOND / 2, start + SECOND);
        let record = recorded(|| {
            (0..25).for_each(|_| refusals.enter(&stranger, start));
            refusals.enter(&bob, soon);
            refusals.turn(soon);
        });
        assert_eq!(record.len(), 11, "{record:?}");
        assert!(record[0].contains(&format!(r#"of="{}" "#, "x".repeat(SAID_MOST))), "{}", record[0]);
        assert!(record[10].starts_with(r#"actor="bob""#), "{}", record[10]);
        // Nobody calls any more: what was left out is told all the same, once.
        let record = recorded(|| {
            refusals.turn(later);
            refusals.turn(later + SECOND);
        });
        assert_eq!(record, [r#"message=more calls of strangers were refused within a second left_out=15"#]);
        let record = recorded(|| refusals.enter(&stranger, later + 3 * SECOND));
        assert_eq!(record.len(), 1);
    }

    #[tokio::test]
    async fn what_was_left_out_is_told_at_the_end() {
        let refusals = Refusals::default();
        let call = Call::look("ListRoles");
        let stranger = Refused { actor: None, from: None, call, why: "no token" };
        let ear = Ear::default();
        let _heard = tracing::subscriber::set_default(Registry::default().with(ear.clone()));
        (0..12).for_each(|_| refusals.enter(&stranger, Instant::now()));
        let shutdown = CancellationToken::new();
        shutdown.cancel();
        refusals.run(shutdown).await;
        let heard = ear.0.lock().expect("not poisoned");
        assert!(heard.last().is_some_and(|line| line.ends_with("left_out=2")), "{heard:?}");
    }
}
