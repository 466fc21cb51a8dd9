//! Starts the controller: configuration, telemetry, listeners, run, drain.

fn main() {}
