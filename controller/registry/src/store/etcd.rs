//! etcd, 3.4 or later.
//!
//! One client per endpoint, so that a call that fails on one member is tried on the next (`failover`): the client's
//! own balancing does not. A client whose call failed is made anew, with the credentials that there are by then. A broken
//! watch is the reader's to resume.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use etcd_client::{
    Certificate, Client, CompactionOptions, CompareOp, ConnectOptions, DeleteOptions, GetOptions, Identity,
    PutOptions, TlsOptions, TxnOp, WatchOptions,
};
use parking_lot::Mutex;
use tonic::{Code, Status};

use super::{
    Compare, KeyRange, KeyValue, Lease, LeaseId, Listing, Operation, Revision, Store, StoreError, Txn,
    TxnOutcome, Watch,
    failover::{self, Failover, Failure, Repeat},
    lease_seconds,
};

mod watch;

/// The largest answer: a listing of a fleet of thousands is a few megabytes.
const MESSAGE_MAX_BYTES: usize = 64 << 20;

#[derive(Clone)]
pub struct EtcdConfig {
    /// host:port of members, or URLs.
    pub endpoints: Vec<String>,
    /// Asked for whenever a member is connected to anew, so that what has changed by then counts.
    pub credentials: CredentialSource,
    pub connect_timeout: Duration,
    /// Of one try on one member.
    pub timeout: Duration,
    /// A connection with a watch that is silent for this long is probed. More than the 5 s that etcd wants between probes
    /// (`--grpc-keepalive-min-time`): it ends connections that are probed more often, or with nothing open on them.
    pub keep_alive: Duration,
    /// After so long without an answer to that it is given up.
    pub keep_alive_timeout: Duration,
}

impl EtcdConfig {
    pub fn new(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            credentials: Arc::new(|| Ok(EtcdCredentials::default())),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
            keep_alive: Duration::from_secs(6),
            keep_alive_timeout: Duration::from_secs(2),
        }
    }

    /// Errors say what cannot be had of the credentials.
    fn options(&self) -> Result<ConnectOptions, String> {
        let EtcdCredentials { user, tls } = (self.credentials)()?;
        let options = ConnectOptions::new()
            .with_connect_timeout(self.connect_timeout)
            .with_keep_alive(self.keep_alive, self.keep_alive_timeout)
            .with_keep_alive_while_idle(false)
            // A member cut off from the others says so, instead of serving an old view.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        let options = match user {
            Some((name, password)) => options.with_user(name, password),
            None => options,
        };
        Ok(match tls {
            Some(tls) => options.with_tls(tls.options()),
            None => options,
        })
    }
}

/// Who this side is to etcd, and whom it believes.
#[derive(Clone, Default)]
pub struct EtcdCredentials {
    /// User and password, if etcd asks for them.
    pub user: Option<(String, String)>,
    /// None = without TLS.
    pub tls: Option<EtcdTls>,
}

/// Where they come from, as they are now. Errors are for people.
pub type CredentialSource = Arc<dyn Fn() -> Result<EtcdCredentials, String> + Send + Sync>;

/// What TLS needs, as PEM.
#[derive(Clone)]
pub struct EtcdTls {
    /// Who signs the members' certificates.
    pub ca: String,
    /// Certificate and key of this side, if etcd asks for them.
    pub identity: Option<(String, String)>,
}

impl EtcdTls {
    fn options(&self) -> TlsOptions {
        let options = TlsOptions::new().ca_certificate(Certificate::from_pem(&self.ca));
        match &self.identity {
            Some((certificate, key)) => options.identity(Identity::from_pem(certificate, key)),
            None => options,
        }
    }
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

/// A cluster of etcd.
pub struct EtcdStore {
    members: Failover<Member>,
}

/// One endpoint and its client, once there is one.
struct Member {
    endpoint: String,
    config: Arc<EtcdConfig>,
    made: Mutex<Option<Made>>,
    /// How many have been made.
    count: AtomicU64,
}

/// A client, and the how manieth of its member it is.
#[derive(Clone)]
struct Made {
    client: Client,
    number: u64,
}

impl EtcdStore {
    /// Makes the store; connects only when used.
    pub fn new(config: &EtcdConfig) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(StoreError::Invalid("no etcd endpoint is given: name at least one host:port".into()));
        }
        let shared = Arc::new(config.clone());
        let member = |endpoint: &String| {
            let config = shared.clone();
            let (made, count) = (Mutex::default(), AtomicU64::default());
            (endpoint.clone(), Member { endpoint: endpoint.clone(), config, made, count })
        };
        Ok(Self { members: Failover::new(config.endpoints.iter().map(member).collect(), config.timeout) })
    }

    /// Forgets the history up to and including `revision`; it is gone when this returns. Operators usually let etcd do it by
    /// itself.
    pub async fn compact(&self, revision: Revision) -> Result<(), StoreError> {
        self.call(Repeat::Never, None, |mut client| async move {
            let physical = CompactionOptions::new().with_physical();
            client.compact(signed(revision.0), Some(physical)).await
        })
        .await
        .map(|_| ())
    }

    /// Calls member after member. `lease` is the one that "lease not found" would be about.
    async fn call<R, F>(
        &self,
        repeat: Repeat,
        lease: Option<LeaseId>,
        call: impl Fn(Client) -> F + Sync,
    ) -> Result<R, StoreError>
    where
        F: Future<Output = Result<R, etcd_client::Error>> + Send,
        R: Send,
    {
        let call = &call;
        self.members
            .call(repeat, |member| async move {
                let (Made { client, number }, is_new) = member.client().await?;
                call(client).await.map_err(|error| {
                    let outdated = !is_new && is_about_credentials(&error);
                    let failure = failure_of(error, lease);
                    if outdated || !matches!(failure, Failure::Final(_)) {
                        member.forget(number);
                    }
                    match failure {
                        // Who calls is looked at before what is called for.
                        Failure::Final(error) if outdated => Failure::NotDone(error.to_string()),
                        failure => failure,
                    }
                })
            })
            .await
    }
}

