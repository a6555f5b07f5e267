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
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::access::Access;
use crate::app::App;
use crate::config::{Config, Listen};
use crate::crates::Crates;
use crate::git::pool::Pool;
use crate::ops::metrics::Metrics;
use crate::router;
use crate::ssh::{self, host_key};
use accept::Ending;
use activity::Connections;

/// How long a stop waits for background work. Enough for a write to disk to end; whoever hashes or counts what is large
/// takes longer and need not end well, for that survives as it would a crash.
const LONGEST_STOP: Duration = Duration::from_secs(10);

/// Sockets that are bound before anything else happens, so that clients wait in the queue instead of being refused.
pub struct Listeners {
    /// HTTP, or HTTPS with `listen.tls`.
    pub http: TcpListener,
    /// SSH, with `listen.ssh`.
    pub ssh: Option<TcpListener>,
}

impl Listeners {
    /// Binds what the configuration names; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address is taken or not ours, with the key that names it.
    pub async fn bind(listen: &Listen) -> anyhow::Result<Self> {
        let bind = async |key, address| {
            TcpListener::bind(address)
                .await
                .with_context(|| format!("{key}: cannot listen on {address}"))
        };
        let http = bind("listen.http", listen.http).await?;
        let ssh = match &listen.ssh {
            Some(ssh) => Some(bind("listen.ssh.address", ssh.address).await?),
            None => None,
        };
        Ok(Self { http, ssh })
    }
}

/// Runs the service on `listeners` until `shutdown` ends, then drains.
///
/// `limits.connections`, `listen` and whether there is TLS are taken from the configuration at the start; all else
/// follows its changes.
///
/// # Errors
/// When the data folder cannot be used, or there is no host key for SSH.
pub async fn run(
    config: watch::Receiver<Arc<Config>>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let ending = Ending::default();
    let has_tls = config.borrow().listen.tls.is_some();
    let tls = has_tls.then(|| tls::acceptor(config.clone())).transpose()?;
    let metrics = Arc::new(Metrics::new());
    let pool =
        Pool::start(config.clone(), metrics.clone()).context("the clone pool cannot start")?;
    let crates =
        Crates::start(config.clone(), pool.storage()).context("the crate cache cannot start")?;
    crates.keep_warm(&pool);
    let app = Arc::new(App {
        config: config.clone(),
        access: Access::new(config.clone()),
        pool: pool.clone(),
        crates: crates.clone(),
        metrics: metrics.clone(),
        started: Instant::now(),
        draining: ending.draining.clone(),
    });
    let ssh = match listeners.ssh {
        Some(listener) => {
            // Who waits at one door has nothing of a place at the other.
            let ending = Ending {
                connections: Connections::default(),
                ..ending.clone()
            };
            Some(serve_ssh(listener, &config, &app, &ending).await?)
        }
        None => None,
    };
    let shared = Arc::new(connection::Shared {
        router: router::routes(app),
        tls,
        ending: ending.clone(),
        metrics,
    });
    let address = listeners.http.local_addr().context("listen.http")?;
    tracing::info!(listener = "http", %address, tls = shared.tls.is_some(), "listening");
    let draining = ending.draining.clone();
    let serve =
        move |stream, address, times| connection::serve(stream, address, times, shared.clone());
    let http = accept::run(listeners.http, config, ending, serve);
    let stopping = async {
        shutdown.await;
        tracing::info!("stopping");
        draining.cancel();
    };
    let ssh = async {
        if let Some(serving) = ssh {
            serving.await;
        }
    };
    tokio::join!(http, ssh, stopping);
    let background = async { tokio::join!(crates.shutdown(), pool.shutdown()) };
    if timeout(LONGEST_STOP, background).await.is_err() {
        tracing::warn!("background work does not end, and is cut off");
    }
    Ok(())
}

/// The SSH door, yet to be run.
async fn serve_ssh(
    listener: TcpListener,
    config: &watch::Receiver<Arc<Config>>,
    app: &Arc<App>,
    ending: &Ending,
) -> anyhow::Result<impl Future<Output = usize> + use<>> {
    let path = config
        .borrow()
        .listen
        .ssh
        .as_ref()
        .map(|ssh| ssh.host_key_file.clone())
        .context("listen.ssh")?;
    let host_key = tokio::task::spawn_blocking(move || host_key::read_or_make(&path))
        .await?
        .context("listen.ssh.host_key_file")?;
    let shared = Arc::new(ssh::connection::Shared {
        app: Arc::clone(app),
        protocol: ssh::connection::Protocol::new(host_key.expose()),
        ending: ending.clone(),
    });
    let address = listener.local_addr().context("listen.ssh.address")?;
    let key = ssh::shown(host_key.expose().public_key());
    tracing::info!(listener = "ssh", %address, key, "listening");
    let serve = move |stream, address, times| {
        ssh::connection::serve(stream, address, times, Arc::clone(&shared))
    };
    Ok(accept::run(listener, config.clone(), ending.clone(), serve))
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
