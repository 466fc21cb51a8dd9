//! What the log tells: as the configuration says, and as a file says while the process runs.
//!
//! The file is looked at every two seconds. What it holds wins for as long as it holds something; what cannot be read as
//! directives changes nothing, and the log says so once.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use tokio_util::task::AbortOnDropHandle;
use tracing_subscriber::{EnvFilter, Registry, reload};

use super::LOG_VARIABLE;
use crate::{
    ProcessConfig, ProcessError,
    follow::{LOOK_EVERY, follow},
};

/// More than any directives take.
const FILE_BYTES_MOST: u64 = 64 << 10;
/// The target of the record of who changed what.
const AUDIT: &str = "audit";

/// The filter of the log, and by what it is changed.
pub(super) type Reloadable = reload::Layer<EnvFilter, Registry>;

/// The environment wins over the configuration, so that one run can be looked at without editing a file.
fn configured(config: &ProcessConfig) -> String {
    match std::env::var(LOG_VARIABLE) {
        Ok(level) if !level.is_empty() => level,
        _ => config.log.level.clone(),
    }
}

/// Directives, each with a level: a word alone that is none would be taken for a target, and silence everything else.
pub(crate) fn check(level: &str) -> Result<(), String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let bare = level.split(',').map(str::trim).filter(|word| !word.contains(['=', '[']));
    for word in bare.filter(|word| !word.is_empty()) {
        if !LEVELS.iter().any(|level| word.eq_ignore_ascii_case(level)) {
            return Err(format!("`{word}` is neither a level ({}) nor `target=level`", LEVELS.join(", ")));
        }
    }
    EnvFilter::try_new(level).map(drop).map_err(|error| error.to_string())
}

/// A lower level for the rest hides no change that somebody made; who wants that names the target.
pub(super) fn filter(level: &str) -> Result<EnvFilter, String> {
    let directives = if level.contains(AUDIT) { level.to_owned() } else { format!("{level},{AUDIT}=info") };
    check(level).map_err(|error| format!("level `{level}`: {error}"))?;
    EnvFilter::try_new(directives).map_err(|error| format!("level `{level}`: {error}"))
}

/// The filter as it is at first, and who follows the file, if there is to be one: for as long as that is held, a drain
/// included. Needs a tokio runtime then.
pub(super) fn start(
    config: &ProcessConfig,
) -> Result<(Reloadable, Option<AbortOnDropHandle<()>>), ProcessError> {
    let level = configured(config);
    let filter = filter(&level).map_err(|error| ProcessError::Setup {
        what: "logging",
        source: format!("{error}, of {LOG_VARIABLE} or process.log.level").into(),
    })?;
    let (layer, handle) = reload::Layer::new(filter);
    let file = Some(config.log.level_file.clone()).filter(|path| !path.as_os_str().is_empty());
    let follows = file.map(|path| AbortOnDropHandle::new(tokio::spawn(follow_file(path, level, handle))));
    Ok((layer, follows))
}

/// For as long as it is polled.
async fn follow_file(path: PathBuf, configured: String, filter: reload::Handle<EnvFilter, Registry>) {
    let (named, mut said) = (path.display().to_string(), String::new());
    let look = move || -> io::Result<Option<String>> {
        let says = read(&path)?;
        Ok((says != said).then(|| {
            said.clone_from(&says);
            says
        }))
    };
    let told = |says: io::Result<String>| match says {
        Ok(says) => change(if says.is_empty() { &configured } else { &says }, &filter),
        Err(error) => {
            tracing::error!("process.log.level_file: {named}: {error}; the level stays as it is");
        }
    };
    follow(LOOK_EVERY, look, told).await;
}

/// What it holds; nothing, if it is not there.
fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(text),
        opened => opened?,
    };
    file.take(FILE_BYTES_MOST).read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

fn change(level: &str, handle: &reload::Handle<EnvFilter, Registry>) {
    match filter(level) {
        // Only a subscriber that is gone takes none.
        Ok(filter) => {
            let _ = handle.reload(filter);
            tracing::info!(target: AUDIT, now = level, "the log's level has changed");
        }
        Err(error) => tracing::error!("process.log.level_file: {error}; the level stays as it is"),
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::{Layer, layer::SubscriberExt};

    use super::*;

    #[test]
    fn no_level_hides_the_audit_but_its_own() {
        let shows = |level: &str| {
            let registry = tracing_subscriber::registry().with(filter(level).expect("a level"));
            tracing::subscriber::with_default(registry, || {
                (
                    tracing::enabled!(target: "audit", tracing::Level::INFO),
                    tracing::enabled!(tracing::Level::INFO),
                )
            })
        };
        assert_eq!(shows("info"), (true, true));
        assert_eq!(shows("error"), (true, false));
        assert_eq!(shows("error,baton_server=debug"), (true, false));
        assert_eq!(shows("error,audit=off"), (false, false));
    }

    #[tokio::test]
    async fn whoever_lets_go_has_the_file_followed_no_more() {
        let mut config = ProcessConfig::default();
        let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
        let (_layer, follows) = start(&config).expect("a level");
        assert!(follows.is_none() && alive() == 0);
        config.log.level_file = "/nowhere/level".into();
        let (_layer, follows) = start(&config).expect("a level");
        assert_eq!(alive(), 1);
        drop(follows);
        while alive() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_changes_the_level_for_as_long_as_it_says_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("level");
        let (layer, handle) = reload::Layer::new(filter("info").expect("a level"));
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::sink).with_filter(layer);
        let _here = tracing::subscriber::set_default(tracing_subscriber::registry().with(log));
        let follows = tokio::spawn(follow_file(path.clone(), "info".to_owned(), handle));
        let says = async |text: Option<&str>, shows: bool| {
            match text {
                Some(text) => std::fs::write(&path, text).expect("a file"),
                None => std::fs::remove_file(&path).expect("was there"),
            }
            for _ in 0..1_000 {
                if tracing::enabled!(tracing::Level::DEBUG) == shows {
                    return;
                }
                tokio::time::sleep(LOOK_EVERY / 4).await;
            }
            panic!("{text:?} changes nothing");
        };
        assert!(!tracing::enabled!(tracing::Level::DEBUG));
        says(Some("debug\n"), true).await;
        says(Some("warn"), false).await;
        says(Some("debug"), true).await;
        says(Some("no=such=level"), true).await;
        says(Some("wran"), true).await;
        tokio::time::sleep(LOOK_EVERY * 3).await;
        assert!(tracing::enabled!(tracing::Level::DEBUG), "what cannot be read changes nothing");
        says(None, false).await;
        follows.abort();
    }
}
