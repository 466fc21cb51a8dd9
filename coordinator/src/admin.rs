//! The gRPC service RequestAdmin: what operators ask a coordinator. Thin: the facts are [`crate::requests`]'s.

use std::sync::Arc;

use baton_proto::v1;
use tonic::{Request, Response, Status};

use crate::requests::{Card, Roster, Stage};

/// Serves RequestAdmin.
pub struct Admin {
    pub roster: Arc<Roster>,
    pub model: String,
}

#[tonic::async_trait]
impl v1::request_admin_server::RequestAdmin for Admin {
    async fn list_requests(
        &self,
        _: Request<v1::ListRequestsRequest>,
    ) -> Result<Response<v1::ListRequestsResponse>, Status> {
        let requests = self.roster.list().iter().map(|card| view(card, &self.model)).collect();
        Ok(Response::new(v1::ListRequestsResponse { requests }))
    }
}

fn view(card: &Card, model: &str) -> v1::RequestView {
    let completion_tokens = card.completion_tokens();
    let (stage, prompt_tokens, prefill_instance, decode_instance) = match card.stage() {
        Stage::Preparing => ("preparing", 0, String::new(), String::new()),
        Stage::Queued { prompt_tokens } => ("queued", prompt_tokens, String::new(), String::new()),
        Stage::Placed { prompt_tokens, prefill, decode } => {
            let stage = if completion_tokens == 0 { "prefill" } else { "decode" };
            (stage, prompt_tokens, prefill.to_string(), decode.to_string())
        }
    };
    v1::RequestView {
        request_id: card.request.to_string(),
        model: model.to_owned(),
        stage: stage.to_owned(),
        prefill_instance,
        decode_instance,
        prompt_tokens,
        completion_tokens,
        age_millis: u64::try_from(card.arrived.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
