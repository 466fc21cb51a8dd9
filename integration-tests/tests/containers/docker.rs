//! A docker engine of the test's own, and what it is told. Everything in it is gone with its folder.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use baton_integration_tests::folder;
use rustix::process::Signal;
use tempfile::TempDir;

/// Nothing else of the machine is to have it.
pub(crate) const NETWORK: &str = "10.97.0";
/// As whom images run.
const USER: u32 = 65532;
const READY_WITHIN: Duration = Duration::from_secs(60);

pub(crate) struct Docker {
    daemon: Child,
    dir: TempDir,
}

impl Docker {
    /// Starts it, with a private network of fixed addresses.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let path = |name: &str| dir.path().join(name).display().to_string();
        let log = File::create(dir.path().join("dockerd.log")).expect("a log file");
        let daemon = Command::new("dockerd")
            .args(["--data-root", &path("data"), "--exec-root", &path("exec"), "--pidfile", &path("pid")])
            .args(["-H", &format!("unix://{}", path("socket")), "--bridge", "none"])
            // One bridge needs none of it.
            .args(["--userland-proxy=false", "--iptables=false", "--ip6tables=false"])
            .args(["--ip-masq=false", "--ip-forward=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log)
            .spawn()
            .expect("dockerd starts: ./deploy/run test-containers installs it");
        let docker = Self { daemon, dir };
        let begun = Instant::now();
        while !docker.try_run(&["version"]).status.success() {
            assert!(begun.elapsed() < READY_WITHIN, "{}", docker.log());
            std::thread::sleep(Duration::from_millis(100));
        }
        docker.run(&["network", "create", "--subnet", &format!("{NETWORK}.0/24"), "baton"]);
        docker
    }

    /// Builds the images of these programs of ours, and loads them.
    pub(crate) fn build(&self, programs: &Path) {
        let output = Command::new(folder().join("../deploy/images/build"))
            .args(["--engine", "docker", "--tag", "test", "--programs"])
            .arg(programs)
            .env("DOCKER_HOST", self.host())
            .output()
            .expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("dockerd.log")).unwrap_or_default()
    }

    pub(crate) fn try_run(&self, arguments: &[&str]) -> Output {
        let mut docker = Command::new("docker");
        docker.args(arguments).env("DOCKER_HOST", self.host()).stdin(Stdio::null());
        docker.output().expect("docker starts")
    }

    /// What it says.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let output = self.try_run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {}: {said}", arguments.join(" "));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The last lines of what every container has said, so many of each or "all".
    pub(crate) fn logs(&self, lines: &str) -> String {
        let names = self.run(&["ps", "-a", "--format", "{{.Names}}"]);
        let of = |name: &str| {
            let output = self.try_run(&["logs", "--tail", lines, name]);
            format!("\n== {name}\n{}", String::from_utf8_lossy(&output.stderr))
        };
        names.lines().map(of).collect()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let all = self.try_run(&["ps", "-aq"]);
        let all = String::from_utf8_lossy(&all.stdout).into_owned();
        let mut remove = vec!["rm", "-f"];
        remove.extend(all.lines());
        self.try_run(&remove);
        self.try_run(&["network", "rm", "baton"]);
        baton_integration_tests::process::signal(self.daemon.id(), Signal::TERM);
        let _ = self.daemon.wait();
    }
}

/// One container to be.
pub(crate) struct Container {
    pub(crate) name: String,
    /// The last part of its address.
    pub(crate) host: u8,
    pub(crate) image: &'static str,
    pub(crate) arguments: Vec<String>,
}

impl Container {
    pub(crate) fn address(&self) -> String {
        format!("{NETWORK}.{}", self.host)
    }

    /// As little as it may have: no capability, nothing to write to but what is in memory, files to read.
    pub(crate) fn start(&self, docker: &Docker, reads: &[(PathBuf, &str)]) {
        let address = self.address();
        let mut run = vec!["run", "--detach", "--name", &self.name, "--network", "baton", "--ip", &address];
        run.extend(["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]);
        let mut mounts: Vec<String> =
            reads.iter().map(|(here, there)| format!("{}:{there}:ro", here.display())).collect();
        // etcd writes; the others have no folder for it.
        if self.image == "baton-etcd" {
            let data = docker.dir.path().join(&self.name);
            std::fs::create_dir(&data).expect("a folder");
            std::os::unix::fs::chown(&data, Some(USER), Some(USER)).expect("root may");
            mounts.push(format!("{}:/var/lib/etcd", data.display()));
        }
        mounts.iter().for_each(|mount| run.extend(["--volume", mount]));
        let image = format!("{}:test", self.image);
        run.push(&image);
        run.extend(self.arguments.iter().map(String::as_str));
        docker.run(&run);
    }
}
