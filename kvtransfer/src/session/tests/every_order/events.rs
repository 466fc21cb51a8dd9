//! What can happen to a transfer: which events are possible, and what each does.

use super::*;
use crate::session;

#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
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
    /// Everything that can happen now.
    pub(super) fn events(&self) -> Vec<Event> {
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

    pub(super) fn apply(&mut self, event: Event) {
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
                if claim == session::Claim::Write {
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

    pub(super) fn break_stream(&mut self) {
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

    pub(super) fn receive(&mut self, step: impl FnOnce(&mut Receiver) -> Vec<ReceiverCommand>) {
        let commands = self.receiver.as_mut().map(step).unwrap_or_default();
        self.of_receiver(commands);
    }

    pub(super) fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        let commands = self.sender.tick(now, self.heard);
        self.of_sender(commands);
        self.receive(|receiver| receiver.tick(now));
    }
}
