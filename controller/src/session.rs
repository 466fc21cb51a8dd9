//! The gRPC adapter of `Control`: reports in, orders out. Here are the instances' sessions; the coordinators' are in
//! [`coordinate`].
//!
//! Thin: it checks and converts, and hands everything to the leading task through the [`Desk`]. A session ends when
//! the instance ends it, when the leading task drops its [`Line`], or when the process stops. A controller that does
//! not lead refuses with `UNAVAILABLE`, naming the one that does: the server goes on to another.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use baton_process::tls::Peer;
use baton_proto::{
    ApiError, ErrorCode, InstanceSpec, LEADER_METADATA, LeaderEpoch, WireError,
    v1::{self, control_server, controller_order, instance_report::Report as Wire},
};
use baton_registry::{KeyRange, LeaderRecord, Store, keys, records::encode_spec};
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use crate::{
    clock::unix_millis,
    config::ControllerConfig,
    coordinators::Coordinators,
    desk::{Desk, Inbox, Line, Message, ORDERS_CAPACITY},
    fleet::{Beat, SessionId},
    reconcile::{Event, Order},
};

mod coordinate;

/// How long a new session may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Characters of a reason to leave.
const REASON_MAX: usize = 200;

/// Largest spec that is taken, as the store keeps it: a batch of them has to fit one request to etcd (1.5 MiB).
pub(crate) const SPEC_MAX_BYTES: usize = 8 << 10;

/// Takes sessions of instances and of coordinators.
#[derive(Debug)]
pub struct ControlService {
    config: Arc<ControllerConfig>,
    store: Arc<dyn Store>,
    desk: Desk,
    coordinators: Coordinators,
    last_session: AtomicU64,
    shutdown: CancellationToken,
    tasks: TaskTracker,
}

impl ControlService {
    pub fn new(
        config: Arc<ControllerConfig>,
        store: Arc<dyn Store>,
        desk: Desk,
        coordinators: Coordinators,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self { config, store, desk, coordinators, last_session: AtomicU64::new(0), shutdown, tasks }
    }

