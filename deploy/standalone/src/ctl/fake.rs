//! Test only: a controller and coordinators that answer as they are told, over real sockets, and remember what they
//! were asked.

use std::sync::{Arc, Mutex};

use baton_proto::{
    LEADER_METADATA,
    v1::{
        self,
        fleet_admin_server::{FleetAdmin, FleetAdminServer},
        request_admin_server::{RequestAdmin, RequestAdminServer},
    },
};
use futures::{StreamExt, stream::BoxStream};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Server, ServerTlsConfig},
};

/// What a fake controller says.
#[derive(Debug, Clone, Default)]
pub(super) struct Says {
    pub(super) instances: Vec<v1::Instance>,
    /// One answer after the other; the last one for good.
    pub(super) roles: Vec<Vec<v1::RoleView>>,
    pub(super) coordinators: Vec<v1::Coordinator>,
    pub(super) links: Vec<v1::Link>,
    pub(super) groups: Vec<v1::GroupPlan>,
    pub(super) events: Vec<v1::FleetEvent>,
    pub(super) keys: Vec<v1::ApiKey>,
    /// Does not lead, and names who does.
    pub(super) leader: Option<String>,
    /// The only token that is let in.
    pub(super) token: Option<&'static str>,
    /// Refuses whatever is asked.
    pub(super) refuses: Option<Status>,
}

/// A running one. Ends with the test.
#[derive(Debug, Clone)]
pub(super) struct Fake {
    pub(super) address: String,
    says: Arc<Mutex<Says>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    pub(super) async fn controller(says: Says) -> Self {
        Self::controller_with(says, None).await
    }

    pub(super) async fn controller_with(says: Says, tls: Option<ServerTlsConfig>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let fake = Self { address, says: Arc::new(Mutex::new(says)), asked: Arc::default() };
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        let served = server.add_service(FleetAdminServer::new(fake.clone()));
        tokio::spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
        fake
    }

    /// Names of the questions, with what of them matters.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn hear<T: std::fmt::Debug>(&self, request: &Request<T>, what: &str) -> Result<Says, Status> {
        self.asked.lock().unwrap().push(what.to_owned());
        let says = self.says.lock().unwrap().clone();
        if let Some(leader) = &says.leader {
            let mut status = Status::unavailable("this controller does not lead");
            status.metadata_mut().insert(LEADER_METADATA, leader.parse().unwrap());
            return Err(status);
        }
        let_in(says.token, request)?;
        says.refuses.clone().map_or(Ok(says), Err)
    }

    fn plan<T: std::fmt::Debug>(
        &self,
        request: &Request<T>,
        what: &str,
        dry_run: bool,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let groups = self.hear(request, what)?.groups;
        Ok(Response::new(v1::PlanResponse { groups, dry_run }))
    }
}

#[tonic::async_trait]
impl FleetAdmin for Fake {
    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Result<Response<v1::ListInstancesResponse>, Status> {
        let instances = self.hear(&request, "instances")?.instances;
        Ok(Response::new(v1::ListInstancesResponse { instances }))
    }

    async fn list_roles(
        &self,
        request: Request<v1::ListRolesRequest>,
    ) -> Result<Response<v1::ListRolesResponse>, Status> {
        self.hear(&request, "roles")?;
        let answers = &mut self.says.lock().unwrap().roles;
        let roles =
            if answers.len() > 1 { answers.remove(0) } else { answers.first().cloned().unwrap_or_default() };
        Ok(Response::new(v1::ListRolesResponse { roles }))
    }

    async fn list_coordinators(
        &self,
        request: Request<v1::ListCoordinatorsRequest>,
    ) -> Result<Response<v1::ListCoordinatorsResponse>, Status> {
        let coordinators = self.hear(&request, "coordinators")?.coordinators;
        Ok(Response::new(v1::ListCoordinatorsResponse { coordinators }))
    }

    async fn list_links(
        &self,
        request: Request<v1::ListLinksRequest>,
    ) -> Result<Response<v1::ListLinksResponse>, Status> {
        let links = self.hear(&request, "links")?.links;
        Ok(Response::new(v1::ListLinksResponse { links, left_out: 0 }))
    }

    async fn explain_plan(
        &self,
        request: Request<v1::ExplainPlanRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let v1::ExplainPlanRequest { group, targets } = request.get_ref();
        let what = format!("plan of {group:?}{}", if targets.is_some() { ", what if" } else { "" });
        self.plan(&request, &what, targets.is_some())
    }

    async fn cordon(
        &self,
        request: Request<v1::CordonRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let v1::CordonRequest { instance_id, reason, drain_millis, force, dry_run } = request.get_ref();
        let what = format!("cordon {instance_id} {reason:?} {drain_millis} {force} {dry_run}");
        self.plan(&request, &what, *dry_run)
    }

