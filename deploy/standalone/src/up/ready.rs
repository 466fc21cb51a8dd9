//! The wait until a cluster serves, shown as it goes on, and the words that greet whoever waited.

use std::{collections::BTreeMap, env, net::SocketAddr, path::Path, time::Duration};

use baton_proto::v1::{Instance, ListInstancesRequest, Phase, Role, fleet_admin_client::FleetAdminClient};
use indicatif::ProgressBar;
use serde::Deserialize;
use tokio::time::{sleep, timeout};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use super::UpError;
use crate::{ctl, run_file::RunFile, screen::Screen};

const POLL: Duration = Duration::from_millis(150);
/// A process that is being started again holds its callers in the socket's queue; they try again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits until all instances are ready, as far as the controller tells us, and the coordinator says that it can serve every
/// model, where it is `probed`. Does not give up by itself: the supervisor does, when a process keeps dying.
pub(super) async fn wait(
    run: &RunFile,
    (probed, instances): (SocketAddr, usize),
    screen: &Screen,
) -> Result<(), UpError> {
    let client = reqwest::Client::builder().timeout(PATIENCE).no_proxy().build();
    let client = client.map_err(|error| UpError::Client(error.to_string()))?;
    let channel = Endpoint::from_shared(format!("http://{}", run.controller));
    let channel = channel.map_err(|error| UpError::Client(error.to_string()))?.connect_lazy();
    let mut fleet = FleetAdminClient::new(channel);
    let mut shown = Shown::new(screen);
    loop {
        let seen = list(&mut fleet).await;
        let is_enough = match &seen {
            Seen::Instances(seen) => {
                shown.update(seen);
                seen.iter().filter(|instance| is_ready(instance)).count() >= instances
            }
            Seen::Refused => true,
            Seen::Nothing => false,
        };
        if is_enough && coordinator_is_ready(&client, probed).await {
            shown.finish();
            return Ok(());
        }
        sleep(POLL).await;
    }
}

/// What the controller says of the instances.
enum Seen {
    Instances(Vec<Instance>),
    /// It asks for a token (`admin.tokens_file`), of which none is ours: what the coordinator says has to do.
    Refused,
    Nothing,
}

async fn list(fleet: &mut FleetAdminClient<Channel>) -> Seen {
    match timeout(PATIENCE, fleet.list_instances(ListInstancesRequest {})).await {
        Ok(Ok(answer)) => Seen::Instances(answer.into_inner().instances),
        Ok(Err(status)) if status.code() == Code::Unauthenticated => Seen::Refused,
        Ok(Err(_)) | Err(_) => Seen::Nothing,
    }
}

async fn coordinator_is_ready(client: &reqwest::Client, probed: SocketAddr) -> bool {
    let asked = async {
        let answer = client.get(format!("http://{probed}/readiness")).send().await?.error_for_status()?;
        answer.json::<Readiness>().await
    };
    asked.await.is_ok_and(|readiness| readiness.status == "ready")
}

/// What a process says of its readiness: more than this word if some of its work cannot be done yet.
#[derive(Deserialize)]
struct Readiness {
    status: String,
}

fn is_ready(instance: &Instance) -> bool {
    let beat = instance.beat.unwrap_or_default();
    beat.phase() == Phase::Ready && !matches!(beat.role(), Role::None | Role::Unspecified)
}

/// A bar per instance on a terminal; elsewhere a line per change of phase.
struct Shown<'a> {
    screen: &'a Screen,
    bars: BTreeMap<String, ProgressBar>,
    said: BTreeMap<String, String>,
}

impl<'a> Shown<'a> {
    fn new(screen: &'a Screen) -> Self {
        Self { screen, bars: BTreeMap::new(), said: BTreeMap::new() }
    }

    fn update(&mut self, seen: &[Instance]) {
        for instance in seen {
            let id = instance.spec.as_ref().map_or_else(String::new, |spec| spec.instance_id.clone());
            let beat = instance.beat.unwrap_or_default();
            let words = match beat.phase() {
                Phase::Ready => ready_to(beat.role()),
                phase => ctl::phase(phase.into()),
            };
            if self.screen.is_terminal() {
                let bar = self.bars.entry(id.clone()).or_insert_with(|| self.screen.permille(&id));
                let loaded = if beat.phase() == Phase::Loading { beat.load_permille.min(1000) } else { 1000 };
                bar.set_position(loaded.into());
                bar.set_message(words);
            } else if self.said.get(&id) != Some(&words) {
                self.screen.line(&format!("{id}: {words}"));
                self.said.insert(id, words);
            }
        }
    }

    fn finish(&self) {
        self.bars.values().for_each(ProgressBar::finish);
    }
}

fn ready_to(role: Role) -> String {
    match role {
        Role::Mixed => "ready to prefill and decode".to_owned(),
        Role::Prefill | Role::Decode => format!("ready to {}", ctl::role(role.into())),
        Role::None | Role::Unspecified => "ready for a role".to_owned(),
    }
}

/// What to do now. `chosen` says that the run directory lies where only its user knows, so that `ctl` must be told.
pub(super) fn greeting(run: &RunFile, run_dir: &Path, chosen: bool) -> String {
    let baton = this_program();
    let of_run = if chosen { format!(" --run-dir {}", shell_word(run_dir)) } else { String::new() };
    let url = &run.url;
    let names: Vec<&str> = run.models.iter().map(|model| model.name.as_str()).collect();
    let (model, logs) = (names.first().copied().unwrap_or_default(), run_dir.display());
    let ready = format!("Baton serves {} at {url}", names.join(" and "));
    format!(
        r#"
{ready}

  ask       curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model": "{model}", "stream": true, "temperature": 0, "max_tokens": 200, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
  openai    OpenAI(base_url="{url}/v1", api_key="none")
  look      {baton} ctl get instances{of_run}     (or: roles, requests)
  measure   {baton} bench --url {url}
  logs      {logs}
  stop      Ctrl-C
"#
    )
}

/// As a shell reads it back whole.
fn shell_word(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// As one would type it from here.
fn this_program() -> String {
    let Ok(path) = env::current_exe() else { return "baton".to_owned() };
    let here = env::current_dir().ok();
    let relative = here.and_then(|here| path.strip_prefix(here).ok().map(Path::to_owned));
    match relative {
        Some(relative) => format!("./{}", relative.display()),
        None => path.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_file::tests::example;

    #[test]
    fn a_chosen_run_directory_is_named_to_ctl() {
        let run = example(1, 1);
        let greets = |path: &str, chosen: bool| greeting(&run, Path::new(path), chosen);
        assert!(greets("/tmp/x", true).contains("ctl get instances --run-dir /tmp/x  "));
        assert!(greets("/tmp/it's x", true).contains(r"ctl get instances --run-dir '/tmp/it'\''s x'  "));
        assert!(!greets("/tmp/x", false).contains("--run-dir"));
    }

    #[test]
    fn a_line_says_what_an_instance_is_ready_for() {
        assert_eq!(ready_to(Role::Mixed), "ready to prefill and decode");
        assert_eq!(ready_to(Role::Prefill), "ready to prefill");
    }
}
