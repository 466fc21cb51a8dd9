//! The sender under any order of events.

use std::{collections::BTreeSet, ops::Range};

use super::*;

#[derive(Debug, Clone)]
enum Event {
    LinkUp,
    LinkLost,
    LinkFailed,
    Accepted {
        bad: bool,
    },
    Ready(u32, Range<u32>),
    /// Makes everything ready that is not.
    AllReady,
    Take(u32),
    /// Reports one of the taken runs.
    Report {
        which: usize,
        sent: bool,
    },
    PathLost,
    Seal,
    Renewed,
    /// The peer says something on the stream, of another transfer.
    HeardOfAnother,
    Released,
    PeerAborted,
    Cancel,
    Pass(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => Just(Event::LinkUp),
        3 => prop::bool::weighted(0.1).prop_map(|bad| Event::Accepted { bad }),
        2 => (0..4u32, 0..5u32, 1..3u32).prop_map(|(layer, first, count)| Event::Ready(layer, first..first + count)),
        2 => Just(Event::AllReady),
        10 => (1..4u32).prop_map(Event::Take),
        10 => (any::<usize>(), prop::bool::weighted(0.98)).prop_map(|(which, sent)| Event::Report { which, sent }),
        2 => Just(Event::Seal),
        3 => Just(Event::Renewed),
        1 => Just(Event::HeardOfAnother),
        1 => Just(Event::Released),
        1 => prop_oneof![
            Just(Event::LinkLost), Just(Event::LinkFailed), Just(Event::PathLost), Just(Event::PeerAborted),
            Just(Event::Cancel),
        ],
        2 => prop_oneof![9 => 1..300u64, 1 => 1..2000u64].prop_map(Event::Pass),
    ]
}

struct Run {
    session: Sender,
    now: Instant,
    /// When anything was heard on the stream.
    heard: Instant,
    shape: Shape,
    held: Vec<u32>,
    ready: BTreeSet<(u32, u32)>,
    taken: Vec<SliceRun>,
    given: BTreeSet<(u32, u32)>,
    sealed: bool,
    answers: usize,
    settled: bool,
    /// The stream was given up.
    cut: bool,
}

impl Run {
    fn new(shape: Shape, held: Vec<u32>) -> Self {
        let now = Instant::now();
        let (ready, taken, given) = Default::default();
        let (sealed, answers, settled, cut) = Default::default();
        let session = Sender::new(now, terms(shape, now));
        Self { session, now, heard: now, shape, held, ready, taken, given, sealed, answers, settled, cut }
    }

    fn apply(&mut self, event: Event) {
        let now = self.now;
        if matches!(event, Event::LinkUp | Event::Accepted { .. } | Event::Renewed | Event::HeardOfAnother) {
            self.heard = now;
        }
        let commands = match event {
            Event::LinkUp => self.session.link_up(now),
            Event::LinkLost => self.session.link_lost("test"),
            Event::LinkFailed => self.session.link_failed(TransferError::ShuttingDown),
            Event::Accepted { bad } => {
                let held = if bad { vec![self.shape.blocks] } else { self.held.clone() };
                self.session.accepted(now, &held, LEASE)
            }
            Event::Ready(layer, blocks) => self.ready(layer, blocks),
            Event::AllReady => {
                for (layer, block) in all(self.shape) {
                    if !self.ready.contains(&(layer, block)) {
                        let commands = self.ready(layer, block..block + 1);
                        self.check(commands);
                    }
                }
                Vec::new()
            }
            Event::Take(most) => {
                if let Some(run) = self.session.take(most) {
                    assert!(
                        !self.settled && self.answers == 0 && run.count <= most && self.shape.contains(run)
                    );
                    for block in run.blocks() {
                        assert!(!self.held.contains(&block), "a held block was sent");
                        assert!(self.ready.contains(&(run.layer, block)), "sent before it was ready");
                        assert!(self.given.insert((run.layer, block)), "sent twice");
                    }
                    self.taken.push(run);
                }
                Vec::new()
            }
            Event::Report { which, sent } => {
                if self.taken.is_empty() {
                    return;
                }
                let run = self.taken.swap_remove(which % self.taken.len());
                if sent { self.session.sent(now, run, &crcs(run)) } else { self.session.failed("test") }
            }
            Event::PathLost => self.session.path_lost("test"),
            Event::Seal => self.session.seal(now, 5.into()),
            Event::Renewed => {
                self.session.renewed(now);
                Vec::new()
            }
            Event::HeardOfAnother => Vec::new(),
            Event::Released => self.session.released(now),
            Event::PeerAborted => self.session.peer_aborted(reason()),
            Event::Cancel => self.session.cancel(TransferError::Cancelled("test".into())),
            Event::Pass(millis) => {
                self.now += Duration::from_millis(millis);
                self.session.tick(self.now, self.heard)
            }
        };
        self.check(commands);
    }

