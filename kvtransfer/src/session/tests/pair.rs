//! Both machines together, over a control stream that keeps order and a data plane that does not.

use std::collections::VecDeque;

use super::*;

/// What is on its way on the control stream.
#[derive(Debug, Clone)]
enum Message {
    Offer,
    Accept,
    Renew,
    Seal(SealTerms),
    Released,
    Doubt,
    Abort,
}

struct World {
    now: Instant,
    shape: Shape,
    held: Vec<u32>,
    sender: Sender,
    receiver: Receiver,
    to_receiver: VecDeque<Message>,
    to_sender: VecDeque<Message>,
    frames: Vec<SliceRun>,
    broken: bool,
    /// When the sender heard anything on the stream.
    heard: Instant,
    sent: Option<bool>,
    received: Option<bool>,
}

impl World {
    fn new(shape: Shape, held: Vec<u32>) -> Self {
        let now = Instant::now();
        let expectation = expectation(shape, held.clone(), now + Duration::from_secs(60));
        let mut world = Self {
            now,
            shape,
            held,
            sender: Sender::new(now, terms(shape, now)),
            receiver: Receiver::expected(now, timing(), SLICE_BYTES, expectation),
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            frames: Vec::new(),
            broken: false,
            heard: now,
            sent: None,
            received: None,
        };
        let commands = world.sender.link_up(now);
        world.of_sender(commands);
        world
    }

    fn of_sender(&mut self, commands: Vec<SenderCommand>) {
        for command in commands {
            let message = match command {
                SenderCommand::Offer => Message::Offer,
                SenderCommand::Renew => Message::Renew,
                SenderCommand::Seal { first_tokens, tally } => {
                    Message::Seal(SealTerms { first_tokens, tally })
                }
                SenderCommand::Doubt => Message::Doubt,
                SenderCommand::Abort(_) => Message::Abort,
                SenderCommand::Complete { .. } => {
                    assert_eq!(self.received, Some(true), "released by a receiver that has not all of it");
                    self.sent = Some(true);
                    continue;
                }
                SenderCommand::Fail(_) => {
                    self.sent = Some(false);
                    continue;
                }
                SenderCommand::Cut => {
                    self.break_link();
                    continue;
                }
                SenderCommand::Wake | SenderCommand::Revoke | SenderCommand::Settled => continue,
            };
            self.to_receiver.push_back(message);
        }
    }

    fn of_receiver(&mut self, commands: Vec<ReceiverCommand>) {
        for command in commands {
            let message = match command {
                ReceiverCommand::Accept => Message::Accept,
                ReceiverCommand::Renew => Message::Renew,
                ReceiverCommand::Released => Message::Released,
                ReceiverCommand::Abort(_) => Message::Abort,
                ReceiverCommand::Complete { tally, .. } => {
                    assert_eq!(tally, whole(self.shape, &self.held));
                    self.received = Some(true);
                    continue;
                }
                ReceiverCommand::Fail(_) => {
                    self.received = Some(false);
                    continue;
                }
                ReceiverCommand::Revoke | ReceiverCommand::Settled => continue,
            };
            self.to_sender.push_back(message);
        }
    }

