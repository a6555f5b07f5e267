//! The route table and the middleware stack, nothing else.

use std::sync::Arc;

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::routing::get;

use crate::app::App;
use crate::crates;
use crate::error::Error;
use crate::git::door;
use crate::ops::{api, health, requests, scrape, status};

/// Everything that the service answers.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(status::page))
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(scrape::metrics))
        .route("/api/v1/status", get(api::status))
        .route("/api/v1/client-config/{client}", get(api::client_config))
        .merge(door::routes())
        .merge(crates::door::routes())
        .fallback(async || Error::NotFound)
        // All routes that take one method only are `get`.
        .method_not_allowed_fallback(async || Error::MethodNotAllowed { allow: "GET,HEAD" })
        .layer(from_fn_with_state(app.clone(), requests::record))
        .with_state(app)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, Response};
    use http_body_util::BodyExt;
    use tokio_util::sync::CancellationToken;
    use tower::ServiceExt;

    use super::*;
    use crate::config::environment::Environment;
    use crate::config::patterns::Patterns;
    use crate::config::secret::Secret;
    use crate::config::{Anonymous, Config, Token};

    struct Service {
        router: Router,
        draining: CancellationToken,
        _folder: tempfile::TempDir,
    }

    fn service(anonymous: Anonymous) -> Service {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = Config::parse("{}", &Environment::default()).expect("the default");
        config.data_dir = folder.path().to_owned();
        config.access.anonymous = anonymous;
        config.access.tokens.push(Token {
            name: "ci".into(),
            token_file: "/run/secrets/ci".into(),
            secret: Secret::new(*b"s3cret"),
            repos: Patterns::everything(),
            registries: None,
        });
        let app = App::of(config);
        Service {
            draining: app.draining.clone(),
            router: routes(app),
            _folder: folder,
        }
    }

    impl Service {
        async fn ask(
            &self,
            method: &str,
            path: &str,
            authorization: Option<&str>,
        ) -> (Response<()>, String) {
            let mut request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", "dock.test:8080");
            if let Some(value) = authorization {
                request = request.header("authorization", value);
            }
            let request = request.body(Body::empty()).expect("a request");
            let (parts, body) = self
                .router
                .clone()
                .oneshot(request)
                .await
                .expect("infallible")
                .into_parts();
            let body = body.collect().await.expect("a body").to_bytes();
            (
                Response::from_parts(parts, ()),
                String::from_utf8(body.to_vec()).expect("text"),
            )
        }
    }

    #[tokio::test]
    async fn every_page_answers_to_whom_it_should() {
        let open = service(Anonymous::Read);
        let closed = service(Anonymous::None);
        let (good, bad) = (Some("Bearer s3cret"), Some("Bearer wrong"));
        // Path, then the status: open without, open with wrong credentials, closed without, closed with good ones.
        let table = [
            ("/", [200, 401, 401, 200]),
            ("/api/v1/status", [200, 401, 401, 200]),
            ("/metrics", [200, 401, 200, 200]),
            ("/healthz", [200, 200, 200, 200]),
            ("/nothing", [404, 404, 404, 404]),
            ("/healthz/", [404, 404, 404, 404]),
        ];
        for (path, expected) in table {
            let mut found = [0; 4];
            for (place, (service, authorization)) in [
                (&open, None),
                (&open, bad),
                (&closed, None),
                (&closed, good),
            ]
            .into_iter()
            .enumerate()
            {
                let (response, body) = service.ask("GET", path, authorization).await;
                found[place] = response.status().as_u16();
                let challenged = response.headers().contains_key("www-authenticate");
                assert_eq!(challenged, found[place] == 401, "{path}: {body}");
                assert_eq!(response.headers()["cache-control"], "no-store", "{path}");
            }
            assert_eq!(found, expected, "{path}");
        }
    }

    #[tokio::test]
    async fn methods_that_a_page_does_not_take_are_refused() {
        let (response, body) = service(Anonymous::Read)
            .ask("DELETE", "/healthz", None)
            .await;
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()["allow"], "GET,HEAD");
        assert_eq!(body, "This address does not take that method.\n");
        let (response, body) = service(Anonymous::Read).ask("HEAD", "/healthz", None).await;
        assert_eq!((response.status().as_u16(), body.as_str()), (200, ""));
    }

    #[tokio::test]
    async fn the_page_lets_nothing_run() {
        let (response, body) = service(Anonymous::Read).ask("GET", "/", None).await;
        assert_eq!(
            response.headers()["content-type"],
            "text/html; charset=utf-8"
        );
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        let policy = response.headers()["content-security-policy"]
            .to_str()
            .expect("text");
        assert!(
            policy.starts_with("default-src 'none'; style-src 'sha256-"),
            "{policy}"
        );
        assert!(
            body.contains("http://dock.test:8080/git/github.com/"),
            "{body}"
        );
    }

    #[tokio::test]
    async fn a_service_that_stops_is_alive_but_not_ready() {
        let service = service(Anonymous::Read);
        service.draining.cancel();
        assert_eq!(service.ask("GET", "/healthz", None).await.0.status(), 200);
        let (response, body) = service.ask("GET", "/readyz", None).await;
        assert_eq!(response.status(), 503);
        assert_eq!(body, "stopping: finishing what is under way\n");
    }

    #[tokio::test]
    async fn requests_are_counted_by_template() {
        let service = service(Anonymous::Read);
        service.ask("GET", "/healthz", None).await;
        service.ask("GET", "/a/path/of/their/own", None).await;
        let (response, text) = service.ask("GET", "/metrics", None).await;
        assert_eq!(
            response.headers()["content-type"],
            "text/plain; version=0.0.4; charset=utf-8"
        );
        for line in [
            "warmdock_http_requests_total{route=\"/healthz\",method=\"GET\",status=\"200\"} 1",
            "warmdock_http_requests_total{route=\"none\",method=\"GET\",status=\"404\"} 1",
            "warmdock_http_requests_in_flight 1",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "expected `{line}` in\n{text}"
            );
        }
        assert!(!text.contains("of/their/own"), "{text}");
    }
}
