//! What coordinators are told of the load: of each of its legs a coordinator knows whether a load counts it, in
//! whatever order things happen and however late it is told.

mod support;

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::Ordering,
};

use baton_proto::v1;
use baton_server::role::Role;
use support::{Attached, Instance, PATIENCE, Request, Shape, whole};
use v1::attach_response::Frame;

/// A coordinator that compares every load with what it knows.
struct Auditor {
    attached: Attached,
    /// Tokens of the prompts of legs that have not ended, and whether they are computed.
    open: HashMap<u64, (u64, bool)>,
    last: u64,
    audited: u32,
    seen: u64,
}

impl Auditor {
    async fn to(instance: &Instance) -> Self {
        let attached = Attached::told_every(20, instance).await;
        Self { attached, open: HashMap::new(), last: 0, audited: 0, seen: 0 }
    }

    async fn dispatch(&mut self, request: &Request) {
        self.last += 1;
        self.open.insert(self.last, (request.prompt.len() as u64, false));
        self.attached.dispatch(self.last, request, whole()).await;
    }

    async fn read(&mut self) {
        match self.attached.frame().await.expect("the stream stands") {
            Frame::Step(step) => {
                for output in step.legs {
                    if output.end.is_some() {
                        self.open.remove(&output.leg);
                    } else if let Some((_, computed)) = self.open.get_mut(&output.leg) {
                        *computed = true;
                    }
                    self.attached.hear(output);
                }
            }
            Frame::Load(load) => self.audit(&load),
            Frame::Welcome(_) | Frame::Role(_) => {}
        }
    }

    /// Nobody else is there, so that the load is that of this coordinator's legs.
    fn audit(&mut self, load: &v1::InstanceLoad) {
        let seen = load.seen_leg.expect("it is always said");
        assert!((self.seen..=self.last).contains(&seen), "{seen} of {}", self.last);
        let counted = || self.open.iter().filter(move |(leg, _)| **leg <= seen);
        let running = u64::from(load.running_sequences + load.waiting_sequences);
        assert_eq!(running, counted().count() as u64, "up to leg {seen}: {:?}", self.open);
        let most: u64 =
            counted().filter(|(_, (_, computed))| !computed).map(|(_, (tokens, _))| tokens - 1).sum();
        assert!(load.queued_prefill_tokens <= most, "{} of {most} tokens", load.queued_prefill_tokens);
        self.audited += 1;
        self.seen = seen;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_counts_each_leg_up_to_the_one_it_names_and_none_that_has_ended() {
    let shape = Shape { blocks: 1000, max_sequences: 4, ..Shape::default() };
    let mut mixed = Instance::start("m", Role::Mixed, shape).await;
    // Longer than what lies between two loads: each comes with the ends that led to it.
    mixed.faults.batch_micros.store(22_000, Ordering::Relaxed);
    let mut auditor = Auditor::to(&mixed).await;
    let mut cancelled = HashSet::new();
    // The lengths are not multiples of each other, so that ends, arrivals and loads meet in every order.
    for turn in 0..150u32 {
        if turn % 3 != 2 && auditor.open.len() < 12 {
            let mut request = Request::greedy(5 + turn % 90, 1 + turn * 7 % 23);
            if turn % 17 == 6 {
                // It is refused before the engine hears of it.
                request.sampling.top_p = -1.0;
            }
            auditor.dispatch(&request).await;
        }
        if turn % 5 == 4
            && let Some(&leg) = auditor.open.keys().min()
            && cancelled.insert(leg)
        {
            auditor.attached.cancel(leg).await;
        }
        auditor.read().await;
    }
    while !auditor.open.is_empty() {
        auditor.read().await;
    }
    // Unless something has changed the next comes after a second.
    let audited = auditor.audited;
    while auditor.audited == audited {
        auditor.read().await;
    }
    assert!(audited > 5, "only {audited} loads came");
    mixed.until_idle().await;
}

/// The next load for which this holds.
async fn until_load(attached: &mut Attached, holds: impl Fn(&v1::InstanceLoad) -> bool) -> v1::InstanceLoad {
    let wait = async {
        loop {
            match attached.frame().await.expect("the stream stands") {
                Frame::Load(load) if holds(&load) => return load,
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("such a load comes")
}

#[tokio::test(flavor = "multi_thread")]
async fn each_coordinator_is_told_of_its_own_legs_and_of_the_load_of_all() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape { max_sequences: 1, ..Shape::default() }).await;
    mixed.faults.batch_micros.store(20_000, Ordering::Relaxed);
    let (mut one, mut other) = (Attached::to(&mixed).await, Attached::told_every(20, &mixed).await);
    assert_eq!(until_load(&mut other, |_| true).await.seen_leg, Some(0));
    one.dispatch(7, &Request::greedy(9, 60), whole()).await;
    let load = until_load(&mut other, |load| load.running_sequences == 1).await;
    assert_eq!(load.seen_leg, Some(0), "no leg of this stream is there");
    other.dispatch(3, &Request::greedy(20, 1), whole()).await;
    let load = until_load(&mut other, |load| load.seen_leg == Some(3)).await;
    assert_eq!((load.running_sequences, load.waiting_sequences, load.queued_prefill_tokens), (1, 1, 19));
    let load = until_load(&mut one, |load| load.waiting_sequences == 1).await;
    assert_eq!(load.seen_leg, Some(7));
    other.cancel(3).await;
    one.cancel(7).await;
    one.until_end(7).await;
    mixed.until_idle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_arrival_is_told_before_the_step_that_it_takes_part_in() {
    let mut mixed = Instance::start("m", Role::Mixed, Shape::default()).await;
    let (one, mut other) = (Attached::to(&mixed).await, Attached::told_every(20, &mixed).await);
    // Much longer than what lies between two loads.
    mixed.faults.batch_micros.store(150_000, Ordering::Relaxed);
    one.dispatch(1, &Request::greedy(9, 60), whole()).await;
    until_load(&mut other, |load| load.running_sequences == 1 && load.prefilled_requests == 1).await;
    one.dispatch(2, &Request::greedy(10, 60), whole()).await;
    let told = until_load(&mut other, |load| load.running_sequences + load.waiting_sequences == 2).await;
    assert_eq!(told.prefilled_requests, 1, "it is told only after its prompt is computed");
    one.cancel(1).await;
    one.cancel(2).await;
    mixed.until_idle().await;
}
