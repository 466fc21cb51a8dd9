//! The gRPC adapter of `FleetAdmin`: the fleet as `baton ctl` shows it and what operators change in it.
//!
//! Thin: it checks who calls ([`baton_process::access`]) and what they say, brings it to the leading task through the
//! [`Desk`], and puts the answer in the wire's words ([`view`]). A change is answered once it is stored.

use std::{sync::Arc, time::Duration};

use baton_process::access::{Access, Call, Right};
use baton_proto::{
    ApiError, Cordoned, ErrorCode, GroupName, InstanceId, Pinned, Role, Targets, WireError,
    v1::{self, fleet_admin_server},
};
use baton_registry::Store;
use futures::{StreamExt, stream::BoxStream};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tonic::{Request, Response, Status};

use crate::{
    clock::unix_millis,
    coordinators::{self, Coordinators, Registered},
    desk::{Desk, Inbox, Message, Plans, Report},
    journal::{Entry, Journal, News},
    reconcile::{Change, Only},
    session::not_leading,
};

mod api_keys;
mod view;

/// Characters of a reason.
const REASON_MAX: usize = 200;
/// Longest time that operators can give to running requests.
const DRAIN_MOST: Duration = Duration::from_secs(24 * 3600);
/// Links in one answer: as many as fit a message of gRPC's usual limit, 4 MiB, with the longest of names.
const LINKS_LISTED: usize = 16_384;
/// Events sent to a reader at a time.
const EVENTS_AT_A_TIME: usize = 256;

/// Answers operators, while this controller leads.
#[derive(Debug)]
pub struct AdminService {
    store: Arc<dyn Store>,
    desk: Desk,
    coordinators: Coordinators,
    journal: Journal,
    access: Access,
    /// Whether API keys are kept in the store.
    keeps_keys: bool,
}

impl AdminService {
    pub fn new(
        store: Arc<dyn Store>,
        desk: Desk,
        coordinators: Coordinators,
        journal: Journal,
        access: Access,
        keeps_keys: bool,
    ) -> Self {
        Self { store, desk, coordinators, journal, access, keeps_keys }
    }

    /// Those that report to this controller, if it leads.
    async fn coordinators(&self, now: Instant) -> Result<Vec<Registered>, Status> {
        match self.desk.inbox().filter(|inbox| !inbox.messages.is_closed()) {
            Some(inbox) => Ok(self.coordinators.list(inbox.epoch, now)),
            None => Err(not_leading(&*self.store).await),
        }
    }

    /// Brings a message to the leading task and waits for its answer.
    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Status> {
        if let Some(inbox) = self.desk.inbox()
            && let Some(answer) = inbox.ask(message).await
        {
            return Ok(answer);
        }
        Err(not_leading(&*self.store).await)
    }

    async fn report(&self) -> Result<Report, Status> {
        self.ask(Message::Report).await
    }

    async fn plans(&self, what_if: Option<Change>) -> Result<Plans, Status> {
        Ok(self.ask(|answer| Message::Plan { what_if, answer }).await??)
    }

    /// Makes a change, or says what it would do; of the plan, the part that `of` says.
    async fn change<T>(
        &self,
        request: &Request<T>,
        call: Call<'_>,
        dry_run: bool,
        change: impl FnOnce(&str) -> Result<Change, ApiError>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        // What a dry run tells is no more than the plan tells anyone who may look.
        let needed = if dry_run { Right::Viewer } else { Right::Admin };
        let actor = self.access.check(request, needed, call)?;
        let change = change(&actor.name)?;
        let plans = if dry_run {
            self.plans(Some(change.clone())).await?
        } else {
            let news: News = change.news(&actor.name);
            let change = change.clone();
            self.ask(|answer| Message::Change { change, news, answer }).await??
        };
        let group = match &change {
            Change::Divide { group, .. } | Change::Rebalance { group } => Some(group.clone()),
            Change::Cordon { id, .. } | Change::Uncordon { id, .. } | Change::Pin { id, .. } => {
                plans.group_of(id)
            }
        };
        Ok(Response::new(view::plans(plans, group.as_ref(), dry_run)))
    }
}

fn instance_id(id: String) -> Result<InstanceId, ApiError> {
    InstanceId::new(id).map_err(|error| invalid("instance_id", error))
}

/// Empty = none.
fn group_name(group: String) -> Result<Option<GroupName>, ApiError> {
    if group.is_empty() {
        return Ok(None);
    }
    GroupName::new(group).map(Some).map_err(|error| invalid("group", error))
}

fn targets(wire: Option<v1::Targets>) -> Result<Option<Targets>, ApiError> {
    let taken = wire.map(Targets::try_from).transpose();
    taken.map_err(|error: WireError| invalid("targets", error))
}

fn invalid(param: &str, problem: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::InvalidArgument, format!("{param}: {problem}")).param(param)
}

