//! The task that scales: while this controller leads it looks at each group and its Deployment, asks [`super::decide`],
//! and does what that says. It is stopped by the shutdown, and its work by the end of a term.
//!
//! Groups do not wait for one another. Whatever fails is tried again, later each time; a change that met another's is
//! decided anew at once.

use std::{sync::Arc, time::Duration};

use baton_proto::{Cordoned, ErrorCode, GroupName, InstanceId, Phase, Role, RolePolicy};
use futures::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    cluster::Cluster,
    decide::{Action, By, Decision, Demand, Instance, Limits, Release, Scaler, Seen},
    error::{OpenError, ScaleError},
};
use crate::{
    clock::unix_millis,
    config::{ControllerConfig, ScaledGroup},
    desk::{Desk, Inbox, Message, Plans, Report},
    fleet::{Member, health::Verdict},
    journal::{Journal, News, NewsKind},
    metrics::ScalingMetrics,
    reconcile::{Change, Only},
};

/// As whom instances are cordoned.
const ACTOR: &str = "autoscaler";
/// How long Kubernetes may take to see that a pod is not ready, and to delete one: its probes are ten seconds apart unless
/// told otherwise, and three have to fail.
const NOTICE: Duration = Duration::from_secs(90);
/// Parts of Kubernetes learn what others see a moment later: what deletes pods, too.
const KNOWN_AFTER: Duration = Duration::from_secs(2);
/// Steps of a group before the others' turn comes, so that none is busy for ever.
const STEPS: usize = 8;
/// The longest wait after failures, unless `kubernetes.every` is longer.
const BACKOFF_MOST: Duration = Duration::from_secs(60);

/// See the module.
pub struct Scaling {
    config: Arc<ControllerConfig>,
    cluster: Cluster,
    desk: Desk,
    journal: Journal,
    metrics: ScalingMetrics,
    shutdown: CancellationToken,
}

impl Scaling {
    /// Errors: what of `kubernetes` cannot be used. Whether the API server is there is seen later, and may change.
    pub async fn open(
        config: Arc<ControllerConfig>,
        desk: Desk,
        journal: Journal,
        metrics: ScalingMetrics,
        shutdown: CancellationToken,
    ) -> Result<Self, OpenError> {
        let cluster = Cluster::open(&config.kubernetes).await?;
        info!(
            namespace = cluster.namespace(),
            groups = config.kubernetes.groups.len(),
            "scales on Kubernetes"
        );
        Ok(Self { config, cluster, desk, journal, metrics, shutdown })
    }

    pub async fn run(self) {
        loop {
            let inbox = tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                inbox = self.desk.opened() => inbox,
            };
            let groups = self.config.kubernetes.groups.iter();
            let tended = groups.map(|(name, group)| Tended::new(&self, &inbox, name, group).tend());
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                () = inbox.messages.closed() => {}
                _ = join_all(tended) => {}
            }
            self.metrics.forget();
        }
    }
}

/// One group, for the time of a term.
struct Tended<'a> {
    scaling: &'a Scaling,
    inbox: &'a Inbox,
    name: &'a GroupName,
    group: &'a ScaledGroup,
    /// Why its instances are cordoned; by that they are known again.
    reason: String,
    scaler: Scaler,
    /// Rounds that failed, since one did not.
    failures: u32,
    /// Why it has more than it wants, as it was last logged.
    waits: Option<String>,
}

impl<'a> Tended<'a> {
    fn new(scaling: &'a Scaling, inbox: &'a Inbox, name: &'a GroupName, group: &'a ScaledGroup) -> Self {
        let roles = &scaling.config.roles;
        let limits = Limits {
            min: group.min,
            max: group.max,
            stabilisation: scaling.config.kubernetes.stabilisation,
            patience: roles.drain + roles.switch_grace,
            notice: NOTICE,
            known_after: KNOWN_AFTER,
        };
        let reason = format!("group {name} is scaled in");
        Self { scaling, inbox, name, group, reason, scaler: Scaler::new(limits), failures: 0, waits: None }
    }

    async fn tend(mut self) {
        let every = self.scaling.config.kubernetes.every;
        loop {
            let round = self.round().await;
            match round {
                Ok(()) => self.succeeded(),
                Err(ScaleError::NotLeading) => return self.inbox.messages.closed().await,
                Err(error) => self.failed(&error),
            }
            let times = 1 << self.failures.min(6);
            let wait = every.saturating_mul(times).min(BACKOFF_MOST.max(every));
            tokio::time::sleep(wait).await;
        }
    }

