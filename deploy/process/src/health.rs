//! Whether this process can do its work now. One handle, three readers: `/readiness`, gRPC health, and the service
//! itself.

use tokio::sync::watch;

/// Liveness is that the process answers at all; this is readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not yet, or not now; the reason is shown to whoever asks.
    NotReady(String),
    /// Ready for some of its work; for which, and why not for the rest, is shown to whoever asks.
    Partly(String),
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
}

impl Health {
    /// Whether it may be given work.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready | Self::Partly(_))
    }

    /// "ready", "draining", or the reason why not, or not for all.
    pub fn describe(&self) -> &str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::NotReady(reason) | Self::Partly(reason) => reason,
        }
    }
}

/// Cheap to clone; all clones speak of the same process.
#[derive(Debug, Clone)]
pub struct HealthHandle {
    state: watch::Sender<Health>,
}

impl Default for HealthHandle {
    fn default() -> Self {
        Self { state: watch::Sender::new(Health::NotReady("starting".to_owned())) }
    }
}

impl HealthHandle {
    /// Returns whether that is news. Draining is final: nothing but the end follows it.
    pub fn set(&self, health: Health) -> bool {
        self.state.send_if_modified(|state| {
            let changes = *state != Health::Draining && *state != health;
            if changes {
                *state = health;
            }
            changes
        })
    }

    pub fn set_ready(&self) {
        self.set(Health::Ready);
    }

    pub fn set_not_ready(&self, reason: impl Into<String>) {
        self.set(Health::NotReady(reason.into()));
    }

    pub fn get(&self) -> Health {
        self.state.borrow().clone()
    }

    pub fn is_ready(&self) -> bool {
        self.state.borrow().is_ready()
    }

    /// Sees the present state at once and every change after it.
    pub fn subscribe(&self) -> watch::Receiver<Health> {
        self.state.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_ready_for_some_work_is_given_it() {
        let health = HealthHandle::default();
        health.set(Health::Partly("ready: a; not ready: b".to_owned()));
        assert!(health.is_ready());
        assert_eq!(health.get().describe(), "ready: a; not ready: b");
    }

    #[test]
    fn draining_is_final() {
        let health = HealthHandle::default();
        assert!(!health.is_ready());
        health.clone().set_ready();
        assert!(health.is_ready());
        health.set(Health::Draining);
        health.set_ready();
        assert_eq!(health.get(), Health::Draining);
    }
}
