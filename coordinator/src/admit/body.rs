//! The memory of request bodies, of all requests together, within a budget.
//!
//! A room in the house ([`super::Ticket`]) comes with [`FREE_BYTES`] for the request's body, so that no short request is
//! refused because of long ones. What a body takes beyond is reserved here: all that it announces before the first of it
//! is read, or, if it announces nothing, as it grows; what does not fit is refused ([`super::budget`]). A [`Body`] is its
//! bytes and their reservation in one, given back together by drop, wherever that happens.

use std::{ops::Deref, sync::Arc};

use baton_proto::ApiError;

use super::{
    Refusal, Ticket,
    budget::{Budget, Held},
};
use crate::{config::LimitsConfig, metrics::Metrics};

/// Of a body, what its room in the house is good for.
pub const FREE_BYTES: usize = 16 << 10;

/// What all bodies may take beyond the [`FREE_BYTES`] of each.
pub(super) fn budget(limits: &LimitsConfig, metrics: &Metrics) -> Arc<Budget> {
    let message = "the bodies of other requests take all memory that there is for them";
    Budget::new(
        limits.max_held_body_bytes,
        &metrics.body_reserved,
        &metrics.refusals,
        Refusal::Bytes,
        message,
    )
}

/// A request's body, as far as it has come, the memory that it may take, and its room in the house.
pub struct Body {
    bytes: Vec<u8>,
    /// How long it is to be; 0: nobody says.
    announced: usize,
    /// It does not become longer than this.
    most: usize,
    /// What is reserved beyond the [`FREE_BYTES`].
    held: Held,
    /// One of the rooms whose bodies are still being sent.
    reading: Option<Held>,
    ticket: Ticket,
}

impl Body {
    /// Nothing yet, and room for what is announced; `most` bounds it if nothing is.
    pub(super) fn new(
        ticket: Ticket,
        reading: Held,
        held: Held,
        announced: Option<usize>,
        most: usize,
    ) -> Result<Self, ApiError> {
        let (announced, most) = (announced.unwrap_or(0), announced.unwrap_or(most));
        let mut body = Self { bytes: Vec::new(), announced, most, held, reading: Some(reading), ticket };
        body.make_room(announced)?;
        Ok(body)
    }

    /// More of it has come. Memory is taken when the first of it is there: of a body that announced how long it is, all at
    /// once, of which the machine gives what is written to.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), ApiError> {
        let needed = self.bytes.len() + chunk.len();
        if needed > self.bytes.capacity() {
            let capacity = needed.max((2 * self.bytes.capacity()).min(self.most)).max(self.announced);
            self.make_room(capacity)?;
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(chunk);
        Ok(())
    }

    /// All of it has come: what is held from now on is what it is long.
    pub fn complete(&mut self) {
        self.reading = None;
        self.bytes.shrink_to_fit();
        let beyond = self.bytes.capacity().saturating_sub(FREE_BYTES).min(self.held.bytes());
        // To give back is never refused.
        let _ = self.held.resize(beyond, 0);
    }

    /// It has been read, and is needed no more; the request goes on.
    pub fn done(self) -> Ticket {
        self.ticket
    }

