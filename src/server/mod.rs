//! The service: listens, accepts, serves, drains.
//!
//! The accept loop is our own because `axum::serve` sets no timers, and without them a client can hold a connection
//! for ever with half a header. What bounds a connection is in [`activity`], [`body`] and [`io`].

pub mod accept;
pub mod activity;
pub mod body;
pub mod connection;
pub mod io;
pub mod panics;
pub mod tls;

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::app::App;
use crate::config::{Config, Listen};
use crate::git::pool::Pool;
use crate::ops::metrics::Metrics;
use crate::router;

/// Sockets that are bound before anything else happens, so that clients wait in the queue instead of being refused.
pub struct Listeners {
    /// HTTP, or HTTPS with `listen.tls`.
    pub http: TcpListener,
}

impl Listeners {
    /// Binds what the configuration names; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address is taken or not ours, with the key that names it.
    pub async fn bind(listen: &Listen) -> anyhow::Result<Self> {
        let http = TcpListener::bind(listen.http)
            .await
            .with_context(|| format!("listen.http: cannot listen on {}", listen.http))?;
        Ok(Self { http })
    }
}

/// Runs the service on `listeners` until `shutdown` ends, then drains.
///
/// `limits.connections`, `listen` and whether there is TLS are taken from the configuration at the start; all else
/// follows its changes.
///
/// # Errors
/// When the data folder cannot be used.
pub async fn run(
    config: watch::Receiver<Arc<Config>>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let draining = CancellationToken::new();
    let has_tls = config.borrow().listen.tls.is_some();
    let tls = has_tls.then(|| tls::acceptor(config.clone())).transpose()?;
    let metrics = Arc::new(Metrics::new());
    let pool =
        Pool::start(config.clone(), metrics.clone()).context("the clone pool cannot start")?;
    let app = Arc::new(App {
        config: config.clone(),
        access: Access::new(config.clone()),
        pool: pool.clone(),
        metrics: metrics.clone(),
        started: Instant::now(),
        draining: draining.clone(),
    });
    let shared = Arc::new(connection::Shared {
        router: router::routes(app),
        tls,
        draining: draining.clone(),
        cut: CancellationToken::new(),
    });
    let address = listeners.http.local_addr().context("listen.http")?;
    tracing::info!(listener = "http", %address, tls = shared.tls.is_some(), "listening");
    let serving = accept::run(listeners.http, config, metrics, shared);
    let stopping = async {
        shutdown.await;
        tracing::info!("stopping");
        draining.cancel();
    };
    tokio::join!(serving, stopping);
    pool.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
