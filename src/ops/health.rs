//! Alive and ready, for whatever restarts the service and sends requests to it.
//!
//! Neither touches the disk or a pool of threads, so both answer at once under any load; neither asks for credentials.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CACHE_CONTROL, HeaderName};
use axum::response::IntoResponse;

use crate::app::App;

const FRESH: [(HeaderName, &str); 1] = [(CACHE_CONTROL, "no-store")];

/// `/healthz`: 200 as long as the process answers at all.
pub async fn alive() -> impl IntoResponse {
    (FRESH, "ok\n")
}

/// `/readyz`: 200, or 503 with the reason while loading and while stopping.
pub async fn ready(State(app): State<Arc<App>>) -> impl IntoResponse {
    match app.ready() {
        Ok(()) => (StatusCode::OK, FRESH, "ready\n".to_owned()),
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            FRESH,
            format!("{reason}\n"),
        ),
    }
}
