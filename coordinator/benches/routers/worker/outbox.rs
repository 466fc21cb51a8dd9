//! What waits to be sent on a coordinator's stream: a message a step, as long as it reads as fast; what it has not read is
//! merged by leg, and a load follows what led to it. So does a real server.

use std::collections::HashMap;

use baton_proto::v1::{AttachResponse, InstanceLoad, LegOutput, StepOutput, attach_response::Frame};
use parking_lot::Mutex;
use tokio::sync::Notify;

#[derive(Default)]
struct Waiting {
    outputs: Vec<LegOutput>,
    by_leg: HashMap<u64, usize>,
    load: Option<InstanceLoad>,
    closed: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

impl Outbox {
    pub(super) fn put(&self, mut output: LegOutput) {
        let mut waiting = self.waiting.lock();
        let waiting = &mut *waiting;
        match waiting.by_leg.get(&output.leg) {
            Some(&at) => {
                let merged = &mut waiting.outputs[at];
                merged.tokens.append(&mut output.tokens);
                merged.end = output.end;
            }
            None => {
                waiting.by_leg.insert(output.leg, waiting.outputs.len());
                waiting.outputs.push(output);
            }
        }
        self.filled.notify_one();
    }

    pub(super) fn tell(&self, load: InstanceLoad) {
        self.waiting.lock().load = Some(load);
        self.filled.notify_one();
    }

    pub(super) fn close(&self) {
        self.waiting.lock().closed = true;
        self.filled.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.waiting.lock().closed
    }

    /// The next message; `None` once it is closed.
    pub(super) async fn next(&self) -> Option<AttachResponse> {
        loop {
            {
                let mut waiting = self.waiting.lock();
                if waiting.closed {
                    return None;
                }
                if !waiting.outputs.is_empty() {
                    waiting.by_leg.clear();
                    let room = Vec::with_capacity(waiting.outputs.len());
                    let legs = std::mem::replace(&mut waiting.outputs, room);
                    return Some(AttachResponse { frame: Some(Frame::Step(StepOutput { legs })) });
                }
                if let Some(load) = waiting.load.take() {
                    return Some(AttachResponse { frame: Some(Frame::Load(load)) });
                }
            }
            self.filled.notified().await;
        }
    }
}
