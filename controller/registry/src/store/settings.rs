//! How etcd is reached, as the configurations of controller and coordinator say it under `store.etcd`.

use std::{fmt, fs, io, time::Duration};

use baton_process::{Invalid, duration};
use serde::{Deserialize, Serialize};

use super::{
    StoreError,
    etcd::{EtcdConfig, EtcdStore},
};

/// What an operator can set.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdSettings {
    /// `host:port` of every member.
    pub endpoints: Vec<String>,
    /// Empty = etcd asks for no user.
    pub user: String,
    /// A file that holds the user's password.
    pub password_file: String,
    /// How long one member may take to accept a connection.
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    /// How long one member may take to answer before the next is asked.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

/// Why the settings open no store.
#[derive(Debug, thiserror::Error)]
pub enum EtcdOpenError {
    #[error("cannot read the etcd password from {path}: {source}")]
    Password { path: String, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            endpoints: Vec::new(),
            user: String::new(),
            password_file: String::new(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
        }
    }
}

impl fmt::Debug for EtcdSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdSettings").field("endpoints", &self.endpoints).field("user", &self.user).finish()
    }
}

impl EtcdSettings {
    /// Checks what the types cannot say; whether endpoints are needed is the service's to know.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.user.is_empty() == self.password_file.is_empty() {
            return Ok(());
        }
        Err(Invalid::new("store.etcd.password_file", "expected both a user and a password file, or neither"))
    }

    /// The store. Reads the password; connects only when used.
    pub fn open(&self) -> Result<EtcdStore, EtcdOpenError> {
        Ok(EtcdStore::new(&self.config()?)?)
    }

    fn config(&self) -> Result<EtcdConfig, EtcdOpenError> {
        let mut config = EtcdConfig::new(&self.endpoints);
        (config.connect_timeout, config.timeout) = (self.connect_timeout, self.timeout);
        if !self.user.is_empty() {
            let path = self.password_file.clone();
            let password =
                fs::read_to_string(&path).map_err(|source| EtcdOpenError::Password { path, source })?;
            config.user = Some((self.user.clone(), password.trim_end().to_owned()));
        }
        Ok(config)
    }
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
        let config = settings(&path.to_string_lossy()).config();
        fs::remove_file(&path).expect("was there");
        let config = config.expect("is read");
        assert_eq!(config.user, Some(("baton".to_owned(), "secret".to_owned())));
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
}
