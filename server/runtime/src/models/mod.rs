//! The decoder-only transformer of all families, written once over [`crate::device::Device`].
//!
//! `decoder` runs it; `attention` and `feed_forward` are its two kinds of blocks in the variants that families
//! choose from; `loader` brings weights from the checkpoint to the device.

mod attention;
mod decoder;
mod feed_forward;
mod loader;

pub(crate) use decoder::Decoder;
