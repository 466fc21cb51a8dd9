//! The decoder-only transformer of all families, written once over [`crate::device::Device`].
//!
//! `decoder` runs it; `attention` (`grouped_query` or `latent`) and `feed_forward` (dense or a mixture of experts) are
//! its two blocks in the variants that families choose from; `loader` brings weights from the checkpoint to the device.

mod attention;
mod decoder;
mod feed_forward;
mod grouped_query;
mod latent;
mod loader;

pub(crate) use decoder::Decoder;
