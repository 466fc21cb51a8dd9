//! What both directions of a transfer have in common around their sessions: events run under the lock, commands are
//! performed there and then, and the end comes in one order.
//!
//! Implemented by [`super::inbound`] and [`super::outbound`]. The order of the end is the fence: first no transport
//! touches the blocks (the session says so, last of all), then nothing here claims them and the tables have moved the
//! transfer to the ended ones, and only then does the owner learn that they are its own again, once.

use tokio::sync::watch;

use crate::{
    TransferError,
    sync::{Mutex, MutexGuard},
};

/// What a shell keeps under its lock.
#[derive(Debug)]
pub(super) struct State<S, L> {
    pub(super) session: S,
    /// The control stream that the transfer rests on.
    pub(super) link: Option<L>,
    pub(super) ending: Ending,
}

/// How far a transfer's end has come.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// Why it was aborted, if it was.
    pub(super) reason: Option<TransferError>,
    /// The owner dropped its handle: blocks go to `reclaim`.
    orphaned: bool,
    settled: bool,
}

impl<S, L> State<S, L> {
    pub(super) fn new(session: S, link: Option<L>) -> Mutex<Self> {
        Mutex::new(Self { session, link, ending: Ending::default() })
    }
}

/// What the owner waits for.
#[derive(Debug, Clone)]
pub(super) struct Outcome<T> {
    pub(super) result: Option<Result<T, TransferError>>,
    /// No transport touches the blocks any more, and they may be lent again.
    settled: bool,
}

impl<T> Outcome<T> {
    pub(super) fn watched() -> watch::Sender<Self> {
        watch::Sender::new(Self { result: None, settled: false })
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled
    }

    /// Success counts once the blocks are free to be lent on; failure counts at once.
    pub(super) fn known(&self) -> bool {
        matches!(self.result, Some(Err(_))) || (self.result.is_some() && self.settled)
    }
}

/// The shell around one transfer's session.
pub(super) trait Shell {
    type Session;
    type Command: PartialEq;
    type Link;
    /// What the owner gets in the end.
    type Success;

    /// The session's last command: no transport touches the blocks any more.
    const SETTLED: Self::Command;

    fn state(&self) -> &Mutex<State<Self::Session, Self::Link>>;
    fn outcome(&self) -> &watch::Sender<Outcome<Self::Success>>;
    /// Carries out what the session decided. Under the lock: must not wait, nor come back to this transfer.
    fn perform(&self, state: &mut State<Self::Session, Self::Link>, command: Self::Command);
    /// Gives up the claim on the blocks and leaves the tables of live transfers. Without the lock.
    fn let_go(&self, reason: Option<TransferError>);
    /// Hands the blocks of an owner that is gone to `NodeConfig::reclaim`.
    fn reclaim(&self);

    /// Brings the session an event.
    fn run(&self, step: impl FnOnce(&mut Self::Session) -> Vec<Self::Command>) {
        let mut state = self.state().lock();
        let commands = step(&mut state.session);
        self.finish(state, commands);
    }

    /// Performs commands under the lock, so that messages keep their order, and what follows the end without it.
    fn finish(
        &self,
        mut state: MutexGuard<'_, State<Self::Session, Self::Link>>,
        commands: Vec<Self::Command>,
    ) {
        if commands.is_empty() {
            return;
        }
        let mut settled = false;
        for command in commands {
            settled |= command == Self::SETTLED;
            self.perform(&mut state, command);
        }
        if !settled {
            return;
        }
        state.link = None;
        let reason = state.ending.reason.clone();
        drop(state);
        self.let_go(reason);
        let mut state = self.state().lock();
        state.ending.settled = true;
        let orphaned = state.ending.orphaned;
        drop(state);
        self.outcome().send_modify(|outcome| outcome.settled = true);
        if orphaned {
            self.reclaim();
        }
    }

    /// The owner's handle is gone.
    fn orphan(&self) {
        let mut state = self.state().lock();
        state.ending.orphaned = true;
        let settled = state.ending.settled;
        drop(state);
        if settled {
            self.reclaim();
        }
    }
}
