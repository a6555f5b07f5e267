//! Placeholder: the lead replaces this file.

use std::sync::Arc;

use axum::Router;

use crate::app::App;

/// The routes below `/git/`.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
}
