//! How every Baton process starts, is observed and stops.
