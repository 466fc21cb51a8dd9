//! The receiver under any order of events.

use super::*;

#[derive(Debug, Clone)]
enum Event {
    Expect,
    Offer {
        wrong: bool,
    },
    Claim {
        run: SliceRun,
        lie: bool,
    },
    /// Closes one of the open claims: 0 = landed, 1 = damaged, 2 = interrupted.
    Close {
        which: usize,
        how: u8,
    },
    /// 0 = fits, others do not.
    Seal(u8),
    Renewed,
    PeerAborted,
    LinkLost,
    Cancel,
    Pass(u64),
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => Just(Event::Expect),
        3 => prop::bool::weighted(0.1).prop_map(|wrong| Event::Offer { wrong }),
        12 => (any_run(), prop::bool::weighted(0.02)).prop_map(|(run, lie)| Event::Claim { run, lie }),
        12 => (any::<usize>(), prop_oneof![40 => Just(0u8), 1 => Just(1), 1 => Just(2)])
            .prop_map(|(which, how)| Event::Close { which, how }),
        1 => prop_oneof![9 => Just(0u8), 1 => 1..5u8].prop_map(Event::Seal),
        3 => Just(Event::Renewed),
        1 => prop_oneof![Just(Event::PeerAborted), Just(Event::LinkLost), Just(Event::Cancel)],
        3 => prop_oneof![9 => 1..300u64, 1 => 1..2000u64].prop_map(Event::Pass),
    ]
}

/// The session, what it has commanded so far, and what the test knows to be true.
struct Run {
    session: Receiver,
    now: Instant,
    shape: Shape,
    held: Vec<u32>,
    deadline: Instant,
    open: Vec<SliceRun>,
    landed: std::collections::BTreeSet<(u32, u32)>,
    sealed_well: bool,
    answers: usize,
    settled: bool,
    accepted: bool,
}

impl Run {
    fn new(offered_first: bool, shape: Shape, held: Vec<u32>) -> Self {
        let now = Instant::now();
        let deadline = now + Duration::from_secs(10);
        let session = if offered_first {
            Receiver::offered(now, timing(), SLICE_BYTES, offer(shape))
        } else {
            Receiver::expected(now, timing(), SLICE_BYTES, expectation(shape, held.clone(), deadline))
        };
        let (open, landed) = Default::default();
        let (sealed_well, answers, settled, accepted) = Default::default();
        Self { session, now, shape, held, deadline, open, landed, sealed_well, answers, settled, accepted }
    }

    fn apply(&mut self, event: Event) {
        let now = self.now;
        let commands = match event {
            Event::Expect => {
                let expectation = expectation(self.shape, self.held.clone(), self.deadline);
                self.session.expect(now, expectation).unwrap_or_default()
            }
            Event::Offer { wrong } => {
                let mut terms = offer(self.shape);
                if wrong {
                    terms.sender_incarnation = Incarnation(2);
                }
                self.session.offer(now, terms).unwrap_or_default()
            }
            Event::Claim { run, lie } => {
                let mut crcs = crcs(run);
                crcs[0] ^= u32::from(lie) << 31;
                let (claim, commands) = self.session.claim(now, run, &crcs);
                if claim == Claim::Write {
                    assert!(!self.settled && self.shape.contains(run), "{run:?}");
                    assert!(run.blocks().all(|block| !self.held.contains(&block)));
                    let overlaps = |other: &SliceRun| {
                        other.layer == run.layer && other.blocks().any(|block| run.blocks().contains(&block))
                    };
                    assert!(!self.open.iter().any(overlaps), "two frames write one slice");
                    assert!(run.blocks().all(|block| !self.landed.contains(&(run.layer, block))));
                    if lie {
                        // Its payload cannot match; closed at once as a transport would.
                        self.check(commands);
                        let commands = self.session.damaged(run, run.first);
                        return self.check(commands);
                    }
                    self.open.push(run);
                }
                commands
            }
            Event::Close { which, how } => {
                if self.open.is_empty() {
                    return;
                }
                let run = self.open.swap_remove(which % self.open.len());
                match how {
                    0 => {
                        self.landed.extend(run.blocks().map(|block| (run.layer, block)));
                        self.session.landed(now, run)
                    }
                    1 => self.session.damaged(run, run.first),
                    _ => self.session.interrupted(run, "test"),
                }
            }
            Event::Seal(how) => {
                let mut tally = whole(self.shape, &self.held);
                match how {
                    1 => tally.slices += 1,
                    2 => tally.bytes += 1,
                    3 => tally.checksum ^= 1,
                    4 => tally = Tally::default(),
                    _ => {}
                }
                self.sealed_well |= self.session.live() && tally == whole(self.shape, &self.held);
                self.session.seal(now, SealTerms { first_tokens: 5.into(), tally })
            }
            Event::Renewed => {
                self.session.renewed(now);
                Vec::new()
            }
            Event::PeerAborted => self.session.peer_aborted(reason()),
            Event::LinkLost => self.session.link_lost("test"),
            Event::Cancel => self.session.cancel(TransferError::Cancelled("test".into())),
            Event::Pass(millis) => {
                self.now += Duration::from_millis(millis);
                self.session.tick(self.now)
            }
        };
        self.check(commands);
    }

