//! From a placement to tokens in order: both legs out at once, what they bring back merged.
//!
//! Called by [`crate::place`] with a placed request; leaves text to [`crate::stream`]. [`machine`] is the protocol (pure),
//! [`generation`] drives it for one [`assignment`] over [`crate::fleet`]'s attachments, with a guard for each of its [`legs`],
//! up to its [`deadline`]; [`wire`] is how instances are told.

mod assignment;
mod deadline;
mod generation;
mod hold;
mod legs;
pub mod machine;
mod wire;

pub use assignment::Assignment;
pub use deadline::deadline_passed;
pub use generation::{Generation, NotSent, Progress};
pub use machine::{Completed, Fresh};