    async fn uncordon(
        &self,
        request: Request<v1::UncordonRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let v1::UncordonRequest { instance_id, dry_run } = request.get_ref();
        self.plan(&request, &format!("uncordon {instance_id} {dry_run}"), *dry_run)
    }

    async fn set_role(
        &self,
        request: Request<v1::SetRoleRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let asked = request.get_ref();
        let what = format!("set-role {} {:?} {}", asked.instance_id, asked.role(), asked.dry_run);
        self.plan(&request, &what, asked.dry_run)
    }

    async fn set_targets(
        &self,
        request: Request<v1::SetTargetsRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let v1::SetTargetsRequest { group, targets, dry_run } = request.get_ref();
        let targets = targets.as_ref().map(super::words::targets);
        self.plan(&request, &format!("set-targets {group} {targets:?} {dry_run}"), *dry_run)
    }

    async fn rebalance(
        &self,
        request: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::PlanResponse>, Status> {
        let v1::RebalanceRequest { group, dry_run } = request.get_ref();
        self.plan(&request, &format!("rebalance {group} {dry_run}"), *dry_run)
    }

    async fn list_api_keys(
        &self,
        request: Request<v1::ListApiKeysRequest>,
    ) -> Result<Response<v1::ListApiKeysResponse>, Status> {
        let keys = self.hear(&request, "keys")?.keys;
        Ok(Response::new(v1::ListApiKeysResponse { keys }))
    }

    async fn add_api_key(
        &self,
        request: Request<v1::AddApiKeyRequest>,
    ) -> Result<Response<v1::AddApiKeyResponse>, Status> {
        let key = request.get_ref().key.clone().unwrap_or_default();
        let (name, tenant, bytes) = (&key.name, &key.tenant, key.sha256.len());
        let what = format!("add-key {name} {tenant} {bytes} {:?} {}", key.band(), key.requests_per_minute);
        self.hear(&request, &what)?;
        Ok(Response::new(v1::AddApiKeyResponse {}))
    }

    async fn revoke_api_key(
        &self,
        request: Request<v1::RevokeApiKeyRequest>,
    ) -> Result<Response<v1::RevokeApiKeyResponse>, Status> {
        self.hear(&request, &format!("revoke-key {}", request.get_ref().name))?;
        Ok(Response::new(v1::RevokeApiKeyResponse {}))
    }

    type WatchEventsStream = BoxStream<'static, Result<v1::FleetEvent, Status>>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let v1::WatchEventsRequest { after, follow, instance_id } = request.get_ref();
        let (after, follow) = (*after, *follow);
        let mut events =
            self.hear(&request, &format!("events after {after} {follow} {instance_id:?}"))?.events;
        events.retain(|event| event.sequence > after);
        let told = futures::stream::iter(events.into_iter().map(Ok));
        let told = if follow { told.chain(futures::stream::pending()).boxed() } else { told.boxed() };
        Ok(Response::new(told))
    }
}

/// `token` is the only one that is let in.
fn let_in<T>(token: Option<&str>, request: &Request<T>) -> Result<(), Status> {
    let given = request.metadata().get("authorization").map(|value| value.to_str().unwrap());
    match (token, given) {
        (Some(_), None) => Err(Status::unauthenticated("no token came")),
        (Some(token), Some(given)) if given != format!("Bearer {token}") => {
            Err(Status::unauthenticated("nobody has this token"))
        }
        _ => Ok(()),
    }
}

/// A coordinator that carries one request, called as it is.
pub(super) async fn coordinator(request: &str) -> String {
    coordinator_for(request, None).await
}

/// One that lets in who has this token.
pub(super) async fn coordinator_for(request: &str, token: Option<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let served = Server::builder()
        .add_service(RequestAdminServer::new(Carries { request: request.to_owned(), token }));
    tokio::spawn(served.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

#[derive(Debug)]
struct Carries {
    request: String,
    token: Option<&'static str>,
}

#[tonic::async_trait]
impl RequestAdmin for Carries {
    async fn list_requests(
        &self,
        request: Request<v1::ListRequestsRequest>,
    ) -> Result<Response<v1::ListRequestsResponse>, Status> {
        let_in(self.token, &request)?;
        let request = v1::RequestView { request_id: self.request.clone(), ..Default::default() };
        Ok(Response::new(v1::ListRequestsResponse { requests: vec![request] }))
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainPlacementRequest>,
    ) -> Result<Response<v1::ExplainPlacementResponse>, Status> {
        let_in(self.token, &request)?;
        match request.get_ref().request_id == self.request {
            true => Ok(Response::new(super::placement::tests::answer(&self.request))),
            false => Err(Status::not_found("another carries it")),
        }
    }
}

/// An address where nobody listens.
pub(super) fn nobody() -> String {
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    held.local_addr().unwrap().to_string()
}
