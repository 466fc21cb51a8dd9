//! Starts the coordinator: configuration, telemetry, listeners, run, drain.

fn main() {}
