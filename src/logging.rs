//! Where events go: to standard error, as text for people or as JSON for machines.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// Whoever connects could fill the log with what russh finds remarkable; what matters of it is said by us.
const DEFAULT: &str = "info,russh=error";

/// Sends events to standard error from now on: as text when that is a terminal, else as one JSON object a line with the
/// event's fields at its top level. `RUST_LOG` says which events; without it, `info` and above.
pub fn start() {
    let (filter, wrong) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.trim().is_empty() => match EnvFilter::try_new(&text) {
            Ok(filter) => (filter, None),
            Err(error) => (EnvFilter::new(DEFAULT), Some(error)),
        },
        _ => (EnvFilter::new(DEFAULT), None),
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    if io::stderr().is_terminal() {
        builder.with_target(false).init();
    } else {
        builder
            .with_ansi(false)
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .init();
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "RUST_LOG is wrong, `info` holds; expected for example `info` or `warmdock=debug`");
    }
}
