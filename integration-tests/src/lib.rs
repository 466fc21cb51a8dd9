//! The sandbox of the integration tests: clusters of real processes, started by `baton up` or each by itself, looked at only
//! through what users have too — HTTP, metrics, `baton ctl`, signals.
//!
//! Needs, from the environment that `deploy/run test` sets: `BATON_TEST_MODEL` (the GGUF file of SmolLM2-135M-Instruct)
//! and `BATON_TEST_PYTHON` (an interpreter with `python/requirements.txt`); some tests need more, and say what. A test that
//! lacks one fails.

pub mod authority;
pub mod chat;
pub mod cluster;
pub mod fleet;
pub mod metrics;
pub mod process;
pub mod promql;
pub mod strangers;
pub mod tokens;

pub use cluster::Cluster;
pub use fleet::{Build, Fleet};

use std::{
    env,
    future::Future,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Longest that anything in a cluster may take to come about.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A coordinator's setting, by which prompts as short as those of tests are computed by prefill, and handed over.
pub const APART: &str = "placement.local_prefill_tokens=0";

/// What `deploy/run test` has to provide.
pub fn required(variable: &str) -> String {
    env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run the tests with `./deploy/run test`"))
}

/// The model file that every test serves.
pub fn model() -> PathBuf {
    PathBuf::from(required("BATON_TEST_MODEL"))
}

/// A program of this workspace, from the build that this test is part of.
pub fn binary(name: &str) -> PathBuf {
    let test = env::current_exe().expect("a test has a path");
    let path = test.ancestors().nth(2).expect("target/<profile>/deps/<test>").join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace --bins`", path.display());
    path
}

/// The folder of this crate.
pub fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Polls until `probe` gives something, and says what was waited for if it never does.
pub async fn eventually<T, F, Fut>(what: &str, mut probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let begin = Instant::now();
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
