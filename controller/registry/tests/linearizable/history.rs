//! What clients did and saw, and whether some order of it explains everything: linearizability.
//!
//! A store numbers its changes, so the order does not have to be searched for: every answer names the revision at which
//! it claims to have happened. It is enough that each answer is what the store held at its revision, that each change
//! was made by one transaction, and that nothing happens at an earlier revision than what had ended before it began.

use std::{collections::BTreeMap, time::Instant};

use baton_registry::{Compare, Event, KeyValue, Listing, Operation, Revision, Txn, TxnOutcome};

/// One call of one client.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) began: Instant,
    /// When its answer came; none = it never came.
    pub(crate) ended: Option<Instant>,
    pub(crate) what: What,
}

#[derive(Debug)]
pub(crate) enum What {
    /// Of all keys.
    Read(Listing),
    /// The answer may be lost: then it was made at some time after the call began, or never.
    Write(Txn, Option<TxnOutcome>),
}

type State = BTreeMap<String, KeyValue>;

/// What the store held after each of its changes, by revision.
struct States(BTreeMap<Revision, (Vec<Event>, State)>);

impl States {
    /// `events` from the first on, on a store without keys.
    fn new(events: Vec<Event>) -> Self {
        let mut state = State::new();
        let mut states: BTreeMap<Revision, (Vec<Event>, State)> = BTreeMap::new();
        for event in events {
            match &event {
                Event::Put(item) => drop(state.insert(item.key.clone(), item.clone())),
                Event::Delete { key, .. } => drop(state.remove(key)),
            }
            let (at, after) = states.entry(event.revision()).or_default();
            at.push(event);
            after.clone_from(&state);
        }
        Self(states)
    }

    fn at(&self, revision: Revision) -> State {
        self.0.range(..=revision).next_back().map(|(_, (_, state))| state.clone()).unwrap_or_default()
    }

    fn before(&self, revision: Revision) -> State {
        self.0.range(..revision).next_back().map(|(_, (_, state))| state.clone()).unwrap_or_default()
    }

    fn events(&self, revision: Revision) -> &[Event] {
        self.0.get(&revision).map_or(&[], |(events, _)| events)
    }
}

fn holds(condition: &Compare, state: &State) -> bool {
    let item = state.get(condition.key());
    match condition {
        Compare::Absent { .. } => item.is_none(),
        Compare::CreateRevision { equals, .. } => item.is_some_and(|item| item.create_revision == *equals),
        Compare::ModRevision { equals, .. } => item.is_some_and(|item| item.mod_revision == *equals),
        Compare::Value { equals, .. } => item.is_some_and(|item| item.value == *equals),
    }
}

/// What a transaction changes: keys with their values, none = deleted.
fn changes(txn: &Txn, state: &State) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut changed = BTreeMap::new();
    for operation in &txn.operations {
        match operation {
            Operation::Put { key, value, .. } => drop(changed.insert(key.clone(), Some(value.to_vec()))),
            Operation::Delete { key } if state.contains_key(key) => drop(changed.insert(key.clone(), None)),
            Operation::Delete { .. } => {}
            Operation::DeletePrefix { prefix } => {
                let there = state.keys().filter(|key| key.starts_with(prefix));
                changed.extend(there.map(|key| (key.clone(), None)));
            }
        }
    }
    changed
}

fn seen(events: &[Event]) -> BTreeMap<String, Option<Vec<u8>>> {
    let change = |event: &Event| match event {
        Event::Put(item) => (item.key.clone(), Some(item.value.to_vec())),
        Event::Delete { key, .. } => (key.clone(), None),
    };
    events.iter().map(change).collect()
}

/// Checks a history against all of the store's changes since it had no keys. The error says what cannot be.
/// Every write must put a value of its own, so that a change tells who made it.
pub(crate) fn check(calls: &[Call], events: Vec<Event>) -> Result<(), String> {
    let states = States::new(events);
    let mut makers: BTreeMap<Revision, &Call> = BTreeMap::new();
    let mut happened: Vec<(&Call, Revision, bool)> = Vec::new();
    let mut lost: Vec<(&Call, &Txn)> = Vec::new();
    for call in calls {
        let (revision, changed) = match &call.what {
            What::Read(listing) => (listing.revision, explain_read(listing, &states)?),
            What::Write(txn, Some(outcome)) => (outcome.revision, explain_write(txn, *outcome, &states)?),
            What::Write(txn, None) => {
                lost.push((call, txn));
                continue;
            }
        };
        if changed && let Some(other) = makers.insert(revision, call) {
            return Err(format!("two calls made revision {revision}: {call:?} and {other:?}"));
        }
        happened.push((call, revision, changed));
    }
    // What nobody says to have done was done by one of those whose answers were lost.
    for (&revision, (events, _)) in &states.0 {
        if makers.contains_key(&revision) {
            continue;
        }
        let before = states.before(revision);
        let made = lost.iter().position(|(_, txn)| {
            txn.conditions.iter().all(|condition| holds(condition, &before))
                && changes(txn, &before) == seen(events)
        });
        let made = made.ok_or_else(|| format!("nobody made revision {revision}: {events:?}"))?;
        happened.push((lost.swap_remove(made).0, revision, true));
    }
    in_real_time(happened)
}

