//! What operators see: health, metrics, the status page and its JSON.

pub mod metrics;
