//! A Baton instance: executes the model, hands KV caches on or takes them up.

pub mod engine;
pub mod handoff;
pub mod metrics;
