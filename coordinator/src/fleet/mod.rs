//! Keeps the streams to the instances, and tells [`baton_schedule`] what the store and they say.

pub mod cache;
pub mod keeper;
