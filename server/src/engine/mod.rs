//! Runs the model for all sequences at once, on a thread of its own.
//!
//! Modules in the order a sequence meets them: `sequence` (what it is), `blocks` (what it holds),
//! `cache_events` (who is told of it), `scheduler` (when it runs; pure), `step` (one batch through the
//! model), `sampler` (its next token; pure), `load` (what was done, counted), `thread` (the loop around all
//! of it: commands in, updates out).

pub mod blocks;
pub mod cache_events;
pub mod load;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod step;
pub mod thread;
