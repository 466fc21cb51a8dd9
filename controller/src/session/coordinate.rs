//! The gRPC adapter of `Control.Coordinate`: a coordinator's reports into the registry of [`crate::coordinators`], and how many
//! there are out of it.
//!
//! A stream ends when the coordinator ends it, when it says nothing for its lease, when a later process of its id is
//! taken, when this controller leads no more, and when the process stops. Only the first is a leave; whoever is cut
//! off, or breaks, is listed for its lease, as it may be on its way back.

use std::time::Duration;

use baton_process::tls::Peer;
use baton_proto::{
    ApiError, CoordinatorBeat, CoordinatorId, CoordinatorSpec, ErrorCode, LeaderEpoch, LinkUse, WireError,
    v1::{self, coordinator_report::Report as Wire},
};
use futures::{StreamExt, stream::BoxStream};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};
use tracing::{debug, info};

use super::{ControlService, HELLO_TIMEOUT, invalid, millis, not_leading};
use crate::{
    clock::unix_millis,
    coordinators::{Coordinators, Hello},
    desk::Message,
    fleet::SessionId,
    reconcile::Event,
};

/// What a coordinator is answered with: orders, and in the end perhaps why it is not wanted.
pub(super) type Orders = BoxStream<'static, Result<v1::CoordinatorOrder, Status>>;

/// Two orders and the end. Whoever has not read the first two is told the next when it has.
const ANSWERS: usize = 3;

pub(super) async fn coordinate(
    service: &ControlService,
    request: Request<Streaming<v1::CoordinatorReport>>,
) -> Result<Orders, Status> {
    let Some(inbox) = service.desk.inbox() else { return Err(not_leading(&*service.store).await) };
    let peer = Peer::of(&request);
    let mut reports = request.into_inner();
    let (spec, beat) = timeout(HELLO_TIMEOUT, hello(&mut reports))
        .await
        .map_err(|_| Status::from(ApiError::new(ErrorCode::DeadlineExceeded, "no hello came in time")))??;
    peer.speaks_as(spec.id.as_str())?;
    let reporter = Reporter {
        coordinators: service.coordinators.clone(),
        epoch: inbox.epoch,
        session: service.next_session(),
        id: spec.id.clone(),
        leading: inbox.messages.clone(),
        lease: service.config.sessions.lease,
        beat_millis: millis(service.config.sessions.beat),
    };
    let (session, lease) = (reporter.session, reporter.lease);
    let (incarnation, http) = (spec.incarnation, spec.http_endpoint.clone());
    let hello = Hello { session, spec, beat, unix_millis: unix_millis() };
    if let Err(refusal) = service.coordinators.hello(inbox.epoch, hello, lease, Instant::now()) {
        debug!(coordinator = %reporter.id, %incarnation, %refusal, "a coordinator is refused");
        return Err(refusal.into());
    }
    info!(coordinator = %reporter.id, %incarnation, %session, http, "a coordinator is here");

    let (answers, receiver) = mpsc::channel(ANSWERS);
    let told = reporter.order();
    answers.try_send(Ok(told)).map_err(|_| Status::internal("no room for an order"))?;
    let shutdown = service.shutdown.clone();
    service.tasks.spawn(async move {
        let why = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            // The leading task has dropped its inbox: the term is over.
            () = inbox.messages.closed() => {
                reporter.coordinators.over(reporter.epoch);
                Some(ApiError::new(ErrorCode::Unavailable, "this controller leads no more: ask another").into())
            }
            why = reporter.follow(&mut reports, &answers, told) => why,
        };
        debug!(coordinator = %reporter.id, session = %reporter.session, ?why, "the stream of a coordinator ends");
        if let Some(status) = why {
            // Who is not there to read it misses nothing.
            answers.try_send(Err(status)).ok();
        }
    });
    let shutdown = service.shutdown.clone().cancelled_owned();
    Ok(ReceiverStream::new(receiver).take_until(shutdown).boxed())
}

/// The first report of a stream.
async fn hello(
    reports: &mut Streaming<v1::CoordinatorReport>,
) -> Result<(CoordinatorSpec, CoordinatorBeat), Status> {
    let first = reports.message().await?.and_then(|report| report.report);
    let Some(Wire::Hello(hello)) = first else {
        return Err(ApiError::new(ErrorCode::InvalidArgument, "a stream begins with a hello").into());
    };
    let spec = hello.spec.ok_or(WireError::Missing("spec")).and_then(CoordinatorSpec::try_from);
    let beat = hello.beat.ok_or(WireError::Missing("beat")).and_then(CoordinatorBeat::try_from);
    Ok((spec.map_err(invalid)?, beat.map_err(invalid)?))
}

/// One stream and whose it is.
struct Reporter {
    coordinators: Coordinators,
    epoch: LeaderEpoch,
    session: SessionId,
    id: CoordinatorId,
    /// The task that judges links.
    leading: mpsc::Sender<Message>,
    lease: Duration,
    beat_millis: u32,
}

impl Reporter {
    /// As things are now.
    fn order(&self) -> v1::CoordinatorOrder {
        let coordinators = self.coordinators.serving(self.epoch, self.lease, Instant::now());
        v1::CoordinatorOrder { beat_millis: self.beat_millis, merges_links: true, coordinators }
    }

    /// Takes beats until the stream ends, and orders anew what has changed since it was `told`; what the coordinator is told
    /// in the end, if anything.
    async fn follow(
        &self,
        reports: &mut Streaming<v1::CoordinatorReport>,
        answers: &mpsc::Sender<Result<v1::CoordinatorOrder, Status>>,
        mut told: v1::CoordinatorOrder,
    ) -> Option<Status> {
        loop {
            let Ok(next) = timeout(self.lease, reports.message()).await else {
                return Some(ApiError::new(ErrorCode::DeadlineExceeded, "no beat came for the lease").into());
            };
            let report = match next {
                Ok(Some(report)) => report.report,
                Ok(None) => {
                    self.coordinators.left(self.epoch, self.session, &self.id);
                    return None;
                }
                Err(status) => {
                    debug!(coordinator = %self.id, %status, "the stream of a coordinator broke");
                    return None;
                }
            };
            match self.take(report) {
                Ok(handoffs) if handoffs.is_empty() => {}
                Ok(handoffs) => {
                    // Nobody takes it if the term has ended; then the stream ends, too.
                    self.leading.send(Message::Event(Event::Handoffs(handoffs))).await.ok();
                }
                Err(status) => return Some(status),
            }
            let order = self.order();
            // The last place is the end's.
            if order != told && answers.capacity() > 1 && answers.try_send(Ok(order)).is_ok() {
                told = order;
            }
        }
    }

    /// Enters a report; what it says of more handoffs.
    fn take(&self, report: Option<Wire>) -> Result<Vec<LinkUse>, Status> {
        match report {
            Some(Wire::Beat(beat)) => {
                let beat = CoordinatorBeat::try_from(beat).map_err(invalid)?;
                let (session, now) = (self.session, Instant::now());
                Ok(self.coordinators.beat(self.epoch, session, &self.id, beat, self.lease, now)?)
            }
            Some(Wire::Hello(_)) => Err(invalid(WireError::Unexpected("a second hello"))),
            // Of a kind that a later version may send.
            None => Ok(Vec::new()),
        }
    }
}
