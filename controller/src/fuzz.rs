//! What the targets `sessions` and `files` in `integration-tests/fuzz` call.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use baton_proto::{
    CoordinatorBeat, CoordinatorSpec, Cordoned, InstanceId, Intent, LINKS_MOST, LeaderEpoch, Pinned, Targets,
    v1,
};
use baton_registry::{
    DesiredRole, HealthRecord, ObservedStatus,
    keys::Key,
    records::{decode_intent, decode_spec, decode_targets},
};
use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;
use v1::coordinator_report::Report as OfCoordinator;

use crate::{
    config::{HealthConfig, RoleConfig, SessionConfig},
    coordinators::{COORDINATORS_MOST, Coordinators, Hello, links},
    fleet::SessionId,
    ranktable::RankTable,
    reconcile::{Change, Command, Event, Only, Order, Reconciler, Record},
    session::{SPEC_MAX_BYTES, event_of, presented},
};

const EPOCH: LeaderEpoch = LeaderEpoch(1000);
const LEASE: Duration = Duration::from_secs(3);
const SLOTS: usize = 4;
const MESSAGES_MOST: usize = 64;

/// A ranktable, if the first byte says so.
pub fn ranktables(bytes: &[u8]) {
    let Some((6, rest)) = bytes.split_first().map(|(kind, rest)| (kind % 8, rest)) else { return };
    let Ok(table) = RankTable::parse(&String::from_utf8_lossy(rest)) else { return };
    let spec =
        v1::InstanceSpec { device: "ascend".into(), inference_endpoint: "10.0.0.1:1".into(), ..spec() };
    let spec = baton_proto::InstanceSpec::try_from(spec).expect("is good");
    assert!(table.npus(&spec).is_none_or(|npus| npus > 0));
}

fn spec() -> v1::InstanceSpec {
    v1::InstanceSpec {
        instance_id: "a".into(),
        group: "default".into(),
        model: Some(v1::ModelIdentity { name: "m".into(), ..Default::default() }),
        kv_layout: Some(v1::KvLayout::default()),
        inference_endpoint: "a:1".into(),
        handoff_endpoint: "a:2".into(),
        ..Default::default()
    }
}

