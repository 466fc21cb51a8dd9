//! For tests, here and in the controller: a real etcd, started at addresses and in a directory of its own and killed
//! when dropped, and an instance as it would announce itself.
//!
//! Fails with what to install when there is no etcd: the tests that need it do not pass without it.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use baton_proto::{GroupName, Incarnation, InstanceId, InstanceSpec, KvLayoutSpec, ModelIdentity, Protocols};

use crate::{EtcdConfig, EtcdStore, KeyRange, Store};

/// A CPU server of group `default` with one small model; two of them can hand over to each other.
pub fn instance_spec(name: &str, incarnation: u64) -> InstanceSpec {
    InstanceSpec {
        id: InstanceId::new(name).expect("a good id"),
        incarnation: Incarnation(incarnation),
        group: GroupName::default(),
        device: "cpu".into(),
        device_count: 1,
        model: ModelIdentity {
            name: "m".into(),
            revision: "r".into(),
            architecture: "llama".into(),
            vocabulary_size: 10,
        },
        context_tokens: 100,
        kv_layout: KvLayoutSpec {
            fingerprint: "x".into(),
            class: String::new(),
            format: "panel".into(),
            dtype: "f32".into(),
            block_tokens: 16,
            layers: 2,
            kv_heads: 2,
            head_dim: 8,
            tensor_parallel: 1,
            rope_dim: 0,
            block_bytes: 1024,
        },
        inference_endpoint: "127.0.0.1:1".into(),
        handoff_endpoint: "127.0.0.1:2".into(),
        metrics_endpoint: String::new(),
        transports: vec!["tcp".into()],
        labels: BTreeMap::from([("zone".into(), "a".into())]),
        handoff_protocols: Protocols::FIRST,
        version: "1".into(),
    }
}

/// One etcd member.
#[derive(Debug)]
pub struct EtcdServer {
    directory: tempfile::TempDir,
    name: String,
    client: SocketAddrV4,
    peer: SocketAddrV4,
    /// `--initial-cluster`: every member's name and peer address.
    cluster: String,
    /// More arguments, and `https` if they make it speak TLS to its clients.
    arguments: Vec<String>,
    scheme: &'static str,
    child: Option<Child>,
}

impl EtcdServer {
    /// Starts a cluster of one and waits until it answers.
    pub async fn start() -> Self {
        let mut members = Self::start_cluster(1).await;
        members.remove(0)
    }

    /// As [`Self::start`], with more arguments.
    pub async fn start_with(arguments: &[&str]) -> Self {
        Self::start_cluster_with(1, arguments).await.remove(0)
    }

    /// Starts a cluster of one that speaks TLS to its clients and asks them for certificates; whoever starts it waits until
    /// it answers. The files are PEM; `ca` signs both sides.
    pub fn start_tls(ca: &Path, certificate: &Path, key: &Path) -> Self {
        let mut member = Self::member(0);
        member.scheme = "https";
        let files = [("--trusted-ca-file", ca), ("--cert-file", certificate), ("--key-file", key)];
        let files = files.into_iter().flat_map(|(name, path)| [name.to_owned(), path.display().to_string()]);
        member.arguments = files.chain(["--client-cert-auth".to_owned()]).collect();
        member.cluster = format!("{}={}", member.name, member.peer_url());
        member.spawn();
        member
    }

    /// The address that clients reach it at; a certificate has to be of it.
    pub fn ip(&self) -> Ipv4Addr {
        *self.client.ip()
    }

    fn member(index: usize) -> Self {
        Self {
            directory: tempfile::tempdir().expect("cannot make a directory for etcd"),
            name: format!("m{index}"),
            client: own_address(),
            peer: own_address(),
            cluster: String::new(),
            arguments: Vec::new(),
            scheme: "http",
            child: None,
        }
    }

    /// Starts a cluster and waits until every member answers.
    pub async fn start_cluster(members: usize) -> Vec<Self> {
        Self::start_cluster_with(members, &[]).await
    }

    /// As [`Self::start_cluster`], with more arguments for each.
    pub async fn start_cluster_with(members: usize, arguments: &[&str]) -> Vec<Self> {
        let mut members: Vec<_> = (0..members).map(Self::member).collect();
        let cluster: Vec<_> =
            members.iter().map(|member| format!("{}={}", member.name, member.peer_url())).collect();
        for member in &mut members {
            member.cluster = cluster.join(",");
            member.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
            member.spawn();
        }
        for member in &members {
            member.answers().await;
        }
        members
    }

    fn peer_url(&self) -> String {
        format!("http://{}", self.peer)
    }

    /// host:port for clients.
    pub fn endpoint(&self) -> String {
        self.client.to_string()
    }

    /// A store over this member alone.
    pub fn store(&self) -> EtcdStore {
        EtcdStore::new(&EtcdConfig::new([self.endpoint()])).expect("a good endpoint")
    }

    /// The pid, for signals; none while it is stopped.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Kills it; its data stays.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail only if it has ended already.
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Starts it again on the same ports and data, and waits until it answers.
    pub async fn restart(&mut self) {
        self.start_again();
        self.answers().await;
    }

    /// Starts it again on the same ports and data; whether it answers is the caller's to ask, with what it asks for.
    pub fn start_again(&mut self) {
        self.kill();
        self.spawn();
    }

    fn spawn(&mut self) {
        let client = format!("{}://{}", self.scheme, self.endpoint());
        let peer = self.peer_url();
        let log = std::fs::File::create(self.directory.path().join("log")).expect("cannot write etcd's log");
        let child = Command::new("etcd")
            .args(["--name", &self.name, "--data-dir"])
            .arg(self.directory.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.cluster, "--logger", "zap"])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "this test needs etcd 3.4 or later on PATH (Debian: apt-get install etcd-server): {error}"
                )
            });
        self.child = Some(child);
    }

    async fn answers(&self) {
        let store = self.store();
        let answers = async { while store.range(KeyRange::exact("/up")).await.is_err() {} };
        if tokio::time::timeout(Duration::from_secs(30), answers).await.is_err() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            panic!("etcd did not answer within 30 s; its log:\n{log}");
        }
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An address that nobody else takes, not even while the member is down.
///
/// A port found free by binding it is free for others, too, once it is let go: two members were given the same one, now
/// and then. So every process has an IP address of its own here (on Linux all of 127/8 is this machine), and gives each
/// port once, from below those that the system hands out.
fn own_address() -> SocketAddrV4 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    // Process ids have 22 bits at most.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let address = Ipv4Addr::new(127, 64 | (high & 0x3f), middle, low);
    SocketAddrV4::new(address, NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_address_is_given_twice_and_each_can_be_listened_at() {
        let addresses: Vec<_> = (0..100).map(|_| own_address()).collect();
        let held: Vec<_> =
            addresses.iter().map(|at| std::net::TcpListener::bind(at).expect("is free")).collect();
        assert_eq!(held.len(), addresses.len());
    }
}
