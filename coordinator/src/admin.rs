//! The gRPC service RequestAdmin: what operators ask a coordinator. Thin: it checks who calls
//! ([`baton_process::access`]), and the facts are [`crate::requests`]'s. Nothing is changed here: viewers may call all of
//! it.

use std::{sync::Arc, time::Duration};

use baton_process::{
    Closed, HealthHandle, Tls,
    access::{Access, Call, Right},
    grpc::{CONNECTIONS, FRAME_BYTES, GrpcOptions, KeepAlive},
    tls::{Allowed, Door},
};
use baton_proto::{
    ApiError, ErrorCode, FILE_DESCRIPTOR_SET,
    v1::{self, request_admin_server::RequestAdminServer},
};
use baton_schedule::{Placement, Receipt, Scored, Side};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

use crate::{
    admit::Waits,
    requests::{Card, ENDED_KEPT, Lookup, Placing, Stage},
    serve::Service,
};

/// Serves RequestAdmin.
pub struct Admin {
    pub service: Arc<Service>,
    /// Who may ask.
    pub access: Access,
}

impl Admin {
    /// What the port for operators serves. Calls may go on for `drain` after the shutdown.
    pub fn port(
        self,
        health: HealthHandle,
        tls: Tls,
        closed: Closed,
        shutdown: CancellationToken,
        drain: Duration,
    ) -> (Routes, GrpcOptions) {
        // By certificate or token: the service itself asks.
        let calls = &[("/baton.v1.RequestAdmin/", Allowed::Anyone)];
        let options = GrpcOptions {
            health,
            services: vec!["baton.v1.RequestAdmin"],
            descriptors: FILE_DESCRIPTOR_SET,
            tls,
            door: Door { calls, without_certificate: self.access.takes_tokens() },
            shutdown,
            drain,
            keep_alive: KeepAlive::default(),
            connections: CONNECTIONS,
            frame_bytes: FRAME_BYTES,
            closed,
        };
        (Routes::new(RequestAdminServer::new(self)), options)
    }
}

#[tonic::async_trait]
impl v1::request_admin_server::RequestAdmin for Admin {
    async fn list_requests(
        &self,
        request: Request<v1::ListRequestsRequest>,
    ) -> Result<Response<v1::ListRequestsResponse>, Status> {
        self.access.check(&request, Right::Viewer, Call::look("ListRequests"))?;
        let requests = self.service.roster.list().iter().map(|card| view(card)).collect();
        Ok(Response::new(v1::ListRequestsResponse { requests }))
    }

    async fn explain_placement(
        &self,
        request: Request<v1::ExplainPlacementRequest>,
    ) -> Result<Response<v1::ExplainPlacementResponse>, Status> {
        self.access.check(&request, Right::Viewer, Call::look("ExplainPlacement"))?;
        let id = request.into_inner().request_id;
        let (card, ended) = match self.service.roster.find(&id) {
            Some(Lookup::Running(card)) => (card, false),
            Some(Lookup::Ended(card)) => (card, true),
            None => {
                let message = format!(
                    "request {id:?} does not run here, nor is it one of the last {ENDED_KEPT} that have ended here, or of as many \
                     that were refused before they had a place"
                );
                return Err(ApiError::new(ErrorCode::NotFound, message).into());
            }
        };
        let mut request = view(&card);
        if ended {
            request.stage = "ended".to_owned();
        }
        let (placings, left_out) = card.placings();
        let placements = placings.iter().map(placing).collect();
        let waiting = self.waiting(&card);
        let request = Some(request);
        Ok(Response::new(v1::ExplainPlacementResponse { request, placements, left_out, waiting }))
    }
}

impl Admin {
    fn waiting(&self, card: &Card) -> Option<v1::WaitingView> {
        let Stage::Queued { model, .. } = card.stage() else { return None };
        let line = &self.service.models.asked(Some(&model)).ok()?.line;
        let Waits { because, place } = line.explain(&card.request, &self.service.placer)?;
        let place = place.map(|(placement, receipt)| view_of(&placement, &receipt));
        Some(v1::WaitingView { because, place })
    }
}