    /// Goes on until there is nothing to do at the moment.
    async fn round(&mut self) -> Result<(), ScaleError> {
        for _ in 0..STEPS {
            let (seen, version) = self.look().await?;
            let decision = self.scaler.decide(&seen, Instant::now());
            self.show(&seen, &decision);
            if decision.action == Action::Wait {
                return Ok(());
            }
            let to_go = match &decision.action {
                Action::Cordon(id) => Some(id.clone()),
                _ => None,
            };
            match (self.make(decision, &seen, &version).await, to_go) {
                (Err(ScaleError::Refused(refusal)), Some(id)) => {
                    debug!(group = %self.name, instance = %id, %refusal, "it cannot go: looking for another");
                    self.scaler.refused(id);
                }
                (Err(ScaleError::Conflict), _) => {
                    self.scaling.metrics.error(self.name, ScaleError::Conflict.reason());
                    debug!(group = %self.name, "somebody else changed the Deployment or a cordon: looking again");
                }
                (made, _) => made?,
            }
        }
        Ok(())
    }

    async fn look(&self) -> Result<(Seen, String), ScaleError> {
        let looked = self.scaling.cluster.look(&self.group.deployment).await?;
        let report = self.inbox.ask(Message::Report).await.ok_or(ScaleError::NotLeading)?;
        let plan = |answer| Message::Plan { what_if: None, answer };
        let plans = self.inbox.ask(plan).await.ok_or(ScaleError::NotLeading)??;
        let (demand, instances) = (demand(&plans, self.name), self.instances(&report));
        Ok((Seen { demand, replicas: looked.replicas, pods: looked.pods, instances }, looked.version))
    }

    /// The group's members, and those that are cordoned and gone.
    fn instances(&self, report: &Report) -> Vec<Instance> {
        let label = &self.scaling.config.kubernetes.pod_label;
        let by = |id: &InstanceId| {
            let cordoned = report.intents.get(id)?.cordoned.as_ref()?;
            let ours = cordoned.by == ACTOR && cordoned.reason == self.reason;
            Some(if ours { By::Us } else { By::Others })
        };
        let named = |id: &InstanceId| Some(id.to_string()).filter(|_| label.is_empty());
        let members = report.members.values().filter(|member| member.spec.group == *self.name);
        let here = members.map(|member| {
            let id = member.spec.id.clone();
            Instance {
                pod: named(&id).or_else(|| member.spec.labels.get(label).cloned()),
                here: member.is_registered(),
                role: member.beat.role,
                sequences: sequences(member),
                drained: is_drained(member),
                quarantined: report.verdicts.get(&id).is_some_and(Verdict::is_quarantined),
                cordoned: by(&id),
                id,
            }
        });
        let gone = report.intents.keys().filter(|id| !report.members.contains_key(*id));
        let gone = gone.filter(|id| by(id).is_some()).map(|id| Instance {
            id: id.clone(),
            pod: named(id),
            here: false,
            role: Role::None,
            sequences: 0,
            drained: false,
            quarantined: false,
            cordoned: by(id),
        });
        here.chain(gone).collect()
    }

    async fn make(&self, decision: Decision, seen: &Seen, version: &str) -> Result<(), ScaleError> {
        // What a deposed leader decided is not carried out if it can be helped.
        if self.inbox.messages.is_closed() {
            return Err(ScaleError::NotLeading);
        }
        let (cluster, deployment, term) = (&self.scaling.cluster, &self.group.deployment, &self.inbox.term);
        match decision.action {
            Action::Wait => {}
            Action::ScaleOut { to } => {
                cluster.scale(deployment, to, version, term).await?;
                self.scaled(NewsKind::ScaledOut, seen.replicas, to, &[]);
            }
            Action::ScaleIn { to, pods } => {
                cluster.scale(deployment, to, version, term).await?;
                self.scaled(NewsKind::ScaledIn, seen.replicas, to, &pods);
            }
            Action::Cordon(id) => {
                let (by, reason) = (ACTOR.to_owned(), self.reason.clone());
                let cordoned = Cordoned { by, reason, unix_millis: unix_millis(), drain: None, force: false };
                self.change(Change::Cordon { id, cordoned, only: Only::Free }).await?;
            }
            Action::Uncordon(id, why) => {
                if why == Release::Ready {
                    warn!(group = %self.name, instance = %id, %why, "is not scaled in");
                } else {
                    info!(group = %self.name, instance = %id, %why, "is not to be scaled in any more");
                }
                let only = Only::Held { by: ACTOR.to_owned(), reason: self.reason.clone() };
                self.change(Change::Uncordon { id, only }).await?;
            }
        }
        Ok(())
    }