impl Member {
    /// And whether it is made with the credentials that there are now.
    async fn client(&self) -> Result<(Made, bool), Failure> {
        if let Some(made) = self.made.lock().clone() {
            return Ok((made, false));
        }
        let options = self.config.options().map_err(Failure::NotDone)?;
        // With a user, this asks etcd for a token: nothing of the call itself has been sent yet.
        let client = match Client::connect([&self.endpoint], Some(options)).await {
            Ok(client) => client,
            Err(error) => {
                return Err(match failure_of(error, None) {
                    Failure::Unclear(error) => Failure::NotDone(error),
                    failure => failure,
                });
            }
        };
        let made = Made { client, number: self.count.fetch_add(1, Ordering::Relaxed) };
        *self.made.lock() = Some(made.clone());
        Ok((made, true))
    }

    /// Unless another has been made since.
    fn forget(&self, number: u64) {
        self.made.lock().take_if(|made| made.number == number);
    }
}

/// Whether etcd takes this side for nobody that it knows: its password may have been changed since the client was made.
fn is_about_credentials(error: &etcd_client::Error) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else { return false };
    // The last two: something about users has changed since it was given its token.
    let told = ["authentication failed", "revision of auth store is old", "revision in header is old"];
    status.code() == Code::Unauthenticated || told.iter().any(|told| status.message().contains(told))
}

fn failure_of(error: etcd_client::Error, lease: Option<LeaseId>) -> Failure {
    use etcd_client::Error;
    match error {
        Error::GRpcStatus(status) => failure_of_status(&status, lease),
        // So the client says that the answer to a renewal was "0 s".
        Error::LeaseKeepAliveError(message) => match lease {
            Some(lease) if message.contains("not found") => Failure::Final(StoreError::LeaseNotFound(lease)),
            _ => Failure::Unclear(message),
        },
        Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::EndpointError(_)
        | Error::InvalidMetadataValue(_) => Failure::Final(StoreError::Invalid(error.to_string())),
        error => Failure::Unclear(error.to_string()),
    }
}

