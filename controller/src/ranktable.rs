//! What Huawei's tools say of Ascend servers: `global_ranktable.json`, read and read again when it changes.
//!
//! It tells how many NPUs the server at an address has, which the planner compares ([`crate::plan`]: prefill and decode of
//! a group have equally many). Of who is not in it, the server's own report counts. All values in the file are strings:
//! <https://www.hiascend.com/document/detail/en/mindcluster/730/clustersched/schedulingug/dl_bestpractice_010.html>.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use baton_process::follow::follow;
use baton_proto::InstanceSpec;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A larger file is not read: it describes some hundred thousand NPUs.
const LARGEST: u64 = 64 << 20;
/// What instances on Ascend NPUs say as their device.
const ASCEND: &str = "ascend";

/// Why a ranktable cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RankTableError {
    #[error("cannot be read: {0}")]
    Read(String),
    #[error("is no ranktable: {0}")]
    Json(String),
    #[error("is not completed: its status is {0:?}")]
    Status(String),
    #[error("server_group_list[{group}].server_list[{server}].{field}: {problem}")]
    Field { group: usize, server: usize, field: &'static str, problem: String },
}

/// NPUs by the address of their server (its pod's, on Kubernetes).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RankTable {
    npus: BTreeMap<IpAddr, u32>,
}

#[derive(Deserialize)]
struct File {
    status: String,
    #[serde(default)]
    server_group_list: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    #[serde(default)]
    server_list: Vec<Server>,
}

#[derive(Deserialize)]
struct Server {
    /// Absent in older files, where `server_id` is the address.
    server_ip: Option<String>,
    server_id: Option<String>,
    #[serde(default)]
    device: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    device_id: String,
}

impl RankTable {
    /// Takes a file's text. A server that stands in several groups has the NPUs of all, each once.
    pub fn parse(text: &str) -> Result<Self, RankTableError> {
        let file: File =
            serde_json::from_str(text).map_err(|error| RankTableError::Json(error.to_string()))?;
        if file.status != "completed" {
            return Err(RankTableError::Status(file.status));
        }
        let mut devices: BTreeMap<IpAddr, std::collections::BTreeSet<u32>> = BTreeMap::new();
        for (group, list) in file.server_group_list.into_iter().enumerate() {
            for (server, entry) in list.server_list.into_iter().enumerate() {
                let bad = |field, problem: String| RankTableError::Field { group, server, field, problem };
                // The coordinators and controllers of Huawei's own serving stand here too, without a device.
                if entry.device.is_empty() {
                    continue;
                }
                let address = entry.server_ip.or(entry.server_id).unwrap_or_default();
                let address: IpAddr =
                    address.parse().map_err(|_| bad("server_ip", format!("{address:?} is no address")))?;
                let of = devices.entry(address).or_default();
                for Device { device_id } in entry.device {
                    let number = device_id.parse();
                    of.insert(
                        number.map_err(|_| bad("device.device_id", format!("{device_id:?} is no number")))?,
                    );
                }
            }
        }
        let count = |of: std::collections::BTreeSet<u32>| u32::try_from(of.len()).unwrap_or(u32::MAX);
        Ok(Self { npus: devices.into_iter().map(|(address, of)| (address, count(of))).collect() })
    }

    fn read(path: &Path) -> Result<Self, RankTableError> {
        let unreadable = |error: std::io::Error| RankTableError::Read(error.to_string());
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > LARGEST {
            return Err(RankTableError::Read(format!("{size} bytes are more than {LARGEST}")));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(unreadable)?)
    }

    /// How many NPUs the instance has by this table; none if it is on none, or not in it.
    pub fn npus(&self, spec: &InstanceSpec) -> Option<u32> {
        if spec.device != ASCEND {
            return None;
        }
        let (host, _) = spec.inference_endpoint.rsplit_once(':')?;
        let address: IpAddr = host.trim_matches(['[', ']']).parse().ok()?;
        self.npus.get(&address).copied()
    }
}

