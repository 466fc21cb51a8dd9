//! The owning end: lets one peer read the node's region, until it is dropped.

use std::io;

use super::{
    parameters::{Answer, Request, Window},
    queue_pair::QueuePair,
    rails::Rails,
};

/// A peer's way into this node's region. Once it has been dropped the peer can read no more.
///
/// Until then it can read all of the region, at any time: the device knows nothing of transfers. So only peers are let in
/// that may see what others are sent.
pub(crate) struct Serving {
    pairs: Vec<QueuePair>,
}

impl Serving {
    /// Lets the peer that sent `request` in, on the rails that both have; the answer is for its `Dial::connect`.
    pub(crate) fn new(rails: &Rails, request: &[u8]) -> io::Result<(Self, Vec<u8>)> {
        let request = Request::decode(request)?;
        let active = rails.active()?;
        let theirs: Vec<_> = request.rails.iter().map(|peer| peer.place).collect();
        let ours: Vec<_> = active.iter().map(|rail| rail.place).collect();
        let mut pairs = Vec::new();
        let mut ends = Vec::new();
        for (peer, own) in matched(&theirs, &ours) {
            let (peer, rail) = (&request.rails[peer], &active[own]);
            let (pair, mut end) = rail.serving_end(peer.place)?;
            end.reads = end.reads.min(peer.reads);
            pair.connect(&rail.port, peer, end.reads)?;
            let memory = rail.memory();
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

/// Which rails of two nodes are connected, as positions in their lists of places: those with the same place, which are on
/// one network. Nodes with none such have their networks in different orders, or one each; theirs are taken as they come.
fn matched(theirs: &[u8], ours: &[u8]) -> Vec<(usize, usize)> {
    let same = |(peer, place)| Some((peer, ours.iter().position(|own| own == place)?));
    let matched: Vec<_> = theirs.iter().enumerate().filter_map(same).collect();
    if matched.is_empty() { (0..theirs.len().min(ours.len())).map(|at| (at, at)).collect() } else { matched }
}

#[cfg(test)]
mod tests {
    use super::matched;

    #[test]
    fn rails_of_one_network_are_connected() {
        assert_eq!(matched(&[0, 1], &[0, 1]), [(0, 0), (1, 1)]);
        assert_eq!(matched(&[1], &[0, 1]), [(0, 1)]);
        assert_eq!(matched(&[0, 1, 3], &[1, 2, 3]), [(1, 0), (2, 2)]);
        assert_eq!(matched(&[0], &[1]), [(0, 0)], "none in common");
        assert_eq!(matched(&[2, 3], &[0]), [(0, 0)]);
    }
}
