//! What the messages of an instance's KV events mean, one after the other. Pure.
//!
//! ```text
//! begin ──> snapshot, in parts ──> following: changes, each numbered one above what was before it
//!   │            ^                  │  ^
//!   │            └── a new snapshot ┘  │  in place of changes that were missed
//!   └── the number that was asked to go on from: what follows is kept
//! ```
//! What does not fit ends the stream; the next one goes on from what was taken in, or begins with a snapshot. Nothing of a
//! message is believed beyond its bounds: gRPC bounds each, this bounds what they come to.

use baton_proto::{BlockHash, IdError, Incarnation, v1};
use baton_schedule::chains::Dialect;
use v1::kv_events::Events;

/// Blocks that one instance is believed to tell of: at one for 128 tokens, 128 million tokens.
pub(super) const BLOCKS_MOST: usize = 1 << 20;
const FINGERPRINT_BYTES_MOST: usize = 256;

/// Why a stream is not read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("change {got} came where {expected} was due")]
    Gap { expected: u64, got: u64 },
    #[error("it is of incarnation {got}, not {expected}")]
    OtherProcess { expected: Incarnation, got: Incarnation },
    #[error("part {got} of a snapshot came where {expected} was due")]
    Part { expected: u32, got: u32 },
    #[error("the parts of a snapshot differ in more than their blocks")]
    MixedParts,
    #[error("a change came before a snapshot was whole")]
    Early,
    #[error("it goes on from change {got}, not from {asked:?}")]
    Elsewhere { asked: Option<u64>, got: u64 },
    #[error("its layout is named in {0} bytes, or its blocks have no tokens")]
    Layout(usize),
    #[error("it says that it has more than {BLOCKS_MOST} blocks")]
    TooMany,
    #[error(transparent)]
    Names(#[from] IdError),
}

impl Fault {
    /// For the label of a metric.
    pub(super) fn reason(&self) -> &'static str {
        match self {
            Self::Gap { .. } => "gap",
            Self::OtherProcess { .. } => "restart",
            _ => "nonsense",
        }
    }
}

/// What a message brings.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum News {
    /// A part of a snapshot; with the last one, how its blocks are named.
    Part {
        first: bool,
        stored: Vec<u64>,
        whole: Option<Dialect>,
    },
    Change {
        stored: Vec<u64>,
        evicted: Vec<u64>,
    },
    /// What was known counts, and changes since come next.
    GoesOn,
    /// What this build does not know.
    Nothing,
}

/// How far an instance's events have been taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) sequence: u64,
    /// Blocks that it has by then.
    blocks: usize,
}

/// What all parts of a snapshot share.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    sequence: u64,
    fingerprint: String,
    block_tokens: u32,
}

