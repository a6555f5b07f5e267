//! Where events go: to standard error, as text for people or as JSON for machines.

use std::io::{self, IsTerminal};

use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Whoever connects could fill the log with what russh finds remarkable; what matters of it is said by us.
const DEFAULT: &str = "info,russh=error";

/// Sends events to standard error from now on: as text when that is a terminal, else as one JSON object a line with the
/// event's fields at its top level. `RUST_LOG` says which events: levels by module, such as `info,warmdock::git=debug`;
/// without it, `info` and above.
pub fn start() {
    let (filter, wrong) = match std::env::var("RUST_LOG") {
        Ok(text) if !text.trim().is_empty() => match text.parse::<Targets>() {
            Ok(filter) => (filter, None),
            Err(error) => (default_filter(), Some(error)),
        },
        _ => (default_filter(), None),
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = if io::stderr().is_terminal() {
        layer.with_target(false).boxed()
    } else {
        layer
            .with_ansi(false)
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed()
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .init();
    if let Some(error) = wrong {
        tracing::warn!(%error, "RUST_LOG is wrong, `info` holds; expected for example `info` or `warmdock=debug`");
    }
}

fn default_filter() -> Targets {
    DEFAULT.parse().expect("is a list of levels by module")
}
