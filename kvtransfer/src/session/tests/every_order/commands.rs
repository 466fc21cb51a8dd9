//! What the machines' commands do: messages go on the stream while it stands, owners are told, each once.

use super::*;

impl Owner {
    fn told(&mut self, answer: bool) {
        assert_eq!(self.answer.replace(answer), None, "told twice");
    }

    fn settled(&mut self, in_use: &[SliceRun]) {
        assert!(self.answer.is_some() && !std::mem::replace(&mut self.settled, true));
        assert!(in_use.is_empty(), "blocks given back while a transport uses them");
    }
}

impl World {
    pub(super) fn of_sender(&mut self, commands: Vec<SenderCommand>) {
        for command in commands {
            assert!(!self.sent.settled, "{command:?} after the end");
            let message = match command {
                SenderCommand::Offer => Message::Offer,
                SenderCommand::Renew => Message::Renew,
                SenderCommand::Seal { first_tokens, tally } => {
                    assert_eq!(tally, whole(SHAPE, &self.held), "sealed what was not sent");
                    self.sealed = true;
                    Message::Seal(SealTerms { first_tokens, tally })
                }
                SenderCommand::Doubt => Message::Doubt,
                SenderCommand::Abort(_) => Message::Abort,
                SenderCommand::Complete { .. } => {
                    assert_eq!(self.received.answer, Some(true), "released by who has not all of it");
                    self.sent.told(true);
                    continue;
                }
                SenderCommand::Fail(reason) => {
                    let by_lease = matches!(reason, TransferError::LeaseExpired { .. });
                    assert!(!(self.sealed && by_lease), "given up while the receiver may own it");
                    self.sent.told(false);
                    continue;
                }
                SenderCommand::Cut => {
                    if self.stream == Stream::Up {
                        self.break_stream();
                    }
                    continue;
                }
                SenderCommand::Settled => {
                    self.sent.settled(&self.taken);
                    continue;
                }
                SenderCommand::Wake | SenderCommand::Revoke => continue,
            };
            if self.stream == Stream::Up {
                self.to_receiver.push_back(message);
            }
        }
    }

    pub(super) fn of_receiver(&mut self, commands: Vec<ReceiverCommand>) {
        for command in commands {
            assert!(!self.received.settled, "{command:?} after the end");
            let message = match command {
                ReceiverCommand::Accept => Message::Accept,
                ReceiverCommand::Renew => Message::Renew,
                ReceiverCommand::Released => Message::Released,
                ReceiverCommand::Abort(_) => Message::Abort,
                ReceiverCommand::Complete { tally, .. } => {
                    assert_eq!(tally, whole(SHAPE, &self.held));
                    assert_eq!(self.landed.len() as u64, tally.slices, "complete without all slices");
                    self.received.told(true);
                    continue;
                }
                ReceiverCommand::Fail(_) => {
                    self.received.told(false);
                    continue;
                }
                ReceiverCommand::Settled => {
                    self.received.settled(&self.open);
                    self.rests_on = None;
                    continue;
                }
                ReceiverCommand::Revoke => continue,
            };
            if self.stream == Stream::Up && self.rests_on == Some(self.number) {
                self.to_sender.push_back(message);
            }
        }
    }
}