/// Messages, each with a byte for who says it and one for its length: instances and coordinators on their sessions, operators,
/// and time that passes. The store takes what is written.
pub fn sessions(bytes: &[u8]) {
    let mut world = World::new();
    let mut rest = bytes;
    for _ in 0..MESSAGES_MOST {
        let [who, length, behind @ ..] = rest else { break };
        let (message, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        let slot = usize::from(who / 16) % SLOTS;
        match who % 16 {
            0..=6 => world.instance(slot, message),
            7..=9 => world.coordinator(slot, message),
            10 => world.ends(slot),
            11 => {
                let wanted = v1::Intent::decode(message).ok().and_then(|wire| Intent::try_from(wire).ok());
                if let Some(wanted) = wanted {
                    world.intends(slot, wanted);
                }
            }
            12 => {
                let targets = v1::Targets::decode(message).ok().and_then(|wire| Targets::try_from(wire).ok());
                let group = Default::default();
                world.change(Change::Divide { group, targets });
            }
            13 => world.change(Change::Rebalance { group: Default::default() }),
            _ => world.now += Duration::from_millis(u64::from(*length) * 250),
        }
        world.settle();
    }
}

struct World {
    mind: Reconciler,
    now: Instant,
    last_session: u64,
    /// Of instances, and of coordinators.
    slots: [Option<SessionId>; SLOTS],
    ids: HashMap<SessionId, InstanceId>,
    reporters: [Option<(SessionId, baton_proto::CoordinatorId)>; SLOTS],
    coordinators: Coordinators,
    stored: BTreeMap<String, Bytes>,
    epochs: BTreeMap<InstanceId, u64>,
}

impl World {
    fn new() -> Self {
        let now = Instant::now() + Duration::from_secs(1000);
        let (sessions, roles) = (SessionConfig::default(), RoleConfig::default());
        let mind = Reconciler::new(sessions, roles, HealthConfig::default(), EPOCH, now);
        Self {
            mind,
            now,
            last_session: 0,
            slots: [None; SLOTS],
            ids: HashMap::new(),
            reporters: [const { None }; SLOTS],
            coordinators: Coordinators::default(),
            stored: BTreeMap::new(),
            epochs: BTreeMap::new(),
        }
    }

    fn event(&mut self, event: Event) {
        let commands = self.mind.handle(event, self.now);
        self.take(commands);
    }

    fn next_session(&mut self) -> SessionId {
        self.last_session += 1;
        SessionId(self.last_session)
    }

    fn instance(&mut self, slot: usize, message: &[u8]) {
        let Ok(report) = v1::InstanceReport::decode(message) else { return };
        if let Some(session) = self.slots[slot] {
            match event_of(session, report) {
                Ok(Some(event)) => self.event(event),
                Ok(None) => {}
                Err(_) => self.ends(slot),
            }
            return;
        }
        let Ok((spec, beat)) = presented(report.report) else { return };
        let session = self.next_session();
        self.slots[slot] = Some(session);
        self.ids.insert(session, spec.id.clone());
        self.event(Event::Hello { session, spec: Box::new(spec), beat, unix_millis: 0 });
    }

    fn ends(&mut self, slot: usize) {
        if let Some(session) = self.slots[slot].take() {
            self.event(Event::Closed { session });
        }
    }

    fn coordinator(&mut self, slot: usize, message: &[u8]) {
        let report = v1::CoordinatorReport::decode(message).ok().and_then(|report| report.report);
        match (&self.reporters[slot], report) {
            (
                None,
                Some(OfCoordinator::Hello(v1::CoordinatorHello { spec: Some(spec), beat: Some(beat) })),
            ) => {
                let (Ok(spec), Ok(beat)) = (CoordinatorSpec::try_from(spec), CoordinatorBeat::try_from(beat))
                else {
                    return;
                };
                let (session, id) = (self.next_session(), spec.id.clone());
                let hello = Hello { session, spec, beat, unix_millis: 0 };
                if self.coordinators.hello(EPOCH, hello, LEASE, self.now).is_ok() {
                    self.reporters[slot] = Some((session, id));
                }
            }
            (Some((session, id)), Some(OfCoordinator::Beat(beat))) => {
                let Ok(beat) = CoordinatorBeat::try_from(beat) else { return };
                match self.coordinators.beat(EPOCH, *session, id, beat, LEASE, self.now) {
                    Ok(more) => self.event(Event::Handoffs(more)),
                    Err(_) => self.reporters[slot] = None,
                }
            }
            _ => {}
        }
        let listed = self.coordinators.list(EPOCH, self.now);
        assert!(listed.len() <= COORDINATORS_MOST && listed.iter().all(|one| one.links.len() <= LINKS_MOST));
        let (shown, left_out) = links(&listed, 2);
        assert!(shown.len() <= 2 && (left_out == 0 || shown.len() == 2));
    }

    fn intends(&mut self, slot: usize, wanted: Intent) {
        let Some(id) = self.slots[slot].and_then(|session| self.ids.get(&session)).cloned() else { return };
        let pinned = wanted.pinned.map(|Pinned { role, .. }| Pinned { role, by: "alice".into() });
        self.change(Change::Pin { id: id.clone(), pinned });
        self.change(match wanted.cordoned {
            Some(cordoned) => Change::Cordon {
                id,
                cordoned: Cordoned { by: "alice".into(), ..cordoned },
                only: Only::Always,
            },
            None => Change::Uncordon { id, only: Only::Always },
        });
    }

    fn change(&mut self, change: Change) {
        // What cannot be done is refused.
        if let Err(error) = self.mind.change(change) {
            assert!((400..500).contains(&error.code.http()), "{error:?}");
        }
    }

    /// Concludes, and lets every write succeed.
    fn settle(&mut self) {
        let commands = self.mind.conclude(self.now);
        self.take(commands);
        for write in self.mind.take_writes(usize::MAX) {
            let key = write.key();
            match &write.value {
                Some(value) => {
                    readable(&key, value);
                    self.stored.insert(key, value.clone());
                }
                None => drop(self.stored.remove(&key)),
            }
            if let (Record::Role(id), Some(epoch)) = (write.record, write.epoch) {
                self.event(Event::RoleStored { id, epoch });
            }
        }
        assert!(self.mind.next_deadline() > self.now, "there is nothing left to do now");
    }

    fn take(&mut self, commands: Vec<Command>) {
        for command in commands {
            match command {
                Command::Order(session, Order::Assign(desired)) => {
                    let id = &self.ids[&session];
                    let record = self
                        .stored
                        .get(&baton_registry::keys::role(id))
                        .expect("it was written before it is told");
                    assert_eq!(DesiredRole::decode(record), Ok(desired.clone()));
                    let before = self.epochs.insert(id.clone(), desired.epoch.0).unwrap_or(0);
                    assert!(
                        before <= desired.epoch.0,
                        "epochs of {id} grow: {before}, then {}",
                        desired.epoch
                    );
                }
                Command::Order(_, Order::Welcome | Order::Refuse { .. }) => {}
                Command::Close(session) => {
                    self.slots
                        .iter_mut()
                        .filter(|slot| **slot == Some(session))
                        .for_each(|slot| *slot = None);
                }
            }
        }
    }
}

/// Whoever follows the store can read it.
fn readable(key: &str, value: &[u8]) {
    let read = match Key::parse(key) {
        Key::Instance(id) => {
            assert!(value.len() <= SPEC_MAX_BYTES + 16);
            decode_spec(value).map(|spec| assert_eq!(spec.id, id))
        }
        Key::Role(_) => DesiredRole::decode(value).map(drop),
        Key::Status(_) => ObservedStatus::decode(value).map(drop),
        Key::Health(_) => HealthRecord::decode(value).map(drop),
        Key::Intent(_) => decode_intent(value).map(drop),
        Key::Targets(_) => decode_targets(value).map(drop),
        other => panic!("{key} is {other:?}"),
    };
    read.unwrap_or_else(|error| panic!("{key}: {error}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpora_are_taken() {
        baton_fuzz::replay("sessions", sessions);
        baton_fuzz::replay("files", ranktables);
    }
}
