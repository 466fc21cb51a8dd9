//! Which instances exist and which role each has.
//!
//! The controller is the single writer of cluster state. Modules stand in the order the news travels: an instance's
//! report comes in by [`session`], through the [`desk`] to the task that leads (`lead`), which keeps what is observed
//! ([`fleet`]), decides what is wanted ([`plan`]), draws the difference ([`reconcile`]) and carries it out: writes to
//! the store, fenced by its leadership, and orders back to the instances. Operators ask through
//! [`admin`], and read in the [`journal`] what has happened. Beside that way, as nothing is decided by them: the
//! [`coordinators`] that report to the leader, and [`scale`], which has Kubernetes run as many instances as are wanted.
//!
//! `fleet`, `plan` and `reconcile` are pure: no IO, and time is an argument. The state store and the election are
//! baton-registry's.

pub mod admin;
mod build;
mod clock;
pub mod config;
pub mod coordinators;
pub mod demand;
pub mod desk;
mod error;
pub mod fleet;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub mod fuzz;
pub mod journal;
mod lead;
pub mod metrics;
pub mod plan;
pub mod ranktable;
pub mod reconcile;
pub mod scale;
pub mod session;
mod steps;

pub use build::{Parts, open_store, run};
pub use config::ControllerConfig;
pub use error::ControllerError;
