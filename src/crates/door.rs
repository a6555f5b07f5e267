//! The HTTP door to the crate cache: a sparse registry, as cargo's reference describes it.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use serde_json::json;

use super::answer::{self, Asked};
use super::counters::{CacheStatus, Kind};
use super::index::{Answer, NoEntry, Terms};
use super::name::{CrateFile, CrateName, Wanted};
use super::upstream::Trouble;
use super::{Crates, Registry};
use crate::app::App;
use crate::config::Anonymous;
use crate::error::Error;
use crate::own_address;
use crate::server::connection::Peer;

/// The routes below `/crates/`.
pub fn routes() -> Router<Arc<App>> {
    // One route: paths of an index have two or three segments, and are judged as a whole.
    Router::new().route("/crates/{*path}", any(handle))
}

async fn handle(
    State(app): State<Arc<App>>,
    peer: Option<Extension<Peer>>,
    request: Request<Body>,
) -> Result<Response, Error> {
    let principal = app.access.cargo_principal(request.headers())?;
    // SECURITY: not decoded: no name has a percent sign.
    let path = request.uri().path().strip_prefix("/crates/");
    let (name, path) = path
        .and_then(|path| path.split_once('/'))
        .ok_or(Error::NotFound)?;
    if !principal.may_read_registry(name) {
        return Err(Error::NotFound);
    }
    let registry = app.crates.registry(name).await?.ok_or(Error::NotFound)?;
    let wanted = Wanted::parse(path).ok_or(Error::NotFound)?;
    if wanted == Wanted::Api {
        return Ok(no_api());
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(Error::MethodNotAllowed { allow: "GET,HEAD" });
    }
    let asked = Asked {
        method: request.method(),
        headers: request.headers(),
    };
    match wanted {
        Wanted::Entry(name) => entry(&app, &registry, &name, &asked).await,
        Wanted::File(wanted) => file(&app.crates, &registry, &wanted, &asked).await,
        Wanted::Config | Wanted::Api => {
            let peer = peer.map(|Extension(peer)| peer);
            config(&app, &registry, peer, &request)
        }
    }
}

/// What this registry says of itself: files are here, found by their checksums.
fn config(
    app: &App,
    registry: &Registry,
    peer: Option<Peer>,
    request: &Request<Body>,
) -> Result<Response, Error> {
    let config = app.config();
    let base = own_address::of_request(&config.listen, peer, request.uri(), request.headers())
        .ok_or_else(|| {
            let what = "Expected a Host header with the address under which you reach this service; or set \
                        listen.public_url.";
            Error::BadRequest(what.into())
        })?;
    let base = format!("{base}/crates/{}", registry.name);
    let mut text = json!({
        "dl": format!("{base}/dl/{{crate}}/{{version}}/{{sha256-checksum}}"),
        // SECURITY: not the registry's own: cargo would send it the token that is meant for us.
        "api": base,
    });
    if config.access.anonymous == Anonymous::None {
        text["auth-required"] = true.into();
    }
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-cache"),
    ];
    Ok((headers, text.to_string()).into_response())
}

async fn entry(
    app: &App,
    registry: &Registry,
    name: &CrateName,
    asked: &Asked<'_>,
) -> Result<Response, Error> {
    let terms = {
        let crates = &app.config().crates;
        Terms {
            max_age: crates.max_age,
            when_upstream_fails: crates.when_upstream_fails,
        }
    };
    let crates = &app.crates;
    let (answer, from) = match registry.index.get(name, &registry.upstream, terms).await {
        Ok(found) => found,
        Err(why) => {
            crates.counters.answer(Kind::Index, CacheStatus::Failed);
            return Err(match why {
                NoEntry::Busy => answer::BUSY,
                NoEntry::Trouble(Trouble::NotFound) => Error::NotFound,
                NoEntry::Trouble(Trouble::Failed(why)) => Error::UpstreamFailed(why.to_string()),
            });
        }
    };
    match answer {
        Answer::Missing => {
            crates.counters.answer(Kind::Index, CacheStatus::Missing);
            Err(Error::NotFound)
        }
        Answer::Entry(entry) => {
            crates.counters.answer(Kind::Index, from);
            Ok(answer::entry(crates, &entry, asked))
        }
    }
}

async fn file(
    crates: &Arc<Crates>,
    registry: &Arc<Registry>,
    wanted: &CrateFile,
    asked: &Asked<'_>,
) -> Result<Response, Error> {
    match crates.open(registry, wanted).await {
        Ok((opened, from)) => {
            crates.counters.answer(Kind::File, from);
            answer::file(crates, registry, wanted, opened, asked).await
        }
        Err(why) => {
            let error = answer::failed(why);
            let from = match error {
                Error::NotFound => CacheStatus::Missing,
                _ => CacheStatus::Failed,
            };
            crates.counters.answer(Kind::File, from);
            Err(error)
        }
    }
}

/// What cargo prints for `cargo search`, `publish`, `owner` and `yank` (in the form of crates.io's API).
fn no_api() -> Response {
    let detail = "warmdock serves the index and the files of this registry, and not its API: search, publish, yank and \
                  owners go to the registry itself, with `--registry crates-io` or its own name";
    let body = json!({ "errors": [{ "detail": detail }] }).to_string();
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-store"),
    ];
    (StatusCode::NOT_FOUND, headers, body).into_response()
}
