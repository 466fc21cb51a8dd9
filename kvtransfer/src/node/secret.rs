//! How the two ends of a control stream show each other that they belong to one fleet.
//!
//! A stream is of one secret, from its hellos to its end. The receiver shows that it knows its newest and, for a while after a
//! change, the one before; the sender answers by the newest that both know. So secrets can change while nodes run, whichever
//! of them hears of it first, and streams that stand go on.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_proto::{Incarnation, InstanceId};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::{TransferError, mac, sync::Mutex, transport::DataKey};

/// Fewest bytes of a secret.
const LEAST: usize = 16;
/// How many are good at a time: the newest, the one that it replaced, and another that a node was told of.
pub(super) const GOOD_MOST: usize = 3;

/// What all nodes of a fleet know and nobody else. Never printed, never sent.
#[derive(Clone, PartialEq, Eq)]
pub struct FleetSecret(Arc<[u8]>);

impl FleetSecret {
    /// At least 16 bytes, best random ones.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, TransferError> {
        let bytes = bytes.into();
        if bytes.len() < LEAST {
            let message =
                format!("the fleet's secret has {} bytes; at least {LEAST} are needed", bytes.len());
            return Err(TransferError::Invalid(message));
        }
        Ok(Self(bytes.into()))
    }

    /// The key that 16 bytes of the wire stand for on a stream of this secret: themselves without one, or what only those who
    /// know it make of them. Who only reads along cannot use it.
    pub(super) fn key_of(secret: Option<&Self>, told: &DataKey) -> DataKey {
        secret.map_or_else(|| told.clone(), |secret| secret.key(told))
    }

    fn key(&self, told: &DataKey) -> DataKey {
        let mut mac = self.mac(b"baton-kv-v1 key");
        mac.update(told.as_bytes());
        let mut key = [0; 16];
        key.copy_from_slice(&mac.finalize().into_bytes()[..16]);
        DataKey::from_bytes(key)
    }

    fn mac(&self, label: &[u8]) -> Hmac<Sha256> {
        mac::keyed(&self.0).chain_update(label)
    }
}

impl fmt::Debug for FleetSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FleetSecret(..)")
    }
}

/// The secret of a fleet, which can be changed while nodes run: all clones change together.
#[derive(Debug, Clone)]
pub struct FleetSecrets(Arc<Mutex<Held>>);

#[derive(Debug)]
struct Held {
    newest: FleetSecret,
    /// The one before, as this node was told of it.
    before: Option<FleetSecret>,
    /// The one that was the newest until it was changed, and until when it is still good.
    replaced: Option<(FleetSecret, Instant)>,
}

impl From<FleetSecret> for FleetSecrets {
    fn from(newest: FleetSecret) -> Self {
        Self(Arc::new(Mutex::new(Held { newest, before: None, replaced: None })))
    }
}

impl FleetSecrets {
    /// `newest` is that from now on; the one that it replaces is good for `keep` more, for peers that do not know the new one
    /// yet. `before` is good for as long as nothing else is said: a node that starts while a fleet changes its secret knows of
    /// the one before by nothing else. False: it is the newest already.
    pub fn set(&self, newest: FleetSecret, before: Option<FleetSecret>, keep: Duration) -> bool {
        let mut held = self.0.lock();
        held.before = before;
        if held.newest == newest {
            return false;
        }
        let replaced = std::mem::replace(&mut held.newest, newest);
        held.replaced = Some((replaced, Instant::now() + keep));
        true
    }

    pub fn newest(&self) -> FleetSecret {
        self.0.lock().newest.clone()
    }

    /// What is good now, each once, the newest first.
    pub(super) fn taken(&self) -> Vec<FleetSecret> {
        let held = self.0.lock();
        let replaced = held.replaced.as_ref().filter(|(_, until)| Instant::now() < *until);
        let mut taken = vec![held.newest.clone()];
        for secret in replaced.map(|(secret, _)| secret).into_iter().chain(&held.before) {
            if !taken.contains(secret) {
                taken.push(secret.clone());
            }
        }
        taken
    }
}

/// Which end of a control stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Sender,
    Receiver,
}

impl End {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Sender => b"baton-kv-v1 sender",
            Self::Receiver => b"baton-kv-v1 receiver",
        }
    }
}

/// One of the two whom a control stream joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Party {
    pub(super) id: InstanceId,
    pub(super) incarnation: Incarnation,
}

