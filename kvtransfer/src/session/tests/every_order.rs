//! Both machines of a small transfer through every order of everything that can happen to it, up to a number of
//! mishaps: a search of all states, each looked at once.
//!
//! The control stream keeps order until it breaks, and what was on it is lost; each side learns of that when it does,
//! and the sender opens another. Frames of the data plane overtake each other and the stream, get lost and come twice.

mod commands;
mod events;

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use super::*;
use events::Event;

const SHAPE: Shape = Shape { layers: 2, blocks: 2 };

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Message {
    Offer,
    Accept,
    Renew,
    Seal(SealTerms),
    Released,
    Doubt,
    Abort,
}

/// What an owner knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Owner {
    /// Whether it was told success.
    answer: Option<bool>,
    settled: bool,
}

/// The control stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stream {
    Up,
    /// It broke, and these have not learned of it.
    Down {
        sender: bool,
        receiver: bool,
    },
}

#[derive(Debug, Clone, Hash)]
struct World {
    start: Instant,
    now: Instant,
    held: Vec<u32>,
    sender: Sender,
    /// `None` until it is expected or offered.
    receiver: Option<Receiver>,
    expected: bool,
    stream: Stream,
    /// Which of the streams so far the present one is, and which one the receiver's side rests on.
    number: u8,
    rests_on: Option<u8>,
    to_receiver: VecDeque<Message>,
    to_sender: VecDeque<Message>,
    /// What the engine does next.
    engine: u32,
    taken: Vec<SliceRun>,
    frames: Vec<SliceRun>,
    open: Vec<SliceRun>,
    /// Slices whose bytes are in place.
    landed: Vec<SliceRun>,
    sent: Owner,
    received: Owner,
    /// How often time may still pass, by half of the lease.
    steps: u8,
    mishaps: u8,
    /// The seal has gone out.
    sealed: bool,
    /// When the sender heard anything on the stream.
    heard: Instant,
    /// Nothing has gone wrong so far, and no time has passed.
    fair: bool,
}

impl World {
    fn new(held: Vec<u32>, mishaps: u8, steps: u8) -> Self {
        let now = Instant::now();
        let mut world = Self {
            start: now,
            now,
            held,
            sender: Sender::new(now, terms(SHAPE, now)),
            receiver: None,
            expected: false,
            stream: Stream::Up,
            number: 0,
            rests_on: None,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            engine: 0,
            taken: Vec::new(),
            frames: Vec::new(),
            open: Vec::new(),
            landed: Vec::new(),
            sent: Owner::default(),
            received: Owner::default(),
            steps,
            mishaps,
            sealed: false,
            heard: now,
            fair: true,
        };
        let commands = world.sender.link_up(now);
        world.of_sender(commands);
        world
    }

    /// From here on nothing is heard any more, and nobody is told: both sides end by themselves, once transports have
    /// let go of what they had. By their leases; a sender that has sealed may wait for another stream as long as the seal
    /// lets it.
    fn check_silence(mut self) {
        self.to_receiver.clear();
        self.to_sender.clear();
        self.stream = Stream::Down { sender: false, receiver: false };
        self.pass(LEASE);
        if self.receiver.as_ref().is_some_and(|receiver| receiver.state() != ReceiverState::Expected) {
            assert!(self.received.answer.is_some(), "the lease does not run out: {:?}", self.receiver);
        }
        if self.sent.answer.is_none() {
            assert!(self.sealed, "the lease does not run out: {:?}", self.sender);
            self.pass(SEAL_GRACE);
        }
        assert!(self.sent.answer.is_some(), "the seal's grace does not run out: {:?}", self.sender);
        self.pass(Duration::from_secs(60));
        self.mishaps = u8::MAX;
        while !self.taken.is_empty() {
            assert!(!self.sent.settled);
            self.apply(Event::NotSent(0));
        }
        assert!(self.sent.settled);
        if self.receiver.is_some() {
            assert!(self.received.answer.is_some(), "the receiver waits for ever: {:?}", self.receiver);
            while !self.open.is_empty() {
                assert!(!self.received.settled);
                self.apply(Event::Interrupt(0));
            }
            assert!(self.received.settled);
        }
    }

    /// From here on nothing goes wrong, and no time passes. Where nothing has gone wrong before, the transfer completes;
    /// what was sealed before its stream broke ends alike on both sides.
    fn check_progress(mut self) {
        self.mishaps = 0;
        self.steps = 0;
        while let Some(&event) = self.events().last() {
            self.apply(event);
        }
        assert_eq!(self.sent.answer, self.received.answer, "two ends of one transfer");
        assert!(!self.fair || self.sent.answer == Some(true), "stuck");
    }
}

/// Looks at every state that can be reached; says how many there are.
fn search(world: World) -> usize {
    let mut seen = HashSet::new();
    let mut left = vec![world];
    while let Some(world) = left.pop() {
        let mut hash = DefaultHasher::new();
        world.hash(&mut hash);
        if !seen.insert(hash.finish()) {
            continue;
        }
        if world.fair || (world.sealed && world.sent.answer.is_none()) {
            world.clone().check_progress();
        }
        for event in world.events() {
            let mut next = world.clone();
            next.apply(event);
            left.push(next);
        }
        world.check_silence();
    }
    seen.len()
}

/// All states of a transfer of these slices with so many mishaps and so many half leases that pass.
fn every_order(held: Vec<u32>, mishaps: u8, steps: u8, at_least: usize) {
    let states = search(World::new(held, mishaps, steps));
    assert!(states >= at_least, "only {states} states were found");
}

#[test]
fn four_slices_keep_the_promises_in_every_order_with_a_mishap() {
    every_order(vec![], 1, 0, 100_000);
}

#[test]
fn two_slices_keep_the_promises_in_every_order_with_two_mishaps() {
    every_order(vec![1], 2, 0, 10_000);
}

#[test]
fn two_slices_keep_the_promises_in_every_order_while_the_lease_runs_out() {
    every_order(vec![1], 1, 2, 10_000);
}

#[test]
fn four_slices_keep_the_promises_in_every_order_while_the_lease_runs_out() {
    every_order(vec![], 0, 2, 10_000);
}
