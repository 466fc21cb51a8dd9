//! Starts the server: configuration, telemetry, listeners, run, drain.

fn main() {}
