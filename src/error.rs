//! The one error type at the HTTP boundary, and its one mapping to a response.

use std::time::Duration;

use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::server::body::Idle;

/// What a request can end with instead of an answer.
///
/// A client sees the status and one sentence as `text/plain; charset=utf-8`; git prints it as `remote: …`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// 404, for what does not exist.
    ///
    /// SECURITY: also for what the requester may not read, so that nobody can find out which private repositories exist.
    #[error("There is nothing here, or nothing that you may read.")]
    NotFound,

    /// 401 with a challenge; git asks its credential helper and tries again.
    #[error(
        "Credentials are missing or wrong: send a token as Bearer, or as the password of Basic."
    )]
    Unauthorized,

    /// 403 for `git push`. `upstream` is where to push instead, for example `github.com/rust-lang/log`.
    #[error("warmdock is read-only: push to {upstream}.")]
    PushRefused {
        /// Shown to the client: host and path, never with credentials.
        upstream: String,
    },

    /// 400. The text says what was expected and what was found, as a sentence.
    #[error("{0}")]
    BadRequest(String),

    /// 405 with `Allow`.
    #[error("This address does not take that method.")]
    MethodNotAllowed {
        /// What the address does take, as `Allow` has it: `GET,HEAD`.
        allow: &'static str,
    },

    /// 408 for a request body that stopped coming.
    #[error("The request body stopped coming: send it without pauses.")]
    RequestTimeout,

    /// 413. `limit` in bytes, after decoding.
    #[error("The request body is larger than the limit of {limit} bytes.")]
    PayloadTooLarge {
        /// In bytes.
        limit: u64,
    },

    /// 415 for a content type or encoding that is not understood. The text names what is, as a sentence.
    #[error("{0}")]
    UnsupportedMediaType(String),

    /// 503 with `Retry-After`, rounded up to whole seconds.
    #[error("The service is busy with this: try again in {} s.", whole_seconds(*retry_after))]
    Busy {
        /// When to try again.
        retry_after: Duration,
    },

    /// 502. The text is shown to the client: no credentials, no URL with user info.
    #[error("The upstream failed: {0}")]
    UpstreamFailed(String),

    /// 507: the data limit leaves no room, and nothing can be evicted.
    #[error("The storage of the service is full: what it has is still served.")]
    StorageFull,

    /// 500. The details go to the log only.
    #[error("The service failed to answer; its log says why.")]
    Internal(#[source] anyhow::Error),
}

impl Error {
    /// The status that a client sees.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::PushRefused { .. } => StatusCode::FORBIDDEN,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::PayloadTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnsupportedMediaType(_) => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Busy { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamFailed(_) => StatusCode::BAD_GATEWAY,
            Self::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
            Self::Internal(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The error for a request body that could not be read to its end: 408 when it idled, else 400.
    pub fn from_body(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut cause = Some(error);
        while let Some(current) = cause {
            if current.is::<Idle>() {
                return Self::RequestTimeout;
            }
            cause = current.source();
        }
        Self::BadRequest("The request body ended before it was whole.".into())
    }

    /// What the client is not told, or an operator should see. Once, by the door that answers with it.
    pub fn log(&self) {
        match self {
            Self::Internal(cause) => {
                tracing::error!(error = format!("{cause:#}"), "request failed")
            }
            Self::UpstreamFailed(reason) => tracing::warn!(error = %reason, "upstream failed"),
            _ => {}
        }
    }

    fn header(&self) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Unauthorized => Some((
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"warmdock\""),
            )),
            Self::MethodNotAllowed { allow } => Some((ALLOW, HeaderValue::from_static(allow))),
            Self::Busy { retry_after } => {
                Some((RETRY_AFTER, HeaderValue::from(whole_seconds(*retry_after))))
            }
            _ => None,
        }
    }
}

impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        Self::Internal(error)
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        self.log();
        let headers = [
            (
                CONTENT_TYPE,
                HeaderValue::from_static("text/plain; charset=utf-8"),
            ),
            (CACHE_CONTROL, HeaderValue::from_static("no-store")),
            // SECURITY: a sentence may quote what the client sent.
            (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        ];
        let mut response = (self.status(), headers, format!("{self}\n")).into_response();
        if let Some((name, value)) = self.header() {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

/// At least one: `Retry-After: 0` would invite a busy loop.
fn whole_seconds(duration: Duration) -> u64 {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    seconds.max(1)
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn answer(error: Error) -> (Response<()>, String) {
        let (parts, body) = error.into_response().into_parts();
        let body = body.collect().await.expect("a body in memory").to_bytes();
        (
            Response::from_parts(parts, ()),
            String::from_utf8(body.to_vec()).expect("text"),
        )
    }

    #[tokio::test]
    async fn every_error_is_one_sentence_of_plain_text_that_nobody_keeps() {
        let table = [
            (Error::NotFound, 404),
            (Error::Unauthorized, 401),
            (
                Error::PushRefused {
                    upstream: "github.com/o/r".into(),
                },
                403,
            ),
            (Error::BadRequest("expected a flush packet".into()), 400),
            (Error::MethodNotAllowed { allow: "GET,HEAD" }, 405),
            (Error::RequestTimeout, 408),
            (Error::PayloadTooLarge { limit: 7 }, 413),
            (Error::UnsupportedMediaType("expected gzip".into()), 415),
            (
                Error::Busy {
                    retry_after: Duration::from_millis(1200),
                },
                503,
            ),
            (Error::UpstreamFailed("it answered 500".into()), 502),
            (Error::StorageFull, 507),
            (Error::Internal(anyhow::anyhow!("the disk is on fire")), 500),
        ];
        for (error, status) in table {
            let text = error.to_string();
            let (response, body) = answer(error).await;
            assert_eq!(response.status().as_u16(), status, "{text}");
            assert_eq!(body, format!("{text}\n"));
            assert_eq!(
                response.headers()[CONTENT_TYPE],
                "text/plain; charset=utf-8"
            );
            assert_eq!(response.headers()[CACHE_CONTROL], "no-store");
            assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert_eq!(
                response.headers().contains_key(WWW_AUTHENTICATE),
                status == 401
            );
            assert_eq!(response.headers().contains_key(RETRY_AFTER), status == 503);
            assert_eq!(response.headers().contains_key(ALLOW), status == 405);
        }
    }

    #[tokio::test]
    async fn details_of_internal_errors_stay_in_the_log() {
        let (_, body) = answer(Error::Internal(anyhow::anyhow!("/secret/path"))).await;
        assert!(!body.contains("/secret/path"), "{body}");
    }

    #[tokio::test]
    async fn retry_after_is_whole_seconds_rounded_up() {
        for (milliseconds, header) in [(0, "1"), (1, "1"), (1000, "1"), (1001, "2")] {
            let (response, _) = answer(Error::Busy {
                retry_after: Duration::from_millis(milliseconds),
            })
            .await;
            assert_eq!(response.headers()[RETRY_AFTER], header);
        }
    }

    #[tokio::test]
    async fn push_names_the_upstream() {
        let (_, body) = answer(Error::PushRefused {
            upstream: "github.com/o/r".into(),
        })
        .await;
        assert_eq!(body, "warmdock is read-only: push to github.com/o/r.\n");
    }
}
