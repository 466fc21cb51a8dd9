//! Stands in for Ascend's libraries in tests: one shared object with the C symbols of the ACL runtime, HIXL-CS and HCCL,
//! which a test places under their file names (as links to one file, so that they share what is kept here).
//!
//! Device memory is host memory that is known to be the device's, a stream is a thread, and bytes cross processes over
//! TCP. Every rule of the real libraries' documents that a caller can break is enforced.
//! Structures are read by offset from the documents, not through the caller's declarations, so that the two check
//! each other. [`fault`] makes things go wrong on demand.
//!
//! What it cannot show: timing, ordering between an NPU's engines, what real drivers do when a network fails.

pub mod fault;

mod acl;
mod handles;
mod hccl;
mod hixl;
mod memory;
mod raw;
mod stream;

#[cfg(test)]
mod tests;
