//! A handler that panics costs one request, not the connection and its other streams.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use axum::http::Uri;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;

use crate::error::Error;

/// The answer to a request for `uri`: 500 when its handler panics.
pub async fn caught(uri: &Uri, handler: impl Future<Output = Response>) -> Response {
    match AssertUnwindSafe(handler).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => {
            let (path, message) = (uri.path(), message(&*panic));
            Error::Internal(anyhow::anyhow!("the handler of {path} panicked: {message}"))
                .into_response()
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
