//! The `baton` command: `up`, `ctl`, `bench`.

fn main() {}
