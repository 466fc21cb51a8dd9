//! Clients over HTTPS, with certificates of `deploy/certificates`: the official client is served, whoever shows no
//! certificate of the clients' authority is not, and probes and metrics are at a port of their own.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use baton_integration_tests::{
    Cluster,
    authority::{Authority, alert},
    folder, process, required,
};

#[tokio::test]
async fn the_official_client_is_served_by_tls_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let (ours, theirs) = (Authority::new(ours), Authority::new(theirs));
    ours.run(&["issue", "host", "web", "127.0.0.1", "localhost"]);
    let joe = theirs.issue("client", "joe");
    let metrics = process::free_ports(4);
    let set = [
        ("cert_file", ours.0.join("host-web.crt")),
        ("key_file", ours.0.join("host-web.key")),
        ("client_ca_file", theirs.0.join("ca.crt")),
    ];
    let set = set.map(|(key, path)| format!("coordinator.https.{key}={}", path.display()));
    let mut arguments = vec!["--metrics-listen", &metrics];
    arguments.extend(set.iter().flat_map(|setting| ["--set", setting]));
    let cluster = Cluster::start(&arguments).await;
    assert!(cluster.url().starts_with("https://"), "{}", cluster.url());
    let client = Command::new(required("BATON_TEST_PYTHON"))
        .arg(folder().join("python/https_client.py"))
        .args([&format!("{}/v1", cluster.url()), cluster.model()])
        .args([ours.0.join("ca.crt"), joe.cert_file.clone(), joe.key_file.clone()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the Python client starts");
    let output = process::finish(client, Duration::from_secs(120));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cluster.assert_nothing_held().await;

    let (port, ca_file) = (cluster.url().trim_start_matches("https://"), ours.0.join("ca.crt"));
    for (shown, words) in [
        (None, "certificate required"),
        (Some(ours.issue("client", "jim")), "unknown ca"),
        (Some(theirs.issue_expired("client", "jane")), "certificate expired"),
    ] {
        let said = alert(port, &ca_file, shown.as_ref()).unwrap_or_else(|| panic!("no {words}"));
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(alert(port, &ca_file, Some(&joe)), None);

    let seen = reqwest::get(format!("http://{metrics}/metrics")).await.expect("is answered");
    let seen = seen.text().await.expect("is text");
    // Of the client: one without a certificate, one with an old version, one in plaintext.
    for refused in [r#"{why="handshake"} 5"#, r#"{why="plaintext"} 1"#] {
        assert!(seen.contains(&format!("baton_tls_refused_total{refused}")), "{seen}");
    }
    cluster.stop().await;
}
