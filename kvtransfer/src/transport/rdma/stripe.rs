//! Which rail reads what: pieces are cut up and dealt out so that each rail reads about as many bytes.

/// One request to a device: a run of bytes of the peer's region, and where it goes in this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Offset in the peer's region.
    pub(super) remote: u64,
    /// Offset in this node's region.
    pub(super) local: u64,
    /// In bytes.
    pub(super) len: u32,
}

/// A piece before it is cut: both of its ends are known to lie in their regions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) remote: u64,
    pub(super) local: u64,
    pub(super) len: u64,
}

/// Deals `spans` out to `rails` rails, in chunks of at most `most` bytes; each chunk goes to the rail that has least.
pub(super) fn stripe(spans: &[Span], rails: usize, most: u32) -> Vec<Vec<Chunk>> {
    let most = most.max(1);
    let mut shares = vec![(0u64, Vec::new()); rails];
    for span in spans {
        let mut done = 0;
        while done < span.len {
            let len = (span.len - done).min(most.into()) as u32;
            let Some((bytes, chunks)) = shares.iter_mut().min_by_key(|(bytes, _)| *bytes) else { break };
            chunks.push(Chunk { remote: span.remote + done, local: span.local + done, len });
            *bytes += u64::from(len);
            done += u64::from(len);
        }
    }
    shares.into_iter().map(|(_, chunks)| chunks).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_large_piece_is_shared_and_small_ones_take_turns() {
        let chunk = |remote, local, len| Chunk { remote, local, len };
        let large = [Span { remote: 100, local: 0, len: 25 }];
        let expected = [vec![chunk(100, 0, 10), chunk(120, 20, 5)], vec![chunk(110, 10, 10)]];
        assert_eq!(stripe(&large, 2, 10), expected);

        let small = [3, 2, 2, 0].map(|len| Span { remote: 7, local: 9, len });
        assert_eq!(stripe(&small, 2, 10), [vec![chunk(7, 9, 3)], vec![chunk(7, 9, 2), chunk(7, 9, 2)]]);
        assert_eq!(stripe(&small, 0, 10), Vec::<Vec<Chunk>>::new());
    }

    proptest::proptest! {
        #[test]
        fn every_byte_is_read_once_and_rails_differ_by_a_chunk(
            lens in proptest::collection::vec(0u64..5000, 0..20),
            rails in 1usize..4,
            most in 1u32..2000,
        ) {
            let mut end = 0;
            let spans: Vec<_> = lens.iter().map(|len| {
                end += len;
                Span { remote: end - len + 11, local: end - len, len: *len }
            }).collect();
            let shares = stripe(&spans, rails, most);
            let mut chunks = shares.concat();
            chunks.sort_by_key(|chunk| chunk.local);
            let mut at = 0;
            for chunk in chunks {
                proptest::prop_assert_eq!((chunk.local, chunk.remote), (at, at + 11));
                proptest::prop_assert!(chunk.len >= 1 && chunk.len <= most);
                at += u64::from(chunk.len);
            }
            proptest::prop_assert_eq!(at, end);
            let bytes = |share: &Vec<Chunk>| share.iter().map(|chunk| u64::from(chunk.len)).sum::<u64>();
            let (least, largest) = (shares.iter().map(bytes).min(), shares.iter().map(bytes).max());
            proptest::prop_assert!(largest.unwrap_or(0) - least.unwrap_or(0) <= u64::from(most));
        }
    }
}
