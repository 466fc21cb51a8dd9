//! The network of the fleet: a network namespace for each process, with a veth pair to a bridge, so that links can be
//! cut as a switch or a firewall would: packets vanish, and no connection is told.
//!
//! Where this user may not make namespaces, every process has a loopback address of its own, and no link can be cut.

use std::{
    io::{BufRead, BufReader},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
};

/// Set in the process that is inside a network of its own.
const INSIDE: &str = "BATON_CHAOS_INSIDE";
/// Of nobody.
const NOWHERE: &str = "02:00:00:00:ff:ff";

/// A machine with one process on it.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) ip: Ipv4Addr,
    number: u8,
    /// Holds the namespace, if it has one.
    holder: Option<Child>,
}

/// Which way the packets between two hosts vanish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Both,
    There,
    Back,
}

/// Runs the test of this name again inside a network of its own: whether that has been done, and it has passed. `None`
/// where this process is the one inside, or where there can be none and that is as it was asked for.
pub(crate) fn entered(test: &str) -> Option<bool> {
    if inside() {
        return None;
    }
    let own = ["--net", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut why = String::new();
    for user in [&["--user", "--map-root-user"][..], &[]] {
        let unshare = || {
            let mut command = Command::new("unshare");
            command.args(user).args(own);
            command
        };
        let tried = unshare().args(["ip", "link", "add", "chaos", "type", "bridge"]).output();
        match tried {
            Ok(output) if output.status.success() => {
                let mut command = unshare();
                command.arg(std::env::current_exe().expect("this test")).env(INSIDE, "1");
                command.args(["--exact", test, "--nocapture", "--include-ignored"]);
                return Some(command.status().expect("it starts").success());
            }
            Ok(output) => why = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => why = format!("unshare: {error}"),
        }
    }
    let asked = std::env::var_os("BATON_SKIP_NAMESPACES").is_some_and(|skip| skip == "1");
    assert!(
        asked,
        "no network of its own can be made here, in which links are cut: {why} (BATON_SKIP_NAMESPACES=1 does without)"
    );
    eprintln!("no link is cut: BATON_SKIP_NAMESPACES=1");
    None
}

/// Whether links can be cut.
pub(crate) fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Makes the bridge, at which the clients are.
pub(crate) fn bridge() {
    if inside() {
        ip("link set lo up");
        ip("link add chaos type bridge");
        ip("addr add 10.78.0.1/24 dev chaos");
        ip("link set chaos up");
    }
}

impl Host {
    /// The host of this number, 2 to 254, with its link up.
    pub(crate) fn new(number: u8) -> Self {
        if !inside() {
            let [_, _, high, low] = std::process::id().to_be_bytes();
            return Self { ip: Ipv4Addr::new(127, 128 | high & 0x7f, low, number), number, holder: None };
        }
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo there; exec sleep infinity"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts");
        let mut there = String::new();
        let stdout = holder.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut there).expect("it says that it is there");
        let pid = holder.id();
        let host = Self { ip: Ipv4Addr::new(10, 78, 0, number), number, holder: Some(holder) };
        ip(&format!("link add v{number} type veth peer name p{number}"));
        ip(&format!("link set p{number} netns {pid}"));
        ip(&format!("link set v{number} master chaos"));
        host.ip("link set lo up");
        host.ip(&format!("link set p{number} name eth0"));
        host.ip(&format!("link set eth0 address 02:00:00:00:00:{number:02x}"));
        host.ip(&format!("addr add {}/24 dev eth0", host.ip));
        host.ip("link set eth0 up");
        ip(&format!("link set v{number} up"));
        host
    }

    fn namespace(&self) -> Option<String> {
        self.holder.as_ref().map(|holder| format!("--net=/proc/{}/ns/net", holder.id()))
    }

    /// A command that runs here.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self.namespace() {
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(namespace).arg(program);
                command
            }
            None => Command::new(program),
        }
    }

    fn ip(&self, arguments: &str) {
        run(self.command("ip").args(arguments.split(' ')));
    }

    /// Cuts it off from everybody, or joins it again.
    pub(crate) fn link(&self, up: bool) {
        ip(&format!("link set v{} {}", self.number, if up { "up" } else { "down" }));
    }

    /// Lets what goes to another vanish.
    pub(crate) fn lose(&self, other: &Self, way: Way) {
        let vanish = |from: &Self, to: &Self| {
            from.ip(&format!("neigh replace {} lladdr {NOWHERE} dev eth0 nud permanent", to.ip));
        };
        if way != Way::Back {
            vanish(self, other);
        }
        if way != Way::There {
            vanish(other, self);
        }
    }

    /// The end of [`Self::lose`].
    pub(crate) fn find(&self, other: &Self, way: Way) {
        let find = |from: &Self, to: &Self| from.ip(&format!("neigh del {} dev eth0", to.ip));
        if way != Way::Back {
            find(self, other);
        }
        if way != Way::There {
            find(other, self);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut holder) = self.holder.take() {
            let _ = holder.kill();
            let _ = holder.wait();
        }
    }
}

fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split(' ')));
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
