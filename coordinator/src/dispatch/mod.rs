//! From a placement to tokens in order: both legs out at once, what they bring back merged.
//!
//! Called by [`crate::serve`] with a placed request; leaves text to [`crate::stream`]. [`machine`] is the protocol
//! (pure), [`generation`] drives it for one [`assignment`], [`link`] is the stream to one instance that all requests share,
//! [`outbound`] what waits to be sent on it, [`mailbox`] lies between the two, and [`inline`] has what was brought read at once.

mod assignment;
mod generation;
mod guard;
pub mod inline;
mod leg;
mod link;
pub mod machine;
mod mailbox;
mod outbound;

pub use assignment::{Assignment, deadline_passed};
pub use generation::{Generation, NotSent, Progress};
pub use guard::LegGuard;
pub use leg::{LegEnd, Output, StopReason, TokenLogprobs};
#[cfg(test)]
pub(crate) use link::standing::standing;
pub use link::{Link, LinkTask, Target};
pub use machine::{Completed, Fresh};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use {link::standing::Stand, mailbox::Mailbox};