fn explain_read(listing: &Listing, states: &States) -> Result<bool, String> {
    let held: Vec<KeyValue> = states.at(listing.revision).into_values().collect();
    if held == listing.items { Ok(false) } else { Err(format!("read {listing:?}, but there was {held:?}")) }
}

/// Whether it changed anything.
fn explain_write(txn: &Txn, outcome: TxnOutcome, states: &States) -> Result<bool, String> {
    let TxnOutcome { succeeded, revision } = outcome;
    let (before, after) = (states.before(revision), states.at(revision));
    let all_hold = |state: &State| txn.conditions.iter().all(|condition| holds(condition, state));
    let changed = changes(txn, &before);
    match (succeeded, changed.is_empty()) {
        (true, false) if all_hold(&before) && changed == seen(states.events(revision)) => Ok(true),
        (true, _) if all_hold(&after) && changes(txn, &after).is_empty() => Ok(false),
        (false, _) if !all_hold(&after) => Ok(false),
        _ => Err(format!("{txn:?} ended with {outcome:?}, on {before:?}, then {after:?}")),
    }
}

/// Nothing happens before what had ended when it began; a change comes after all of that.
fn in_real_time(mut happened: Vec<(&Call, Revision, bool)>) -> Result<(), String> {
    let mut ends: Vec<(Instant, Revision)> =
        happened.iter().filter_map(|(call, revision, _)| Some((call.ended?, *revision))).collect();
    ends.sort_unstable();
    happened.sort_by_key(|(call, ..)| call.began);
    let (mut ended, mut latest) = (ends.into_iter().peekable(), Revision(0));
    for (call, revision, changed) in happened {
        while let Some((_, of)) = ended.next_if(|(at, _)| *at < call.began) {
            latest = latest.max(of);
        }
        if revision < latest || (changed && revision == latest) {
            return Err(format!(
                "at revision {revision}, although {latest} had ended before it began: {call:?}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn put(key: &str, value: &str, revision: u64, created: u64, version: u64) -> KeyValue {
        KeyValue {
            key: key.into(),
            value: value.to_owned().into(),
            create_revision: Revision(created),
            mod_revision: Revision(revision),
            version,
            lease: None,
        }
    }

    struct Script {
        zero: Instant,
        calls: Vec<Call>,
    }

    impl Script {
        fn call(mut self, began: u64, ended: Option<u64>, what: What) -> Self {
            let at = |seconds| self.zero + Duration::from_secs(seconds);
            self.calls.push(Call { began: at(began), ended: ended.map(at), what });
            self
        }

        fn write(self, span: (u64, u64), txn: Txn, (succeeded, revision): (bool, u64)) -> Self {
            let outcome = TxnOutcome { succeeded, revision: Revision(revision) };
            self.call(span.0, Some(span.1), What::Write(txn, Some(outcome)))
        }

        fn read(self, span: (u64, u64), revision: u64, items: Vec<KeyValue>) -> Self {
            self.call(span.0, Some(span.1), What::Read(Listing { revision: Revision(revision), items }))
        }

        fn check(&self) -> Result<(), String> {
            let (first, second) = (put("a", "1", 5, 5, 1), put("a", "2", 6, 5, 2));
            check(&self.calls, vec![Event::Put(first), Event::Put(second)])
        }
    }

    fn script() -> Script {
        Script { zero: Instant::now(), calls: Vec::new() }
            .write((0, 1), Txn::new().when(Compare::absent("a")).put("a", "1", None), (true, 5))
            .write((2, 3), Txn::new().put("a", "2", None), (true, 6))
    }

    #[test]
    fn what_can_be_is_accepted() {
        let stale = Txn::new().when(Compare::absent("a")).put("a", "3", None);
        let good = script().read((1, 5), 5, vec![put("a", "1", 5, 5, 1)]).write((4, 6), stale, (false, 6));
        assert_eq!(good.check(), Ok(()));
    }

    #[test]
    fn a_write_whose_answer_was_lost_may_have_been_made() {
        let mut script = script();
        let Some(Call { what: What::Write(_, outcome), ended, .. }) = script.calls.last_mut() else {
            panic!()
        };
        (*outcome, *ended) = (None, None);
        assert_eq!(script.check(), Ok(()));
        script.calls.pop();
        assert!(script.check().expect_err("by whom?").contains("nobody made revision 6"));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let stale = script().read((4, 5), 5, vec![put("a", "1", 5, 5, 1)]);
        assert!(stale.check().expect_err("the change had ended").contains("had ended before it began"));
        let wrong = script().read((4, 5), 6, vec![put("a", "1", 5, 5, 1)]);
        assert!(wrong.check().expect_err("not what was there").contains("but there was"));
        let lost = script().write((4, 5), Txn::new().put("a", "9", None), (true, 7));
        assert!(lost.check().expect_err("no such change").contains("ended with"));
        let condition = Txn::new().when(Compare::absent("a")).put("a", "2", None);
        let ignored = Script { zero: Instant::now(), calls: script().calls.drain(..1).collect() };
        assert!(ignored.write((2, 3), condition, (true, 6)).check().is_err(), "its condition did not hold");
    }
}