    /// One step of the world: `choice` says whose.
    fn step(&mut self, choice: u8, detail: usize) {
        let now = self.now;
        match choice % 5 {
            0 if !self.broken => {
                let commands = match self.to_receiver.pop_front() {
                    Some(Message::Offer) => {
                        let refused = |_| vec![ReceiverCommand::Abort(TransferError::ShuttingDown)];
                        self.receiver.offer(now, offer(self.shape)).unwrap_or_else(refused)
                    }
                    Some(Message::Seal(seal)) => self.receiver.seal(now, seal),
                    Some(Message::Doubt) => self.receiver.doubted(),
                    Some(Message::Abort) => self.receiver.peer_aborted(reason()),
                    Some(_) => {
                        self.receiver.renewed(now);
                        Vec::new()
                    }
                    None => Vec::new(),
                };
                self.of_receiver(commands);
            }
            1 if !self.broken => {
                if !self.to_sender.is_empty() {
                    self.heard = now;
                }
                let commands = match self.to_sender.pop_front() {
                    Some(Message::Accept) => self.sender.accepted(now, &self.held, LEASE),
                    Some(Message::Released) => self.sender.released(now),
                    Some(Message::Abort) => self.sender.peer_aborted(reason()),
                    Some(_) => {
                        self.sender.renewed(now);
                        Vec::new()
                    }
                    None => Vec::new(),
                };
                self.of_sender(commands);
            }
            2 => {
                if let Some(run) = self.sender.take(1 + detail as u32 % 3) {
                    self.frames.push(run);
                    let commands = self.sender.sent(now, run, &crcs(run));
                    self.of_sender(commands);
                }
            }
            3 if !self.frames.is_empty() => {
                let run = self.frames.swap_remove(detail % self.frames.len());
                let (claim, commands) = self.receiver.claim(now, run, &crcs(run));
                self.of_receiver(commands);
                if claim == Claim::Write {
                    let commands = self.receiver.landed(now, run);
                    self.of_receiver(commands);
                }
            }
            4 => self.pass(Duration::from_millis(detail as u64 % 20)),
            _ => {}
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let commands = self.sender.tick(self.now, self.heard);
        self.of_sender(commands);
        let commands = self.receiver.tick(self.now);
        self.of_receiver(commands);
    }

    fn break_link(&mut self) {
        self.broken = true;
        self.to_sender.clear();
        self.to_receiver.clear();
        let commands = self.sender.link_lost("test");
        self.of_sender(commands);
        let commands = self.receiver.link_lost("test");
        self.of_receiver(commands);
    }

    fn engine(&mut self) {
        for layer in 0..self.shape.layers {
            let commands = self.sender.ready(self.now, layer, 0..self.shape.blocks);
            self.of_sender(commands);
        }
        let commands = self.sender.seal(self.now, 1.into());
        self.of_sender(commands);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn with_nothing_wrong_every_order_completes(
        (shape, held) in any_shape(),
        engine_at in 0..40usize,
        steps in prop::collection::vec((any::<u8>(), any::<usize>()), 40..200),
    ) {
        let mut world = World::new(shape, held);
        for (n, (choice, detail)) in steps.iter().enumerate() {
            if n == engine_at {
                world.engine();
            }
            world.step(*choice, *detail);
        }
        // Then fairly, until all is said.
        (0..200).for_each(|n| world.step(n as u8, n));
        prop_assert_eq!((world.sent, world.received), (Some(true), Some(true)));
    }

    #[test]
    fn with_a_fault_at_any_moment_both_sides_end(
        (shape, held) in any_shape(),
        fault_at in 0..120usize,
        fault in 0..5u8,
        steps in prop::collection::vec((any::<u8>(), any::<usize>()), 120),
    ) {
        let mut world = World::new(shape, held);
        for (n, (choice, detail)) in steps.iter().enumerate() {
            if n == 20 {
                world.engine();
            }
            if n == fault_at {
                match fault {
                    0 => world.break_link(),
                    1 => {
                        let commands = world.sender.cancel(TransferError::Cancelled("test".into()));
                        world.of_sender(commands);
                    }
                    2 => {
                        let commands = world.receiver.cancel(TransferError::Cancelled("test".into()));
                        world.of_receiver(commands);
                    }
                    3 => world.frames.clear(), // a data connection lost what it had taken
                    _ => {
                        // Frozen: nothing is said any more, in either direction, and nobody is told.
                        world.broken = true;
                        world.frames.clear();
                    }
                }
            }
            world.step(*choice, *detail);
        }
        // Given time, each side ends by itself: by its peer's word, its lease or its deadline.
        for n in 0..800usize {
            world.step(n as u8, n);
            if n % 5 == 4 {
                world.pass(Duration::from_millis(500));
            }
        }
        prop_assert!(world.sent.is_some() && world.received.is_some(), "{:?} {:?}", world.sent, world.received);
        // A sender that was told of success was told the truth; a receiver never ran on less than all.
        prop_assert!(world.sent != Some(true) || world.received == Some(true));
    }
}
