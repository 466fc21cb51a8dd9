//! HTTP as every Baton process has it: `/metrics`, `/health` (the process answers) and `/readiness` (it can do its
//! work), and a server with a graceful end. The coordinator merges its API into the same router.

use std::{net::TcpListener, time::Duration};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::{HealthHandle, Metrics, ProcessError, metrics};

/// The routes by which a process is observed.
pub fn router(metrics: Metrics, health: HealthHandle) -> Router {
    let metrics = get(async move || ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics.render()));
    Router::new()
        .route("/metrics", metrics)
        .route("/health", get(async || Json(Status { status: "ok".to_owned() })))
        .route("/readiness", get(readiness).with_state(health))
}

#[derive(Serialize)]
struct Status {
    status: String,
}

async fn readiness(State(health): State<HealthHandle>) -> impl IntoResponse {
    let state = health.get();
    let code = if health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(Status { status: state.describe().to_owned() }))
}

/// Serves until `shutdown`, then lets running requests finish for up to `drain`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
    drain: Duration,
) -> Result<(), ProcessError> {
    listener.set_nonblocking(true).map_err(ProcessError::Http)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(ProcessError::Http)?;
    let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
        // Tokens are small and must leave at once; a socket that refuses is slow, not broken.
        let _ = stream.set_nodelay(true);
    });
    let service = router.into_make_service();
    let server = axum::serve(listener, service).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let cut_off = async {
        shutdown.cancelled().await;
        tokio::time::sleep(drain).await;
    };
    tokio::select! {
        result = server => result.map_err(ProcessError::Http),
        () = cut_off => {
            tracing::warn!(?drain, "some requests did not end in time and are cut off");
            Ok(())
        }
    }
}
