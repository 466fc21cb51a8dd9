//! RDMA: a node's region is registered with every RoCE port of the machine, and a peer reads out of it by itself.
//!
//! The reader asks with the parameters of its queue pairs ([`Dial`]), the owner makes its own ([`Serving`]) and answers
//! with them and with the key of its region, and from then on the reader's device fetches pieces (`PeerRegion`) while
//! the owner's CPU knows nothing of it. Both messages are small blobs in the hellos of a data connection (`medium`).
//!
//! - `abi`, `library`: libibverbs as it is found at run time. A machine without it has no RDMA, and [`probe()`] says
//!   so (`unavailable`).
//! - `device`, `memory`, `completion`, `queue_pair`: the objects of verbs, each owned, freed by dropping it.
//! - `rails`: a node's ports with its region registered, `parameters`: the blobs, `stripe`: which port reads what.
//! - `reader` (with `rail`, one port's share of it) and `serving`: the two ends.
//!
//! # Fences
//! A queue pair is destroyed before the memory it may touch is let go of, on both sides: a failed read destroys the
//! reader's before it returns, and dropping [`Serving`] the owner's. Destroying waits until the device has let go.

mod abi;
mod completion;
mod device;
mod library;
mod medium;
mod memory;
mod parameters;
mod probe;
mod queue_pair;
mod rail;
mod rails;
mod reader;
mod serving;
mod stripe;
#[cfg(test)]
mod tests;
mod unavailable;

pub(crate) use medium::RdmaMedium;
pub(crate) use probe::probe;
use rails::Rails;
use reader::Dial;
#[cfg(test)]
use reader::PeerRegion;
use serving::Serving;

/// Reads bytes as either side's parameters: what is read is written the same again.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    if let Ok(request) = parameters::Request::decode(bytes) {
        assert_eq!(request.encode(), bytes);
    }
    if let Ok(answer) = parameters::Answer::decode(bytes) {
        assert_eq!(answer.encode(), bytes);
    }
}
