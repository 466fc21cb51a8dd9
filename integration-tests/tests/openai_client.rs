//! The official OpenAI client, unchanged, gets what it expects. The promises are in python/openai_client.py.

use std::process::{Command, Stdio};

use baton_integration_tests::{Cluster, folder, process, required};

#[tokio::test]
async fn the_official_client_works_unchanged() {
    let cluster = Cluster::start(&[]).await;
    let client = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/openai_client.py"))
        .args([&format!("{}/v1", cluster.url()), cluster.model()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python client starts");
    let output = process::finish(client, std::time::Duration::from_secs(300));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.assert_nothing_held().await;
}