    fn ready(&mut self, layer: u32, blocks: Range<u32>) -> Vec<SenderCommand> {
        self.ready.extend(blocks.clone().map(|block| (layer, block)));
        self.session.ready(self.now, layer, blocks)
    }

    fn check(&mut self, commands: Vec<SenderCommand>) {
        for command in commands {
            assert!(!self.settled, "{command:?} after the end");
            match command {
                SenderCommand::Seal { tally, first_tokens } => {
                    assert_eq!(
                        (tally, first_tokens),
                        (whole(self.shape, &self.held), 5.into()),
                        "sealed what was not sent"
                    );
                    assert!(self.taken.is_empty() && self.answers == 0);
                    self.sealed = true;
                }
                SenderCommand::Complete { tally, .. } => {
                    assert!(self.sealed && self.taken.is_empty());
                    assert_eq!(tally, whole(self.shape, &self.held));
                    self.answers += 1;
                }
                SenderCommand::Fail(_) => self.answers += 1,
                SenderCommand::Settled => {
                    assert!(self.taken.is_empty(), "blocks given back while a transport reads them");
                    assert_eq!(self.answers, 1);
                    self.settled = true;
                }
                SenderCommand::Offer | SenderCommand::Wake | SenderCommand::Doubt => {
                    assert_eq!(self.answers, 0)
                }
                SenderCommand::Cut => self.cut = true,
                SenderCommand::Renew | SenderCommand::Abort(_) | SenderCommand::Revoke => {}
            }
            assert!(self.answers <= 1, "two answers");
        }
    }

    fn end(mut self) {
        self.apply(Event::Cancel);
        assert!(self.session.take(9).is_none() && !self.session.has_runs());
        while !self.taken.is_empty() {
            assert!(!self.settled);
            self.apply(Event::Report { which: 0, sent: true });
        }
        assert!(self.settled && self.answers == 1);
    }
}

