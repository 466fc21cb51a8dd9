//! A Baton instance: executes the model, hands KV caches on or takes them up.
//!
//! Modules in the order a request meets them: `inference` (the gRPC adapter), `engine` (its own thread:
//! scheduler, sequences, blocks, sampler), `handoff` (the engine's transfers), and back out through
//! `inference`. Beside that path: `kv_cache` (tells coordinators what is cached), `secret` (of the fleet,
//! followed), `session` (with the controller), `wire` (how busy it is, as those are told), `role` (pure)
//! and `duty` (performs it), `permits` (what a drain waits for). `serving` and `instance` put them together.

pub mod config;
pub mod duty;
pub mod engine;
pub mod error;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod handoff;
pub mod inference;
pub mod instance;
pub mod kv_cache;
pub mod metrics;
pub mod permits;
pub mod role;
mod secret;
pub mod serving;
pub mod session;
mod wire;
