//! Which instances exist and which role each has.
