//! The fleet's secret, read again whenever its files have changed, as certificates are: [`crate::serving`] starts it.
//!
//! What cannot be used changes nothing. The secret before is good for [`KEEP_BEFORE`] more, as files do not change everywhere
//! at once, and for as long as there is a file that has it: servers that start meanwhile know of it by nothing else.

use std::time::Duration;

use baton_kvtransfer::{FleetSecret, FleetSecrets};
use baton_process::{
    Invalid,
    follow::{LOOK_EVERY, follow},
};

use crate::config::HandoffConfig;

/// Longer than Kubernetes takes until a changed Secret is mounted everywhere, which is a minute or two.
const KEEP_BEFORE: Duration = Duration::from_secs(300);

/// What the files hold: the secret, and the one before, where that has a file of its own.
type Read = (FleetSecret, Option<FleetSecret>);

/// As the files have them now; none in a fleet without one.
pub(crate) fn read(config: &HandoffConfig) -> Result<Option<FleetSecrets>, Invalid> {
    let before = config.secret_before()?;
    Ok(config.secret()?.map(|secret| {
        let secrets = FleetSecrets::from(secret.clone());
        secrets.set(secret, before, KEEP_BEFORE);
        secrets
    }))
}

/// As long as it is polled.
pub(crate) async fn follow_files(config: HandoffConfig, secrets: FleetSecrets) {
    let (mut seen, mut taken) = (None, None);
    let look = move || -> Result<Option<Read>, Invalid> {
        let before = config.secret_before()?;
        let read = config.secret()?.map(|secret| (secret, before));
        // Not the half of a file that is being written.
        let settled = seen == read;
        seen.clone_from(&read);
        if !settled || read == taken {
            return Ok(None);
        }
        taken.clone_from(&read);
        Ok(read)
    };
    let told = |read: Result<Read, Invalid>| match read {
        Ok((secret, before)) => {
            if secrets.set(secret, before, KEEP_BEFORE) {
                tracing::info!(
                    "the changed handoff secret is taken; the one before is good for {KEEP_BEFORE:?}"
                );
            }
        }
        Err(error) => tracing::error!("{error}; the secret that was read before stays in use"),
    };
    follow(LOOK_EVERY, look, told).await;
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[test]
    fn the_secret_before_may_be_there() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let config = HandoffConfig {
            secret_file: path("secret"),
            secret_before_file: path("before"),
            ..HandoffConfig::default()
        };
        std::fs::write(path("secret"), "the second of them all").expect("a file");
        assert_eq!(config.secret_before().expect("it need not"), None);
        assert!(read(&config).expect("good").is_some());
        std::fs::write(path("before"), "the first of them all\n").expect("a file");
        assert_eq!(config.secret_before().expect("good"), FleetSecret::new("the first of them all").ok());
        std::fs::write(path("before"), "short").expect("a file");
        assert_eq!(read(&config).expect_err("too short").key, "handoff.secret_before_file");
        std::fs::remove_file(path("secret")).expect("was there");
        assert_eq!(config.secret().expect_err("is needed").key, "handoff.secret_file");
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_secret_is_taken_and_what_is_none_changes_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = HandoffConfig { secret_file: folder.path().join("secret"), ..HandoffConfig::default() };
        let write = |text: &str| std::fs::write(&config.secret_file, text).expect("a file");
        let of = |text: &str| FleetSecret::new(text).expect("long enough");
        write("the first of them all\n");
        let secrets = FleetSecrets::from(config.secret().expect("good").expect("there is one"));
        let follows = tokio::spawn(follow_files(config.clone(), secrets.clone()));
        let shows = async |secret: &FleetSecret| {
            for _ in 0..1_000 {
                if secrets.newest() == *secret {
                    return;
                }
                sleep(LOOK_EVERY / 4).await;
            }
            panic!("it is never shown");
        };

        write("the second of them all\n");
        shows(&of("the second of them all")).await;
        for useless in ["", "too short"] {
            write(useless);
            sleep(LOOK_EVERY * 4).await;
            assert_eq!(secrets.newest(), of("the second of them all"), "{useless:?}");
        }
        std::fs::remove_file(&config.secret_file).expect("was there");
        sleep(LOOK_EVERY * 4).await;
        assert_eq!(secrets.newest(), of("the second of them all"));
        write("the third of them all");
        shows(&of("the third of them all")).await;
        follows.abort();
    }
}