fn needed(group: Option<GroupName>) -> Result<GroupName, ApiError> {
    group.ok_or_else(|| invalid("group", "is missing"))
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl fleet_admin_server::FleetAdmin for AdminService {
    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Answer<v1::ListInstancesResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ListInstances"))?;
        let report = self.report().await?;
        let registered = report.members.values().filter(|member| member.is_registered());
        let instances = registered.map(|member| view::instance(member, report.at)).collect();
        Ok(Response::new(v1::ListInstancesResponse { instances }))
    }

    async fn list_roles(&self, request: Request<v1::ListRolesRequest>) -> Answer<v1::ListRolesResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ListRoles"))?;
        let report = self.report().await?;
        let intent = |id: &InstanceId| report.intents.get(id);
        let here = report.members.values().map(|member| {
            let id = &member.spec.id;
            let verdict = report.verdicts.get(id).copied().unwrap_or_default();
            let health = verdict.to_string();
            v1::RoleView {
                health,
                ..view::role(id.as_str(), member.desired.as_ref(), Some(member), intent(id))
            }
        });
        let gone = report
            .remembered
            .iter()
            .map(|(id, desired)| view::role(id.as_str(), Some(desired), None, intent(id)));
        let mut roles: Vec<_> = here.chain(gone).collect();
        roles.sort_by(|a, b| a.instance_id.cmp(&b.instance_id));
        Ok(Response::new(v1::ListRolesResponse { roles }))
    }

    async fn list_coordinators(
        &self,
        request: Request<v1::ListCoordinatorsRequest>,
    ) -> Answer<v1::ListCoordinatorsResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ListCoordinators"))?;
        let now = Instant::now();
        let registered = self.coordinators(now).await?;
        let links = LINKS_LISTED / registered.len().max(1);
        let coordinators = registered.into_iter().map(|one| view::coordinator(one, links, now)).collect();
        Ok(Response::new(v1::ListCoordinatorsResponse { coordinators }))
    }

    async fn list_links(&self, request: Request<v1::ListLinksRequest>) -> Answer<v1::ListLinksResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ListLinks"))?;
        let registered = self.coordinators(Instant::now()).await?;
        let degraded = self.ask(Message::Links).await?;
        let (links, left_out) = coordinators::links(&registered, LINKS_LISTED);
        let links = links.into_iter().map(|link| view::link(link, &degraded)).collect();
        Ok(Response::new(v1::ListLinksResponse { links, left_out: left_out as u64 }))
    }

    async fn explain_plan(&self, request: Request<v1::ExplainPlanRequest>) -> Answer<v1::PlanResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ExplainPlan"))?;
        let v1::ExplainPlanRequest { group, targets: wire } = request.into_inner();
        let group = group_name(group)?;
        let what_if = match targets(wire)? {
            Some(targets) => {
                let group = needed(group.clone())?;
                Some(Change::Divide { group, targets: Some(targets) })
            }
            None => None,
        };
        let dry_run = what_if.is_some();
        let plans = self.plans(what_if).await?;
        if let Some(group) = &group
            && !plans.plans.iter().any(|plan| plan.group == *group)
        {
            let message = format!("no instance is in a group {group}");
            return Err(ApiError::new(ErrorCode::NotFound, message).into());
        }
        Ok(Response::new(view::plans(plans, group.as_ref(), dry_run)))
    }

    type WatchEventsStream = BoxStream<'static, Result<v1::FleetEvent, Status>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        self.access.check(&request, Right::Viewer, Call::look("WatchEvents"))?;
        let v1::WatchEventsRequest { after, follow, instance_id: wanted } = request.into_inner();
        let Some(inbox) = self.desk.inbox() else { return Err(not_leading(&*self.store).await) };
        let follow = follow.then_some(inbox);
        let entries = entries(self.journal.clone(), self.journal.last(), after, follow);
        let of_wanted = move |entry: &Entry| {
            let of = entry.news.instance.as_ref().map(InstanceId::as_str);
            futures::future::ready(wanted.is_empty() || of == Some(&wanted))
        };
        let events = entries.filter(of_wanted).map(|entry| Ok(view::event(entry)));
        Ok(Response::new(events.boxed()))
    }

    async fn cordon(&self, request: Request<v1::CordonRequest>) -> Answer<v1::PlanResponse> {
        let v1::CordonRequest { instance_id: id, reason, drain_millis, force, dry_run } =
            request.get_ref().clone();
        let call = Call { name: "Cordon", of: &request.get_ref().instance_id };
        self.change(&request, call, dry_run, |actor| {
            if reason.chars().count() > REASON_MAX {
                return Err(invalid("reason", format!("at most {REASON_MAX} characters")));
            }
            if reason.chars().any(char::is_control) {
                return Err(invalid("reason", "one line of text"));
            }
            let drain = (drain_millis > 0).then(|| Duration::from_millis(drain_millis.into()));
            if drain.is_some_and(|drain| drain > DRAIN_MOST) {
                return Err(invalid("drain_millis", "at most a day"));
            }
            let by = actor.to_owned();
            let cordoned = Cordoned { by, reason, unix_millis: unix_millis(), drain, force };
            Ok(Change::Cordon { id: instance_id(id)?, cordoned, only: Only::Always })
        })
        .await
    }

    async fn uncordon(&self, request: Request<v1::UncordonRequest>) -> Answer<v1::PlanResponse> {
        let v1::UncordonRequest { instance_id: id, dry_run } = request.get_ref().clone();
        let call = Call { name: "Uncordon", of: &request.get_ref().instance_id };
        let only = Only::Always;
        self.change(&request, call, dry_run, |_| Ok(Change::Uncordon { id: instance_id(id)?, only })).await
    }

    async fn set_role(&self, request: Request<v1::SetRoleRequest>) -> Answer<v1::PlanResponse> {
        let v1::SetRoleRequest { instance_id: id, role, dry_run } = request.get_ref().clone();
        let call = Call { name: "SetRole", of: &request.get_ref().instance_id };
        self.change(&request, call, dry_run, |actor| {
            let unpinned = role == i32::from(v1::Role::Unspecified);
            let role = Role::from_wire(role).map_err(|error| invalid("role", error))?;
            if role == Role::None && !unpinned {
                return Err(invalid("role", "cordon an instance that is to take no requests"));
            }
            let pinned = (!unpinned).then(|| Pinned { role, by: actor.to_owned() });
            Ok(Change::Pin { id: instance_id(id)?, pinned })
        })
        .await
    }

    async fn set_targets(&self, request: Request<v1::SetTargetsRequest>) -> Answer<v1::PlanResponse> {
        let v1::SetTargetsRequest { group, targets: wire, dry_run } = request.get_ref().clone();
        let call = Call { name: "SetTargets", of: &request.get_ref().group };
        self.change(&request, call, dry_run, |_| {
            Ok(Change::Divide { group: needed(group_name(group)?)?, targets: targets(wire)? })
        })
        .await
    }

    async fn rebalance(&self, request: Request<v1::RebalanceRequest>) -> Answer<v1::PlanResponse> {
        let v1::RebalanceRequest { group, dry_run } = request.get_ref().clone();
        let call = Call { name: "Rebalance", of: &request.get_ref().group };
        self.change(&request, call, dry_run, |_| Ok(Change::Rebalance { group: needed(group_name(group)?)? }))
            .await
    }

    async fn list_api_keys(
        &self,
        request: Request<v1::ListApiKeysRequest>,
    ) -> Answer<v1::ListApiKeysResponse> {
        self.access.check(&request, Right::Viewer, Call::look("ListApiKeys"))?;
        let keys = self.api_keys().await?.into_iter().map(Into::into).collect();
        Ok(Response::new(v1::ListApiKeysResponse { keys }))
    }

    async fn add_api_key(&self, request: Request<v1::AddApiKeyRequest>) -> Answer<v1::AddApiKeyResponse> {
        let wire = request.get_ref().key.clone().unwrap_or_default();
        let call = Call { name: "AddApiKey", of: &wire.name };
        let actor = self.access.check(&request, Right::Admin, call)?;
        self.add_api_key(wire, &actor.name).await?;
        Ok(Response::new(v1::AddApiKeyResponse {}))
    }

    async fn revoke_api_key(
        &self,
        request: Request<v1::RevokeApiKeyRequest>,
    ) -> Answer<v1::RevokeApiKeyResponse> {
        let name = request.get_ref().name.clone();
        let actor = self.access.check(&request, Right::Admin, Call { name: "RevokeApiKey", of: &name })?;
        self.revoke_api_key(name, &actor.name).await?;
        Ok(Response::new(v1::RevokeApiKeyResponse {}))
    }
}

/// Entries above `after`; with an inbox it goes on with what happens, until that term ends.
fn entries(
    journal: Journal,
    last: watch::Receiver<u64>,
    after: u64,
    follow: Option<Inbox>,
) -> impl futures::Stream<Item = Entry> {
    let read = move |(after, mut last, follow): (u64, watch::Receiver<u64>, Option<Inbox>)| {
        let journal = journal.clone();
        async move {
            loop {
                last.borrow_and_update();
                let entries = journal.after(after, EVENTS_AT_A_TIME);
                if let Some(newest) = entries.last() {
                    let after = newest.sequence;
                    return Some((futures::stream::iter(entries), (after, last, follow)));
                }
                let inbox = follow.as_ref()?;
                tokio::select! {
                    () = inbox.messages.closed() => return None,
                    changed = last.changed() => changed.ok()?,
                }
            }
        }
    };
    futures::stream::unfold((after, last, follow), read).flatten()
}
