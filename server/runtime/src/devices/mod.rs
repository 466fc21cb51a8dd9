//! The devices that models run on. Each implements [`crate::device::Device`].

pub(crate) mod cpu;
