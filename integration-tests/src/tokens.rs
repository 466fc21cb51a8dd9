//! Operators' tokens: the file that the services are given, and one for each operator.

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// Files in a folder.
pub struct Tokens(PathBuf);

impl Tokens {
    /// Alice is an admin, Bob a viewer, and Carol is not listed.
    pub fn write(folder: &Path) -> Self {
        let tokens = Self(folder.to_owned());
        let mut lines = String::new();
        for (name, right) in [("alice", Some("admin")), ("bob", Some("viewer")), ("carol", None)] {
            let token = format!("token-of-{name}");
            let hash: String =
                Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
            fs::write(tokens.of(name), token + "\n").expect("a file");
            lines.extend(right.map(|right| format!("{name} {right} {hash}\n")));
        }
        fs::write(tokens.0.join("tokens"), lines).expect("a file");
        tokens
    }

    /// The setting of a service.
    pub fn setting(&self) -> String {
        format!("admin.tokens_file={}", self.0.join("tokens").display())
    }

    /// The file of an operator's own token.
    pub fn of(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.token"))
    }
}
