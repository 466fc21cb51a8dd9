//! Certificates as `deploy/certificates` issues them, and what a port says to one that shows the wrong ones.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use baton_process::TlsConfig;

use crate::{folder, process};

/// A folder that an authority issues into.
pub struct Authority(pub PathBuf);

impl Authority {
    /// A new one.
    pub fn new(path: PathBuf) -> Self {
        let authority = Self(path);
        authority.run(&["authority"]);
        authority
    }

    pub fn run(&self, arguments: &[&str]) {
        let mut script = Command::new(folder().join("../deploy/certificates"));
        let output = script.args(arguments).arg("--folder").arg(&self.0).output().expect("it runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The files of a role and a name.
    pub fn issue(&self, role: &str, name: &str) -> TlsConfig {
        self.issue_for(role, name, &[])
    }

    /// The same, good until now.
    pub fn issue_expired(&self, role: &str, name: &str) -> TlsConfig {
        let issued = self.issue_for(role, name, &["--days", "0"]);
        // It is good for the second in which it was made.
        std::thread::sleep(Duration::from_millis(1500));
        issued
    }

    fn issue_for(&self, role: &str, name: &str, options: &[&str]) -> TlsConfig {
        self.run(&[&["issue", role, name][..], options].concat());
        let file = |end: &str| self.0.join(format!("{role}-{name}.{end}"));
        TlsConfig { ca_file: self.0.join("ca.crt"), cert_file: file("crt"), key_file: file("key") }
    }
}

/// What a port says to a client that believes `ca_file` and shows this certificate, or none: OpenSSL's words for the alert.
/// `None`: it lets it in.
pub fn alert(address: &str, ca_file: &Path, shown: Option<&TlsConfig>) -> Option<String> {
    let mut client = Command::new("openssl");
    client.args(["s_client", "-tls1_3", "-alpn", "h2,http/1.1", "-connect", address, "-CAfile"]).arg(ca_file);
    if let Some(shown) = shown {
        client.arg("-cert").arg(&shown.cert_file).arg("-key").arg(&shown.key_file);
    }
    // A port that lets it in waits for its first word, and is told by that that there will be none.
    let mut client = client
        .args(["-quiet", "-ign_eof"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl starts");
    let ended = std::time::Instant::now() + Duration::from_secs(3);
    while client.try_wait().expect("it is a child").is_none() {
        if std::time::Instant::now() > ended {
            client.kill().expect("it is a child");
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = process::finish(client, Duration::from_secs(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let alert = said.lines().find(|line| line.contains("alert"));
    Some(alert.unwrap_or_else(|| panic!("no alert: {said}")).to_owned())
}
