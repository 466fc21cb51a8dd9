//! How etcd is reached, as the configurations of controller and coordinator say it under `store.etcd`.

use std::{fmt, fs, io, path::Path, sync::Arc, time::Duration};

use baton_process::{Invalid, duration};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    StoreError,
    etcd::{EtcdConfig, EtcdCredentials, EtcdStore, EtcdTls},
};

/// How etcd is reached.
#[derive(Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdSettings {
    /// `host:port` of every member.
    pub endpoints: Vec<String>,
    /// Whom etcd knows this process as. Empty = etcd asks for no user.
    pub user: String,
    /// A file that holds the user's password.
    pub password_file: String,
    /// Certificates (PEM) of who signs those of the members; with it, etcd is reached by TLS. Empty = without.
    pub ca_file: String,
    /// This process's own certificate (PEM), if etcd asks for one.
    pub cert_file: String,
    /// The key (PEM) of `cert_file`.
    pub key_file: String,
    /// How long one member may take to accept a connection.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub connect_timeout: Duration,
    /// How long one member may take to answer before the next is asked.
    #[serde(with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub timeout: Duration,
}

/// Why the settings open no store.
#[derive(Debug, thiserror::Error)]
pub enum EtcdOpenError {
    #[error("cannot read {what} for etcd from {path}: {source}")]
    File { what: &'static str, path: String, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            user: String::new(),
            password_file: String::new(),
            ca_file: String::new(),
            cert_file: String::new(),
            key_file: String::new(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
        }
    }
}

impl fmt::Debug for EtcdSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdSettings")
            .field("endpoints", &self.endpoints)
            .field("user", &self.user)
            .field("ca_file", &self.ca_file)
            .finish_non_exhaustive()
    }
}

impl EtcdSettings {
    /// Checks what the types cannot say; whether endpoints are needed is the service's to know.
    pub fn validate(&self) -> Result<(), Invalid> {
        let require = |holds: bool, key: &str, expected: &str| {
            if holds { Ok(()) } else { Err(Invalid::new(key, expected)) }
        };
        let both = self.user.is_empty() == self.password_file.is_empty();
        require(both, "store.etcd.password_file", "expected both a user and a password file, or neither")?;
        let both = self.cert_file.is_empty() == self.key_file.is_empty();
        require(both, "store.etcd.key_file", "expected both a certificate and its key, or neither")?;
        let trusted = self.cert_file.is_empty() || !self.ca_file.is_empty();
        require(trusted, "store.etcd.ca_file", "expected with a certificate, so that etcd is known, too")?;
        let plain = |endpoint: &String| endpoint.starts_with("http://");
        let secure = |endpoint: &String| endpoint.starts_with("https://");
        let (mut endpoints, tls) = (self.endpoints.iter(), !self.ca_file.is_empty());
        let scheme = if tls { !endpoints.any(plain) } else { !endpoints.any(secure) };
        let expected = "expected host:port, or https:// with `store.etcd.ca_file` and http:// without";
        require(scheme, "store.etcd.endpoints", expected)
    }

    /// Of the certificate that etcd is shown once this is opened, if any: the setting that names its file, and the file.
    pub fn certificate(&self) -> Option<(&'static str, &Path)> {
        let shown = !self.endpoints.is_empty() && !self.cert_file.is_empty();
        shown.then(|| ("store.etcd.cert_file", Path::new(&self.cert_file)))
    }

    /// The store. Reads the files, and again whenever a member is connected to anew; connects only when used.
    pub fn open(&self) -> Result<EtcdStore, EtcdOpenError> {
        Ok(EtcdStore::new(&self.config()?)?)
    }

    fn config(&self) -> Result<EtcdConfig, EtcdOpenError> {
        let mut config = EtcdConfig::new(&self.endpoints);
        (config.connect_timeout, config.timeout) = (self.connect_timeout, self.timeout);
        self.credentials()?;
        let settings = self.clone();
        config.credentials = Arc::new(move || settings.credentials().map_err(|error| error.to_string()));
        Ok(config)
    }

