//! How a data connection begins, whatever it carries: the sender shows that it belongs to a control stream, the receiver
//! that it is the one meant, and both say what their transport needs to know of the other.
//!
//! ```text
//! sender -> receiver                             receiver -> sender
//! 0   4  magic "BKH1"                            0   4  magic "BKA1"
//! 4   1  transport, see `TransportKind`          4   4  bytes of the terms
//! 5   3  zero                                    8   8  zero
//! 8  16  link id                                16  16  proof (link key; nonce, bytes 0..16, terms)
//! 24  4  bytes of the terms                     32      terms
//! 28  4  zero
//! 32 16  nonce
//! 48 16  proof (link key; bytes 0..48, terms)
//! 64     terms
//! ```
//! Where the sender's memory is read in place of the connection, it then says how: a grant, and once the receiver is
//! connected to it, the receiver says one byte.
//! ```text
//! 0   4  magic "BKG1"      4  4  bytes of the terms      8  8  zero      16 16  proof as an answer's      32  the terms
//! ```
//! Numbers are little endian. Link id and key come with the control stream's hellos.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::{DataKey, TransportKind, key::PROOF_BYTES};

/// Bytes of a hello before its terms.
pub(crate) const HELLO_BYTES: usize = 64;
/// Bytes of an answer before its terms.
pub(crate) const ANSWER_BYTES: usize = 32;
/// Most that a transport says of itself.
pub(crate) const MAX_TERMS: usize = 16 << 10;

const HELLO: [u8; 4] = *b"BKH1";
const ANSWER: [u8; 4] = *b"BKA1";
const GRANT: [u8; 4] = *b"BKG1";
const NONCE_AT: usize = 32;
const PROOF_AT: usize = HELLO_BYTES - PROOF_BYTES;
const ANSWER_PROOF_AT: usize = ANSWER_BYTES - PROOF_BYTES;

/// Which control stream a data connection belongs to. No secret.
pub(crate) type LinkId = [u8; 16];

/// What entitles a sender to open data connections.
#[derive(Debug, Clone)]
pub(crate) struct LinkPass {
    pub(crate) id: LinkId,
    pub(crate) key: DataKey,
}

impl LinkPass {
    pub(crate) fn generate() -> Self {
        Self { id: rand::random(), key: DataKey::generate() }
    }
}

/// Why a connection does not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HelloError {
    #[error("not a data connection of this protocol version")]
    Magic,
    #[error("terms of {0} bytes; at most {MAX_TERMS} are allowed")]
    Terms(u32),
    #[error("it wants a transport that is not served here")]
    Kind,
    #[error("it belongs to no control stream that stands")]
    Link,
    #[error("it does not show the link's key")]
    Unproven,
}

/// The head of a hello. Nothing of it is believed before [`Hello::proven`] has said yes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    bytes: [u8; HELLO_BYTES],
}

impl Hello {
    /// What to write: head and terms; and what the answer is to be checked with.
    pub(crate) fn encode(kind: TransportKind, pass: &LinkPass, terms: &[u8]) -> (Vec<u8>, Self) {
        let mut bytes = [0; HELLO_BYTES];
        bytes[..4].copy_from_slice(&HELLO);
        bytes[4] = kind.wire();
        bytes[8..24].copy_from_slice(&pass.id);
        bytes[24..28].copy_from_slice(&(terms.len() as u32).to_le_bytes());
        bytes[NONCE_AT..PROOF_AT].copy_from_slice(&rand::random::<[u8; 16]>());
        let proof = pass.key.prove(&[&bytes[..PROOF_AT], terms]);
        bytes[PROOF_AT..].copy_from_slice(&proof);
        ([&bytes[..], terms].concat(), Self { bytes })
    }

    /// Checks what can be checked without the key.
    pub(crate) fn decode(bytes: [u8; HELLO_BYTES]) -> Result<Self, HelloError> {
        if bytes[..4] != HELLO {
            return Err(HelloError::Magic);
        }
        let hello = Self { bytes };
        if hello.terms_bytes() > MAX_TERMS {
            return Err(HelloError::Terms(word(&bytes, 24)));
        }
        Ok(hello)
    }

    pub(crate) fn kind(&self) -> Option<TransportKind> {
        TransportKind::from_wire(self.bytes[4])
    }

    pub(crate) fn link(&self) -> LinkId {
        let mut id = LinkId::default();
        id.copy_from_slice(&self.bytes[8..24]);
        id
    }

    pub(crate) fn terms_bytes(&self) -> usize {
        word(&self.bytes, 24) as usize
    }

    /// Whether whoever wrote this and the terms has the link's key.
    pub(crate) fn proven(&self, key: &DataKey, terms: &[u8]) -> bool {
        key.proves(&[&self.bytes[..PROOF_AT], terms], &self.bytes[PROOF_AT..])
    }

    /// What the receiver answers.
    pub(crate) fn answer(&self, key: &DataKey, terms: &[u8]) -> Vec<u8> {
        self.reply(ANSWER, key, terms)
    }

    /// What the sender says to the answer.
    pub(crate) fn grant(&self, key: &DataKey, terms: &[u8]) -> Vec<u8> {
        self.reply(GRANT, key, terms)
    }

