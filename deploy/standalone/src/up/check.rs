//! Asks every service whether it understands its configuration, before any is started: a misspelt `--set` is then told
//! once and at once, not by each process of a cluster that dies of it again and again. Called by `up`.

use std::{process::Stdio, time::Duration};

use tokio::process::Command;
use toml::Table;

use super::{
    UpError,
    plan::{ChildSpec, Service},
};

/// A program only reads its configuration and ends; this is for a machine that is very busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// How clients and probes reach the coordinator, by all that it is told, the environment included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Reached {
    pub(super) is_https: bool,
    /// Where metrics and probes are apart from the API; empty = nowhere.
    pub(super) metrics_listen: String,
}

impl Reached {
    fn of(coordinator: &Table) -> Self {
        let text =
            |value: Option<&toml::Value>| value.and_then(toml::Value::as_str).unwrap_or_default().to_owned();
        let https = coordinator.get("https").and_then(toml::Value::as_table);
        Self {
            is_https: https.is_some_and(|https| !text(https.get("cert_file")).is_empty()),
            metrics_listen: text(coordinator.get("metrics_listen")),
        }
    }
}

/// Runs the program of each service with `--check-config`. The servers differ in nothing but their names and
/// models, so the first answers for all.
pub(super) async fn check(plan: &[ChildSpec]) -> Result<Reached, UpError> {
    let mut reached = Reached::default();
    for service in [Service::Controller, Service::Coordinator, Service::Server] {
        let Some(spec) = plan.iter().find(|spec| spec.service == service) else { continue };
        let effective = check_one(spec).await?;
        if service == Service::Coordinator {
            reached = Reached::of(&effective);
        }
    }
    if reached.is_https && reached.metrics_listen.is_empty() {
        let reason =
            "with `https`, give --metrics-listen ADDR: it is asked there whether it is ready".to_owned();
        return Err(UpError::Config { service: "coordinator", reason });
    }
    Ok(reached)
}

/// What is in effect.
async fn check_one(spec: &ChildSpec) -> Result<Table, UpError> {
    let service = spec.service.name();
    let refused = |reason: String| UpError::Config { service, reason };
    let mut command = Command::new(&spec.program);
    command.args(&spec.args).arg("--check-config").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| refused(format!("its configuration is not read within {PATIENCE:?}")))?
        .map_err(|source| UpError::Spawn { name: service.to_owned(), source })?;
    if output.status.success() {
        let text = String::from_utf8_lossy(&output.stdout);
        return text.parse().map_err(|error| refused(format!("it does not say what is in effect: {error}")));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let error = said.lines().find_map(|line| line.strip_prefix("error: "));
    let reason = error.or_else(|| said.lines().last()).map(str::to_owned);
    Err(refused(reason.unwrap_or_else(|| format!("its configuration is refused ({})", output.status))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(name: &str, service: Service, script: &str) -> ChildSpec {
        ChildSpec {
            name: name.to_owned(),
            service,
            program: "/bin/sh".into(),
            args: vec!["-c".to_owned(), script.to_owned()],
            config: "/none.toml".into(),
            sockets: Vec::new(),
            grace: Duration::ZERO,
        }
    }

    #[tokio::test]
    async fn each_service_is_asked_once_and_the_first_refusal_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let trail = directory.path().join("trail");
        // A shell takes the flag that follows its script as $0.
        let asked = |name: &str, service| {
            shell(name, service, &format!("echo {name} $0 >>{trail}", trail = trail.display()))
        };
        let mut plan = vec![
            asked("controller", Service::Controller),
            asked("server-0", Service::Server),
            asked("server-1", Service::Server),
            asked("coordinator", Service::Coordinator),
        ];
        check(&plan).await.unwrap();
        let asked = std::fs::read_to_string(&trail).unwrap();
        let (first, all) =
            ("controller --check-config\n", ["coordinator --check-config\n", "server-0 --check-config\n"]);
        assert_eq!(asked, format!("{first}{}", all.concat()));

        let says = "echo 'metrics_listen = \"h:1\"'; echo '[https]'; echo 'cert_file = \"c\"'";
        plan[3] = shell("coordinator", Service::Coordinator, says);
        let reached = check(&plan).await.unwrap();
        assert_eq!(reached, Reached { is_https: true, metrics_listen: "h:1".to_owned() });
        plan[3] = shell("coordinator", Service::Coordinator, "echo '[https]'; echo 'cert_file = \"c\"'");
        let text = check(&plan).await.unwrap_err().to_string();
        assert!(text.contains("give --metrics-listen"), "{text}");

        let refuses = "echo a line >&2; echo 'error: no key x; did you mean y?' >&2; exit 1";
        plan[3] = shell("coordinator", Service::Coordinator, refuses);
        let text = check(&plan).await.unwrap_err().to_string();
        assert_eq!(text, "coordinator: no key x; did you mean y?");
        plan[3] = shell("coordinator", Service::Coordinator, "exit 3");
        let text = check(&plan).await.unwrap_err().to_string();
        assert!(text.contains("refused (exit status: 3)"), "{text}");
    }
}
