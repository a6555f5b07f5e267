//! `/api/v1/…`: what pages and commands say, for programs.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{Extension, Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use crate::client_config::{self, ServiceUrl};
use crate::error::Error;
use crate::git::pool::RepoStatus;
use crate::ops::snapshot::{Snapshot, age};
use crate::own_address;
use crate::server::connection::Peer;

/// Answers `/api/v1/status`.
///
/// # Errors
/// [`Error::Unauthorized`] as everywhere.
pub async fn status(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, Error> {
    let text = format!("{:#}\n", json(&Snapshot::take(&app, &headers)?));
    let headers = [
        (CONTENT_TYPE, "application/json"),
        (CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, text).into_response())
}

/// Answers `/api/v1/client-config/cargo` and `/git`: what the command `client-config` prints, for the address under
/// which the requester reached us.
///
/// # Errors
/// [`Error::Unauthorized`] as everywhere; [`Error::NotFound`] for other clients, and for Git to whoever may read some
/// repositories only; [`Error::BadRequest`] where the request names no address.
pub async fn client_config(
    State(app): State<Arc<App>>,
    Path(client): Path<String>,
    peer: Option<Extension<Peer>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let principal = app.access.cargo_principal(&headers)?;
    let config = app.config();
    let peer = peer.map(|Extension(peer)| peer);
    let address = own_address::of_request(&config.listen, peer, &uri, &headers);
    let service: Option<ServiceUrl> = address.and_then(|address| address.parse().ok());
    let service = service.ok_or_else(|| {
        Error::BadRequest("Expected a Host header with the address of this service.".into())
    })?;
    let text = match client.as_str() {
        "cargo" => {
            let may_read = |name: &str| principal.may_read_registry(name);
            client_config::cargo(&service, &config, may_read)
        }
        // SECURITY: it names all hosts.
        "git" if principal.may_read_every_repo() => client_config::git(&service, &config),
        _ => return Err(Error::NotFound),
    };
    let headers = [
        (CONTENT_TYPE, "text/plain; charset=utf-8"),
        (CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, text).into_response())
}

/// Fields are added in later versions, never removed or changed within `v1`.
fn json(snapshot: &Snapshot) -> Value {
    let repositories = snapshot
        .repos
        .iter()
        .map(|status| repository(status, snapshot));
    json!({
        "version": snapshot.version,
        "uptime_seconds": snapshot.uptime.as_secs(),
        "ready": snapshot.not_ready.is_none(),
        "not_ready_because": snapshot.not_ready,
        "storage": { "used_bytes": snapshot.storage_used, "limit_bytes": snapshot.storage_limit },
        "repositories": repositories.collect::<Vec<_>>(),
        "crates": crates(snapshot),
    })
}

fn crates(snapshot: &Snapshot) -> Value {
    let registries = snapshot.registries.iter();
    let registries =
        registries.map(|registry| json!({ "name": registry.name, "failing": registry.failing }));
    json!({
        "registries": registries.collect::<Vec<_>>(),
        "hits": snapshot.crates.hits,
        "misses": snapshot.crates.misses,
        "stale": snapshot.crates.stale,
        "sent_bytes": snapshot.crates.sent_bytes,
        "stored_bytes": snapshot.crates.stored_bytes,
    })
}

fn repository(status: &RepoStatus, snapshot: &Snapshot) -> Value {
    // Times before 1970, from a wrong clock, cannot be written.
    let last_fetch = status.last_fetch.filter(|at| *at >= SystemTime::UNIX_EPOCH);
    let last_fetch = last_fetch.map(|at| humantime::format_rfc3339_seconds(at).to_string());
    json!({
        "name": status.repo.to_string(),
        "state": status.state,
        "warm": status.warm,
        "stale": status.stale,
        "refs": status.refs,
        "objects": status.objects,
        "bytes": status.bytes,
        "last_fetch": last_fetch,
        "age_seconds": age(status, snapshot.now).map(|age| age.as_secs()),
        "error": status.error,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::crates::RegistryStatus;
    use crate::git::name::RepoName;
    use crate::ops::snapshot::CratesStatus;

    #[test]
    fn the_shape_stays() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let snapshot = Snapshot {
            version: "1.2.3",
            uptime: Duration::from_secs(9),
            not_ready: Some("loading".into()),
            repos: vec![RepoStatus {
                repo: RepoName::parse("github.com/o/r").expect("a name"),
                state: "failed",
                refs: 1,
                objects: 2,
                bytes: 3,
                last_fetch: Some(at),
                stale: true,
                error: Some("it answered \"no\"".into()),
                warm: false,
            }],
            hosts: Vec::new(),
            registries: vec![RegistryStatus {
                name: "crates.io".into(),
                failing: true,
            }],
            crates: CratesStatus {
                hits: 6,
                misses: 7,
                stale: 8,
                sent_bytes: 9,
                stored_bytes: 10,
            },
            storage_used: 4,
            storage_limit: 5,
            now: at + Duration::from_secs(60),
        };
        let expected = json!({
            "version": "1.2.3",
            "uptime_seconds": 9,
            "ready": false,
            "not_ready_because": "loading",
            "storage": { "used_bytes": 4, "limit_bytes": 5 },
            "repositories": [{
                "name": "github.com/o/r",
                "state": "failed",
                "warm": false,
                "stale": true,
                "refs": 1,
                "objects": 2,
                "bytes": 3,
                "last_fetch": "2023-11-14T22:13:20Z",
                "age_seconds": 60,
                "error": "it answered \"no\"",
            }],
            "crates": {
                "registries": [{ "name": "crates.io", "failing": true }],
                "hits": 6,
                "misses": 7,
                "stale": 8,
                "sent_bytes": 9,
                "stored_bytes": 10,
            },
        });
        assert_eq!(json(&snapshot), expected);
    }
}
