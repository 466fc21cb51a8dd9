//! The fleet's secret, read again whenever its file has changed, as certificates are: [`crate::serving`] starts it.
//!
//! What cannot be used changes nothing. The secret before is good for [`KEEP_BEFORE`] more, as files do not change everywhere
//! at once.

use std::time::Duration;

use baton_kvtransfer::{FleetSecret, FleetSecrets};
use baton_process::{
    Invalid,
    follow::{LOOK_EVERY, follow},
};

use crate::config::HandoffConfig;

/// Longer than Kubernetes takes until a changed Secret is mounted everywhere, which is a minute or two.
const KEEP_BEFORE: Duration = Duration::from_secs(300);

/// As long as it is polled.
pub(crate) async fn follow_file(config: HandoffConfig, secrets: FleetSecrets) {
    let mut seen = None;
    let look = move || -> Result<Option<FleetSecret>, Invalid> {
        let secret = config.secret()?;
        // Not the half of a file that is being written.
        let settled = seen == secret;
        seen.clone_from(&secret);
        Ok(secret.filter(|_| settled))
    };
    let told = |secret: Result<FleetSecret, Invalid>| match secret {
        Ok(secret) => {
            if secrets.change(secret, KEEP_BEFORE) {
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

    #[tokio::test(start_paused = true)]
    async fn a_changed_secret_is_taken_and_what_is_none_changes_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = HandoffConfig { secret_file: folder.path().join("secret"), ..HandoffConfig::default() };
        let write = |text: &str| std::fs::write(&config.secret_file, text).expect("a file");
        let of = |text: &str| FleetSecret::new(text).expect("long enough");
        write("the first of them all\n");
        let secrets = FleetSecrets::from(config.secret().expect("good").expect("there is one"));
        let follows = tokio::spawn(follow_file(config.clone(), secrets.clone()));
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
