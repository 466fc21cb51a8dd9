//! How a receiver's session comes to be agreed: what its owner expects meets what a sender offers, in either order.

use std::time::Instant;

use super::{Commands, Expectation, OfferTerms, Receiver, ReceiverCommand, ReceiverState, Shape, Slots};
use crate::TransferError;

impl Receiver {
    /// The owner reserves blocks for a held offer. An error leaves the session as it was. An offer from the wrong
    /// sender is sent back, and the session waits for the right one.
    pub(crate) fn expect(
        &mut self,
        now: Instant,
        expectation: Expectation,
    ) -> Result<Commands, TransferError> {
        if self.state != ReceiverState::Offered {
            return Err(TransferError::Invalid("the transfer is expected already".into()));
        }
        let Some(offer) = self.offer.take() else {
            return Err(TransferError::Invalid("the transfer has no offer".into()));
        };
        self.deadline = expectation.deadline;
        let check = check_sender(&expectation, &offer);
        self.expectation = Some(expectation);
        if let Err(wrong) = check {
            self.state = ReceiverState::Expected;
            return Ok(vec![ReceiverCommand::Abort(wrong)]);
        }
        self.offer = Some(offer);
        Ok(self.accept(now))
    }

    /// An offer comes in for expected blocks. An error refuses this offer and leaves the session as it was.
    pub(crate) fn offer(&mut self, now: Instant, offer: OfferTerms) -> Result<Commands, TransferError> {
        match (&self.expectation, self.state) {
            (Some(expectation), ReceiverState::Expected) => {
                check_sender(expectation, &offer)?;
                self.offer = Some(offer);
                Ok(self.accept(now))
            }
            (_, ReceiverState::Aborting | ReceiverState::Aborted) => {
                Err(TransferError::Invalid("the transfer was aborted".into()))
            }
            _ => Err(TransferError::Protocol("the transfer was offered twice".into())),
        }
    }

    /// Both sides are known: check that they mean the same, then accept.
    fn accept(&mut self, now: Instant) -> Commands {
        let (Some(expectation), Some(offer)) = (&self.expectation, &self.offer) else {
            return Vec::new();
        };
        let differs = |what: &str, ours: u32, theirs: u32| {
            Some(TransferError::Protocol(format!("{what} differ: {ours} expected, {theirs} offered")))
        };
        let (cut, prompt_tokens, theirs) = (offer.cut, expectation.prompt_tokens, offer.shape);
        let ours = match cut {
            None => expectation.shape,
            Some(cut) => Shape { blocks: cut.blocks(prompt_tokens), ..expectation.shape },
        };
        let mismatch = if ours.layers != theirs.layers {
            differs("layers", ours.layers, theirs.layers)
        } else if ours.blocks != theirs.blocks {
            differs("blocks", ours.blocks, theirs.blocks)
        } else if expectation.prompt_tokens != offer.prompt_tokens {
            differs("prompt tokens", expectation.prompt_tokens, offer.prompt_tokens)
        } else if expectation.prompt_digest != offer.prompt_digest {
            let (expected, found) = (expectation.prompt_digest, offer.prompt_digest);
            Some(TransferError::OtherPrompt { expected, found })
        } else {
            None
        };
        if let (Some(cut), Some(expectation)) = (cut, &mut self.expectation) {
            expectation.held = cut.held(prompt_tokens, &expectation.held);
            self.slice_bytes = cut.slice_bytes;
        }
        let slots = Slots::new(ours, self.held());
        self.state = ReceiverState::Offered; // whichever came first: from here on there is a sender to tell
        self.lease.agree(now, self.timing.lease);
        if let Some(mismatch) = mismatch {
            return self.abort(mismatch, true);
        }
        self.slices = Some(slots);
        self.state = ReceiverState::Accepted;
        self.accepted_at = now;
        self.last_slice_at = now;
        vec![ReceiverCommand::Accept]
    }
}

fn check_sender(expectation: &Expectation, offer: &OfferTerms) -> Result<(), TransferError> {
    if expectation.sender != offer.sender {
        return Err(TransferError::WrongPeer {
            expected: expectation.sender.clone(),
            found: offer.sender.clone(),
        });
    }
    match expectation.sender_incarnation {
        Some(expected) if expected != offer.sender_incarnation => Err(TransferError::StalePeer {
            instance: offer.sender.clone(),
            expected,
            found: offer.sender_incarnation,
        }),
        _ => Ok(()),
    }
}