fn all(shape: Shape) -> impl Iterator<Item = (u32, u32)> {
    (0..shape.layers).flat_map(move |layer| (0..shape.blocks).map(move |block| (layer, block)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_of_events_keeps_the_promises(
        (shape, held) in any_shape(),
        events in prop::collection::vec(any_event(), 0..80),
    ) {
        let mut run = Run::new(shape, held);
        events.into_iter().for_each(|event| run.apply(event));
        run.end();
    }
}

/// With nothing going wrong: ready before or after the accept, sealed when all is sent, released once.
#[test]
fn the_straight_way() {
    for early in [true, false] {
        let shape = Shape { layers: 2, blocks: 3 };
        let mut run = Run::new(shape, vec![1]);
        if early {
            run.apply(Event::AllReady);
            run.apply(Event::Seal);
        }
        assert!(run.session.take(9).is_none(), "nothing goes before the accept");
        run.apply(Event::LinkUp);
        run.apply(Event::Accepted { bad: false });
        if !early {
            run.apply(Event::AllReady);
            run.apply(Event::Seal);
        }
        for expected in [(0, 0), (0, 2), (1, 0), (1, 2)] {
            assert!(!run.sealed);
            run.apply(Event::Take(9));
            assert_eq!((run.taken[0].layer, run.taken[0].first), expected);
            run.apply(Event::Report { which: 0, sent: true });
        }
        assert!(run.sealed);
        run.apply(Event::LinkLost);
        run.apply(Event::LinkUp); // the seal goes out again
        run.apply(Event::Released);
        assert_eq!((run.answers, run.settled), (1, true));
    }
}

#[test]
fn neighbours_travel_together() {
    let mut run = Run::new(Shape { layers: 1, blocks: 4 }, vec![]);
    run.apply(Event::LinkUp);
    run.apply(Event::Accepted { bad: false });
    run.apply(Event::Ready(0, 0..1));
    run.apply(Event::Ready(0, 1..4));
    assert_eq!(run.session.take(3), Some(SliceRun { layer: 0, first: 0, count: 3 }));
    assert_eq!(run.session.take(3), Some(SliceRun { layer: 0, first: 3, count: 1 }));
}

/// What was sealed before its stream broke waits for the answer until the seal's own deadline, however short the lease.
#[test]
fn a_sealed_transfer_without_a_stream_waits_for_the_seal_grace_and_not_for_the_lease() {
    for back_after in [LEASE * 2, SEAL_GRACE] {
        let mut run = Run::new(Shape { layers: 1, blocks: 1 }, vec![]);
        let millis = |time: Duration| u64::try_from(time.as_millis()).expect("short");
        run.apply(Event::LinkUp);
        run.apply(Event::Accepted { bad: false });
        run.apply(Event::AllReady);
        run.apply(Event::Seal);
        run.apply(Event::Take(1));
        run.apply(Event::Report { which: 0, sent: true });
        assert!(run.sealed);
        run.apply(Event::LinkLost); // and `Released` with it
        run.apply(Event::Pass(millis(back_after) - 1));
        assert_eq!(run.answers, 0, "given up after {:?} without a stream", back_after);
        if back_after == SEAL_GRACE {
            run.apply(Event::Pass(1));
            assert_eq!((run.answers, run.settled), (1, true), "waits for ever");
            continue;
        }
        // The stream is back: the receiver has a lease to answer in.
        run.apply(Event::LinkUp);
        run.apply(Event::Pass(1));
        assert_eq!(run.answers, 0, "the lease runs while nothing can be heard");
        run.apply(Event::Released);
        assert_eq!((run.answers, run.settled), (1, true));
    }
}

/// A lease that runs out on a stream on which nothing else was heard takes the stream along, and a sealed transfer stays
/// to ask over the next one. A peer that speaks of others is there: only this transfer is over.
#[test]
fn a_lease_that_runs_out_on_a_silent_stream_ends_the_stream_too() {
    let lease = u64::try_from(LEASE.as_millis()).expect("short");
    for (seal, heard_of_another, answers) in
        [(false, false, 1), (false, true, 1), (true, false, 0), (true, true, 1)]
    {
        let mut run = Run::new(Shape { layers: 1, blocks: 1 }, vec![]);
        run.apply(Event::LinkUp);
        run.apply(Event::Accepted { bad: false });
        if seal {
            run.apply(Event::AllReady);
            run.apply(Event::Seal);
            run.apply(Event::Take(1));
            run.apply(Event::Report { which: 0, sent: true });
        }
        run.apply(Event::Pass(lease / 2));
        if heard_of_another {
            run.apply(Event::HeardOfAnother);
        }
        run.apply(Event::Pass(lease / 2 - 1));
        assert!(!run.cut && run.answers == 0);
        run.apply(Event::Pass(1));
        let case = (seal, heard_of_another);
        assert_eq!((run.cut, run.answers), (!heard_of_another, answers), "{case:?}");
    }
}
