//! Files that may change while a process runs are looked at again and again: a mounted Secret or ConfigMap is swapped as a
//! whole, which only a look at its content tells.

use std::{fmt::Display, sync::Arc, time::Duration};

use parking_lot::Mutex;

/// How often, where nothing asks for more.
pub const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Looks at once and then every so often, for as long as it is polled. `look` says what is new, if anything is; it may block,
/// as where files lie may not answer. `told` gets that, and what is wrong: once, until all is well again or something else is
/// wrong. A look that panics is one that says nothing.
pub async fn follow<T, E>(
    every: Duration,
    look: impl FnMut() -> Result<Option<T>, E> + Send + 'static,
    mut told: impl FnMut(Result<T, E>),
) where
    T: Send + 'static,
    E: Display + Send + 'static,
{
    let (look, mut trouble) = (Arc::new(Mutex::new(look)), String::new());
    loop {
        let looking = look.clone();
        match tokio::task::spawn_blocking(move || looking.lock()()).await {
            Ok(Ok(new)) => {
                trouble.clear();
                if let Some(new) = new {
                    told(Ok(new));
                }
            }
            Ok(Err(error)) => {
                let says = error.to_string();
                if says != trouble {
                    trouble = says;
                    told(Err(error));
                }
            }
            // Told where it happened; or the runtime ends.
            Err(_) => {}
        }
        tokio::time::sleep(every).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_new_is_told_and_the_same_trouble_once() {
        let looks = [
            Ok(Some(1)),
            Ok(None),
            Err("gone"),
            Err("gone"),
            Err("unreadable"),
            Ok(None),
            Err("unreadable"),
            Ok(Some(2)),
        ];
        let (tell, mut told) = mpsc::unbounded_channel();
        let mut left = looks.into_iter();
        // The end is a look that panics, again and again: it changes nothing.
        let look = move || left.next().expect("a look that says nothing");
        let following = follow(LOOK_EVERY, look, move |said| tell.send(said).expect("is heard"));
        let _ = tokio::time::timeout(LOOK_EVERY * 20, following).await;
        let mut all = Vec::new();
        while let Some(said) = told.recv().await {
            all.push(said);
        }
        assert_eq!(all, [Ok(1), Err("gone"), Err("unreadable"), Err("unreadable"), Ok(2)]);
    }
}
