//! The wait until a cluster serves, shown as it goes on, and the words that greet whoever waited.

use std::{collections::BTreeMap, env, path::Path, time::Duration};

use baton_proto::v1::{Instance, ListInstancesRequest, Phase, Role, fleet_admin_client::FleetAdminClient};
use indicatif::ProgressBar;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};

use super::UpError;
use crate::{ctl, run_file::RunFile, screen::Screen};

const POLL: Duration = Duration::from_millis(150);
/// A process that is being started again holds its callers in the socket's queue; they try again.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits until all instances are ready and the coordinator says that it can serve. Does not give up by itself: the
/// supervisor does, when a process keeps dying.
pub(super) async fn wait(run: &RunFile, instances: u32, screen: &Screen) -> Result<(), UpError> {
    let client = reqwest::Client::builder().timeout(PATIENCE).no_proxy().build();
    let client = client.map_err(|error| UpError::Client(error.to_string()))?;
    let channel = Endpoint::from_shared(format!("http://{}", run.controller));
    let channel = channel.map_err(|error| UpError::Client(error.to_string()))?.connect_lazy();
    let mut fleet = FleetAdminClient::new(channel);
    let mut shown = Shown::new(screen);
    loop {
        let seen = list(&mut fleet).await;
        let ready = seen.iter().filter(|instance| is_ready(instance)).count();
        shown.update(&seen);
        if ready >= instances as usize && coordinator_is_ready(&client, &run.url).await {
            shown.finish();
            return Ok(());
        }
        sleep(POLL).await;
    }
}

async fn list(fleet: &mut FleetAdminClient<Channel>) -> Vec<Instance> {
    match timeout(PATIENCE, fleet.list_instances(ListInstancesRequest {})).await {
        Ok(Ok(answer)) => answer.into_inner().instances,
        Ok(Err(_)) | Err(_) => Vec::new(),
    }
}

async fn coordinator_is_ready(client: &reqwest::Client, url: &str) -> bool {
    client.get(format!("{url}/readiness")).send().await.is_ok_and(|answer| answer.status().is_success())
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
                Phase::Ready => format!("ready to {}", ctl::role(beat.role)),
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

/// What to do now.
pub(super) fn greeting(run: &RunFile, run_dir: &Path) -> String {
    let baton = this_program();
    let RunFile { url, model, .. } = run;
    let (ready, logs) = (format!("Baton serves {model} at {url}"), run_dir.display());
    format!(
        r#"
{ready}

  ask       curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'
  openai    OpenAI(base_url="{url}/v1", api_key="none")
  look      {baton} ctl get instances     (or: roles, requests)
  measure   {baton} bench --url {url}
  logs      {logs}
  stop      Ctrl-C
"#
    )
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