/// What the two hellos of a control stream said: what proofs are about.
#[derive(Debug, Clone)]
pub(super) struct Hellos {
    pub(super) nonces: [[u8; 16]; 2],
    pub(super) sender: Party,
    pub(super) receiver: Party,
}

/// 16 bytes of the wire.
pub(super) fn nonce(bytes: &[u8]) -> Result<[u8; 16], TransferError> {
    bytes.try_into().map_err(|_| TransferError::Protocol(format!("a nonce of {} bytes, not 16", bytes.len())))
}

impl Hellos {
    /// What shows that `end` knows the secret; empty without one.
    pub(super) fn prove(&self, secret: Option<&FleetSecret>, end: End) -> Vec<u8> {
        secret.map_or_else(Vec::new, |secret| self.over(secret, end).finalize().into_bytes().to_vec())
    }

    /// The first of `secrets` that one of the proofs of `end` shows that it knows; none where there are none, and nothing was
    /// shown. Refuses an `end` that knows none of them, or that has one where this node has none.
    pub(super) fn known(
        &self,
        secrets: &[FleetSecret],
        end: End,
        proofs: &[&[u8]],
    ) -> Result<Option<FleetSecret>, TransferError> {
        if secrets.is_empty() && proofs.iter().all(|proof| proof.is_empty()) {
            return Ok(None);
        }
        let by = |secret: &FleetSecret, proof: &[u8]| self.over(secret, end).verify_slice(proof).is_ok();
        let known = secrets.iter().find(|secret| proofs.iter().any(|proof| by(secret, proof)));
        known.cloned().map(Some).ok_or(TransferError::Unauthenticated)
    }

