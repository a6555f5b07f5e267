//! What operators see: health, metrics, the access log, the status page and its JSON.
//!
//! SECURITY: whatever names repositories shows only those that the requester may read.

pub mod api;
pub mod health;
pub mod metrics;
pub mod process;
pub mod requests;
pub mod scrape;
pub mod snapshot;
pub mod status;
