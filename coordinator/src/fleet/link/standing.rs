//! A link as it is once its instance has said welcome, without the instance: for tests and fuzz targets.

use super::*;
use crate::fleet::outbound::Frames;

/// Such a link, and what is sent on it.
pub(crate) fn standing(instance: InstanceId, metrics: Arc<Metrics>) -> (Arc<Link>, Frames) {
    let link = Link::new(instance, Arc::default(), metrics);
    let (outbound, frames) = Outbound::new(v1::attach_request::Hello::default());
    *link.stream.lock() = Some(Up { outbound, legs: Slots::default() });
    (link, frames)
}

/// Such a link, to be told what an instance might say.
pub(crate) struct Stand {
    pub(crate) link: Arc<Link>,
    _frames: Frames,
}

impl Stand {
    pub(crate) fn new(instance: &InstanceId, metrics: &Arc<Metrics>) -> Self {
        let (link, frames) = standing(instance.clone(), metrics.clone());
        Self { link, _frames: frames }
    }

    /// A step's outputs, as the link's task hands them on.
    pub(crate) fn step(&self, step: v1::StepOutput) -> Vec<LegNews> {
        self.link.deliver(step)
    }
}
