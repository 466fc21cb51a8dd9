//! What the two ends tell each other to connect: small blobs that travel in the hellos of a data connection.
//!
//! ```text
//! 0 1  version, 1                      each rail:
//! 1 1  1 the reader's, 2 the owner's    0  4  number of the queue pair     8 1  MTU, as verbs count it
//! 2 1  number of rails                  4  4  first packet number          9 1  reads at a time
//! 3 1  zero                            10  1  the reader's rail           11 1  zero
//!                                      12 16  address (GID)
//! the owner's only:                    the owner's only:
//! 4 8  bytes of the region             28  4  key of the region           32 8  what its first byte is called
//! ```
//! Numbers are little endian, and rails in ascending order. A blob is believed as a whole or refused.

use std::io;

/// Most rails of a node.
pub(super) const MAX_RAILS: usize = 8;

const VERSION: u8 = 1;
const READER: u8 = 1;
const OWNER: u8 = 2;
/// Numbers of queue pairs and of packets have 24 bits.
const LARGEST_NUMBER: u32 = (1 << 24) - 1;
const LARGEST_MTU: u8 = 5;

/// One end of a connection, as the other needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Endpoint {
    /// The place of the reader's rail among its ports.
    pub(super) place: u8,
    /// Of its queue pair.
    pub(super) number: u32,
    /// The number of the first packet it sends.
    pub(super) psn: u32,
    pub(super) gid: [u8; 16],
    /// As verbs count it: 1 is 256 bytes, and each next is twice as long.
    pub(super) mtu: u8,
    /// How many reads at a time it can have on the way (the reader's) or answer (the owner's).
    pub(super) reads: u8,
}

/// What the owner's region is called on one rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) key: u32,
    /// Of the first byte.
    pub(super) base: u64,
}

/// The reader's: its ends, one for each rail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) rails: Vec<Endpoint>,
}

/// The owner's: as many ends as it could match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) region_bytes: u64,
    pub(super) rails: Vec<(Endpoint, Window)>,
}

/// Why bytes are no parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParameterError {
    #[error("RDMA parameters of another version ({0}); both sides must run the same version of Baton")]
    Version(u8),
    #[error("RDMA parameters end too early or go on too long")]
    Length,
    #[error("RDMA parameters with an impossible {0}")]
    Value(&'static str),
}

impl From<ParameterError> for io::Error {
    fn from(error: ParameterError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut blob = head(READER, self.rails.len());
        for end in &self.rails {
            end.encode(&mut blob);
        }
        blob
    }

    pub(super) fn decode(mut blob: &[u8]) -> Result<Self, ParameterError> {
        let count = rails_of(&mut blob, READER)?;
        let rails = (0..count).map(|_| Endpoint::decode(&mut blob)).collect::<Result<Vec<_>, _>>()?;
        check(blob, rails.iter())?;
        Ok(Self { rails })
    }
}

impl Answer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut blob = head(OWNER, self.rails.len());
        blob.extend(self.region_bytes.to_le_bytes());
        for (end, window) in &self.rails {
            end.encode(&mut blob);
            blob.extend(window.key.to_le_bytes());
            blob.extend(window.base.to_le_bytes());
        }
        blob
    }

    pub(super) fn decode(mut blob: &[u8]) -> Result<Self, ParameterError> {
        let count = rails_of(&mut blob, OWNER)?;
        let region_bytes = u64::from_le_bytes(take(&mut blob)?);
        let mut rails = Vec::with_capacity(count);
        for _ in 0..count {
            let end = Endpoint::decode(&mut blob)?;
            let window = Window {
                key: u32::from_le_bytes(take(&mut blob)?),
                base: u64::from_le_bytes(take(&mut blob)?),
            };
            if window.base.checked_add(region_bytes).is_none() {
                return Err(ParameterError::Value("region"));
            }
            rails.push((end, window));
        }
        check(blob, rails.iter().map(|(end, _)| end))?;
        Ok(Self { region_bytes, rails })
    }
}

impl Endpoint {
    fn encode(&self, blob: &mut Vec<u8>) {
        blob.extend(self.number.to_le_bytes());
        blob.extend(self.psn.to_le_bytes());
        blob.extend([self.mtu, self.reads, self.place, 0]);
        blob.extend(self.gid);
    }

    fn decode(blob: &mut &[u8]) -> Result<Self, ParameterError> {
        let number = u32::from_le_bytes(take(blob)?);
        let psn = u32::from_le_bytes(take(blob)?);
        let [mtu, reads, place, zero] = take(blob)?;
        let gid = take(blob)?;
        let impossible = match () {
            () if number == 0 || number > LARGEST_NUMBER => "queue pair",
            () if psn > LARGEST_NUMBER => "packet number",
            () if mtu == 0 || mtu > LARGEST_MTU => "MTU",
            () if reads == 0 => "number of reads",
            () if zero != 0 => "filler",
            () if gid == [0; 16] => "address",
            () => return Ok(Self { place, number, psn, gid, mtu, reads }),
        };
        Err(ParameterError::Value(impossible))
    }
}

