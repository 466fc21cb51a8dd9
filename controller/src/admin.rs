//! The gRPC adapter of `FleetAdmin`: the fleet as `baton ctl` shows it, with intent and observation side by side.

use std::sync::Arc;

use baton_proto::{
    CoordinatorBeat,
    v1::{self, fleet_admin_server},
};
use baton_registry::{DesiredRole, Store};
use tokio::{sync::oneshot, time::Instant};
use tonic::{Request, Response, Status};

use crate::{
    coordinators::{self, Coordinators, Registered},
    desk::{Desk, Message, Report},
    fleet::Member,
    session::not_leading,
};

/// Links in one answer: as many as fit a message of gRPC's usual limit, 4 MiB, with the longest of names.
const LINKS_LISTED: usize = 16_384;

/// Answers operators, while this controller leads.
#[derive(Debug)]
pub struct AdminService {
    store: Arc<dyn Store>,
    desk: Desk,
    coordinators: Coordinators,
}

impl AdminService {
    pub fn new(store: Arc<dyn Store>, desk: Desk, coordinators: Coordinators) -> Self {
        Self { store, desk, coordinators }
    }

    /// Those that report to this controller, if it leads.
    async fn coordinators(&self, now: Instant) -> Result<Vec<Registered>, Status> {
        match self.desk.inbox().filter(|inbox| !inbox.messages.is_closed()) {
            Some(inbox) => Ok(self.coordinators.list(inbox.epoch, now)),
            None => Err(not_leading(&*self.store).await),
        }
    }

    async fn report(&self) -> Result<Report, Status> {
        if let Some(inbox) = self.desk.inbox() {
            let (answer, report) = oneshot::channel();
            if inbox.messages.send(Message::Report(answer)).await.is_ok()
                && let Ok(report) = report.await
            {
                return Ok(report);
            }
        }
        Err(not_leading(&*self.store).await)
    }
}

#[tonic::async_trait]
impl fleet_admin_server::FleetAdmin for AdminService {
    async fn list_instances(
        &self,
        _: Request<v1::ListInstancesRequest>,
    ) -> Result<Response<v1::ListInstancesResponse>, Status> {
        let report = self.report().await?;
        let registered = report.members.values().filter(|member| member.is_registered());
        let instances = registered.map(|member| instance(member, report.at)).collect();
        Ok(Response::new(v1::ListInstancesResponse { instances }))
    }

    async fn list_roles(
        &self,
        _: Request<v1::ListRolesRequest>,
    ) -> Result<Response<v1::ListRolesResponse>, Status> {
        let report = self.report().await?;
        let here = report
            .members
            .values()
            .map(|member| role_view(member.spec.id.as_str(), member.desired.as_ref(), Some(member)));
        let gone = report.remembered.iter().map(|(id, desired)| role_view(id.as_str(), Some(desired), None));
        let mut roles: Vec<_> = here.chain(gone).collect();
        roles.sort_by(|a, b| a.instance_id.cmp(&b.instance_id));
        Ok(Response::new(v1::ListRolesResponse { roles }))
    }

    async fn list_coordinators(
        &self,
        _: Request<v1::ListCoordinatorsRequest>,
    ) -> Result<Response<v1::ListCoordinatorsResponse>, Status> {
        let now = Instant::now();
        let registered = self.coordinators(now).await?;
        let links = LINKS_LISTED / registered.len().max(1);
        let coordinators = registered.into_iter().map(|one| coordinator(one, links, now)).collect();
        Ok(Response::new(v1::ListCoordinatorsResponse { coordinators }))
    }

    async fn list_links(
        &self,
        _: Request<v1::ListLinksRequest>,
    ) -> Result<Response<v1::ListLinksResponse>, Status> {
        let registered = self.coordinators(Instant::now()).await?;
        let (links, left_out) = coordinators::links(&registered, LINKS_LISTED);
        let links = links.into_iter().map(v1::Link::from).collect();
        Ok(Response::new(v1::ListLinksResponse { links, left_out: left_out as u64 }))
    }

    async fn explain_plan(
        &self,
        _: Request<v1::ExplainPlanRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn cordon(&self, _: Request<v1::CordonRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn uncordon(&self, _: Request<v1::UncordonRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn set_role(&self, _: Request<v1::SetRoleRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn set_targets(
        &self,
        _: Request<v1::SetTargetsRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn rebalance(
        &self,
        _: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    type WatchEventsStream = futures::stream::BoxStream<'static, Result<v1::FleetEvent, Status>>;

    async fn watch_events(
        &self,
        _: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        Err(Status::unimplemented("not yet"))
    }
}

fn instance(member: &Member, now: Instant) -> v1::Instance {
    let age = now.duration_since(member.last_beat);
    v1::Instance {
        spec: Some(member.spec.clone().into()),
        beat: Some(member.beat.into()),
        registered_unix_millis: member.registered_unix_millis,
        last_beat_age_millis: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    }
}

/// With so many of its links.
fn coordinator(registered: Registered, links: usize, now: Instant) -> v1::Coordinator {
    let age = now.saturating_duration_since(registered.last_beat);
    let links = registered.beat.links.iter().take(links).cloned().collect();
    let beat = CoordinatorBeat { links, ..*registered.beat };
    v1::Coordinator {
        spec: Some(registered.spec.into()),
        beat: Some(beat.into()),
        registered_unix_millis: registered.registered_unix_millis,
        last_beat_age_millis: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    }
}

/// `member` is none for an instance that is gone.
fn role_view(id: &str, desired: Option<&DesiredRole>, member: Option<&Member>) -> v1::RoleView {
    let member = member.filter(|member| member.is_registered());
    v1::RoleView {
        instance_id: id.to_owned(),
        desired_role: desired.map_or(v1::Role::Unspecified, |desired| desired.role.to_wire()).into(),
        desired_epoch: desired.map_or(0, |desired| desired.epoch.0),
        reason: desired.map(|desired| desired.reason.clone()).unwrap_or_default(),
        observed_role: member.map_or(v1::Role::Unspecified, |member| member.beat.role.to_wire()).into(),
        observed_epoch: member.map_or(0, |member| member.beat.role_epoch.0),
        phase: member.map_or(v1::Phase::Unspecified, |member| member.beat.phase.to_wire()).into(),
        registered: member.is_some(),
        stuck: member.and_then(|member| member.stuck.as_ref()).map(ToString::to_string).unwrap_or_default(),
        intent: None,
    }
}