fn placing(placing: &Placing) -> v1::PlacementView {
    let Placing { at, because, waited, placement, receipt } = placing;
    v1::PlacementView {
        age_millis: millis(*at),
        because: because.as_ref().map(ToString::to_string).unwrap_or_default(),
        waited_millis: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        ..view_of(placement, receipt)
    }
}

fn view_of(placement: &Placement, receipt: &Receipt) -> v1::PlacementView {
    let [prefill, decode] = placement.both();
    // A decode instance may be there twice: to decode, and to do all of it.
    let taken = |Scored { instance, side, .. }: &Scored| match placement {
        Placement::Alone(alone) => alone.instance == *instance && *side != Side::Decode,
        Placement::Apart { prefill, decode } => match side {
            Side::Prefill => prefill.instance == *instance,
            Side::Decode => decode.instance == *instance,
            Side::Whole => false,
        },
    };
    v1::PlacementView {
        prefill_instance: prefill.instance.to_string(),
        decode_instance: decode.instance.to_string(),
        prompt_tokens: receipt.prompt_tokens,
        expected_tokens: receipt.expected_tokens,
        choices: receipt.choices,
        policy: receipt.policy.name().to_owned(),
        candidates: u32::try_from(receipt.candidates).unwrap_or(u32::MAX),
        cost_micros: receipt.cost_micros,
        handoff_micros: receipt.handoff_micros,
        runner_up: receipt.runner_up.as_ref().map(|next| v1::RunnerUpView {
            prefill_instance: next.prefill.to_string(),
            decode_instance: next.decode.to_string(),
            cost_micros: next.cost_micros,
        }),
        away: receipt.left_aside.away,
        avoided: receipt.left_aside.avoided,
        full: receipt.left_aside.full,
        too_small: receipt.left_aside.too_small,
        cheapest: receipt.cheapest.iter().map(|scored| candidate(scored, taken(scored))).collect(),
        ..Default::default()
    }
}

fn candidate(scored: &Scored, taken: bool) -> v1::CandidateView {
    let standing = &scored.standing;
    v1::CandidateView {
        instance_id: scored.instance.to_string(),
        part: scored.side.name().to_owned(),
        cost_micros: scored.cost_micros,
        taken,
        queued_prefill_tokens: standing.queued_prefill_tokens,
        prefill_tokens_per_second: standing.prefill_tokens_per_second,
        sequences: standing.sequences,
        decode_step_micros: standing.decode_step_micros,
        kv_blocks_free: standing.blocks_free,
        kv_blocks_wanted: scored.blocks,
        cached_tokens: scored.cached_tokens,
        ttft_micros: scored.ttft_micros,
        tpot_micros: scored.tpot_micros,
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// With the code that the client was told, too.
fn told(error: &ApiError) -> String {
    format!("{}: {error}", error.code.name())
}

fn view(card: &Card) -> v1::RequestView {
    let view = v1::RequestView {
        request_id: card.request.to_string(),
        completion_tokens: card.completion_tokens(),
        age_millis: millis(card.arrived),
        api_key: card.api_key.to_string(),
        error: card.error().map(told).unwrap_or_default(),
        ..Default::default()
    };
    match card.stage() {
        Stage::Preparing => v1::RequestView { stage: "preparing".to_owned(), ..view },
        Stage::Queued { model, prompt_tokens } => {
            v1::RequestView { model: model.to_string(), stage: "queued".to_owned(), prompt_tokens, ..view }
        }
        Stage::Placed { model, prompt_tokens, prefill, decode } => v1::RequestView {
            model: model.to_string(),
            stage: if view.completion_tokens == 0 { "prefill" } else { "decode" }.to_owned(),
            prompt_tokens,
            prefill_instance: prefill.to_string(),
            decode_instance: decode.to_string(),
            ..view
        },
    }
}