    fn reply(&self, magic: [u8; 4], key: &DataKey, terms: &[u8]) -> Vec<u8> {
        let mut head = [0; ANSWER_BYTES];
        head[..4].copy_from_slice(&magic);
        head[4..8].copy_from_slice(&(terms.len() as u32).to_le_bytes());
        let proof = key.prove(&[self.nonce(), &head[..ANSWER_PROOF_AT], terms]);
        head[ANSWER_PROOF_AT..].copy_from_slice(&proof);
        [&head[..], terms].concat()
    }

    /// Bytes of the terms that follow the head of an answer.
    pub(crate) fn answer_terms_bytes(head: &[u8; ANSWER_BYTES]) -> Result<usize, HelloError> {
        reply_terms_bytes(ANSWER, head)
    }

    /// Bytes of the terms that follow the head of a grant.
    pub(crate) fn grant_terms_bytes(head: &[u8; ANSWER_BYTES]) -> Result<usize, HelloError> {
        reply_terms_bytes(GRANT, head)
    }

    /// Reads the answer to this hello; what the peer says of itself. Refused if it does not come from the peer.
    pub(crate) async fn read_answer(
        &self,
        key: &DataKey,
        stream: &mut (impl AsyncRead + Unpin),
    ) -> io::Result<Vec<u8>> {
        let mut head = [0; ANSWER_BYTES];
        stream.read_exact(&mut head).await?;
        let mut terms = vec![0; Self::answer_terms_bytes(&head).map_err(io::Error::other)?];
        stream.read_exact(&mut terms).await?;
        match self.answered(key, &head, &terms) {
            true => Ok(terms),
            false => Err(io::Error::other("what listens there is not the peer")),
        }
    }

    /// Whether an answer to this hello, or the grant after it, comes from whoever has the link's key.
    pub(crate) fn answered(&self, key: &DataKey, head: &[u8; ANSWER_BYTES], terms: &[u8]) -> bool {
        let (head, proof) = head.split_at(ANSWER_PROOF_AT);
        key.proves(&[self.nonce(), head, terms], proof)
    }

    fn nonce(&self) -> &[u8] {
        &self.bytes[NONCE_AT..PROOF_AT]
    }
}

fn reply_terms_bytes(magic: [u8; 4], head: &[u8; ANSWER_BYTES]) -> Result<usize, HelloError> {
    match word(head, 4) {
        _ if head[..4] != magic => Err(HelloError::Magic),
        length if length as usize > MAX_TERMS => Err(HelloError::Terms(length)),
        length => Ok(length as usize),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head<const N: usize>(bytes: &[u8]) -> [u8; N] {
        bytes[..N].try_into().expect("long enough")
    }

    #[test]
    fn both_sides_prove_themselves_and_every_flipped_bit_is_seen() {
        let pass = LinkPass::generate();
        let (bytes, asked) = Hello::encode(TransportKind::Shm, &pass, b"terms");
        let hello = Hello::decode(head(&bytes)).expect("a hello");
        assert_eq!((hello.kind(), hello.link(), hello.terms_bytes()), (Some(TransportKind::Shm), pass.id, 5));
        assert!(hello.proven(&pass.key, b"terms") && !hello.proven(&pass.key, b"term"));
        assert!(!hello.proven(&DataKey::generate(), b"terms"));
        for bit in 0..bytes.len() * 8 {
            let mut bent = bytes.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            let taken = Hello::decode(head(&bent));
            assert!(
                taken.is_err_and(|_| bit < 32 || bit / 8 < 28) || {
                    let hello = Hello::decode(head(&bent)).expect("taken");
                    !hello.proven(&pass.key, &bent[HELLO_BYTES..])
                },
                "bit {bit}"
            );
        }
        let answer = hello.answer(&pass.key, b"yes");
        assert_eq!(Hello::answer_terms_bytes(&head(&answer)), Ok(3));
        assert!(asked.answered(&pass.key, &head(&answer), b"yes"));
        assert!(!asked.answered(&DataKey::generate(), &head(&answer), b"yes"));
        let grant = hello.grant(&pass.key, b"yes");
        assert!(grant != answer && Hello::answer_terms_bytes(&head(&grant)).is_err(), "one is not the other");
        assert_eq!(Hello::grant_terms_bytes(&head(&grant)), Ok(3));
        assert!(asked.answered(&pass.key, &head(&grant), b"yes"));
        let (_, another) = Hello::encode(TransportKind::Shm, &pass, b"terms");
        assert!(!another.answered(&pass.key, &head(&answer), b"yes"), "an answer is to one hello");
    }

    #[test]
    fn what_is_no_hello_is_refused() {
        assert_eq!(Hello::decode([0; HELLO_BYTES]), Err(HelloError::Magic));
        let (mut bytes, _) = Hello::encode(TransportKind::Tcp, &LinkPass::generate(), b"");
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Hello::decode(head(&bytes)), Err(HelloError::Terms(u32::MAX)));
        bytes[4] = 200;
        bytes[24..28].fill(0);
        assert_eq!(Hello::decode(head(&bytes)).expect("a hello").kind(), None);
        assert_eq!(Hello::answer_terms_bytes(&[0; ANSWER_BYTES]), Err(HelloError::Magic));
    }
}