    fn check(&mut self, commands: Vec<ReceiverCommand>) {
        for command in commands {
            assert!(!self.settled, "{command:?} after the end");
            match command {
                ReceiverCommand::Accept => {
                    assert!(!self.accepted && self.answers == 0, "accepted twice or too late");
                    self.accepted = true;
                }
                ReceiverCommand::Complete { tally, .. } => {
                    self.answers += 1;
                    assert!(self.sealed_well && self.open.is_empty());
                    assert_eq!(tally, whole(self.shape, &self.held));
                    assert_eq!(
                        tally.slices as usize,
                        self.landed.len(),
                        "released before all was accounted for"
                    );
                }
                ReceiverCommand::Fail(_) => self.answers += 1,
                ReceiverCommand::Released => assert_eq!(self.answers, 0),
                ReceiverCommand::Settled => {
                    assert!(self.open.is_empty(), "blocks given back while a claim is open");
                    assert_eq!(self.answers, 1);
                    self.settled = true;
                }
                ReceiverCommand::Renew | ReceiverCommand::Abort(_) | ReceiverCommand::Revoke => {}
            }
            assert!(self.answers <= 1, "two answers");
        }
    }

    /// Whatever happened: cancelled and with its claims closed, a session is over and says so once.
    fn end(mut self) {
        self.apply(Event::Cancel);
        while !self.open.is_empty() {
            assert!(!self.settled);
            self.apply(Event::Close { which: 0, how: 2 });
        }
        assert!(self.settled && self.answers == 1);
        assert!(matches!(self.session.state(), ReceiverState::Released | ReceiverState::Aborted));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_order_of_events_keeps_the_promises(
        offered_first: bool,
        (shape, held) in any_shape(),
        events in prop::collection::vec(any_event(), 0..80),
    ) {
        let mut run = Run::new(offered_first, shape, held);
        events.into_iter().for_each(|event| run.apply(event));
        run.end();
    }

    #[test]
    fn any_order_of_slices_and_seal_completes_if_they_agree(
        (shape, held) in any_shape(),
        order in any::<u64>(),
        seal_at in 0..13usize,
        how in prop_oneof![2 => Just(0u8), 1 => 1..4u8],
    ) {
        let mut run = Run::new(false, shape, held.clone());
        run.apply(Event::Offer { wrong: false });
        let missing = |block: &u32| !held.contains(block);
        let mut slices: Vec<_> = (0..shape.layers)
            .flat_map(|layer| (0..shape.blocks).filter(missing).map(move |first| SliceRun { layer, first, count: 1 }))
            .collect();
        slices.sort_by_key(|run| order.rotate_left(run.layer * 7 + run.first).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let seal_at = seal_at.min(slices.len());
        for (n, slice) in slices.iter().enumerate() {
            if n == seal_at {
                run.apply(Event::Seal(how));
            }
            prop_assert!(run.answers == 0 || how != 0);
            run.apply(Event::Claim { run: *slice, lie: false });
            run.apply(Event::Close { which: 0, how: 0 });
        }
        if seal_at == slices.len() {
            run.apply(Event::Seal(how));
        }
        let end = if how == 0 { ReceiverState::Released } else { ReceiverState::Aborted };
        prop_assert_eq!(run.session.state(), end);
        run.end();
    }
}

/// What each state makes of each event: a table, so that none is forgotten.
#[test]
fn every_event_is_legal_or_refused_in_every_state() {
    use ReceiverState::*;
    let shape = Shape { layers: 1, blocks: 2 };
    let slice = |first| SliceRun { layer: 0, first, count: 1 };
    let reach = |state: ReceiverState| {
        let mut run = Run::new(state == Offered, shape, vec![]);
        if !matches!(state, Expected | Offered) {
            run.apply(Event::Offer { wrong: false });
        }
        if matches!(state, Moving | Sealed | Released | Aborting) {
            run.apply(Event::Claim { run: slice(0), lie: false });
        }
        if matches!(state, Sealed | Released) {
            run.apply(Event::Seal(0));
        }
        if state == Released {
            run.apply(Event::Close { which: 0, how: 0 });
            run.apply(Event::Claim { run: slice(1), lie: false });
            run.apply(Event::Close { which: 0, how: 0 });
        }
        if matches!(state, Aborting | Aborted) {
            run.apply(Event::Cancel);
        }
        assert_eq!(run.session.state(), state);
        run
    };
    let claim = Event::Claim { run: slice(1), lie: false };
    let late = Event::Pass(60_000);
    // (event, what becomes of Expected, Offered, Accepted, Moving, Sealed, Released, Aborting, Aborted)
    let table = [
        (Event::Expect, [Expected, Accepted, Accepted, Moving, Sealed, Released, Aborting, Aborted]),
        (
            Event::Offer { wrong: false },
            [Accepted, Offered, Accepted, Moving, Sealed, Released, Aborting, Aborted],
        ),
        (
            Event::Offer { wrong: true },
            [Expected, Offered, Accepted, Moving, Sealed, Released, Aborting, Aborted],
        ),
        (claim, [Aborted, Aborted, Moving, Moving, Sealed, Released, Aborting, Aborted]),
        (
            Event::Close { which: 0, how: 0 },
            [Expected, Offered, Accepted, Moving, Sealed, Released, Aborted, Aborted],
        ),
        (
            Event::Close { which: 0, how: 1 },
            [Expected, Offered, Accepted, Aborted, Aborted, Released, Aborted, Aborted],
        ),
        (Event::Seal(0), [Aborted, Aborted, Sealed, Sealed, Aborting, Released, Aborting, Aborted]),
        (Event::Seal(1), [Aborted, Aborted, Aborted, Aborting, Aborting, Released, Aborting, Aborted]),
        (Event::Renewed, [Expected, Offered, Accepted, Moving, Sealed, Released, Aborting, Aborted]),
        (Event::PeerAborted, [Aborted, Aborted, Aborted, Aborting, Aborting, Released, Aborting, Aborted]),
        (Event::LinkLost, [Expected, Aborted, Aborted, Aborting, Aborting, Released, Aborting, Aborted]),
        (Event::Cancel, [Aborted, Aborted, Aborted, Aborting, Aborting, Released, Aborting, Aborted]),
        (late, [Aborted, Aborted, Aborted, Aborting, Aborting, Released, Aborting, Aborted]),
    ];
    let states = [Expected, Offered, Accepted, Moving, Sealed, Released, Aborting, Aborted];
    for (event, outcomes) in table {
        for (state, outcome) in states.into_iter().zip(outcomes) {
            let mut run = reach(state);
            run.apply(event.clone());
            assert_eq!(run.session.state(), outcome, "{event:?} in {state:?}");
            run.end();
        }
    }
}
