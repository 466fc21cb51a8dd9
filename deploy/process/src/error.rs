//! What can go wrong before and around a service's own work. Each message is one line that says what to do.

use std::{io, path::PathBuf, time::Duration};

use crate::{
    ListenError,
    settings::{Invalid, Unserved},
};

/// A configuration that cannot be used. Names the place, the dotted key and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config file {path}: cannot be read: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("config file {path}, line {line}: {message}", path = .path.display())]
    Syntax { path: PathBuf, line: usize, message: String },
    #[error("{origin}: unknown key `{key}`{}", .nearest.as_ref().map(|near| format!("; did you mean `{near}`?")).unwrap_or_default())]
    UnknownKey { origin: String, key: String, nearest: Option<String> },
    #[error("{origin}: there is no key `{key}`: {why}")]
    Unserved { origin: String, key: String, why: &'static str },
    #[error("{origin}: `{key}`: {message}")]
    BadValue { origin: String, key: String, message: String },
    #[error("--set {argument}: expected KEY=VALUE, as in --set process.log.level=debug")]
    BadOverride { argument: String },
    #[error("{origin}: {source}")]
    Invalid { origin: String, source: Invalid },
    #[error("configuration: {0}")]
    Source(#[from] config::ConfigError),
    #[error("the configuration's defaults cannot be listed: {0}")]
    Shape(#[source] serde_json::Error),
    #[error("the configuration cannot be written as TOML: {0}")]
    Print(#[from] toml::ser::Error),
}

impl ConfigError {
    /// Says of an unknown key why there is none, if it is for one of these.
    pub(crate) fn of_unserved(self, all: &[Unserved]) -> Self {
        match self {
            Self::UnknownKey { origin, key, nearest } => match all.iter().find(|one| one.is_meant_by(&key)) {
                Some(unserved) => Self::Unserved { origin, key, why: unserved.why },
                None => Self::UnknownKey { origin, key, nearest },
            },
            other => other,
        }
    }
}

/// Why a process could not run, or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{what} cannot be set up: {source}")]
    Setup { what: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("HTTP server: {0}")]
    Http(#[source] io::Error),
    #[error("{task} failed: {reason}")]
    Essential { task: &'static str, reason: String },
    #[error(
        "did not stop within {0:?} of being asked to; raise process.shutdown.drain if requests need longer than that"
    )]
    DrainTimeout(Duration),
}

/// The error and its causes on one line, without repeating what a message already holds.
pub fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let text = next.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = next.source();
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}
