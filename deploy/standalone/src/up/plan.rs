//! What to start: programs, their configuration and the sockets they inherit. Pure but for looking whether the programs
//! are there and writing the configuration files.

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use baton_process::{Listen, duration};
use baton_proto::GroupName;
use toml::{Table, Value, toml};

use super::{UpArgs, UpError, addresses::Addresses};
use crate::run_file::ModelEntry;

/// Where a child finds the first socket that it inherits.
pub(super) const FIRST_INHERITED_FD: i32 = 3;
/// How long requests may take to finish once a stop was asked for; the servers have nothing left by then. A coordinator of
/// its own waits for as long as its requests may take, which is minutes: whoever stops a cluster on their own machine
/// sits before it.
const COORDINATOR_DRAIN: Duration = Duration::from_secs(20);
const OTHER_DRAIN: Duration = Duration::from_secs(5);
/// Beyond its own deadline a process gets this long before it is killed.
const KILL_AFTER: Duration = Duration::from_secs(2);

/// Characters of a group's name that are taken from its model's.
const GROUP_NAME_MOST: usize = 48;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Service {
    Controller,
    Coordinator,
    Server,
}

impl Service {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Coordinator => "coordinator",
            Self::Server => "server",
        }
    }
}

/// Sockets by name; which one is a matter of [`Addresses`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Socket {
    Http,
    Controller,
    CoordinatorAdmin,
    CoordinatorMetrics,
}

/// One process to keep running.
#[derive(Debug, Clone)]
pub(super) struct ChildSpec {
    pub(super) name: String,
    pub(super) service: Service,
    pub(super) program: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) config: PathBuf,
    /// Inherited under [`FIRST_INHERITED_FD`] and the numbers after it.
    pub(super) sockets: Vec<Socket>,
    /// Longest time from SIGTERM to SIGKILL.
    pub(super) grace: Duration,
}

/// The three service binaries.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    directory: PathBuf,
}

impl Programs {
    /// They lie where this program lies.
    pub(super) fn beside_this_one() -> Result<Self, UpError> {
        let this =
            env::current_exe().map_err(|source| UpError::Spawn { name: "baton".to_owned(), source })?;
        let directory = this.parent().unwrap_or(Path::new("/")).to_owned();
        let programs = Self { directory };
        for service in [Service::Controller, Service::Coordinator, Service::Server] {
            let path = programs.path(service);
            if !path.is_file() {
                let program = format!("baton-{}", service.name());
                return Err(UpError::MissingProgram { program, beside: this });
            }
        }
        Ok(programs)
    }

    fn path(&self, service: Service) -> PathBuf {
        self.directory.join(format!("baton-{}", service.name()))
    }
}

