//! What every handler can reach, shared as `Arc<App>`.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::access::Access;
use crate::config::Config;
use crate::crates::Crates;
use crate::git::pool::Pool;
use crate::ops::metrics::Metrics;

/// The service's parts, wired once in [`crate::server::run`].
pub struct App {
    /// The configuration that holds now; a reload replaces it.
    pub config: watch::Receiver<Arc<Config>>,
    /// Who may read what.
    pub access: Access,
    /// The mirrors.
    pub pool: Arc<Pool>,
    /// The crate cache.
    pub crates: Arc<Crates>,
    /// Counters and gauges.
    pub metrics: Arc<Metrics>,
    /// When the service began, for the uptime.
    pub started: Instant,
    /// Cancelled when the service has been told to stop and only finishes what is under way.
    pub draining: CancellationToken,
}

impl App {
    /// A service without a port, for tests.
    #[cfg(test)]
    pub fn of(config: Config) -> Arc<Self> {
        let config = watch::channel(Arc::new(config)).1;
        let metrics = Arc::new(Metrics::new());
        let pool = Pool::start(config.clone(), metrics.clone()).expect("a pool");
        Arc::new(Self {
            access: Access::new(config.clone()),
            crates: Crates::start(config.clone(), pool.storage()).expect("a crate cache"),
            pool,
            config,
            metrics,
            started: Instant::now(),
            draining: CancellationToken::new(),
        })
    }

    /// The configuration of this moment.
    pub fn config(&self) -> Arc<Config> {
        self.config.borrow().clone()
    }

    /// Whether requests should be sent here.
    ///
    /// # Errors
    /// Why not, as text for people; `/readyz` shows it to anybody.
    pub fn ready(&self) -> Result<(), String> {
        if self.draining.is_cancelled() {
            return Err("stopping: finishing what is under way".into());
        }
        self.pool.ready()
    }
}
