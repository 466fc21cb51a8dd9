//! Faults on demand, and counts of what happened: by the environment, or by two functions of the shared object.
//!
//! `BATON_ASCEND_FAULT=<name>` names the fault a process starts with; `baton_emulator_fault` changes it.

use std::{
    ffi::{c_char, c_int},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{handles::lock, raw};

/// The variable that names the fault a process starts with.
pub const VARIABLE: &str = "BATON_ASCEND_FAULT";
/// `int baton_emulator_fault(const char *name)`: 0, or -1 for a name that is not known. An empty name is no fault.
pub const SET: &str = "baton_emulator_fault";
/// `uint64_t baton_emulator_count(const char *name)`: see [`count`]; `u64::MAX` for a name that is not known.
pub const COUNT: &str = "baton_emulator_count";

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A batch copies half of its pieces and fails.
    BatchFails,
    /// A batch copies half of its pieces, then times out inside the library.
    BatchTimesOut,
    /// A batch writes to its local memory until its client is destroyed and never completes.
    BatchNeverCompletes,
    /// A batch is refused as if too many had not been queried.
    QueueExhausted,
    /// As [`Self::BatchNeverCompletes`], and the client cannot be destroyed.
    Unfenced,
    /// No call finds a device context.
    ContextLost,
    /// A pair's communicator breaks: its operations never complete.
    CommunicatorBroken,
}

impl Fault {
    const ALL: [(&str, Fault); 7] = [
        ("batch-fails", Self::BatchFails),
        ("batch-times-out", Self::BatchTimesOut),
        ("batch-never-completes", Self::BatchNeverCompletes),
        ("queue-exhausted", Self::QueueExhausted),
        ("unfenced", Self::Unfenced),
        ("context-lost", Self::ContextLost),
        ("communicator-broken", Self::CommunicatorBroken),
    ];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, fault)| *fault == self).map_or("", |(name, _)| name)
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, fault)| *fault)
    }
}

/// What is counted, by name.
pub mod count {
    /// Batches submitted, refused ones as well.
    pub const BATCHES: &str = "batches";
    /// The most tasks of one client that had not been queried.
    pub const MOST_TASKS: &str = "most-tasks";
    /// The most pieces of one client that had not been queried.
    pub const MOST_PIECES: &str = "most-pieces";
    /// HIXL clients that have not been destroyed.
    pub const LIVE_CLIENTS: &str = "live-clients";
    /// HCCL communicators that have not been destroyed.
    pub const LIVE_COMMUNICATORS: &str = "live-communicators";
    /// Streams that have not been destroyed.
    pub const LIVE_STREAMS: &str = "live-streams";
    /// Sends and receives submitted to communicators.
    pub const EXCHANGES: &str = "exchanges";
}

pub(crate) static BATCHES: AtomicU64 = AtomicU64::new(0);
pub(crate) static MOST_TASKS: AtomicU64 = AtomicU64::new(0);
pub(crate) static MOST_PIECES: AtomicU64 = AtomicU64::new(0);
pub(crate) static EXCHANGES: AtomicU64 = AtomicU64::new(0);

fn current() -> &'static Mutex<Option<Fault>> {
    static CURRENT: OnceLock<Mutex<Option<Fault>>> = OnceLock::new();
    CURRENT.get_or_init(|| Mutex::new(std::env::var(VARIABLE).ok().and_then(|name| Fault::parse(&name))))
}

pub(crate) fn is(fault: Fault) -> bool {
    *lock(current()) == Some(fault)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn baton_emulator_fault(name: *const c_char) -> c_int {
    // SAFETY: the caller gives a C string.
    let fault = match unsafe { raw::text(name) }.as_deref() {
        Some("") => None,
        Some(name) => match Fault::parse(name) {
            Some(fault) => Some(fault),
            None => return -1,
        },
        None => return -1,
    };
    *lock(current()) = fault;
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn baton_emulator_count(name: *const c_char) -> u64 {
    // SAFETY: the caller gives a C string.
    match unsafe { raw::text(name) }.as_deref() {
        Some(count::BATCHES) => BATCHES.load(Ordering::Relaxed),
        Some(count::MOST_TASKS) => MOST_TASKS.load(Ordering::Relaxed),
        Some(count::MOST_PIECES) => MOST_PIECES.load(Ordering::Relaxed),
        Some(count::EXCHANGES) => EXCHANGES.load(Ordering::Relaxed),
        Some(count::LIVE_CLIENTS) => crate::hixl::live_clients() as u64,
        Some(count::LIVE_COMMUNICATORS) => crate::hccl::live_communicators() as u64,
        Some(count::LIVE_STREAMS) => crate::acl::live_streams() as u64,
        _ => u64::MAX,
    }
}