/// Decides every process and writes its configuration file into `run_dir`. Servers keep copies of packed weights in `cache`.
pub(super) fn plan(
    args: &UpArgs,
    programs: &Programs,
    (models, cache): (&[ModelEntry], &Path),
    addresses: &Addresses,
    run_dir: &Path,
) -> Result<Vec<ChildSpec>, UpError> {
    let overrides = split_overrides(&args.set)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.map_or_else(
        || threads_of_each(cores, models.len(), args.prefill, args.decode),
        |threads| threads as usize,
    );
    let metrics_at = |index: usize| metrics_listen(args.metrics_listen.as_ref(), index);
    let packed = std::path::absolute(cache).unwrap_or_else(|_| cache.to_owned()).join("packed");
    let packed = packed.display().to_string();
    let controller = addresses.controller.to_string();
    // A server alone does both, whatever the ratio; the controller wants at least one of each in it.
    let (prefill, decode) = (i64::from(args.prefill), i64::from(args.decode.max(1)));

    // A server that is started again tells the controller by it that the one before has ended.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let supervisor = format!("up-{}-{}", std::process::id(), since.as_millis());

    let mut children = Vec::new();
    let mut add = |name: String, service: Service, config: Table, sockets: Vec<Socket>| {
        let path = run_dir.join(format!("{name}.toml"));
        let written = fs::write(&path, config.to_string());
        written.map_err(|source| UpError::RunDir { path: path.clone(), source })?;
        let mut arguments =
            vec!["--supervised".to_owned(), "--config".to_owned(), path.display().to_string()];
        let own = overrides.iter().filter(|(of, _)| *of == service);
        arguments.extend(own.clone().flat_map(|(_, setting)| ["--set".to_owned(), setting.clone()]));
        let (program, grace) =
            (programs.path(service), grace(service, own.map(|(_, setting)| setting.as_str())));
        children.push(ChildSpec { name, service, program, args: arguments, config: path, sockets, grace });
        Ok::<(), UpError>(())
    };

    let (listen, metrics) = (inherited(0), metrics_at(1)?);
    let config = toml! {
        controller_id = "controller"
        listen = listen
        metrics_listen = metrics
        [roles]
        prefill = prefill
        decode = decode
    };
    add(
        "controller".to_owned(),
        Service::Controller,
        drained(config, OTHER_DRAIN),
        vec![Socket::Controller],
    )?;

    let servers = ServersHave { controller: controller.clone(), threads, packed, supervisor };
    let per_model = args.instances() as usize;
    for (index, model) in models.iter().enumerate() {
        let group = group_of(models, index);
        for number in index * per_model..(index + 1) * per_model {
            let name = format!("server-{number}");
            let config = servers.config(&name, (&group, &model.path), &metrics_at(2 + number)?);
            add(name, Service::Server, drained(config, OTHER_DRAIN), Vec::new())?;
        }
    }

    let served = models.iter().map(|model| {
        let path = model.path.display().to_string();
        Value::Table(toml! { path = path })
    });
    let served = Value::Array(served.collect());
    // Servers on the same machine cost nothing to ask again, and a restarted one is back the sooner.
    let (listen, admin_listen) = (inherited(0), inherited(1));
    let config = toml! {
        listen = listen
        admin_listen = admin_listen
        models = served
        [store]
        controller = controller
        [fleet]
        reconnect_max = "300ms"
        [limits]
        linger = "0s"
    };
    let mut config = drained(config, COORDINATOR_DRAIN);
    let mut sockets = vec![Socket::Http, Socket::CoordinatorAdmin];
    if addresses.coordinator_metrics.is_some() {
        config.insert("metrics_listen".to_owned(), Value::String(inherited(2)));
        sockets.push(Socket::CoordinatorMetrics);
    }
    add("coordinator".to_owned(), Service::Coordinator, config, sockets)?;
    Ok(children)
}

/// What all servers are told alike.
struct ServersHave {
    controller: String,
    threads: usize,
    packed: String,
    supervisor: String,
}

impl ServersHave {
    fn config(&self, instance_id: &str, (group, model): (&str, &Path), metrics_listen: &str) -> Table {
        let (controller, packed, supervisor) =
            (self.controller.as_str(), self.packed.as_str(), self.supervisor.as_str());
        let (threads, path) = (i64::try_from(self.threads).unwrap_or(1), model.display().to_string());
        toml! {
            instance_id = instance_id
            group = group
            controllers = [controller]
            advertise_host = "127.0.0.1"
            metrics_listen = metrics_listen
            [model]
            path = path
            [runtime]
            threads = threads
            packed_copies = packed
            [labels]
            supervisor = supervisor
        }
    }
}

/// Where the process of this number has its metrics, counted on from the address that was asked for; any port of the loopback
/// if none was.
fn metrics_listen(asked: Option<&Listen>, index: usize) -> Result<String, UpError> {
    let Some(Listen::Address { host, port }) = asked else { return Ok(Listen::loopback().to_string()) };
    let own = match port {
        0 => Some(0),
        first => u16::try_from(index).ok().and_then(|index| first.checked_add(index)),
    };
    Ok(Listen::address(host, own.ok_or(UpError::Ports(*port))?).to_string())
}

/// Whether clients are to be served by TLS.
pub(super) fn is_https(set: &[String]) -> bool {
    said(set, "coordinator.https.cert_file=").is_some_and(|file| !file.is_empty())
}

/// Where servers' model files have to lie; empty: anywhere.
pub(super) fn model_root(set: &[String]) -> PathBuf {
    said(set, "server.model.root=").unwrap_or_default().into()
}

/// The last setting of a key.
fn said<'a>(set: &'a [String], key: &str) -> Option<&'a str> {
    set.iter().filter_map(|text| text.strip_prefix(key)).next_back()
}

/// Instances of a group work together, so that each of several models has one of its own, called after it as far as a
/// group can be.
fn group_of(models: &[ModelEntry], index: usize) -> String {
    let named = |model: &ModelEntry| {
        let lower = model.name.to_lowercase();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let name: String = lower.chars().map(plain).take(GROUP_NAME_MOST).collect();
        name.trim_matches(['-', '.']).to_owned()
    };
    let name = named(&models[index]);
    match models {
        [_] => GroupName::default().to_string(),
        _ if name.is_empty() || models[..index].iter().any(|other| named(other) == name) => {
            format!("model-{index}")
        }
        _ => name,
    }
}