    /// `Conflict` if its condition does not hold any more.
    async fn change(&self, change: Change) -> Result<(), ScaleError> {
        let news = change.news(ACTOR);
        let message = |answer| Message::Change { change, news, answer };
        match self.inbox.ask(message).await.ok_or(ScaleError::NotLeading)? {
            Ok(_) => Ok(()),
            Err(refusal) if matches!(refusal.code, ErrorCode::AlreadyExists | ErrorCode::NotFound) => {
                Err(ScaleError::Conflict)
            }
            Err(refusal) => Err(refusal.into()),
        }
    }

    fn scaled(&self, kind: NewsKind, from: u32, to: u32, pods: &[String]) {
        let without =
            if pods.is_empty() { String::new() } else { format!(", without {}", pods.join(" or ")) };
        let message = format!("Deployment {}: {from} -> {to} replicas{without}", self.group.deployment);
        info!(group = %self.name, message);
        self.scaling.metrics.changed(self.name, to > from);
        self.tell(kind, message);
    }

    fn show(&mut self, seen: &Seen, decision: &Decision) {
        self.scaling.metrics.show(self.name, seen.replicas, decision.wanted);
        if self.waits != decision.waits {
            self.waits.clone_from(&decision.waits);
            if let Some(waits) = &self.waits {
                info!(group = %self.name, replicas = seen.replicas, wanted = decision.wanted, waits, "waits to scale in");
            }
        }
    }

    fn succeeded(&mut self) {
        if std::mem::take(&mut self.failures) > 0 {
            info!(group = %self.name, "scaling goes on");
            self.scaling.metrics.failing(self.name, false);
            let message = format!("Deployment {} is scaled again", self.group.deployment);
            self.tell(NewsKind::ScalingRecovered, message);
        }
    }

    fn failed(&mut self, error: &ScaleError) {
        self.scaling.metrics.error(self.name, error.reason());
        self.scaling.metrics.failing(self.name, true);
        warn!(group = %self.name, deployment = self.group.deployment, %error, "the group is not scaled; trying again");
        if self.failures == 0 {
            self.tell(NewsKind::ScalingFailed, error.to_string());
        }
        self.failures = self.failures.saturating_add(1);
    }

    fn tell(&self, kind: NewsKind, message: String) {
        let group = Some(self.name.clone());
        self.scaling.journal.enter(News { kind, group, instance: None, message, actor: None });
    }
}

fn demand(plans: &Plans, group: &GroupName) -> Demand {
    let plan = plans.plans.iter().find(|plan| plan.group == *group);
    match plan.map(|plan| (plan.wanted, plan.aim.policy, plan.congested)) {
        Some((Some(wanted), ..)) => Demand::Measured(wanted),
        Some((None, RolePolicy::Auto, true)) => Demand::Congested,
        Some((None, RolePolicy::Auto, false)) => Demand::Little,
        Some((None, RolePolicy::Ratio, _)) => Demand::Unasked,
        None => Demand::Unknown,
    }
}

fn sequences(member: &Member) -> u32 {
    member.beat.load.running_sequences.saturating_add(member.beat.load.waiting_sequences)
}

/// It was told to serve nothing, does so, and neither sequences nor transfers are left on it.
fn is_drained(member: &Member) -> bool {
    let (beat, load) = (&member.beat, &member.beat.load);
    let told = member.desired.as_ref().is_some_and(|desired| {
        let known = beat.role_epoch == desired.epoch || beat.phase == Phase::Loading;
        desired.role == Role::None && known
    });
    let empty = sequences(member) == 0 && load.outgoing_transfers == 0 && load.incoming_transfers == 0;
    member.session().is_some() && beat.role == Role::None && told && empty
}
