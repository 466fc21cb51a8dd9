//! Requests that go on elsewhere ([`attempts`]); of a model's requests only so many are given to others ([`budget`]), so
//! that failures do not spread. Who is left out meanwhile [`crate::fleet::breakers`] says.

pub mod attempts;
pub mod budget;

pub use attempts::{Attempts, Failure, Moved, Replacing};
