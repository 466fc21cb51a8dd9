//! An authority of the tests' own, and what it signs.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, Issuer, KeyPair, SanType};

use super::TlsConfig;

pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

impl Authority {
    pub(super) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate with this name, and its key.
    pub(super) fn sign(
        &self,
        name: SanType,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![name];
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        (certificate.pem(), key.serialize_pem())
    }

    /// Puts the three files of whom the URI names into a folder.
    pub(super) fn issue(
        &self,
        folder: &Path,
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> TlsConfig {
        let (certificate, key) = self.sign(SanType::URI(uri.try_into().expect("ASCII")), change);
        let name = uri.replace(['/', ':'], "-");
        let file = |end: &str, content: String| {
            let path = folder.join(format!("{name}.{end}"));
            fs::write(&path, content).expect("a file");
            path
        };
        TlsConfig {
            ca_file: file("ca", self.pem.clone()),
            cert_file: file("crt", certificate),
            key_file: file("key", key),
        }
    }
}