    fn make_room(&mut self, bytes: usize) -> Result<(), ApiError> {
        let beyond = bytes.saturating_sub(FREE_BYTES);
        if beyond > self.held.bytes() { self.held.resize(beyond, 0) } else { Ok(()) }
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use baton_proto::ErrorCode;
    use prometheus_client::registry::Registry;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::metrics::reason;

    const MOST: usize = 1 << 20;

    fn budget(bytes: usize) -> (Arc<Budget>, Arc<Metrics>) {
        let metrics = Metrics::register(&mut Registry::default());
        let limits = LimitsConfig { max_held_body_bytes: bytes, ..LimitsConfig::default() };
        (super::budget(&limits, &metrics), metrics)
    }

    fn begun(held: Held, announced: Option<usize>, most: usize) -> Result<Body, ApiError> {
        let room = crate::admit::at_once(&Arc::new(Semaphore::new(1))).expect("a room");
        Body::new(
            Ticket { held: None, _room: room },
            budget(1).0.part(&Arc::default()),
            held,
            announced,
            most,
        )
    }

    fn announced(budget: &Arc<Budget>, bytes: usize) -> Result<Body, ApiError> {
        begun(budget.part(&Arc::default()), Some(bytes), MOST)
    }

    #[test]
    fn what_is_announced_is_reserved_and_given_back_with_the_body() {
        let (budget, metrics) = budget(MOST);
        let mut first = announced(&budget, MOST).expect("it fits");
        assert_eq!(metrics.body_reserved.get(), (MOST - FREE_BYTES) as i64);
        assert_eq!(first.bytes.capacity(), 0, "a body that never comes takes no memory");
        let second = announced(&budget, FREE_BYTES * 2).expect("it takes what is left");
        let Err(refused) = announced(&budget, FREE_BYTES + 1) else { panic!("nothing was left") };
        assert_eq!(refused.code, ErrorCode::QueueFull);
        assert_eq!(metrics.refusals.get_or_create(&reason("bytes")).get(), 1);
        // The short ones go on.
        let mut short = announced(&budget, FREE_BYTES).expect("every room is good for it");
        short.push(&[7; FREE_BYTES]).expect("every room is good for it");
        drop(second);
        let third = announced(&budget, FREE_BYTES + 1).expect("it was given back");
        first.push(&[1; 100]).expect("was reserved");
        assert_eq!(first.bytes.capacity(), MOST, "it does not grow any more");
        first.complete();
        assert_eq!((metrics.body_reserved.get(), &first[..]), (1, &[1; 100][..]), "as long as it is");
        drop((first, third, short));
        assert_eq!(metrics.body_reserved.get(), 0);
        assert!(announced(&budget, MOST + FREE_BYTES).is_ok());
    }

    #[test]
    fn a_body_that_announces_nothing_takes_what_it_grows_to() {
        let (budget, metrics) = budget(16 * FREE_BYTES);
        let mut body = begun(budget.part(&Arc::default()), None, MOST).expect("nothing is asked");
        for _ in 0..100 {
            body.push(&[3; 1000]).expect("there is room");
            let room = body.bytes.capacity().max(FREE_BYTES);
            assert_eq!(metrics.body_reserved.get(), (room - FREE_BYTES) as i64, "all that it takes");
        }
        body.complete();
        assert_eq!(metrics.body_reserved.get(), 100_000 - FREE_BYTES as i64);
        let Err(refused) = body.push(&[3; 16 * FREE_BYTES]) else { panic!("there is no room") };
        assert_eq!((refused.code, body.len()), (ErrorCode::QueueFull, 100_000));
        drop(body);
        assert_eq!(metrics.body_reserved.get(), 0);
    }

    #[test]
    fn no_body_takes_more_than_its_bound_by_growing() {
        let (budget, _) = budget(MOST);
        for bound in [Some(100_000), None] {
            let mut body = begun(budget.part(&Arc::default()), bound, 100_000).expect("there is room");
            body.push(&[0; 70_000]).expect("there is room");
            body.push(&[0; 30_000]).expect("there is room");
            assert_eq!((body.bytes.capacity(), body.held.bytes()), (100_000, 100_000 - FREE_BYTES));
        }
    }

    #[test]
    fn a_tenant_leaves_some_for_others() {
        let (budget, metrics) = budget(90 * FREE_BYTES);
        // Of one free part and another that is reserved each.
        let taken = |tenant: &str, most: usize| -> Vec<Body> {
            let tenant = tenant.into();
            let body = |_| begun(budget.part(&tenant), Some(2 * FREE_BYTES), MOST).ok();
            (0..most).map_while(body).collect()
        };
        let all = taken("", 1000);
        assert_eq!(all.len(), 90, "nobody else is known");
        drop(all);
        let first = taken("a", 1000);
        assert_eq!(first.len(), 80);
        let second = taken("b", 1000);
        assert_eq!((second.len(), taken("c", 1000).len()), (8, 1));
        // Whoever has too much now gets nothing until the others are content.
        drop(second);
        assert_eq!((taken("a", 1000).len(), taken("b", 5).len()), (0, 5));
        drop(first);
        let equal = [taken("a", 40), taken("b", 40)].map(|bodies| bodies.len());
        assert_eq!(equal, [40, 40]);
        // A single body may be as large as what is left.
        assert!(begun(budget.part(&"d".into()), Some(91 * FREE_BYTES), 91 * FREE_BYTES).is_ok());
        let mut growing = begun(budget.part(&"d".into()), None, 91 * FREE_BYTES).expect("nothing is asked");
        for _ in 0..91 {
            growing.push(&[0; FREE_BYTES]).expect("nobody else has any");
        }
        drop(growing);
        assert_eq!((metrics.body_reserved.get(), budget.left()), (0, 90 * FREE_BYTES as isize));
    }

    #[test]
    fn all_that_many_threads_take_is_given_back() {
        let (budget, metrics) = budget(3 * FREE_BYTES);
        let work = || {
            for bytes in (0..2000).map(|n| n * 97 % (4 * FREE_BYTES)) {
                let _ = announced(&budget, bytes).and_then(|mut body| body.push(&[0; 512]));
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
        assert_eq!((metrics.body_reserved.get(), budget.left()), (0, 3 * FREE_BYTES as isize));
    }
}
