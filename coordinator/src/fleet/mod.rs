//! The instances: which there are, the stream to each that all requests share, and what they have cached.
//!
//! [`keeper`] follows the list, has an attachment ([`attachment`]) to each instance that is on it, and tells [`baton_schedule`] what the
//! list and they say. What a request sends goes by [`outbound`]; what instances bring lies in a [`mailbox`] of the request's
//! own until it reads, at once where it can ([`inline`]). Whoever fails or does not get on ([`stall`]) is left out for a while
//! ([`breakers`]); [`cache`] hears what each has cached. Nothing here knows what a request is: that is [`crate::dispatch`]'s.

pub mod attachment;
pub mod breakers;
pub mod cache;
mod cancel;
mod guard;
pub mod inline;
pub mod keeper;
mod leg;
mod mailbox;
mod outbound;
pub mod stall;

pub use attachment::{AttachTask, Attachment, Target};
pub use breakers::{Attempt, Breakers, Trials};
pub use cancel::CancelReason;
pub use guard::LegGuard;
pub use leg::{LegEnd, Output, StopReason, TokenLogprobs};
pub use mailbox::{BATCH_TOKENS, Expected, Mailbox};
