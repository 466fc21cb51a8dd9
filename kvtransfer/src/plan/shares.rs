//! Who sends what to whom: heads by where they are needed, and among ranks that hold the same heads an even share each.
//!
//! Replicas share receivers first and layers where there are fewer receivers than senders, so that as few pairs as
//! possible talk to each other and no sender carries more than its part, to within one layer.

use std::ops::Range;

use super::sharded::Ranks;

/// What one rank sends to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) sender: u32,
    pub(super) receiver: u32,
    /// Of the whole model.
    pub(super) heads: Range<u32>,
    /// The first head among the sender's, and among the receiver's.
    pub(super) places: (u32, u32),
    /// In ascending order.
    pub(super) layers: Vec<u32>,
}

/// All shares, by receiver. Every head and layer a receiver has is in exactly one share.
pub(super) fn shares(source: Ranks, target: Ranks, layers: u32) -> Vec<Share> {
    let mut shares = Vec::new();
    for receiver in 0..target.groups() * target.replicas() {
        let needed = target.heads(receiver / target.replicas());
        for group in 0..source.groups() {
            let held = source.heads(group);
            let heads = held.start.max(needed.start)..held.end.min(needed.end);
            if heads.is_empty() {
                continue;
            }
            let places = (heads.start - held.start, heads.start - needed.start);
            let replica = receiver % target.replicas();
            for (sender, layers) in deal(replica, target.replicas(), source.replicas(), layers) {
                let sender = group * source.replicas() + sender;
                shares.push(Share { sender, receiver, heads: heads.clone(), places, layers });
            }
        }
    }
    shares
}

/// The senders of receiver `receiver` of `receivers`, and the layers of each.
///
/// The layers of all receivers, put one after the other, are cut into as many equal runs as there are senders. That says
/// how many layers of this receiver each has; which ones is dealt in turn, because layers are computed one after the
/// other and all senders should be at work while they are.
fn deal(receiver: u32, receivers: u32, senders: u32, layers: u32) -> Vec<(u32, Vec<u32>)> {
    let all = u64::from(receivers) * u64::from(layers);
    let mut dealt: Vec<(u32, u32, Vec<u32>)> = Vec::new();
    for layer in 0..layers {
        let at = u64::from(receiver) * u64::from(layers) + u64::from(layer);
        let sender = (at * u64::from(senders) / all) as u32;
        match dealt.last_mut() {
            Some((last, count, _)) if *last == sender => *count += 1,
            _ => dealt.push((sender, 1, Vec::new())),
        }
    }
    for layer in 0..layers {
        // The one that would have the smallest part of its count after this layer; never one that has all of it.
        let next = dealt.iter_mut().min_by(|(_, a, of_a), (_, b, of_b)| {
            let part = |of: &Vec<u32>, other: u32| (of.len() as u64 + 1) * u64::from(other);
            part(of_a, *b).cmp(&part(of_b, *a))
        });
        if let Some((_, _, layers)) = next {
            layers.push(layer);
        }
    }
    dealt.into_iter().map(|(sender, _, layers)| (sender, layers)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers_of(receivers: u32, senders: u32, layers: u32) -> Vec<usize> {
        let mut load = vec![0; senders as usize];
        for receiver in 0..receivers {
            let mut seen: Vec<u32> = Vec::new();
            for (sender, layers) in deal(receiver, receivers, senders, layers) {
                load[sender as usize] += layers.len();
                seen.extend(layers);
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..layers).collect::<Vec<_>>(), "every layer once");
        }
        load
    }

    #[test]
    fn replicas_carry_the_same_to_within_a_layer() {
        for (receivers, senders, layers) in
            [(1, 8, 30), (8, 8, 30), (2, 3, 61), (8, 1, 4), (3, 2, 5), (1, 8, 3)]
        {
            let load = layers_of(receivers, senders, layers);
            let (least, most) = (load.iter().min().expect("senders"), load.iter().max().expect("senders"));
            assert!(most - least <= 1, "{receivers} receivers, {senders} senders: {load:?}");
        }
    }

    #[test]
    fn equally_many_ranks_pair_off() {
        for rank in 0..8 {
            assert_eq!(deal(rank, 8, 8, 30), [(rank, (0..30).collect())]);
        }
    }

    #[test]
    fn senders_take_turns() {
        assert_eq!(deal(0, 1, 2, 4), [(0, vec![0, 2]), (1, vec![1, 3])]);
    }
}