    fn next_session(&self) -> SessionId {
        SessionId(self.last_session.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// What a controller that does not lead answers with.
pub(crate) async fn not_leading(store: &dyn Store) -> Status {
    let leader =
        store.range(KeyRange::exact(keys::LEADER)).await.ok().and_then(|mut listing| listing.items.pop());
    let Some(leader) = leader.and_then(|item| LeaderRecord::decode(&item.value).ok()) else {
        let message = "no controller leads at the moment: try again";
        return ApiError::new(ErrorCode::Unavailable, message).into();
    };
    let (id, endpoint) = (leader.controller_id, leader.endpoint);
    let message = format!("this controller does not lead: ask {id} at {endpoint}");
    let mut status = Status::from(ApiError::new(ErrorCode::Unavailable, message));
    if let Ok(endpoint) = endpoint.parse() {
        status.metadata_mut().insert(LEADER_METADATA, endpoint);
    }
    status
}

fn invalid(error: WireError) -> Status {
    ApiError::new(ErrorCode::InvalidArgument, format!("this report cannot be taken: {error}")).into()
}

#[tonic::async_trait]
impl control_server::Control for ControlService {
    type CoordinateStream = coordinate::Orders;

    async fn coordinate(
        &self,
        request: Request<Streaming<v1::CoordinatorReport>>,
    ) -> Result<Response<Self::CoordinateStream>, Status> {
        coordinate::coordinate(self, request).await.map(Response::new)
    }

    type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::ControllerOrder, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::InstanceReport>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let Some(inbox) = self.desk.inbox() else { return Err(not_leading(&*self.store).await) };
        let peer = Peer::of(&request);
        let mut reports = request.into_inner();
        let (spec, beat) =
            tokio::time::timeout(HELLO_TIMEOUT, hello(&mut reports)).await.map_err(|_| {
                Status::from(ApiError::new(ErrorCode::DeadlineExceeded, "no hello came in time"))
            })??;
        peer.speaks_as(spec.id.as_str())?;
        let (session, unix_millis) = (self.next_session(), unix_millis());
        let (orders, receiver) = mpsc::channel(ORDERS_CAPACITY);
        let end = self.shutdown.child_token();
        let line = Line { orders, end: end.clone().drop_guard() };
        let event = Event::Hello { session, spec: Box::new(spec), beat, unix_millis };
        if inbox.messages.send(Message::Hello { event, session, line }).await.is_err() {
            return Err(not_leading(&*self.store).await);
        }
        let welcome = welcome(&self.config, inbox.epoch);
        let drain = self.config.roles.drain;
        self.tasks.spawn(read(session, reports, inbox, end));
        let answers =
            ReceiverStream::new(receiver).map(move |order| Ok(order_to_wire(order, &welcome, drain)));
        let shutdown = self.shutdown.clone().cancelled_owned();
        Ok(Response::new(answers.take_until(shutdown).boxed()))
    }
}

/// The first report of a session.
async fn hello(reports: &mut Streaming<v1::InstanceReport>) -> Result<(InstanceSpec, Beat), Status> {
    presented(reports.message().await?.and_then(|report| report.report))
}

/// Who says hello, and how it is.
pub(crate) fn presented(first: Option<Wire>) -> Result<(InstanceSpec, Beat), Status> {
    let Some(Wire::Hello(hello)) = first else {
        return Err(ApiError::new(ErrorCode::InvalidArgument, "a session begins with a hello").into());
    };
    let spec =
        hello.spec.ok_or(WireError::Missing("spec")).and_then(InstanceSpec::try_from).map_err(invalid)?;
    let size = encode_spec(&spec).len();
    if size > SPEC_MAX_BYTES {
        let message = format!(
            "the spec of {} has {size} bytes, over the limit of {SPEC_MAX_BYTES}: give it fewer or shorter labels",
            spec.id
        );
        return Err(ApiError::new(ErrorCode::InvalidArgument, message).into());
    }
    let beat = hello.beat.ok_or(WireError::Missing("beat")).and_then(Beat::try_from).map_err(invalid)?;
    Ok((spec, beat))
}

/// Hands reports on until one side ends the session, and says so.
async fn read(
    session: SessionId,
    mut reports: Streaming<v1::InstanceReport>,
    inbox: Inbox,
    end: CancellationToken,
) {
    let reading = async {
        loop {
            let event = match reports.message().await {
                Ok(Some(report)) => match event_of(session, report) {
                    Ok(Some(event)) => event,
                    // Of a kind that a later version may send.
                    Ok(None) => continue,
                    Err(error) => {
                        debug!(%session, %error, "a report that cannot be read ends the session");
                        break;
                    }
                },
                Ok(None) => break,
                Err(status) => {
                    debug!(%session, %status, "a session broke");
                    break;
                }
            };
            if inbox.messages.send(Message::Event(event)).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = end.cancelled() => {}
        () = reading => {
            // Nobody reads it if the term has ended; then there is nothing to close either.
            inbox.messages.send(Message::Event(Event::Closed { session })).await.ok();
        }
    }
}

pub(crate) fn event_of(session: SessionId, report: v1::InstanceReport) -> Result<Option<Event>, WireError> {
    Ok(match report.report {
        Some(Wire::Beat(beat)) => Some(Event::Beat { session, beat: beat.try_into()? }),
        Some(Wire::Bye(bye)) => {
            let reason = bye.reason.chars().filter(|c| !c.is_control()).take(REASON_MAX).collect();
            Some(Event::Bye { session, reason })
        }
        Some(Wire::Hello(_)) => return Err(WireError::Unexpected("a second hello")),
        None => None,
    })
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn welcome(config: &ControllerConfig, epoch: LeaderEpoch) -> controller_order::Welcome {
    controller_order::Welcome {
        controller_id: config.controller_id.clone(),
        leader_epoch: epoch.0,
        beat_millis: millis(config.sessions.beat),
        lease_millis: millis(config.sessions.lease),
    }
}

fn order_to_wire(order: Order, welcome: &controller_order::Welcome, drain: Duration) -> v1::ControllerOrder {
    let order = match order {
        Order::Welcome => controller_order::Order::Welcome(welcome.clone()),
        Order::Assign(desired) => controller_order::Order::Assign(v1::AssignRole {
            role: desired.role.to_wire().into(),
            epoch: desired.epoch.0,
            reason: desired.reason,
            drain_millis: millis(desired.drain.unwrap_or(drain)),
            cordoned: desired.cordoned,
        }),
        Order::Refuse { reason, held } => controller_order::Order::Refuse(v1::Refuse {
            reason: Some(reason.into()),
            held_incarnation: held.map_or(0, |held| held.0),
        }),
    };
    v1::ControllerOrder { order: Some(order) }
}
