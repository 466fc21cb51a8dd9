//! The entry of a Baton cluster: takes OpenAI requests, schedules and streams them.
//!
//! Modules in the order a request meets them: [`http`] ([`keys`]: who may come in) -> [`serve`] (the path through the
//! stages) -> [`prepare`] (validate, template, tokenise; [`text`]) -> [`admit`] -> [`place`] (books it;
//! [`baton_schedule`] chooses, pure) -> [`dispatch`] (protocol machine, pure, and what drives it) -> [`stream`]
//! (detokenise, stop, count) -> [`http`]. Beside that path: [`models`] (what is served), [`carry`] (how requests go
//! on elsewhere, as often as a model's [`retry_budget`] lets them), [`fleet`] (which instances there are, the streams to
//! them, what they have cached, who is left out), [`requests`] and [`admin`] (what operators ask), [`report`],
//! [`metrics`] and [`handoffs`] (what is counted), [`registration`] (what the controller is told, and tells), [`cause`]
//! (what follows from an error).
//!
//! [`run`] wires it all; `main` calls it.

pub mod admin;
pub mod admit;
mod build;
pub mod carry;
pub mod cause;
pub mod config;
pub mod dispatch;
mod error;
pub mod fleet;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod handoffs;
pub mod http;
pub mod keys;
mod life;
pub mod metrics;
pub mod models;
pub mod place;
pub mod prepare;
pub mod registration;
pub mod report;
pub mod requests;
pub mod retry_budget;
pub mod serve;
pub mod stream;
pub mod text;

pub use build::{Parts, assemble};
pub use config::CoordinatorConfig;
pub use error::{CoordinatorError, ModelError};
pub use life::{run, serve_clients};
