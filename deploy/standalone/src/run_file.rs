//! What a running `baton up` tells others about itself: `run.json` in its run directory. `baton ctl` finds endpoints
//! by it, tests read it too. Rewritten whole (write, then rename) whenever something in it changes.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

const FILE: &str = "run.json";

/// The file's content. Fields are only ever added.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunFile {
    /// Of `baton up` itself.
    pub(crate) pid: u32,
    pub(crate) started_unix_seconds: u64,
    /// Whether the cluster has been ready once.
    pub(crate) ready: bool,
    /// What is served; at least one.
    pub(crate) models: Vec<ModelEntry>,
    /// Base of the OpenAI API, as in `http://127.0.0.1:8000`.
    pub(crate) url: String,
    /// `host:port` of the controller's gRPC.
    pub(crate) controller: String,
    /// `host:port` of the coordinator's admin gRPC.
    pub(crate) coordinator: String,
    pub(crate) processes: Vec<ProcessEntry>,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ModelEntry {
    /// What clients say in `model`.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

/// One supervised process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ProcessEntry {
    /// "controller", "coordinator", "server-0", ...
    pub(crate) name: String,
    /// Absent while it is down.
    pub(crate) pid: Option<u32>,
    /// How often it was started again.
    pub(crate) restarts: u32,
    pub(crate) config: PathBuf,
    pub(crate) log: PathBuf,
}

impl RunFile {
    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        let path = directory.join(FILE);
        let partial = directory.join(format!("{FILE}.part"));
        fs::write(&partial, serde_json::to_vec_pretty(self)?)?;
        fs::rename(partial, path)
    }

    pub(crate) fn read(directory: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(directory.join(FILE)).ok()?).ok()
    }

    pub(crate) fn remove(directory: &Path) {
        // Left behind it does no harm: readers look whether its process lives.
        let _ = fs::remove_file(directory.join(FILE));
    }

    /// Whether the `baton up` that wrote it still runs.
    pub(crate) fn is_alive(&self) -> bool {
        i32::try_from(self.pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
    }
}

/// Where run directories lie: `$XDG_STATE_HOME/baton/runs`, or under `~/.local/state`.
pub(crate) fn runs_directory() -> Option<PathBuf> {
    home("XDG_STATE_HOME", ".local/state").map(|state| state.join("baton/runs"))
}

/// Where models are kept: `$XDG_CACHE_HOME/baton`, or under `~/.cache`.
pub(crate) fn cache_directory() -> Option<PathBuf> {
    home("XDG_CACHE_HOME", ".cache").map(|cache| cache.join("baton"))
}

fn home(variable: &str, below_home: &str) -> Option<PathBuf> {
    let given = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    given(variable).or_else(|| given("HOME").map(|home| home.join(below_home)))
}

/// The living clusters of this user, the latest first.
pub(crate) fn living(runs: &Path) -> Vec<RunFile> {
    let entries = fs::read_dir(runs).into_iter().flatten().flatten();
    let mut found: Vec<RunFile> =
        entries.filter_map(|entry| RunFile::read(&entry.path())).filter(RunFile::is_alive).collect();
    found.sort_by_key(|run| std::cmp::Reverse(run.started_unix_seconds));
    found
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example(pid: u32, started: u64) -> RunFile {
        RunFile {
            pid,
            started_unix_seconds: started,
            ready: true,
            models: vec![ModelEntry { name: "m".into(), path: "/m".into() }],
            url: "http://127.0.0.1:8000".into(),
            controller: "127.0.0.1:1".into(),
            coordinator: "127.0.0.1:2".into(),
            processes: Vec::new(),
        }
    }

    #[test]
    fn only_living_clusters_are_found_latest_first() {
        let runs = tempfile::tempdir().unwrap();
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        for (name, pid, started) in
            [("a", std::process::id(), 1), ("b", std::process::id(), 2), ("c", gone.id(), 3)]
        {
            fs::create_dir(runs.path().join(name)).unwrap();
            example(pid, started).write(&runs.path().join(name)).unwrap();
        }
        fs::create_dir(runs.path().join("empty")).unwrap();
        let found: Vec<u64> = living(runs.path()).iter().map(|run| run.started_unix_seconds).collect();
        assert_eq!(found, [2, 1]);
        assert!(living(&runs.path().join("absent")).is_empty());
    }
}
