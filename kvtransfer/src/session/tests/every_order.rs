//! Both machines of a small transfer through every order of everything that can happen to it, up to a number of
//! mishaps: a search of all states, each looked at once.
//!
//! The control stream keeps order until it breaks, and what was on it is lost; each side learns of that when it does,
//! and the sender opens another. Frames of the data plane overtake each other and the stream, get lost and come twice.

use std::{
    collections::{HashSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use super::*;

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

impl Owner {
    fn told(&mut self, answer: bool) {
        assert_eq!(self.answer.replace(answer), None, "told twice");
    }

    fn settled(&mut self, in_use: &[SliceRun]) {
        assert!(self.answer.is_some() && !std::mem::replace(&mut self.settled, true));
        assert!(in_use.is_empty(), "blocks given back while a transport uses them");
    }
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

#[derive(Debug, Clone, Copy)]
enum Event {
    Expect,
    Engine,
    ToReceiver,
    ToSender,
    Take,
    Sent(usize),
    Claim(usize),
    Land(usize),
    Pass,
    SenderLearns,
    ReceiverLearns,
    Reconnect,
    // Mishaps.
    CancelSent,
    CancelReceived,
    Break,
    Lose(usize),
    LoseAndLearn(usize),
    Repeat(usize),
    NotSent(usize),
    Damage(usize),
    Interrupt(usize),
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

    /// Everything that can happen now.
    fn events(&self) -> Vec<Event> {
        use Event::*;
        let mut events = Vec::new();
        let mut on = |possible: bool, event: Event| {
            if possible {
                events.push(event);
            }
        };
        let learned = |who: bool| self.stream != Stream::Up && !who;
        let (sender_knows, receiver_knows) = match self.stream {
            Stream::Up => (true, true),
            Stream::Down { sender, receiver } => (!sender, !receiver),
        };
        on(!self.expected, Expect);
        on(self.engine <= SHAPE.layers, Engine);
        on(!self.to_receiver.is_empty(), ToReceiver);
        on(!self.to_sender.is_empty(), ToSender);
        on(self.sender.has_runs() && self.taken.len() < 2, Take);
        on(learned(sender_knows), SenderLearns);
        on(learned(receiver_knows), ReceiverLearns);
        on(self.stream != Stream::Up && sender_knows && self.number < 2, Reconnect);
        on(self.steps > 0, Pass);
        (0..self.taken.len()).for_each(|n| on(true, Sent(n)));
        (0..self.frames.len()).for_each(|n| on(true, Claim(n)));
        (0..self.open.len()).for_each(|n| on(true, Land(n)));
        if self.mishaps > 0 {
            on(self.sender.live(), CancelSent);
            on(self.receiver.as_ref().is_some_and(Receiver::live), CancelReceived);
            on(self.stream == Stream::Up, Break);
            (0..self.taken.len()).for_each(|n| on(true, NotSent(n)));
            (0..self.frames.len()).for_each(|n| {
                [Lose(n), LoseAndLearn(n), Repeat(n)].into_iter().for_each(|event| on(true, event));
            });
            (0..self.open.len()).for_each(|n| {
                [Damage(n), Interrupt(n)].into_iter().for_each(|event| on(true, event));
            });
        }
        events
    }

    fn apply(&mut self, event: Event) {
        let now = self.now;
        let cancelled = || TransferError::Cancelled("test".into());
        use Event::*;
        if matches!(
            event,
            CancelSent
                | CancelReceived
                | Break
                | Lose(_)
                | LoseAndLearn(_)
                | Repeat(_)
                | NotSent(_)
                | Damage(_)
                | Interrupt(_)
        ) {
            self.mishaps -= 1;
            self.fair = false;
        }
        match event {
            Expect => self.expect(),
            Engine => {
                let commands = if self.engine < SHAPE.layers {
                    self.sender.ready(now, self.engine, 0..SHAPE.blocks)
                } else {
                    self.sender.seal(now, 1.into())
                };
                self.engine += 1;
                self.of_sender(commands);
            }
            ToReceiver => self.hear_sender(),
            ToSender => {
                self.heard = now;
                let commands = match self.to_sender.pop_front() {
                    Some(Message::Accept) => self.sender.accepted(now, &self.held, LEASE),
                    Some(Message::Released) => self.sender.released(now),
                    Some(Message::Abort) => self.sender.peer_aborted(reason()),
                    _ => {
                        self.sender.renewed(now);
                        Vec::new()
                    }
                };
                self.of_sender(commands);
            }
            Take => self.taken.extend(self.sender.take(1)),
            Sent(n) => {
                let run = self.taken.remove(n);
                self.add_frame(run);
                let commands = self.sender.sent(now, run, &crcs(run));
                self.of_sender(commands);
            }
            NotSent(n) => {
                self.taken.remove(n);
                let commands = self.sender.failed("test");
                self.of_sender(commands);
            }
            Claim(n) => {
                let run = self.frames.remove(n);
                let Some(receiver) = &mut self.receiver else { return };
                let (claim, commands) = receiver.claim(now, run, &crcs(run));
                if claim == super::Claim::Write {
                    assert!(
                        !self.received.settled && !self.landed.contains(&run) && !self.open.contains(&run)
                    );
                    self.open.push(run);
                }
                self.of_receiver(commands);
            }
            Land(n) => {
                let run = self.open.remove(n);
                self.landed.push(run);
                self.landed.sort_unstable_by_key(|run| (run.layer, run.first));
                self.receive(|receiver| receiver.landed(now, run));
            }
            Damage(n) => {
                let run = self.open.remove(n);
                self.receive(|receiver| receiver.damaged(run, run.first));
            }
            Interrupt(n) => {
                let run = self.open.remove(n);
                self.receive(|receiver| receiver.interrupted(run, "test"));
            }
            Pass => {
                self.steps -= 1;
                self.fair = false;
                self.pass(LEASE / 2);
            }
            CancelSent => {
                let commands = self.sender.cancel(cancelled());
                self.of_sender(commands);
            }
            CancelReceived => self.receive(|receiver| receiver.cancel(cancelled())),
            Break => self.break_stream(),
            SenderLearns => {
                if let Stream::Down { sender, .. } = &mut self.stream {
                    *sender = false;
                }
                let commands = self.sender.link_lost("test");
                self.of_sender(commands);
            }
            ReceiverLearns => self.receiver_learns(),
            Reconnect => {
                // A new stream ends what rests on the one before it.
                self.receiver_learns();
                self.stream = Stream::Up;
                self.number += 1;
                self.heard = now;
                let commands = self.sender.link_up(now);
                self.of_sender(commands);
            }
            Lose(n) => drop(self.frames.remove(n)),
            LoseAndLearn(n) => {
                self.frames.remove(n);
                let commands = self.sender.path_lost("test");
                self.of_sender(commands);
            }
            Repeat(n) => self.add_frame(self.frames[n]),
        }
    }

    /// Kept sorted: the order in which frames left does not matter, so it is not to tell states apart.
    fn add_frame(&mut self, run: SliceRun) {
        self.frames.push(run);
        self.frames.sort_unstable_by_key(|run| (run.layer, run.first));
    }

    fn break_stream(&mut self) {
        self.stream = Stream::Down { sender: true, receiver: true };
        self.to_receiver.clear();
        self.to_sender.clear();
    }

    fn receiver_learns(&mut self) {
        let Stream::Down { receiver, .. } = &mut self.stream else { return };
        if std::mem::take(receiver) && self.rests_on == Some(self.number) {
            self.receive(|receiver| receiver.link_lost("test"));
        }
    }

    fn expect(&mut self) {
        self.expected = true;
        let expectation = expectation(SHAPE, self.held.clone(), self.start + Duration::from_secs(60));
        match &mut self.receiver {
            // The offer was given up, and the owner is told so.
            Some(receiver) if !receiver.live() => {}
            Some(receiver) => {
                let commands = receiver.expect(self.now, expectation).expect("an offer is held");
                self.of_receiver(commands);
            }
            None => {
                self.receiver = Some(Receiver::expected(self.now, timing(), SLICE_BYTES, expectation));
            }
        }
    }

    /// As the control stream's service: what rests on another stream is left alone, and a repeated seal is answered.
    fn hear_sender(&mut self) {
        let now = self.now;
        let own = self.rests_on == Some(self.number);
        match (self.to_receiver.pop_front(), &mut self.receiver) {
            (Some(Message::Offer), None) => {
                self.rests_on = Some(self.number);
                self.receiver = Some(Receiver::offered(now, timing(), SLICE_BYTES, offer(SHAPE)));
            }
            (Some(Message::Offer), Some(receiver)) => match receiver.offer(now, offer(SHAPE)) {
                Ok(commands) => {
                    self.rests_on = Some(self.number);
                    self.of_receiver(commands);
                }
                Err(_) => self.to_sender.push_back(Message::Abort),
            },
            (Some(Message::Seal(seal)), Some(_)) if own => self.receive(|receiver| receiver.seal(now, seal)),
            (Some(Message::Seal(_)), _) => self.to_sender.push_back(match self.received.answer {
                Some(true) => Message::Released,
                _ => Message::Abort,
            }),
            (Some(Message::Abort), Some(_)) if own => {
                self.receive(|receiver| receiver.peer_aborted(reason()))
            }
            (Some(Message::Doubt), Some(_)) if own => self.receive(Receiver::doubted),
            (Some(Message::Renew), Some(receiver)) if own => receiver.renewed(now),
            _ => {}
        }
    }

    fn receive(&mut self, step: impl FnOnce(&mut Receiver) -> Vec<ReceiverCommand>) {
        let commands = self.receiver.as_mut().map(step).unwrap_or_default();
        self.of_receiver(commands);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let commands = self.sender.tick(now, self.heard);
        self.of_sender(commands);
        self.receive(|receiver| receiver.tick(now));
    }

    fn of_sender(&mut self, commands: Vec<SenderCommand>) {
        for command in commands {
            assert!(!self.sent.settled, "{command:?} after the end");
            let message = match command {
                SenderCommand::Offer => Message::Offer,
                SenderCommand::Renew => Message::Renew,
                SenderCommand::Seal { first_tokens, tally } => {
                    assert_eq!(tally, whole(SHAPE, &self.held), "sealed what was not sent");
                    self.sealed = true;
                    Message::Seal(SealTerms { first_tokens, tally })
                }
                SenderCommand::Doubt => Message::Doubt,
                SenderCommand::Abort(_) => Message::Abort,
                SenderCommand::Complete { .. } => {
                    assert_eq!(self.received.answer, Some(true), "released by who has not all of it");
                    self.sent.told(true);
                    continue;
                }
                SenderCommand::Fail(reason) => {
                    let by_lease = matches!(reason, TransferError::LeaseExpired { .. });
                    assert!(!(self.sealed && by_lease), "given up while the receiver may own it");
                    self.sent.told(false);
                    continue;
                }
                SenderCommand::Cut => {
                    if self.stream == Stream::Up {
                        self.break_stream();
                    }
                    continue;
                }
                SenderCommand::Settled => {
                    self.sent.settled(&self.taken);
                    continue;
                }
                SenderCommand::Wake | SenderCommand::Revoke => continue,
            };
            if self.stream == Stream::Up {
                self.to_receiver.push_back(message);
            }
        }
    }

    fn of_receiver(&mut self, commands: Vec<ReceiverCommand>) {
        for command in commands {
            assert!(!self.received.settled, "{command:?} after the end");
            let message = match command {
                ReceiverCommand::Accept => Message::Accept,
                ReceiverCommand::Renew => Message::Renew,
                ReceiverCommand::Released => Message::Released,
                ReceiverCommand::Abort(_) => Message::Abort,
                ReceiverCommand::Complete { tally, .. } => {
                    assert_eq!(tally, whole(SHAPE, &self.held));
                    assert_eq!(self.landed.len() as u64, tally.slices, "complete without all slices");
                    self.received.told(true);
                    continue;
                }
                ReceiverCommand::Fail(_) => {
                    self.received.told(false);
                    continue;
                }
                ReceiverCommand::Settled => {
                    self.received.settled(&self.open);
                    self.rests_on = None;
                    continue;
                }
                ReceiverCommand::Revoke => continue,
            };
            if self.stream == Stream::Up && self.rests_on == Some(self.number) {
                self.to_sender.push_back(message);
            }
        }
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
