//! The route table and the middleware stack, nothing else.

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::get;

use crate::app::App;
use crate::error::Error;
use crate::git::door;
use crate::ops::{api, health, requests, scrape, status};
use crate::server::panics;

/// Everything that the service answers.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(status::page))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(scrape::metrics))
        .route("/api/v1/status", get(api::status))
        .merge(door::routes())
        .fallback(async || Error::NotFound)
        .method_not_allowed_fallback(async || Error::MethodNotAllowed)
        // The last one is the first to see a request.
        .layer(from_fn(panics::catch))
        .layer(from_fn_with_state(app.clone(), requests::record))
        .with_state(app)
}