    /// As the files say now.
    fn credentials(&self) -> Result<EtcdCredentials, EtcdOpenError> {
        let mut credentials = EtcdCredentials::default();
        if !self.user.is_empty() {
            let password = read("the password", &self.password_file)?;
            credentials.user = Some((self.user.clone(), password.trim_end().to_owned()));
        }
        if !self.ca_file.is_empty() {
            let ca = read("the CA's certificates", &self.ca_file)?;
            let identity = if self.cert_file.is_empty() {
                None
            } else {
                let certificate = read("the certificate", &self.cert_file)?;
                Some((certificate, read("the certificate's key", &self.key_file)?))
            };
            credentials.tls = Some(EtcdTls { ca, identity });
        }
        Ok(credentials)
    }
}

fn read(what: &'static str, path: &str) -> Result<String, EtcdOpenError> {
    fs::read_to_string(path).map_err(|source| EtcdOpenError::File { what, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_of_etcd_comes_from_its_file() {
        let settings = |password_file: &str| EtcdSettings {
            endpoints: vec!["127.0.0.1:2379".into()],
            user: "baton".into(),
            password_file: password_file.into(),
            ..EtcdSettings::default()
        };
        let path = std::env::temp_dir().join(format!("baton-password-{}", std::process::id()));
        fs::write(&path, "secret\n").expect("a file");
        let config = settings(&path.to_string_lossy()).config().expect("is read");
        let user = || (config.credentials)().map(|credentials| credentials.user);
        assert_eq!(user(), Ok(Some(("baton".to_owned(), "secret".to_owned()))));
        fs::write(&path, "another\n").expect("a file");
        assert_eq!(user(), Ok(Some(("baton".to_owned(), "another".to_owned()))));
        fs::remove_file(&path).expect("was there");
        assert!(user().expect_err("it is gone").contains("cannot read the password for etcd from"));
        let Err(missing) = settings("/nowhere/password").open() else { panic!("is not there") };
        assert!(missing.to_string().contains("/nowhere/password"), "{missing}");
        let shown = format!("{:?}", settings("/the/file"));
        assert!(!shown.contains("/the/file"), "{shown}");
    }

    #[test]
    fn a_user_has_a_password_and_a_password_a_user() {
        assert!(EtcdSettings::default().validate().is_ok());
        let alone = EtcdSettings { user: "baton".into(), ..EtcdSettings::default() };
        assert_eq!(alone.validate().expect_err("no password").key, "store.etcd.password_file");
        let both = EtcdSettings { password_file: "/f".into(), ..alone };
        assert!(both.validate().is_ok());
    }

    #[test]
    fn etcd_is_shown_a_certificate_where_there_are_both() {
        let of = |endpoints: &[&str], cert_file: &str| {
            let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
            let settings = EtcdSettings { endpoints, cert_file: cert_file.into(), ..EtcdSettings::default() };
            settings.certificate().map(|(setting, file)| (setting, file.to_owned()))
        };
        assert_eq!(of(&[], "/cert.pem"), None);
        assert_eq!(of(&["h:1"], ""), None);
        assert_eq!(of(&["h:1"], "/cert.pem"), Some(("store.etcd.cert_file", "/cert.pem".into())));
    }

    #[test]
    fn tls_is_whole_or_not_at_all() {
        let refused = |settings: EtcdSettings| settings.validate().expect_err("half of it").key;
        let with = |ca: &str, cert: &str, key: &str, endpoint: &str| EtcdSettings {
            endpoints: vec![endpoint.into()],
            ca_file: ca.into(),
            cert_file: cert.into(),
            key_file: key.into(),
            ..EtcdSettings::default()
        };
        assert_eq!(refused(with("ca", "cert", "", "h:1")), "store.etcd.key_file");
        assert_eq!(refused(with("", "cert", "key", "h:1")), "store.etcd.ca_file");
        assert_eq!(refused(with("ca", "", "", "http://h:1")), "store.etcd.endpoints");
        assert_eq!(refused(with("", "", "", "https://h:1")), "store.etcd.endpoints");
        for good in [
            with("ca", "cert", "key", "https://h:1"),
            with("ca", "", "", "h:1"),
            with("", "", "", "http://h:1"),
        ] {
            assert!(good.validate().is_ok());
        }
        let Err(missing) = with("/nowhere/ca.pem", "", "", "h:1").open() else { panic!("is not there") };
        assert!(missing.to_string().contains("/nowhere/ca.pem"), "{missing}");
    }
}