fn failure_of_status(status: &Status, lease: Option<LeaseId>) -> Failure {
    let message = status.message();
    match (status.code(), lease) {
        (Code::NotFound, Some(lease)) if message.contains("lease not found") => {
            Failure::Final(StoreError::LeaseNotFound(lease))
        }
        (Code::ResourceExhausted, _) if message.contains("too many requests") => {
            Failure::NotDone(message.into())
        }
        (Code::ResourceExhausted, _) if message.contains("space exceeded") => {
            Failure::Final(StoreError::Refused(format!(
                "etcd is out of space, and takes no changes until its alarm NOSPACE is disarmed ({message}): compact its \
                 history, defragment every member or raise --quota-backend-bytes, then disarm it (etcdctl alarm disarm)"
            )))
        }
        (Code::NotFound | Code::InvalidArgument | Code::OutOfRange, _) => {
            Failure::Final(StoreError::Invalid(message.into()))
        }
        (
            Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented,
            _,
        ) => Failure::Final(StoreError::Refused(message.into())),
        // Said before the request is looked at.
        (Code::Unavailable, _) if message == "etcdserver: no leader" => Failure::NotDone(message.into()),
        _ => failover::passing(status),
    }
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EtcdStore ")?;
        f.debug_list().entries(self.members.names()).finish()
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn range(&self, range: KeyRange) -> Result<Listing, StoreError> {
        let (key, options) = match range {
            KeyRange::Exact(key) => (key, GetOptions::new()),
            KeyRange::Prefix(prefix) if prefix.is_empty() => (prefix, GetOptions::new().with_all_keys()),
            KeyRange::Prefix(prefix) => (prefix, GetOptions::new().with_prefix()),
        };
        let (key, options) = (&key, &options);
        let answer = self
            .call(Repeat::Harmless, None, |client| async move {
                let mut kv = client.kv_client().max_decoding_message_size(MESSAGE_MAX_BYTES);
                kv.get(key.as_str(), Some(options.clone())).await
            })
            .await?;
        let revision = revision_of(answer.header());
        Ok(Listing { revision, items: answer.kvs().iter().map(key_value).collect() })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.check()?;
        let lease = txn.operations.iter().find_map(|operation| match operation {
            Operation::Put { lease, .. } => *lease,
            _ => None,
        });
        let request = etcd_client::Txn::new()
            .when(txn.conditions.into_iter().map(condition).collect::<Vec<_>>())
            .and_then(txn.operations.into_iter().map(change).collect::<Vec<_>>());
        let request = &request;
        let answer = self
            .call(Repeat::Never, lease, |client| async move { client.kv_client().txn(request.clone()).await })
            .await?;
        Ok(TxnOutcome { succeeded: answer.succeeded(), revision: revision_of(answer.header()) })
    }

    async fn watch(&self, range: KeyRange, from: Option<Revision>) -> Result<Watch, StoreError> {
        let mut options = WatchOptions::new().with_progress_notify();
        if let Some(from) = from {
            options = options.with_start_revision(signed(watch::start(from).0));
        }
        let (key, options) = match range {
            KeyRange::Exact(key) => (key, options),
            KeyRange::Prefix(prefix) if prefix.is_empty() => (prefix, options.with_all_keys()),
            KeyRange::Prefix(prefix) => (prefix, options.with_prefix()),
        };
        let (key, options) = (&key, &options);
        let (first, stream) = self
            .call(Repeat::Harmless, None, |client| async move {
                let mut watch = client.watch_client().max_decoding_message_size(MESSAGE_MAX_BYTES);
                let mut stream = watch.watch(key.as_str(), Some(options.clone())).await?;
                let ended = || etcd_client::Error::WatchError("the watch ended at once".into());
                let first = stream.message().await?.ok_or_else(ended)?;
                Ok((first, stream))
            })
            .await?;
        Ok(Watch::new(watch::batches(&first, stream, from)))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let seconds = signed(lease_seconds(ttl)?);
        // A lease granted and not heard of ends by itself.
        let grant = |mut client: Client| async move { client.lease_grant(seconds, None).await };
        let answer = self.call(Repeat::Harmless, None, grant).await?;
        let ttl = Duration::from_secs(unsigned(answer.ttl()));
        Ok(Lease { id: LeaseId(unsigned(answer.id())), ttl })
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<Duration, StoreError> {
        let renew = |mut client: Client| async move {
            // Opening the stream asks once; the time of the answer is not handed on, so it is asked for again.
            let (mut keeper, mut answers) = client.lease_keep_alive(signed(lease.0)).await?;
            keeper.keep_alive().await?;
            answers.message().await
        };
        match self.call(Repeat::Harmless, Some(lease), renew).await? {
            Some(answer) if answer.ttl() > 0 => Ok(Duration::from_secs(unsigned(answer.ttl()))),
            _ => Err(StoreError::LeaseNotFound(lease)),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let revoke = |mut client: Client| async move { client.lease_revoke(signed(lease.0)).await };
        match self.call(Repeat::Harmless, Some(lease), revoke).await {
            Ok(_) | Err(StoreError::LeaseNotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// etcd's numbers are signed and never negative.
fn unsigned(number: i64) -> u64 {
    number.max(0).unsigned_abs()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn revision_of(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |header| unsigned(header.revision())))
}

fn key_value(item: &etcd_client::KeyValue) -> KeyValue {
    KeyValue {
        key: String::from_utf8_lossy(item.key()).into_owned(),
        value: item.value().to_vec().into(),
        create_revision: Revision(unsigned(item.create_revision())),
        mod_revision: Revision(unsigned(item.mod_revision())),
        version: unsigned(item.version()),
        lease: (item.lease() != 0).then(|| LeaseId(unsigned(item.lease()))),
    }
}

fn condition(compare: Compare) -> etcd_client::Compare {
    use etcd_client::Compare as Etcd;
    match compare {
        Compare::Absent { key } => Etcd::create_revision(key, CompareOp::Equal, 0),
        Compare::CreateRevision { key, equals } => {
            Etcd::create_revision(key, CompareOp::Equal, signed(equals.0))
        }
        Compare::ModRevision { key, equals } => Etcd::mod_revision(key, CompareOp::Equal, signed(equals.0)),
        Compare::Value { key, equals } => Etcd::value(key, CompareOp::Equal, equals),
    }
}

fn change(operation: Operation) -> TxnOp {
    match operation {
        Operation::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(signed(lease.0)));
            TxnOp::put(key, value, options)
        }
        Operation::Delete { key } => TxnOp::delete(key, None),
        Operation::DeletePrefix { prefix } if prefix.is_empty() => {
            TxnOp::delete(prefix, Some(DeleteOptions::new().with_all_keys()))
        }
        Operation::DeletePrefix { prefix } => TxnOp::delete(prefix, Some(DeleteOptions::new().with_prefix())),
    }
}
