//! An attachment as it is once its instance has said welcome, without the instance: for tests and fuzz targets.

use super::*;
use crate::fleet::outbound::Frames;

/// Such an attachment, and what is sent on it.
pub(crate) fn standing(instance: InstanceId, metrics: Arc<Metrics>) -> (Arc<Attachment>, Frames) {
    let attachment = Attachment::new(instance, Arc::default(), metrics);
    let (outbound, frames) = Outbound::new(v1::attach_request::Hello::default());
    *attachment.stream.lock() = Some(Up { outbound, legs: Slots::default() });
    (attachment, frames)
}

/// Such an attachment, to be told what an instance might say.
pub(crate) struct Stand {
    pub(crate) attachment: Arc<Attachment>,
    _frames: Frames,
}

impl Stand {
    pub(crate) fn new(instance: &InstanceId, metrics: &Arc<Metrics>) -> Self {
        let (attachment, frames) = standing(instance.clone(), metrics.clone());
        Self { attachment, _frames: frames }
    }

    /// A step's outputs, as the attachment's task hands them on.
    pub(crate) fn step(&self, step: v1::StepOutput) -> Vec<LegNews> {
        self.attachment.deliver(step)
    }
}
