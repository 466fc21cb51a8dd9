//! What is done about an instance that does not get on, as [`crate::fleet::stall`] sees it: all its legs are taken from it
//! and fail as those of a lost one do, so that their requests go on elsewhere, and the board gives it nothing until it gets
//! on. Its stream stays, for that is where this will show. Its breaker is open meanwhile, too: when it gets on, a single
//! request tries it first.

use std::sync::{Arc, atomic::Ordering};

use baton_proto::{ApiError, ErrorCode, LegId, v1};
use baton_schedule::board::Board;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use v1::{attach_request::Frame as Ask, attach_response::Frame as Answer};

use super::{AttachTask, Attachment, Slots};
use crate::fleet::{
    Breakers, CancelReason,
    stall::{Stall, Verdict},
};

/// Watches over an instance for as long as its stream stands.
pub(super) struct Pulse {
    attachment: Arc<Attachment>,
    board: Arc<Board>,
    breakers: Arc<Breakers>,
    stall: Stall,
    channel: Channel,
    /// To the question whether it is there.
    answer: OptionFuture<BoxFuture<'static, ()>>,
}

impl Pulse {
    /// Of a stream that stands from now on; an instance is not taken to be stuck sooner than after `fleet.stall`.
    pub(super) fn new(task: &AttachTask, channel: Channel) -> Self {
        let stall = Stall::new(task.config.stall, Instant::now());
        let (attachment, board, breakers) =
            (task.attachment.clone(), task.board.clone(), task.breakers.clone());
        attachment.stuck.store(false, Ordering::Relaxed);
        Self { attachment, board, breakers, stall, channel, answer: None.into() }
    }

    /// The instance has said this.
    pub(super) fn heard(&mut self, frame: &Answer) {
        let now = Instant::now();
        match frame {
            Answer::Step(step) if !step.legs.is_empty() => self.stall.output(now),
            Answer::Load(load) => self.stall.load(load, now),
            Answer::Step(_) | Answer::Role(_) | Answer::Welcome(_) => self.stall.heard(now),
        }
    }

    /// Waits for the answer to a question, if one was asked.
    pub(super) async fn answered(&mut self) {
        if (&mut self.answer).await.is_none() {
            std::future::pending::<()>().await;
        }
        self.answer = None.into();
        self.stall.heard(Instant::now());
    }

    /// To be called as often as [`Stall::look`] is.
    pub(super) fn look(&mut self) {
        let (now, instance) = (Instant::now(), &self.attachment.instance);
        let unseen = self.stall.seen().and_then(|seen| self.attachment.unseen_since(seen));
        let verdict = self.stall.look(unseen, now);
        let stuck = matches!(verdict, Verdict::Stuck(_) | Verdict::StillStuck);
        if self.attachment.stuck.swap(stuck, Ordering::Relaxed) != stuck {
            // Before its legs fail: they may be placed again at once, and not here.
            self.board.set_stuck(instance, stuck);
            if !stuck {
                tracing::info!(%instance, "the instance gets on again");
            }
        }
        match verdict {
            Verdict::Well => {}
            Verdict::Ask => {
                let mut client = HealthClient::new(self.channel.clone());
                // Whatever it answers, it is there.
                let ask = async move { drop(client.check(HealthCheckRequest::default()).await) };
                self.answer = Some(ask.boxed()).into();
            }
            Verdict::Stuck(why) => {
                self.breakers.stuck(instance, now);
                let (legs, last) = self.attachment.give_up();
                if let Some(last) = last {
                    self.stall.gave_up(last, unseen);
                }
                tracing::warn!(%instance, legs, %why, "the instance does not get on; its requests go on elsewhere");
            }
            Verdict::StillStuck => self.breakers.stuck(instance, now),
        }
    }
}

impl Attachment {
    /// Whether the instance finishes what it has, and may be told to fail what takes long.
    pub fn drains(&self) -> bool {
        self.drains.load(Ordering::Relaxed)
    }

    /// When the first of the legs after `seen` was sent of those that have not ended.
    fn unseen_since(&self, seen: LegId) -> Option<Instant> {
        let stream = self.stream.lock();
        let legs = stream.as_ref()?.legs.iter();
        legs.filter(|(leg, _)| **leg > seen).map(|(_, slot)| slot.sent).min()
    }

    /// Takes every leg from the instance, and fails it; how many there were, and the last of them.
    pub(super) fn give_up(&self) -> (usize, Option<LegId>) {
        let (mut legs, why) = (Slots::default(), CancelReason::Stuck.name());
        if let Some(up) = self.stream.lock().as_mut() {
            legs = std::mem::take(&mut up.legs);
            for leg in legs.keys() {
                // It may wake up.
                let (leg, reason) = (leg.0, why.to_owned());
                up.outbound.push(Ask::Cancel(v1::Cancel { leg, reason, choice: None, damaged: false }));
            }
        }
        let (many, last) = (legs.len(), legs.keys().max().copied());
        self.metrics.cancels.get_or_create(&crate::metrics::reason(why)).inc_by(many as u64);
        let message =
            format!("instance {} does not get on with its work; send the request again", self.instance);
        self.lose(legs, &ApiError::new(ErrorCode::InstanceLost, message));
        (many, last)
    }
}
