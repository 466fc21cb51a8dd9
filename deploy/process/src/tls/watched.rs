//! A certificate that something else reads and shows, as etcd's client does: only when it ends is of interest here.

use std::{path::Path, sync::Arc};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use webpki::KeyUsage;

use super::{
    Counts, Shown, TlsError,
    credentials::{certificates, content},
    expiry::believed_until,
    files::{Followed, Paths},
};
use crate::follow::{LOOK_EVERY, follow};

/// Has the metrics say when the certificate in `path` ends, and follows the file until the shutdown. `setting` names the
/// file. Errors name both.
pub(crate) fn watch(
    setting: &'static str,
    path: &Path,
    counts: Counts,
    shutdown: &CancellationToken,
    tasks: &TaskTracker,
) -> Result<(), TlsError> {
    let nothing = || (setting, Default::default());
    let (files, path): (Paths, _) = ([(setting, path.to_owned()), nothing(), nothing()], path.to_owned());
    let followed = Followed::read(files, move |[pem, ..]| {
        let chain = certificates(setting, &path, pem)?;
        // Whom the other side believes is not known here.
        let until = believed_until(&chain, &[], KeyUsage::client_auth());
        if until.is_none() {
            return Err(content(setting, &path, "holds no certificate that can be read"));
        }
        Ok(Shown { file: setting, named: path.display().to_string(), until })
    })?;
    counts.shows(&followed.current());
    let told = move |now: Result<Arc<Shown>, TlsError>| match now {
        Ok(shown) => {
            counts.reloaded("taken");
            counts.shows(&shown);
            tracing::info!(now = shown.named, "a changed certificate is there: new connections use it");
        }
        Err(error) => {
            counts.reloaded("failed");
            tracing::error!("{error}; connections made from now on will fail");
        }
    };
    let following = follow(LOOK_EVERY, move || followed.refresh(), told);
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(following));
    Ok(())
}