#[derive(Debug)]
enum State {
    /// With the change that was asked to go on from.
    Begin {
        after: Option<u64>,
    },
    Parts {
        head: Head,
        next: u32,
    },
    Following {
        sequence: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Follower {
    /// Of the process that is listened to.
    incarnation: Incarnation,
    state: State,
    /// Blocks that it says it has.
    blocks: usize,
}

impl Follower {
    /// Of a stream that was asked to go on from what is known, if anything is.
    pub(super) fn new(incarnation: Incarnation, known: Option<Position>) -> Self {
        let state = State::Begin { after: known.map(|known| known.sequence) };
        Self { incarnation, state, blocks: known.map_or(0, |known| known.blocks) }
    }

    /// How far it is, unless a snapshot is not whole.
    pub(super) fn position(&self) -> Option<Position> {
        match self.state {
            State::Following { sequence } => Some(Position { sequence, blocks: self.blocks }),
            State::Begin { .. } | State::Parts { .. } => None,
        }
    }

    /// Whether all is known and changes may be long in coming.
    pub(super) fn follows(&self) -> bool {
        matches!(self.state, State::Following { .. })
    }

    pub(super) fn take(&mut self, message: v1::KvEvents) -> Result<News, Fault> {
        match message.events {
            Some(Events::Snapshot(snapshot)) => self.part(message.sequence, snapshot),
            Some(Events::Change(change)) => self.change(message.sequence, &change),
            None => self.goes_on(message.sequence),
        }
    }

    fn goes_on(&mut self, sequence: u64) -> Result<News, Fault> {
        match self.state {
            State::Begin { after } if after == Some(sequence) => {
                self.state = State::Following { sequence };
                Ok(News::GoesOn)
            }
            State::Begin { after: asked } => Err(Fault::Elsewhere { asked, got: sequence }),
            State::Parts { .. } | State::Following { .. } => Ok(News::Nothing),
        }
    }

    fn part(&mut self, sequence: u64, snapshot: v1::KvSnapshot) -> Result<News, Fault> {
        let v1::KvSnapshot { incarnation, layout_fingerprint, block_tokens, stored, part, last } = snapshot;
        if incarnation != self.incarnation.0 {
            let (expected, got) = (self.incarnation, Incarnation(incarnation));
            return Err(Fault::OtherProcess { expected, got });
        }
        let length = layout_fingerprint.len();
        if length > FINGERPRINT_BYTES_MOST {
            return Err(Fault::Layout(length));
        }
        let head = Head { sequence, fingerprint: layout_fingerprint, block_tokens };
        let first = part == 0;
        if first {
            self.blocks = 0;
        } else {
            match &self.state {
                State::Parts { next, .. } if *next != part => {
                    return Err(Fault::Part { expected: *next, got: part });
                }
                State::Parts { head: begun, .. } if *begun != head => return Err(Fault::MixedParts),
                State::Parts { .. } => {}
                State::Begin { .. } | State::Following { .. } => {
                    return Err(Fault::Part { expected: 0, got: part });
                }
            }
        }
        let stored = keys(&stored)?;
        self.count(stored.len())?;
        if !last {
            self.state = State::Parts { head, next: part + 1 };
            return Ok(News::Part { first, stored, whole: None });
        }
        let dialect = Dialect::new(&head.fingerprint, block_tokens).ok_or(Fault::Layout(length))?;
        self.state = State::Following { sequence };
        Ok(News::Part { first, stored, whole: Some(dialect) })
    }

    fn change(&mut self, sequence: u64, change: &v1::KvChange) -> Result<News, Fault> {
        let State::Following { sequence: last } = &mut self.state else { return Err(Fault::Early) };
        let expected = last.wrapping_add(1);
        if sequence != expected {
            return Err(Fault::Gap { expected, got: sequence });
        }
        *last = sequence;
        let (stored, evicted) = (keys(&change.stored)?, keys(&change.evicted)?);
        self.blocks = self.blocks.saturating_sub(evicted.len());
        self.count(stored.len())?;
        Ok(News::Change { stored, evicted })
    }

    fn count(&mut self, stored: usize) -> Result<(), Fault> {
        self.blocks += stored;
        if self.blocks > BLOCKS_MOST { Err(Fault::TooMany) } else { Ok(()) }
    }
}

fn keys(names: &[u8]) -> Result<Vec<u64>, Fault> {
    Ok(BlockHash::from_wire(names)?.map(|hash| hash.key()).collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn hash(number: u32) -> BlockHash {
        BlockHash::root("l", "").child(&[number])
    }

    fn names(numbers: &[u32]) -> Bytes {
        let hashes: Vec<_> = numbers.iter().map(|&number| hash(number)).collect();
        BlockHash::to_wire(&hashes)
    }

    fn known(numbers: &[u32]) -> Vec<u64> {
        numbers.iter().map(|&number| hash(number).key()).collect()
    }

    fn snapshot(numbers: &[u32], part: u32, last: bool) -> v1::KvSnapshot {
        let layout_fingerprint = "l".to_owned();
        v1::KvSnapshot {
            incarnation: 1,
            layout_fingerprint,
            block_tokens: 16,
            stored: names(numbers),
            part,
            last,
        }
    }

    fn of_snapshot(sequence: u64, snapshot: v1::KvSnapshot) -> v1::KvEvents {
        v1::KvEvents { sequence, events: Some(Events::Snapshot(snapshot)) }
    }

    fn change(sequence: u64, stored: &[u32], evicted: &[u32]) -> v1::KvEvents {
        let change = v1::KvChange { stored: names(stored), evicted: names(evicted) };
        v1::KvEvents { sequence, events: Some(Events::Change(change)) }
    }

    #[test]
    fn a_snapshot_in_parts_then_changes_then_a_snapshot_again() {
        let mut follower = Follower::new(Incarnation(1), None);
        let part = |first, stored: &[u32], whole: bool| {
            let whole = whole.then(|| Dialect::new("l", 16).expect("16 tokens"));
            Ok(News::Part { first, stored: known(stored), whole })
        };
        assert_eq!(follower.take(of_snapshot(7, snapshot(&[1, 2], 0, false))), part(true, &[1, 2], false));
        assert!(!follower.follows());
        assert_eq!(follower.take(of_snapshot(7, snapshot(&[3], 1, true))), part(false, &[3], true));
        assert!(follower.follows());
        let changed = Ok(News::Change { stored: known(&[4]), evicted: known(&[1]) });
        assert_eq!(follower.take(change(8, &[4], &[1])), changed);
        assert_eq!(follower.take(of_snapshot(30, snapshot(&[], 0, true))), part(true, &[], true));
        assert!(follower.take(change(31, &[4], &[])).is_ok());
    }

    #[test]
    fn a_stream_goes_on_from_what_is_known() {
        let mut first = Follower::new(Incarnation(1), None);
        assert_eq!(first.position(), None);
        first.take(of_snapshot(7, snapshot(&[1, 2], 0, true))).expect("is good");
        first.take(change(8, &[3, 4], &[1])).expect("is good");
        let known = first.position();
        assert_eq!(known, Some(Position { sequence: 8, blocks: 3 }));
        let back = || Follower::new(Incarnation(1), known);
        let goes_on = |sequence| v1::KvEvents { sequence, events: None };
        let mut second = back();
        assert!(!second.follows(), "nobody has said so");
        assert_eq!(second.take(goes_on(8)), Ok(News::GoesOn));
        assert!(second.take(change(9, &[5], &[])).is_ok());
        assert_eq!(second.position(), Some(Position { sequence: 9, blocks: 4 }));
        assert_eq!(second.take(goes_on(0)), Ok(News::Nothing), "of a later build");
        assert!(second.take(change(10, &[6], &[])).is_ok());
        assert_eq!(back().take(goes_on(7)), Err(Fault::Elsewhere { asked: Some(8), got: 7 }));
        assert_eq!(back().take(change(9, &[5], &[])), Err(Fault::Early));
        // Not all is kept, or the instance knows of no going on.
        let mut anew = back();
        anew.take(of_snapshot(20, snapshot(&[9], 0, false))).expect("is good");
        assert_eq!(anew.position(), None);
        anew.take(of_snapshot(20, snapshot(&[8], 1, true))).expect("is good");
        assert_eq!(anew.position(), Some(Position { sequence: 20, blocks: 2 }));
        assert!(Follower::new(Incarnation(1), None).take(goes_on(0)).is_err());
    }

    #[test]
    fn what_does_not_fit_is_a_fault() {
        let follower = || {
            let mut follower = Follower::new(Incarnation(1), None);
            follower.take(of_snapshot(7, snapshot(&[1], 0, true))).expect("is good");
            follower
        };
        let beginner = || Follower::new(Incarnation(1), None);
        let gap = |got| Fault::Gap { expected: 8, got };
        for got in [0, 7, 9, u64::MAX] {
            assert_eq!(follower().take(change(got, &[2], &[])), Err(gap(got)));
        }
        assert_eq!(beginner().take(change(1, &[2], &[])), Err(Fault::Early));
        let lost = Err(Fault::Part { expected: 0, got: 1 });
        assert_eq!(beginner().take(of_snapshot(7, snapshot(&[1], 1, true))), lost);
        assert_eq!(follower().take(of_snapshot(7, snapshot(&[1], 1, true))), lost);
        let mut third = beginner();
        third.take(of_snapshot(7, snapshot(&[1], 0, false))).expect("is good");
        assert_eq!(third.take(of_snapshot(8, snapshot(&[1], 1, true))), Err(Fault::MixedParts));
        assert_eq!(
            third.take(of_snapshot(7, snapshot(&[1], 2, true))),
            Err(Fault::Part { expected: 1, got: 2 })
        );
        type Spoil = fn(&mut v1::KvSnapshot);
        let cases: [(Spoil, Fault); 4] = [
            (|s| s.incarnation = 2, Fault::OtherProcess { expected: Incarnation(1), got: Incarnation(2) }),
            (|s| s.block_tokens = 0, Fault::Layout(1)),
            (|s| s.layout_fingerprint = "l".repeat(257), Fault::Layout(257)),
            (|s| s.stored.truncate(15), Fault::Names(IdError::BlockHashesLength(15))),
        ];
        for (spoil, fault) in cases {
            let mut spoilt = snapshot(&[1], 0, true);
            spoil(&mut spoilt);
            assert_eq!(follower().take(of_snapshot(9, spoilt)), Err(fault));
        }
    }

    #[test]
    fn nobody_is_believed_to_have_more_than_there_is() {
        let mut follower = Follower::new(Incarnation(1), None);
        let half = |part, last| {
            let stored = names(&[1]).repeat(BLOCKS_MOST / 2).into();
            of_snapshot(7, v1::KvSnapshot { stored, ..snapshot(&[], part, last) })
        };
        follower.take(half(0, false)).expect("is good");
        follower.take(half(1, true)).expect("is good");
        follower.take(change(8, &[1], &[2])).expect("as many as before");
        assert_eq!(follower.take(change(9, &[3], &[])), Err(Fault::TooMany));
    }
}
