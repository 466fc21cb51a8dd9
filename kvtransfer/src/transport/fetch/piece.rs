//! What is asked of a medium: pieces of the peer's region, slices that lie side by side at both ends joined.

use std::ptr::NonNull;

/// One piece to copy from the peer's region into this node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it starts in the peer's region, in bytes.
    pub(crate) remote: u64,
    /// Where it goes.
    pub(crate) local: NonNull<u8>,
    pub(crate) len: usize,
}

impl Piece {
    /// Whether `next` goes on where this one ends, there and here.
    fn goes_on_in(&self, next: &Self) -> bool {
        let there = self.remote.checked_add(self.len as u64);
        let here = self.local.addr().get().checked_add(self.len);
        there == Some(next.remote) && here == Some(next.local.addr().get())
    }
}

/// Adds a piece: as part of the last one where it goes on with that and both have no more than `most` bytes together.
pub(super) fn join(pieces: &mut Vec<Piece>, piece: Piece, most: usize) {
    match pieces.last_mut() {
        Some(last) if last.goes_on_in(&piece) && last.len.saturating_add(piece.len) <= most => {
            last.len += piece.len;
        }
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(remote: u64, local: usize, len: usize) -> Piece {
        let local = NonNull::new(std::ptr::without_provenance_mut(local)).expect("not 0");
        Piece { remote, local, len }
    }

    fn joined(pieces: &[Piece], most: usize) -> Vec<Piece> {
        let mut list = Vec::new();
        pieces.iter().for_each(|piece| join(&mut list, *piece, most));
        list
    }

    #[test]
    fn neighbours_at_both_ends_become_one_up_to_the_bound() {
        let row: Vec<_> = (0..5).map(|at| piece(100 + at * 8, 64 + at as usize * 8, 8)).collect();
        assert_eq!(joined(&row, 40), [piece(100, 64, 40)]);
        assert_eq!(joined(&row, 23), [piece(100, 64, 16), piece(116, 80, 16), piece(132, 96, 8)]);
        assert_eq!(joined(&row, 0), row, "each for itself");
        let apart = [piece(100, 64, 8), piece(108, 80, 8), piece(120, 88, 8), piece(92, 96, 8)];
        assert_eq!(joined(&apart, 1 << 20), apart, "neighbours at one end only, or backwards");
        let last = [piece(u64::MAX - 7, usize::MAX - 7, 8), piece(0, 1, 8)];
        assert_eq!(joined(&last, 1 << 20), last);
    }

    proptest! {
        #[test]
        fn every_byte_comes_from_where_it_did_and_goes_where_it_went(
            slices in proptest::collection::vec((0u64..12, 1usize..12), 0..40),
            most in 0usize..100,
        ) {
            const LEN: usize = 7;
            let slices: Vec<_> =
                slices.into_iter().map(|(from, to)| piece(from * LEN as u64, to * LEN, LEN)).collect();
            let joined = joined(&slices, most);
            let bytes = |pieces: &[Piece]| {
                let bytes = |it: &Piece| {
                    let (remote, local) = (it.remote, it.local.addr().get());
                    (0..it.len).map(move |at| (remote + at as u64, local + at)).collect::<Vec<_>>()
                };
                pieces.iter().flat_map(bytes).collect::<Vec<_>>()
            };
            prop_assert_eq!(bytes(&joined), bytes(&slices));
            for pair in joined.windows(2) {
                prop_assert!(!pair[0].goes_on_in(&pair[1]) || pair[0].len + LEN > most);
            }
            prop_assert!(joined.iter().all(|it| it.len <= most.max(LEN)));
        }
    }
}
