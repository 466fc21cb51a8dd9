//! Clients over HTTPS, with certificates of `deploy/certificates`: the official client is served, whoever shows no
//! certificate of the clients' authority is not, and probes and metrics are at a port of their own.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use baton_integration_tests::{Cluster, folder, process, required};

fn certificates(folder_of: &Path, arguments: &[&str]) {
    let mut script = Command::new(folder().join("../deploy/certificates"));
    let output = script.args(arguments).arg("--folder").arg(folder_of).output().expect("it runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn the_official_client_is_served_by_tls_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    certificates(&ours, &["authority"]);
    certificates(&ours, &["issue", "host", "web", "127.0.0.1", "localhost"]);
    certificates(&theirs, &["authority"]);
    certificates(&theirs, &["issue", "client", "joe"]);
    let metrics = process::free_ports(4);
    let set = [
        ("cert_file", ours.join("host-web.crt")),
        ("key_file", ours.join("host-web.key")),
        ("client_ca_file", theirs.join("ca.crt")),
    ];
    let set = set.map(|(key, path)| format!("coordinator.https.{key}={}", path.display()));
    let mut arguments = vec!["--metrics-listen", &metrics];
    arguments.extend(set.iter().flat_map(|setting| ["--set", setting]));
    let cluster = Cluster::start(&arguments).await;
    assert!(cluster.url().starts_with("https://"), "{}", cluster.url());
    let client = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/https_client.py"))
        .args([&format!("{}/v1", cluster.url()), cluster.model()])
        .args([ours.join("ca.crt"), theirs.join("client-joe.crt"), theirs.join("client-joe.key")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python client starts");
    let output = process::finish(client, Duration::from_secs(120));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.assert_nothing_held().await;

    let seen = reqwest::get(format!("http://{metrics}/metrics")).await.expect("is answered");
    let seen = seen.text().await.expect("is text");
    // One without a certificate, one with an old version, one in plaintext.
    for refused in [r#"{why="handshake"} 2"#, r#"{why="plaintext"} 1"#] {
        assert!(seen.contains(&format!("baton_tls_refused_total{refused}")), "{seen}");
    }
    cluster.stop().await;
}
