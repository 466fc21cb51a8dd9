//! Small model files, written by the tests: what is read of them, and how they are refused.

mod contents;
mod damaged;
mod eight_bits;
mod place;
mod refused;
mod revisions;
mod small;
