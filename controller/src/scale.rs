//! Scaling on Kubernetes: as many replicas of a group's Deployment as the group wants instances.
//!
//! An operator like any other: it runs beside the task that leads, for as long as this controller does, asks it at the
//! [`crate::desk`] what a group wants and who is in it, cordons and uncordons there, and otherwise speaks to Kubernetes. Nothing
//! of the fleet is decided here, and losing Kubernetes changes nothing of it.
//!
//! [`decide`] says what to do next and is pure; `cluster` speaks to the API server; `task` looks, asks [`decide`] and does
//! what that says. Only `decide` is there without the feature `kubernetes`.

pub mod decide;
pub mod low;

#[cfg(feature = "kubernetes")]
mod cluster;
#[cfg(feature = "kubernetes")]
mod error;
#[cfg(feature = "kubernetes")]
mod task;

#[cfg(feature = "kubernetes")]
pub use {error::OpenError, task::Scaling};
