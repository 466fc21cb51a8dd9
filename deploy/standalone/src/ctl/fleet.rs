//! Asks the controller that leads. Connects when first asked, follows a controller that names the leader once a
//! question, and connects anew after a connection has failed.

use std::future::Future;

use baton_proto::{
    LEADER_METADATA,
    v1::{
        Coordinator, ExplainPlanRequest, FleetEvent, GroupPlan, Instance, ListCoordinatorsRequest,
        ListInstancesRequest, ListLinksRequest, ListLinksResponse, ListRolesRequest, RoleView, Targets,
        WatchEventsRequest, fleet_admin_client::FleetAdminClient,
    },
};
use tonic::{
    Code, Response, Status, Streaming, service::interceptor::InterceptedService, transport::Channel,
};

use super::{
    connect::{ANSWER, CONTROLLER, MAX_ANSWER_BYTES, Reach},
    error::CtlError,
    line::{Bearer, Line},
};

pub(super) type Client = FleetAdminClient<InterceptedService<Channel, Bearer>>;

/// The fleet, as the controller knows it.
#[derive(Debug)]
pub(super) struct Fleet {
    reach: Reach,
    line: Option<Line>,
}

impl Fleet {
    pub(super) fn new(reach: Reach) -> Self {
        Self { reach, line: None }
    }

    pub(super) fn reach(&self) -> &Reach {
        &self.reach
    }

    /// Whether those that the controller names are to be asked by TLS too.
    pub(super) fn is_secure(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.secure)
    }

    /// One question, whichever controller leads.
    pub(super) async fn ask<Q, A, F>(
        &mut self,
        question: Q,
        call: impl Fn(Client, Q) -> F,
    ) -> Result<A, CtlError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let line = match self.line.take() {
            Some(line) => line,
            None => self.reach.controller().await?,
        };
        let status = match call(client(&line), question.clone()).await {
            Ok(answer) => {
                self.line = Some(line);
                return Ok(answer.into_inner());
            }
            Err(status) => status,
        };
        let Some(leader) = leader(&status) else {
            let error = line.refused(&status);
            // One that cannot answer now is not asked again: the next question finds another.
            self.line = (status.code() != Code::Unavailable && std::error::Error::source(&status).is_none())
                .then_some(line);
            return Err(error);
        };
        let scheme = if line.secure { "https://" } else { "" };
        let led = self.reach.open(CONTROLLER, &format!("{scheme}{leader}")).await;
        let led =
            led.map_err(|error| CtlError::Leader { asked: line.address, leader, source: Box::new(error) })?;
        let answer = call(client(&led), question).await.map_err(|status| led.refused(&status))?;
        self.line = Some(led);
        Ok(answer.into_inner())
    }

    pub(super) async fn instances(&mut self) -> Result<Vec<Instance>, CtlError> {
        let call = |mut client: Client, question| async move { client.list_instances(question).await };
        self.ask(ListInstancesRequest {}, call).await.map(|answer| answer.instances)
    }

    pub(super) async fn roles(&mut self) -> Result<Vec<RoleView>, CtlError> {
        let call = |mut client: Client, question| async move { client.list_roles(question).await };
        self.ask(ListRolesRequest {}, call).await.map(|answer| answer.roles)
    }

    pub(super) async fn coordinators(&mut self) -> Result<Vec<Coordinator>, CtlError> {
        let call = |mut client: Client, question| async move { client.list_coordinators(question).await };
        self.ask(ListCoordinatorsRequest {}, call).await.map(|answer| answer.coordinators)
    }

    pub(super) async fn links(&mut self) -> Result<ListLinksResponse, CtlError> {
        let call = |mut client: Client, question| async move { client.list_links(question).await };
        self.ask(ListLinksRequest {}, call).await
    }

    /// Of one group, or of all; with `targets`, how it would be divided by these.
    pub(super) async fn plans(
        &mut self,
        group: &str,
        targets: Option<Targets>,
    ) -> Result<Vec<GroupPlan>, CtlError> {
        let question = ExplainPlanRequest { group: group.to_owned(), targets };
        let call = |mut client: Client, question| async move { client.explain_plan(question).await };
        self.ask(question, call).await.map(|answer| answer.groups)
    }

    /// With `follow` it goes on until the controller ends.
    pub(super) async fn events(
        &mut self,
        after: u64,
        follow: bool,
        instance_id: &str,
    ) -> Result<Events, CtlError> {
        let question = WatchEventsRequest { after, follow, instance_id: instance_id.to_owned() };
        let call = |mut client: Client, question| async move { client.watch_events(question).await };
        let stream = self.ask(question, call).await?;
        let Some(line) = self.line.clone() else { return Err(CtlError::NoCluster(CONTROLLER)) };
        Ok(Events { stream, follow, line })
    }
}

/// What happens, one by one.
#[derive(Debug)]
pub(super) struct Events {
    stream: Streaming<FleetEvent>,
    follow: bool,
    line: Line,
}

impl Events {
    pub(super) async fn next(&mut self) -> Result<Option<FleetEvent>, CtlError> {
        let message = if self.follow {
            self.stream.message().await
        } else {
            let message = tokio::time::timeout(ANSWER, self.stream.message()).await;
            message.unwrap_or_else(|_| Err(Status::deadline_exceeded("its list of events does not end")))
        };
        message.map_err(|status| self.line.refused(&status))
    }

    /// The last `most` of those that have happened.
    pub(super) async fn last(mut self, most: usize) -> Result<Vec<FleetEvent>, CtlError> {
        let mut events = std::collections::VecDeque::new();
        while let Some(event) = self.next().await? {
            if events.len() == most {
                events.pop_front();
            }
            events.push_back(event);
        }
        Ok(events.into())
    }
}

fn client(line: &Line) -> Client {
    FleetAdminClient::new(line.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES)
}

fn leader(status: &Status) -> Option<String> {
    let named = status.metadata().get(LEADER_METADATA).filter(|_| status.code() == Code::Unavailable)?;
    named.to_str().ok().map(str::to_owned)
}