fn inherited(index: i32) -> String {
    format!("fd://{}", FIRST_INHERITED_FD + index)
}

fn drained(mut config: Table, drain: Duration) -> Table {
    let drain = duration::format(drain);
    config.insert("process".to_owned(), Value::Table(toml! { shutdown = { drain = drain } }));
    config
}

/// Prefill and decode mostly take turns (they measured alike under load when each had half the cores, and a request
/// alone is served faster when neither leaves cores idle), so the servers of one role, of all models, share all cores.
fn threads_of_each(cores: usize, models: usize, prefill: u32, decode: u32) -> usize {
    (cores / (models * prefill.max(decode) as usize).max(1)).max(1)
}

/// The service's own drain deadline, which a `--set` may have changed, and a little.
fn grace<'a>(service: Service, settings: impl Iterator<Item = &'a str>) -> Duration {
    let set = settings.filter_map(|setting| setting.strip_prefix("process.shutdown.drain=")).last();
    let default = if service == Service::Coordinator { COORDINATOR_DRAIN } else { OTHER_DRAIN };
    set.and_then(|text| duration::parse(text).ok()).unwrap_or(default) + KILL_AFTER
}

/// `SERVICE.KEY=VALUE` to the service and `KEY=VALUE`.
fn split_overrides(set: &[String]) -> Result<Vec<(Service, String)>, UpError> {
    set.iter()
        .map(|text| {
            let bad = || UpError::BadSet(text.clone());
            let (service, setting) =
                text.split_once('.').filter(|(_, setting)| setting.contains('=')).ok_or_else(bad)?;
            let services = [Service::Controller, Service::Coordinator, Service::Server];
            let service = services.into_iter().find(|known| known.name() == service).ok_or_else(bad)?;
            Ok((service, setting.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        up: UpArgs,
    }

    fn planned(line: &[&str]) -> (Vec<ChildSpec>, tempfile::TempDir) {
        let args = Line::parse_from([&["up", "--listen", "127.0.0.1:0"], line].concat()).up;
        let directory = tempfile::tempdir().unwrap();
        let programs = Programs { directory: "/programs".into() };
        let addresses = Addresses::bind(&args.listen, args.metrics_listen.as_ref()).unwrap();
        let given = if args.model.is_empty() { vec!["/m odel.gguf".into()] } else { args.model.clone() };
        let entry = |path: PathBuf| ModelEntry { name: path.display().to_string(), path };
        let models: Vec<ModelEntry> = given.into_iter().map(entry).collect();
        let of = (&models[..], Path::new("/c ache"));
        let plan = plan(&args, &programs, of, &addresses, directory.path()).unwrap();
        (plan, directory)
    }

    fn config(child: &ChildSpec) -> Table {
        fs::read_to_string(&child.config).unwrap().parse().unwrap()
    }

    #[test]
    fn one_process_each_and_as_many_servers_as_asked() {
        let (plan, _directory) = planned(&["--prefill", "2", "--decode", "1", "--threads", "3"]);
        let names: Vec<&str> = plan.iter().map(|child| child.name.as_str()).collect();
        assert_eq!(names, ["controller", "server-0", "server-1", "server-2", "coordinator"]);
        let server = config(&plan[3]);
        assert_eq!(server["instance_id"].as_str(), Some("server-2"));
        assert_eq!(server["model"]["path"].as_str(), Some("/m odel.gguf"));
        assert_eq!(server["runtime"]["threads"].as_integer(), Some(3));
        assert!(server["labels"]["supervisor"].as_str().is_some_and(|label| label.starts_with("up-")));
        assert_eq!(server["labels"], config(&plan[1])["labels"]);
        assert_eq!(server["runtime"]["packed_copies"].as_str(), Some("/c ache/packed"));
        let coordinator = config(&plan[4]);
        assert_eq!(coordinator["listen"].as_str(), Some("fd://3"));
        assert_eq!(coordinator["admin_listen"].as_str(), Some("fd://4"));
        assert_eq!(coordinator["store"]["controller"], server["controllers"][0]);
        assert_eq!(plan[4].sockets, [Socket::Http, Socket::CoordinatorAdmin]);
        assert_eq!(plan[4].program, Path::new("/programs/baton-coordinator"));
    }

    #[test]
    fn each_model_has_servers_and_a_group_of_its_own() {
        let (plan, _directory) =
            planned(&["--model", "/a", "--model", "/b \"c\"", "--prefill", "1", "--decode", "2"]);
        let names: Vec<&str> = plan.iter().map(|child| child.name.as_str()).collect();
        let servers = ["server-0", "server-1", "server-2", "server-3", "server-4", "server-5"];
        assert_eq!(names, [&["controller"], &servers[..], &["coordinator"]].concat());
        let facts: Vec<(String, String)> = plan[1..7]
            .iter()
            .map(|child| (config(child)["group"].to_string(), config(child)["model"]["path"].to_string()))
            .collect();
        assert!(facts[..3].iter().all(|fact| *fact == facts[0]), "{facts:?}");
        assert!(facts[3..].iter().all(|fact| *fact == facts[3]), "{facts:?}");
        assert!(facts[0].0 != facts[3].0 && facts[0].1 != facts[3].1, "{facts:?}");
        let models = config(&plan[7])["models"].as_array().unwrap().clone();
        let paths: Vec<_> = models.iter().map(|model| model["path"].as_str().unwrap().to_owned()).collect();
        assert_eq!(paths, ["/a", "/b \"c\""]);
    }

    #[test]
    fn groups_are_called_after_models_as_far_as_they_can_be() {
        let groups = |names: &[&str]| {
            let entry = |name: &&str| ModelEntry { name: (*name).to_owned(), path: "/m".into() };
            let models: Vec<ModelEntry> = names.iter().map(entry).collect();
            (0..models.len()).map(|index| group_of(&models, index)).collect::<Vec<_>>()
        };
        assert_eq!(groups(&["Qwen3 8B"]), ["default"]);
        let names = ["Qwen3 8B", "qwen3-8b", "_", "SmolLM2-1.7B", &format!("x{}", "é".repeat(99))];
        let long = ["qwen3-8b", "model-1", "model-2", "smollm2-1.7b", "x"];
        assert_eq!(groups(&names), long);
        assert!(groups(&names).into_iter().all(|name| GroupName::new(name).is_ok()));
    }

    #[test]
    fn metrics_are_at_ports_in_a_row() {
        let (plan, _directory) = planned(&["--metrics-listen", "127.0.0.1:0"]);
        let coordinator = plan.last().unwrap();
        assert_eq!(config(coordinator)["metrics_listen"].as_str(), Some("fd://5"));
        assert_eq!(coordinator.sockets.len(), 3);
        let at = |asked: &str, index| metrics_listen(Some(&asked.parse().unwrap()), index);
        assert_eq!(at("0.0.0.0:9100", 3).unwrap(), "0.0.0.0:9103");
        assert_eq!(at("[::1]:0", 3).unwrap(), "[::1]:0");
        assert!(matches!(at("h:65535", 1), Err(UpError::Ports(65535))));
        let (plan, _directory) = planned(&[]);
        assert_eq!(config(&plan[0])["metrics_listen"].as_str(), Some("127.0.0.1:0"));
        assert!(!config(plan.last().unwrap()).contains_key("metrics_listen"));
    }

    #[test]
    fn clients_are_served_by_tls_once_there_is_a_certificate() {
        let set = |text: &[&str]| is_https(&text.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert!(set(&["coordinator.https.key_file=k", "coordinator.https.cert_file=c"]));
        assert!(!set(&["coordinator.https.cert_file=c", "coordinator.https.cert_file="]));
        assert!(!set(&["server.https.cert_file=c"]));
    }

    #[test]
    fn settings_reach_the_service_they_name() {
        let (plan, _directory) = planned(&[
            "--set",
            "server.runtime.kv_dtype=int8",
            "--set",
            "coordinator.process.shutdown.drain=1m",
        ]);
        let has = |child: &ChildSpec, text: &str| child.args.iter().any(|arg| arg == text);
        assert!(has(&plan[1], "runtime.kv_dtype=int8") && has(&plan[2], "runtime.kv_dtype=int8"));
        assert!(!has(&plan[0], "runtime.kv_dtype=int8") && !has(&plan[3], "runtime.kv_dtype=int8"));
        assert_eq!(plan[3].grace, Duration::from_secs(62));
        for bad in ["server", "server.x", "engine.x=1", "=", ".a=b"] {
            assert!(split_overrides(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_servers_of_a_role_share_the_cores() {
        let threads = [(16, 1, 1), (16, 2, 1), (2, 1, 1), (2, 1, 4), (3, 2, 1), (8, 1, 0)];
        assert_eq!(threads.map(|(cores, p, d)| threads_of_each(cores, 1, p, d)), [16, 8, 2, 1, 1, 8]);
        assert_eq!(threads.map(|(cores, p, d)| threads_of_each(cores, 2, p, d)), [8, 4, 1, 1, 1, 4]);
    }
}