    fn over(&self, secret: &FleetSecret, end: End) -> Hmac<Sha256> {
        let mut mac = secret.mac(end.label());
        let mut field = |bytes: &[u8]| {
            mac.update(&(bytes.len() as u32).to_le_bytes());
            mac.update(bytes);
        };
        self.nonces.iter().for_each(|nonce| field(nonce));
        for Party { id, incarnation } in [&self.sender, &self.receiver] {
            field(id.as_str().as_bytes());
            field(&incarnation.0.to_le_bytes());
        }
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hellos() -> Hellos {
        let party = |name: &str, incarnation| Party {
            id: InstanceId::new(name).expect("a name"),
            incarnation: Incarnation(incarnation),
        };
        Hellos { nonces: [[1; 16], [2; 16]], sender: party("p", 3), receiver: party("d", 4) }
    }

    #[test]
    fn a_key_is_of_one_secret_and_of_what_was_told() {
        let secrets = [[9; 16], [8; 16]].map(|bytes| FleetSecret::new(bytes).expect("long enough"));
        let told = [1, 2].map(|byte| DataKey::from_bytes([byte; 16]));
        let key = secrets[0].key(&told[0]);
        assert_eq!(key, secrets[0].key(&told[0]));
        for other in [&told[0], &secrets[0].key(&told[1]), &secrets[1].key(&told[0])] {
            assert_ne!(key, *other);
        }
    }

    #[test]
    fn a_proof_is_of_one_end_one_stream_and_one_secret() {
        let secret = FleetSecret::new([9; 16]).expect("long enough");
        let ours = [secret.clone()];
        let proof = hellos().prove(Some(&secret), End::Sender);
        assert_eq!(hellos().known(&ours, End::Sender, &[&proof]), Ok(Some(secret)));
        let refused = Err(TransferError::Unauthenticated);
        assert_eq!(hellos().known(&ours, End::Receiver, &[&proof]), refused, "cannot be thrown back");
        let other = FleetSecret::new([8; 16]).expect("long enough");
        assert_eq!(hellos().known(&[other], End::Sender, &[&proof]), refused);
        type Change = fn(&mut Hellos);
        let changes: [Change; 6] = [
            |hellos| hellos.nonces[0][0] ^= 1,
            |hellos| hellos.nonces[1][0] ^= 1,
            |hellos| hellos.sender.id = InstanceId::new("q").expect("a name"),
            |hellos| hellos.sender.incarnation = Incarnation(5),
            |hellos| hellos.receiver.id = InstanceId::new("e").expect("a name"),
            |hellos| hellos.receiver.incarnation = Incarnation(5),
        ];
        for change in changes {
            let mut changed = hellos();
            change(&mut changed);
            assert_eq!(changed.known(&ours, End::Sender, &[&proof]), refused);
        }
    }

    #[test]
    fn the_newest_secret_that_both_know_is_taken() {
        let [a, b, c] = [7, 8, 9].map(|byte| FleetSecret::new([byte; 16]).expect("long enough"));
        let taken = |ours: &[&FleetSecret], theirs: &[&FleetSecret]| {
            let ours: Vec<_> = ours.iter().copied().cloned().collect();
            let proofs: Vec<_> =
                theirs.iter().map(|secret| hellos().prove(Some(secret), End::Receiver)).collect();
            let proofs: Vec<_> = proofs.iter().map(Vec::as_slice).collect();
            hellos().known(&ours, End::Receiver, &proofs)
        };
        assert_eq!(taken(&[&b, &a], &[&b, &a]), Ok(Some(b.clone())));
        assert_eq!(taken(&[&a], &[&b, &a]), Ok(Some(a.clone())), "who does not know the new one");
        assert_eq!(taken(&[&b, &a], &[&a]), Ok(Some(a.clone())), "who shows only the one before");
        assert_eq!(taken(&[&b], &[&b, &a]), Ok(Some(b.clone())), "who began with the new one");
        assert_eq!(taken(&[&c], &[&b, &a]), Err(TransferError::Unauthenticated));
        assert_eq!(taken(&[], &[&b, &a]), Err(TransferError::Unauthenticated));
        assert_eq!(hellos().known(&[a], End::Receiver, &[&[], &[]]), Err(TransferError::Unauthenticated));
    }

    #[test]
    fn a_secret_that_was_changed_is_good_for_a_while() {
        let [old, new] = [[9; 16], [8; 16]].map(|bytes| FleetSecret::new(bytes).expect("long enough"));
        let (secrets, long) = (FleetSecrets::from(old.clone()), Duration::from_secs(60));
        assert!(!secrets.set(old.clone(), None, long));
        assert_eq!(secrets.taken(), std::slice::from_ref(&old));
        assert!(secrets.set(new.clone(), None, long));
        assert_eq!(secrets.newest(), new);
        assert_eq!(secrets.taken(), [new.clone(), old.clone()]);
        // What is read again is no change: the one before stays the one before.
        assert!(!secrets.set(new.clone(), None, Duration::ZERO));
        assert_eq!(secrets.taken(), [new, old.clone()]);
        secrets.set(old.clone(), None, Duration::ZERO);
        assert_eq!(secrets.taken(), [old], "its time is over");
    }

    #[test]
    fn a_node_is_told_of_the_secret_before_and_remembers_what_was_replaced() {
        let [a, b, z] = [7, 8, 9].map(|byte| FleetSecret::new([byte; 16]).expect("long enough"));
        let (secrets, long) = (FleetSecrets::from(a.clone()), Duration::from_secs(60));
        secrets.set(a.clone(), Some(z.clone()), long);
        assert_eq!(secrets.taken(), [a.clone(), z.clone()], "it started meanwhile");
        // What it is told of may be older than what was replaced.
        secrets.set(b.clone(), Some(z.clone()), long);
        assert_eq!(secrets.taken(), [b.clone(), a.clone(), z]);
        assert!(secrets.taken().len() <= GOOD_MOST);
        // Back to the one before, which is told of, too.
        secrets.set(a.clone(), Some(a.clone()), long);
        assert_eq!(secrets.taken(), [a.clone(), b.clone()]);
        secrets.set(a.clone(), None, long);
        assert_eq!(secrets.taken(), [a, b]);
    }

    #[test]
    fn a_fleet_without_a_secret_takes_no_proof_and_one_with_it_no_silence() {
        let secret = FleetSecret::new([9; 100]).expect("long enough");
        let (silence, proof) =
            (hellos().prove(None, End::Sender), hellos().prove(Some(&secret), End::Sender));
        assert_eq!(hellos().known(&[], End::Sender, &[&silence]), Ok(None));
        assert!(hellos().known(std::slice::from_ref(&secret), End::Sender, &[&silence]).is_err());
        assert!(hellos().known(&[], End::Sender, &[&proof]).is_err());
        assert!(FleetSecret::new([0; 15]).is_err());
        assert_eq!(format!("{secret:?}"), "FleetSecret(..)");
    }
}