fn head(kind: u8, rails: usize) -> Vec<u8> {
    debug_assert!(rails <= MAX_RAILS);
    vec![VERSION, kind, rails as u8, 0]
}

/// The number of rails in a blob of that kind, which is left with what follows its head.
fn rails_of(blob: &mut &[u8], expected: u8) -> Result<usize, ParameterError> {
    let [version, kind, rails, zero] = take(blob)?;
    match () {
        () if version != VERSION => Err(ParameterError::Version(version)),
        () if kind != expected => Err(ParameterError::Value("kind")),
        () if rails == 0 || usize::from(rails) > MAX_RAILS => Err(ParameterError::Value("number of rails")),
        () if zero != 0 => Err(ParameterError::Value("filler")),
        () => Ok(rails.into()),
    }
}

/// Nothing is left of the blob, and no rail comes twice.
fn check<'a>(rest: &[u8], rails: impl Iterator<Item = &'a Endpoint>) -> Result<(), ParameterError> {
    if !rest.is_empty() {
        return Err(ParameterError::Length);
    }
    let ascend = rails.map(|end| end.place).is_sorted_by(|one, next| one < next);
    if ascend { Ok(()) } else { Err(ParameterError::Value("order of rails")) }
}

fn take<const N: usize>(blob: &mut &[u8]) -> Result<[u8; N], ParameterError> {
    let (taken, rest) = blob.split_first_chunk().ok_or(ParameterError::Length)?;
    *blob = rest;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(place: u8, number: u32) -> Endpoint {
        Endpoint { place, number, psn: 0xabcdef, gid: [7; 16], mtu: 3, reads: 16 }
    }

    fn blobs() -> (Vec<u8>, Vec<u8>) {
        let windows = [Window { key: 9, base: 0x1000 }, Window { key: u32::MAX, base: 0 }];
        let request = Request { rails: vec![end(1, 17), end(4, LARGEST_NUMBER)] };
        let answer =
            Answer { region_bytes: 1 << 40, rails: request.rails.iter().copied().zip(windows).collect() };
        assert_eq!(Request::decode(&request.encode()), Ok(request.clone()));
        assert_eq!(Answer::decode(&answer.encode()), Ok(answer.clone()));
        (request.encode(), answer.encode())
    }

    #[test]
    fn blobs_are_as_long_as_the_table_says() {
        let (request, answer) = blobs();
        assert_eq!((request.len(), answer.len()), (4 + 2 * 28, 12 + 2 * 40));
    }

    #[test]
    fn a_part_or_a_surplus_is_refused() {
        let (request, answer) = blobs();
        for cut in 0..request.len() {
            assert_eq!(Request::decode(&request[..cut]), Err(ParameterError::Length), "{cut}");
        }
        for cut in 0..answer.len() {
            assert_eq!(Answer::decode(&answer[..cut]), Err(ParameterError::Length), "{cut}");
        }
        assert_eq!(Request::decode(&[request, vec![0]].concat()), Err(ParameterError::Length));
        assert_eq!(Answer::decode(&[answer, vec![0]].concat()), Err(ParameterError::Length));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (request, answer) = blobs();
        let changed = |at: usize, to: &[u8]| {
            let mut blob = request.clone();
            blob[at..at + to.len()].copy_from_slice(to);
            Request::decode(&blob)
        };
        let value = |what| Err(ParameterError::Value(what));
        assert_eq!(changed(0, &[2]), Err(ParameterError::Version(2)));
        assert_eq!(changed(1, &[2]), value("kind"));
        assert_eq!(changed(2, &[0]), value("number of rails"));
        assert_eq!(changed(2, &[9]), value("number of rails"));
        assert_eq!(changed(3, &[1]), value("filler"));
        assert_eq!(changed(4, &[0; 4]), value("queue pair"));
        assert_eq!(changed(4, &[0, 0, 0, 1]), value("queue pair"));
        assert_eq!(changed(8, &[0, 0, 0, 1]), value("packet number"));
        assert_eq!(changed(12, &[6]), value("MTU"));
        assert_eq!(changed(13, &[0]), value("number of reads"));
        assert_eq!(changed(14, &[4]), value("order of rails"));
        assert_eq!(changed(15, &[1]), value("filler"));
        assert_eq!(changed(16, &[0; 16]), value("address"));
        assert_eq!(Answer::decode(&request), Err(ParameterError::Value("kind")));
        let mut huge = answer;
        huge[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(Answer::decode(&huge), Err(ParameterError::Value("region")));
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_refused_or_means_itself(
            mut garbage in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            known in 0usize..4,
        ) {
            // With a good head more of it is looked at.
            for (byte, good) in garbage.iter_mut().zip([VERSION, READER, 1, 0].into_iter().take(known)) {
                *byte = good;
            }
            if let Ok(request) = Request::decode(&garbage) {
                proptest::prop_assert_eq!(request.encode(), garbage.clone());
            }
            if let Some(kind) = garbage.get_mut(1) {
                *kind = OWNER;
            }
            if let Ok(answer) = Answer::decode(&garbage) {
                proptest::prop_assert_eq!(answer.encode(), garbage);
            }
        }
    }
}