/// Follows the file until the shutdown. A file that cannot be used changes nothing: the last good one counts.
pub(crate) fn follow_file(
    path: PathBuf,
    shutdown: CancellationToken,
    tasks: &TaskTracker,
) -> watch::Receiver<RankTable> {
    let (sender, table) = watch::channel(RankTable::default());
    let (named, mut last) = (path.display().to_string(), None);
    let look = move || {
        let table = RankTable::read(&path)?;
        let new = last.as_ref() != Some(&table);
        last = Some(table.clone());
        Ok(new.then_some(table))
    };
    let told = move |table: Result<RankTable, RankTableError>| match table {
        Ok(table) => {
            info!(file = named, servers = table.npus.len(), "the ranktable is taken");
            sender.send_replace(table);
        }
        Err(error) => warn!(file = named, "the ranktable {error}"),
    };
    tasks.spawn(shutdown.run_until_cancelled_owned(follow(LOOK_EVERY, look, told)));
    table
}

#[cfg(test)]
mod tests {
    use baton_registry::testing::instance_spec;
    use serde_json::json;

    use super::*;

    fn device(id: &str) -> serde_json::Value {
        json!({"device_id": id, "device_ip": "10.9.0.1", "device_logical_id": id, "rank_id": id})
    }

    fn table() -> serde_json::Value {
        json!({
            "version": "1.0",
            "status": "completed",
            "server_group_list": [
                {"group_id": "0", "server_count": "1", "server_list": [{"server_id": "x", "server_ip": "10.0.0.9"}]},
                {"group_id": "2", "deploy_server": "0", "server_count": "2", "server_list": [
                    {"device": [device("0"), device("1")], "server_id": "x", "server_ip": "10.0.0.1"},
                    {"device": [device("0")], "server_id": "10.0.0.2"},
                ]},
                {"group_id": "3", "server_count": "1", "server_list": [
                    {"device": [device("1"), device("2")], "server_id": "x", "server_ip": "10.0.0.1"},
                ]},
            ],
        })
    }

    fn on(device: &str, endpoint: &str) -> InstanceSpec {
        InstanceSpec { device: device.into(), inference_endpoint: endpoint.into(), ..instance_spec("a", 1) }
    }

    #[test]
    fn npus_are_counted_by_the_address_of_their_server() {
        let table = RankTable::parse(&table().to_string()).expect("a ranktable");
        let npus = |device, endpoint| table.npus(&on(device, endpoint));
        assert_eq!(npus("ascend", "10.0.0.1:7200"), Some(3), "device 1 stands in both groups");
        assert_eq!(npus("ascend", "10.0.0.2:7200"), Some(1), "an older file's address");
        assert_eq!(npus("ascend", "10.0.0.9:7200"), None, "a controller has none");
        assert_eq!(npus("ascend", "elsewhere:7200"), None);
        assert_eq!(npus("cpu", "10.0.0.1:7200"), None);
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let with = |pointer: &str, value: serde_json::Value| {
            let mut table = table();
            *table.pointer_mut(pointer).expect("it is there") = value;
            RankTable::parse(&table.to_string()).expect_err("refused").to_string()
        };
        assert_eq!(
            with("/status", json!("initializing")),
            "is not completed: its status is \"initializing\""
        );
        assert_eq!(
            with("/server_group_list/1/server_list/0/server_ip", json!("nowhere")),
            "server_group_list[1].server_list[0].server_ip: \"nowhere\" is no address"
        );
        let id = with("/server_group_list/1/server_list/1/device/0/device_id", json!("-1"));
        assert!(id.ends_with("device.device_id: \"-1\" is no number"), "{id}");
        assert!(with("/status", json!(7)).starts_with("is no ranktable: "));
    }

    #[tokio::test]
    async fn a_changed_file_is_taken_and_a_bad_one_changes_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("global_ranktable.json");
        let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
        let mut seen = follow_file(path.clone(), shutdown.clone(), &tasks);
        std::fs::write(&path, table().to_string()).expect("a file");
        seen.changed().await.expect("it follows");
        let good = seen.borrow_and_update().clone();
        assert_eq!(good.npus(&on("ascend", "10.0.0.1:1")), Some(3));
        std::fs::write(&path, "{").expect("a file");
        tokio::time::sleep(LOOK_EVERY * 2).await;
        assert!(!seen.has_changed().expect("it follows"));
        let one = json!({"status": "completed", "server_group_list": []});
        std::fs::write(&path, one.to_string()).expect("a file");
        seen.changed().await.expect("it follows");
        assert_eq!(*seen.borrow(), RankTable::default());
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
