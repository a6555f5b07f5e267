//! The HTTP client for every upstream that packs and crates come from: certificates, time to connect, and where redirects
//! may lead.

use std::time::Duration;

use anyhow::Context as _;
use reqwest::redirect::{Attempt, Policy};

/// Who asks. crates.io refuses clients that do not say.
pub const AGENT: &str = concat!(
    "warmdock/",
    env!("CARGO_PKG_VERSION"),
    " (cache for container builds)"
);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MOST_REDIRECTS: usize = 5;

/// Where an upstream may send us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    /// SECURITY: our credentials go to the host that the operator named and to no other, and never from https to
    /// http.
    SameOrigin,
    /// Also to other hosts, as registries send to the storage of their files; never from https to http. The redirect
    /// there is the answer: whoever asked follows it, without credentials.
    OtherHosts,
}

/// A client. Reads certificates from disk.
///
/// # Errors
/// No usable certificates.
pub fn client(redirects: Redirects) -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .redirect(Policy::custom(move |attempt| follow(attempt, redirects)))
        .connect_timeout(CONNECT_TIMEOUT)
        .build()
        .context("the HTTP client cannot be made: are there CA certificates? SSL_CERT_FILE names a bundle")
}

fn follow(attempt: Attempt<'_>, redirects: Redirects) -> reqwest::redirect::Action {
    let first = &attempt.previous()[0];
    let same = first.origin() == attempt.url().origin();
    let downgraded = first.scheme() == "https" && attempt.url().scheme() != "https";
    if attempt.previous().len() > MOST_REDIRECTS {
        attempt.error("it redirects without end")
    } else if same {
        attempt.follow()
    } else if redirects == Redirects::OtherHosts && !downgraded {
        // SECURITY: reqwest, if it followed, would leave credentials off here, and put them on again for the next
        // redirect at that host.
        attempt.stop()
    } else {
        let elsewhere = attempt.url().origin().ascii_serialization();
        attempt.error(format!(
            "it redirects to {elsewhere}: configure that host as the upstream"
        ))
    }
}

/// The message of an HTTP client's error with its causes, without the URL.
pub fn describe(error: &reqwest::Error) -> String {
    let mut text = if error.is_connect() {
        "it cannot be reached".to_owned()
    } else {
        "the connection failed".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    let mut last = None;
    while let Some(next) = cause {
        last = Some(next.to_string());
        cause = next.source();
    }
    if let Some(last) = last {
        text = format!("{text}: {last}");
    }
    text
}
