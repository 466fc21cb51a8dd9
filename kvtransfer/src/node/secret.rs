//! How the two ends of a control stream show each other that they belong to one fleet.

use std::fmt;

use baton_proto::{Incarnation, InstanceId};
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::{TransferError, mac, transport::DataKey};

/// Fewest bytes of a secret.
const LEAST: usize = 16;

/// What all nodes of a fleet know and nobody else. Never printed, never sent.
#[derive(Clone)]
pub struct FleetSecret(Vec<u8>);

impl FleetSecret {
    /// At least 16 bytes, best random ones.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Result<Self, TransferError> {
        let bytes = bytes.into();
        if bytes.len() < LEAST {
            let message =
                format!("the fleet's secret has {} bytes; at least {LEAST} are needed", bytes.len());
            return Err(TransferError::Invalid(message));
        }
        Ok(Self(bytes))
    }

    /// The key that 16 bytes of the wire stand for among those who know the secret. Who only reads along cannot use it.
    pub(super) fn key(&self, told: &DataKey) -> DataKey {
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

/// What the two hellos of a control stream said: what proofs are about.
#[derive(Debug, Clone)]
pub(super) struct Hellos {
    pub(super) nonces: [[u8; 16]; 2],
    pub(super) sender: (InstanceId, Incarnation),
    pub(super) receiver: (InstanceId, Incarnation),
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

    /// Refuses an `end` that does not know the secret, or that has one where this node has none.
    pub(super) fn check(
        &self,
        secret: Option<&FleetSecret>,
        end: End,
        proof: &[u8],
    ) -> Result<(), TransferError> {
        let known = match secret {
            Some(secret) => self.over(secret, end).verify_slice(proof).is_ok(),
            None => proof.is_empty(),
        };
        if known { Ok(()) } else { Err(TransferError::Unauthenticated) }
    }

    fn over(&self, secret: &FleetSecret, end: End) -> Hmac<Sha256> {
        let mut mac = secret.mac(end.label());
        let mut field = |bytes: &[u8]| {
            mac.update(&(bytes.len() as u32).to_le_bytes());
            mac.update(bytes);
        };
        self.nonces.iter().for_each(|nonce| field(nonce));
        for (id, incarnation) in [&self.sender, &self.receiver] {
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
        let end =
            |name: &str, incarnation| (InstanceId::new(name).expect("a name"), Incarnation(incarnation));
        Hellos { nonces: [[1; 16], [2; 16]], sender: end("p", 3), receiver: end("d", 4) }
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
        let proof = hellos().prove(Some(&secret), End::Sender);
        assert_eq!(hellos().check(Some(&secret), End::Sender, &proof), Ok(()));
        let refused = Err(TransferError::Unauthenticated);
        assert_eq!(hellos().check(Some(&secret), End::Receiver, &proof), refused, "cannot be thrown back");
        let other = FleetSecret::new([8; 16]).expect("long enough");
        assert_eq!(hellos().check(Some(&other), End::Sender, &proof), refused);
        type Change = fn(&mut Hellos);
        let changes: [Change; 6] = [
            |hellos| hellos.nonces[0][0] ^= 1,
            |hellos| hellos.nonces[1][0] ^= 1,
            |hellos| hellos.sender.0 = InstanceId::new("q").expect("a name"),
            |hellos| hellos.sender.1 = Incarnation(5),
            |hellos| hellos.receiver.0 = InstanceId::new("e").expect("a name"),
            |hellos| hellos.receiver.1 = Incarnation(5),
        ];
        for change in changes {
            let mut changed = hellos();
            change(&mut changed);
            assert_eq!(changed.check(Some(&secret), End::Sender, &proof), refused);
        }
    }

    #[test]
    fn a_fleet_without_a_secret_takes_no_proof_and_one_with_it_no_silence() {
        let secret = FleetSecret::new([9; 100]).expect("long enough");
        assert_eq!(hellos().check(None, End::Sender, &hellos().prove(None, End::Sender)), Ok(()));
        let proof = hellos().prove(Some(&secret), End::Sender);
        assert_eq!(hellos().check(Some(&secret), End::Sender, &proof), Ok(()));
        assert!(hellos().check(Some(&secret), End::Sender, &[]).is_err());
        assert!(hellos().check(None, End::Sender, &proof).is_err());
        assert!(FleetSecret::new([0; 15]).is_err());
        assert_eq!(format!("{secret:?}"), "FleetSecret(..)");
    }
}
