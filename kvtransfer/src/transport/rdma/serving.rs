//! The owning end: lets one peer read the node's region, until it is dropped.

use std::io;

use super::{
    parameters::{Answer, Request, Window},
    queue_pair::QueuePair,
    rails::Rails,
};

/// A peer's way into this node's region. Once it has been dropped the peer can read no more.
pub(crate) struct Serving {
    pairs: Vec<QueuePair>,
}

impl Serving {
    /// Lets the peer that sent `request` in, on as many rails as both have; the answer is for its `Dial::connect`.
    pub(crate) fn new(rails: &Rails, request: &[u8]) -> io::Result<(Self, Vec<u8>)> {
        let request = Request::decode(request)?;
        let mut pairs = Vec::new();
        let mut ends = Vec::new();
        for (local, peer) in rails.iter().zip(&request.rails) {
            let (pair, mut end) = local.serving_end()?;
            end.reads = end.reads.min(peer.reads);
            pair.connect(local.port(), peer, end.reads)?;
            let memory = local.memory();
            ends.push((end, Window { key: memory.remote_key(), base: memory.base() }));
            pairs.push(pair);
        }
        let answer = Answer { region_bytes: rails.region().len() as u64, rails: ends };
        Ok((Self { pairs }, answer.encode()))
    }

    /// On how many rails.
    pub(crate) fn rails(&self) -> usize {
        self.pairs.len()
    }

    /// As a fault of the owner's devices would.
    #[cfg(test)]
    pub(super) fn fail(&self) -> io::Result<()> {
        self.pairs.iter().try_for_each(QueuePair::fail)
    }
}
