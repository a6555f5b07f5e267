//! `/api/v1/status`: the status page for programs.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::app::App;
use crate::error::Error;
use crate::git::pool::RepoStatus;
use crate::ops::snapshot::{Snapshot, age};

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
    use crate::git::name::RepoName;

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
        });
        assert_eq!(json(&snapshot), expected);
    }
}
