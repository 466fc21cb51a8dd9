//! What the target `records` in `integration-tests/fuzz` calls: what lies in the store, or a controller says of it, read by
//! whoever follows it.

use std::fmt::Debug;

use baton_proto::v1;
use bytes::Bytes;
use prost::Message;

use super::*;
use crate::{
    Event, HealthRecord, KeyValue, LeaderRecord, Listing, RecordError, Txn,
    keys::Key,
    records::{
        decode_api_key, decode_intent, decode_spec, decode_targets, encode_api_key, encode_intent,
        encode_spec, encode_targets,
    },
};

const IDS: [&str; 3] = ["a", "b.c", "not an id"];

/// The first byte says what the rest is: a record, a message of the store's service, a key, or a history of keys.
pub fn records(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else { return };
    match kind % 14 {
        0 => again(rest, decode_spec, encode_spec),
        1 => again(rest, decode_intent, encode_intent),
        2 => again(rest, decode_targets, encode_targets),
        3 => again(rest, decode_api_key, encode_api_key),
        4 => again(rest, DesiredRole::decode, DesiredRole::encode),
        5 => again(rest, ObservedStatus::decode, ObservedStatus::encode),
        6 => again(rest, HealthRecord::decode, HealthRecord::encode),
        7 => again(rest, LeaderRecord::decode, LeaderRecord::encode),
        8 => {
            let Some(txn) = decoded::<v1::TxnRequest>(rest).and_then(|wire| Txn::try_from(wire).ok()) else {
                return;
            };
            let back = v1::TxnRequest::from(txn.clone());
            assert_eq!(Txn::try_from(back), Ok(txn));
        }
        9 => {
            let Some(wire) = decoded::<v1::WatchResponse>(rest) else { return };
            let batch = WatchBatch::from(wire);
            assert_eq!(WatchBatch::from(v1::WatchResponse::from(batch.clone())), batch);
        }
        10 => key(&String::from_utf8_lossy(rest)),
        _ => history(rest),
    }
}

fn decoded<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    M::decode(bytes).ok()
}

/// Whatever can be read says the same when it is written and read again; but numbers that are none equal nothing.
fn again<T: Debug>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, RecordError>,
    encode: impl Fn(&T) -> Bytes,
) {
    let Ok(record) = decode(bytes) else { return };
    let read = decode(&encode(&record)).expect("what was written can be read");
    assert_eq!(format!("{read:?}"), format!("{record:?}"));
}

/// A key that is understood is the one that would be written for what it was understood as.
fn key(text: &str) {
    let text = text.replacen('~', keys::ROOT, 1);
    let written = match Key::parse(&text) {
        Key::Leader => keys::LEADER.to_owned(),
        Key::Format => keys::FORMAT.to_owned(),
        Key::Instance(id) => keys::instance(&id),
        Key::Role(id) => keys::role(&id),
        Key::Status(id) => keys::status(&id),
        Key::Health(id) => keys::health(&id),
        Key::Intent(id) => keys::intent(&id),
        Key::Targets(group) => keys::targets(&group),
        Key::ApiKey(name) => keys::api_key(&name),
        Key::Other => return,
    };
    assert_eq!(written, text);
}

/// Keys written and deleted while nobody leads: readers see of each instance the last spec that could be read, whatever was
/// deleted, and whether the store still has it, and no status of another start. What one sees who lists what there is in the end is
/// no other spec.
fn history(bytes: &[u8]) {
    let now = Instant::now();
    let mut view = View::new(Duration::from_secs(15));
    let mut stored: BTreeMap<String, KeyValue> = BTreeMap::new();
    let mut specs: BTreeMap<InstanceId, (InstanceSpec, bool)> = BTreeMap::new();
    let (mut rest, mut revision) = (bytes, 0);
    view.relist(Listing { revision: Revision(0), items: Vec::new() }, now);
    while let [what, length, behind @ ..] = rest {
        let (value, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        revision += 1;
        let id = IDS[usize::from(what / 8) % IDS.len()];
        let place = match what % 8 {
            0 | 1 | 4 => format!("{}{id}", keys::INSTANCES),
            2 | 5 => format!("{}{id}", keys::ROLES),
            3 | 6 => format!("{}{id}", keys::STATUS),
            _ => format!("{}{id}", keys::HEALTH),
        };
        let known = InstanceId::new(id);
        let event = if what % 8 < 4 {
            let item = KeyValue {
                key: place.clone(),
                value: value.to_vec().into(),
                create_revision: Revision(revision),
                mod_revision: Revision(revision),
                version: 1,
                lease: None,
            };
            if let (Ok(id), true, Ok(spec)) = (known, what % 8 < 2, decode_spec(value))
                && spec.id == id
            {
                specs.insert(id, (spec, true));
            }
            stored.insert(place, item.clone());
            Event::Put(item)
        } else {
            stored.remove(&place);
            if let (Ok(id), true) = (known, what % 8 == 4)
                && let Some((_, present)) = specs.get_mut(&id)
            {
                *present = false;
            }
            Event::Delete { key: place, revision: Revision(revision) }
        };
        view.apply(WatchBatch { revision: Revision(revision), events: vec![event] }, now);
    }
    let shown = view.snapshot(None);
    let read: BTreeMap<_, _> =
        shown.instances.iter().map(|(id, one)| (id.clone(), (one.spec.clone(), one.confirmed))).collect();
    assert_eq!(read, specs);
    for one in shown.instances.values() {
        assert!(one.status.is_none_or(|status| status.incarnation == one.spec.incarnation));
    }
    let mut late = View::new(Duration::from_secs(15));
    late.relist(Listing { revision: Revision(revision), items: stored.into_values().collect() }, now);
    for (id, one) in &late.snapshot(None).instances {
        assert_eq!(shown.instances.get(id).map(|seen| &seen.spec), Some(&one.spec));
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_is_taken() {
        baton_fuzz::replay("records", super::records);
    }
}
