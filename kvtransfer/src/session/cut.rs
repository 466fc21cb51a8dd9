//! How a sender cuts a cache that the receiver cuts otherwise: its slices are the unit of such a transfer.

/// Block sizes of both sides, and what a slice of the sender's weighs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub(crate) struct Cut {
    /// Tokens in a block of the sender's; at least 1.
    pub(crate) sender_tokens: u32,
    /// Tokens in a block of the receiver's; at least 1.
    pub(crate) own_tokens: u32,
    /// Of the sender's.
    pub(crate) slice_bytes: u64,
}

impl Cut {
    /// Blocks that the sender has of a prompt.
    pub(crate) fn blocks(self, prompt_tokens: u32) -> u32 {
        prompt_tokens.div_ceil(self.sender_tokens)
    }

    /// The sender's blocks whose tokens all lie in blocks that the receiver holds, which are given in ascending order.
    pub(crate) fn held(self, prompt_tokens: u32, own_held: &[u32]) -> Vec<u32> {
        let (sender, own) = (u64::from(self.sender_tokens), u64::from(self.own_tokens));
        let covered = |block: &u32| {
            let first = u64::from(*block) * sender;
            let last = (first + sender).min(prompt_tokens.into()) - 1;
            (first / own..=last / own).all(|own| own_held.binary_search(&(own as u32)).is_ok())
        };
        (0..self.blocks(prompt_tokens)).filter(covered).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_left_out_if_each_of_its_tokens_is_held_and_only_then() {
        for (sender_tokens, own_tokens) in [(16, 32), (32, 16), (24, 16), (16, 24), (16, 16), (1, 7), (40, 3)]
        {
            let cut = Cut { sender_tokens, own_tokens, slice_bytes: 1 };
            for prompt in [1_u32, 15, 16, 17, 40, 48, 97] {
                let own = prompt.div_ceil(own_tokens);
                for pattern in [0, 1, 0b11, 0b101, 0b110, u128::MAX, u128::MAX << 1, 1 << (own - 1).min(127)]
                {
                    let held: Vec<u32> =
                        (0..own).filter(|&block| pattern >> block.min(127) & 1 == 1).collect();
                    let all_held = |block: &u32| {
                        (block * sender_tokens..((block + 1) * sender_tokens).min(prompt))
                            .all(|token| held.contains(&(token / own_tokens)))
                    };
                    let expected: Vec<u32> = (0..prompt.div_ceil(sender_tokens)).filter(all_held).collect();
                    assert_eq!(cut.held(prompt, &held), expected, "{cut:?}, {prompt} tokens, {held:?}");
                }
            }
        }
    }

    #[test]
    fn the_longest_prompt_does_not_overflow() {
        let cut = Cut { sender_tokens: u32::MAX, own_tokens: 1 << 31, slice_bytes: 1 };
        assert_eq!(cut.held(u32::MAX, &[0, 1]), [0]);
        assert_eq!(cut.held(u32::MAX, &[0]), [0; 0]);
    }
}
