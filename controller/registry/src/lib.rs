//! The state of a Baton cluster: one [`Store`] contract over etcd, memory or a remote controller, and what is kept in it.
//!
//! - [`store`]: the contract, with etcd's semantics, and its three implementations: [`EtcdStore`], [`MemoryStore`]
//!   (embedded in a single controller) and [`RemoteStore`] (that one, over gRPC, served by [`StoreService`]).
//! - [`keys`] and [`records`]: the key layout under `/baton/v1/` and the typed values under it.
//! - [`format`]: which version its format has, so that builds of different versions can share it.
//! - [`election`]: who of the controllers leads, and writes that only the leader can make.
//! - [`fleet`]: the readers' side: [`FleetWatch`] keeps a typed snapshot of instances, roles and status up to date.
//!
//! This crate is the only user of etcd, and says how a configuration reaches it ([`EtcdSettings`]). It
//! decides nothing about roles: that is the controller's.

pub mod election;
pub mod fleet;
pub mod format;
#[cfg(any(test, feature = "fuzz"))]
#[doc(hidden)]
pub use fleet::fuzz;
pub mod keys;
pub mod records;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;

pub use election::{Candidacy, Candidate, Fenced, Leadership, Term};
pub use fleet::{FleetInstance, FleetSnapshot, FleetWatch, FleetWatchConfig, Leader};
pub use format::{StateFormats, foreign};
pub use records::{DesiredRole, HealthRecord, LeaderRecord, ObservedStatus, RecordError, Standing};
pub use store::{
    Compare, Event, KeyRange, KeyValue, Lease, LeaseId, Listing, Operation, Revision, Store, StoreError, Txn,
    TxnOutcome, Watch, WatchBatch, WatchError,
    etcd::{CredentialSource, EtcdConfig, EtcdCredentials, EtcdStore, EtcdTls},
    memory::{MemoryConfig, MemoryStore},
    remote::{RemoteConfig, RemoteStore},
    service::StoreService,
    settings::{EtcdOpenError, EtcdSettings},
};
