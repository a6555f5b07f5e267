//! `/`: the status page for people. One page without scripts, pictures or anything from elsewhere.
//!
//! SECURITY: names, errors and the `Host` header come from others. All text goes through [`Text`], which escapes it;
//! the host must look like one; and the policy in the headers lets nothing run even if both had a hole.

use std::fmt::{self, Display, Write};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use axum::extract::{Extension, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytesize::ByteSize;

use crate::app::App;
use crate::error::Error;
use crate::git::pool::RepoStatus;
use crate::ops::snapshot::{Snapshot, age};
use crate::own_address;
use crate::server::connection::Peer;

const STYLE: &str = include_str!("status.css");

/// Nothing may run or load; the style is let in by its hash.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = STANDARD.encode(aws_lc_rs::digest::digest(
        &aws_lc_rs::digest::SHA256,
        STYLE.as_bytes(),
    ));
    format!(
        "default-src 'none'; style-src 'sha256-{hash}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
});

/// A browser draws this many rows at once; the JSON has them all.
const MAX_ROWS: usize = 500;

/// Answers `/`.
///
/// # Errors
/// [`Error::Unauthorized`] as everywhere; browsers then ask for user and password.
pub async fn page(
    State(app): State<Arc<App>>,
    peer: Option<Extension<Peer>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let snapshot = Snapshot::take(&app, &headers)?;
    let listen = &app.config().listen;
    let base = own_address::of_request(listen, peer.map(|Extension(peer)| peer), &uri, &headers)
        .unwrap_or_else(|| format!("http://{}", listen.http));
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ];
    Ok((headers, html(&snapshot, &base)).into_response())
}

fn html(snapshot: &Snapshot, base: &str) -> String {
    let mut page = String::with_capacity(8 << 10);
    write(&mut page, snapshot, base).expect("a String takes everything");
    page
}

fn write(page: &mut String, snapshot: &Snapshot, base: &str) -> fmt::Result {
    write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"refresh\" content=\"30\">\n<title>warmdock</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )?;
    write_header(page, snapshot)?;
    write_commands(page, snapshot, base)?;
    write_repos(page, snapshot)?;
    write_crates(page, snapshot, base)?;
    write_storage(page, snapshot)?;
    page.write_str("</body>\n</html>\n")
}

fn write_header(page: &mut String, snapshot: &Snapshot) -> fmt::Result {
    let (class, ready) = match &snapshot.not_ready {
        None => ("good", "ready"),
        Some(reason) => ("bad", reason.as_str()),
    };
    writeln!(
        page,
        "<header><h1>warmdock</h1><span class=\"{class}\">{}</span>\
         <span class=\"soft\">version {} · up {}</span></header>",
        Text(ready),
        Text(snapshot.version),
        Span(snapshot.uptime),
    )
}

fn write_commands(page: &mut String, snapshot: &Snapshot, base: &str) -> fmt::Result {
    let base = Text(base);
    page.write_str("<h2>Clone through it</h2>\n")?;
    if let Some(status) = snapshot.repos.first() {
        writeln!(
            page,
            "<pre>git clone {base}/git/{}.git</pre>",
            Text(&status.repo.to_string())
        )?;
    } else if let Some(host) = snapshot.hosts.first() {
        writeln!(
            page,
            "<pre>git clone {base}/git/{}/OWNER/NAME.git</pre>",
            Text(host)
        )?;
    }
    if snapshot.hosts.is_empty() {
        return page.write_str("<p class=\"soft\">No upstream is open to you.</p>\n");
    }
    page.write_str("<p class=\"soft\">Or let git and cargo use it by themselves:</p>\n<pre>")?;
    for host in &snapshot.hosts {
        let host = Text(host);
        let (from, to) = (format!("{base}/git/{host}/"), format!("https://{host}/"));
        writeln!(
            page,
            "git config --global url.&quot;{from}&quot;.insteadOf &quot;{to}&quot;\n\
             git config --global url.&quot;{to}&quot;.pushInsteadOf &quot;{to}&quot;"
        )?;
    }
    page.write_str("</pre>\n")
}

fn write_repos(page: &mut String, snapshot: &Snapshot) -> fmt::Result {
    writeln!(
        page,
        "<h2>Repositories <span class=\"soft\">{}</span></h2>",
        snapshot.repos.len()
    )?;
    if snapshot.repos.is_empty() {
        return page
            .write_str("<p class=\"soft\">None yet: the first clone of one brings it here.</p>\n");
    }
    page.write_str(
        "<div class=\"wide\"><table>\n<thead><tr><th>Name</th><th>State</th><th class=\"number\">Size</th>\
         <th class=\"number\">References</th><th class=\"number\">Objects</th><th>Fresh</th></tr></thead>\n<tbody>\n",
    )?;
    for status in snapshot.repos.iter().take(MAX_ROWS) {
        write_repo(page, status, snapshot)?;
    }
    page.write_str("</tbody>\n</table></div>\n")?;
    let hidden = snapshot.repos.len().saturating_sub(MAX_ROWS);
    if hidden > 0 {
        writeln!(
            page,
            "<p class=\"soft\">And {hidden} more, all in <a href=\"/api/v1/status\">JSON</a>.</p>"
        )?;
    }
    Ok(())
}

fn write_repo(page: &mut String, status: &RepoStatus, snapshot: &Snapshot) -> fmt::Result {
    let warm = if status.warm {
        " <span class=\"tag\">warm</span>"
    } else {
        ""
    };
    let fresh = match age(status, snapshot.now) {
        Some(age) => format!("{} ago", Span(age)),
        None => "no mirror".to_owned(),
    };
    let stale = if status.stale {
        " <span class=\"bad\">stale</span>"
    } else {
        ""
    };
    write!(
        page,
        "<tr><td class=\"name\">{}{warm}</td><td>{}</td><td class=\"number\">{}</td>\
         <td class=\"number\">{}</td><td class=\"number\">{}</td><td>{fresh}{stale}",
        Text(&status.repo.to_string()),
        Text(status.state),
        ByteSize(status.bytes),
        status.refs,
        status.objects,
    )?;
    if let Some(error) = &status.error {
        write!(page, "<br><span class=\"bad\">{}</span>", Text(error))?;
    }
    page.write_str("</td></tr>\n")
}

fn write_crates(page: &mut String, snapshot: &Snapshot, base: &str) -> fmt::Result {
    if snapshot.registries.is_empty() {
        return Ok(());
    }
    page.write_str("<h2>Crates</h2>\n<p>")?;
    for registry in &snapshot.registries {
        let (class, state) = if registry.failing {
            ("bad", "fails: what is here is served")
        } else {
            ("good", "ready")
        };
        write!(
            page,
            "{} <span class=\"{class}\">{state}</span> ",
            Text(&registry.name)
        )?;
    }
    let crates = &snapshot.crates;
    writeln!(
        page,
        "</p>\n<p class=\"soft\">{} answers from here, {} from registries, {} stale · {} sent · {} kept</p>\n\
         <pre>curl {}/api/v1/client-config/cargo &gt; ~/.config/warmdock.toml\n\
         cargo --config ~/.config/warmdock.toml build</pre>",
        crates.hits,
        crates.misses,
        crates.stale,
        ByteSize(crates.sent_bytes),
        ByteSize(crates.stored_bytes),
        Text(base),
    )
}

fn write_storage(page: &mut String, snapshot: &Snapshot) -> fmt::Result {
    let (used, limit) = (snapshot.storage_used, snapshot.storage_limit);
    writeln!(
        page,
        "<h2>Storage</h2>\n<meter min=\"0\" max=\"{}\" value=\"{used}\" aria-label=\"Storage used\"></meter>\n\
         <p class=\"soft\">{} of {} used · <a href=\"/metrics\">metrics</a> · <a href=\"/api/v1/status\">JSON</a></p>",
        limit.max(1),
        ByteSize(used),
        ByteSize(limit),
    )
}

/// Text of somebody else, escaped for content and for quoted attributes.
struct Text<'a>(&'a str);

impl Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// A duration in its two largest units: nobody counts the seconds of a day.
struct Span(Duration);

impl Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0..60 => write!(f, "{seconds} s"),
            60..3600 => write!(f, "{} min {} s", seconds / 60, seconds % 60),
            3600..86_400 => write!(f, "{} h {} min", seconds / 3600, seconds % 3600 / 60),
            _ => write!(f, "{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::crates::RegistryStatus;
    use crate::git::name::RepoName;
    use crate::ops::snapshot::CratesStatus;

    fn snapshot() -> Snapshot {
        Snapshot {
            version: "1.2.3",
            uptime: Duration::from_secs(3725),
            not_ready: None,
            repos: vec![RepoStatus {
                repo: RepoName::parse("github.com/rust-lang/log").expect("a name"),
                state: "ready",
                refs: 12,
                objects: 3456,
                bytes: 5 << 20,
                last_fetch: Some(SystemTime::UNIX_EPOCH),
                stale: false,
                error: None,
                warm: true,
            }],
            hosts: vec!["github.com".into()],
            registries: vec![RegistryStatus {
                name: "crates.io".into(),
                failing: false,
            }],
            crates: CratesStatus {
                hits: 41,
                sent_bytes: 3 << 20,
                ..CratesStatus::default()
            },
            storage_used: 5 << 20,
            storage_limit: 50 << 30,
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(61),
        }
    }

    #[test]
    fn the_page_says_what_there_is_and_how_to_use_it() {
        let page = html(&snapshot(), "http://dock:8080");
        for part in [
            ">ready<",
            "version 1.2.3 · up 1 h 2 min",
            "github.com/rust-lang/log <span class=\"tag\">warm</span>",
            "5.0 MiB",
            ">12<",
            ">3456<",
            "1 min 1 s ago",
            "git clone http://dock:8080/git/github.com/rust-lang/log.git",
            "url.&quot;http://dock:8080/git/github.com/&quot;.insteadOf &quot;https://github.com/&quot;",
            "crates.io <span class=\"good\">ready</span>",
            "41 answers from here, 0 from registries, 0 stale · 3.0 MiB sent",
            "5.0 MiB of 50.0 GiB used",
        ] {
            assert!(page.contains(part), "expected `{part}` in\n{page}");
        }
        // Nothing from elsewhere, nothing that runs.
        for part in ["<script", "src=", "style=", "@import", "url(", "onclick"] {
            assert!(!page.contains(part), "{part}");
        }
    }

    #[test]
    fn text_of_others_is_escaped_everywhere() {
        const EVIL: &str = "\"'><script>alert(1)</script>&";
        let mut snapshot = snapshot();
        snapshot.not_ready = Some(EVIL.into());
        snapshot.hosts = vec![EVIL.into()];
        snapshot.registries[0].name = EVIL.into();
        snapshot.repos[0].error = Some(EVIL.into());
        snapshot.repos[0].state = EVIL;
        for page in [html(&snapshot, EVIL), {
            snapshot.repos.clear();
            html(&snapshot, EVIL)
        }] {
            assert!(!page.contains("<script"), "{page}");
            assert!(page.contains("&quot;&#39;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;"));
        }
    }

    #[test]
    fn an_empty_pool_and_no_upstream_have_a_page() {
        let mut snapshot = snapshot();
        snapshot.repos.clear();
        let page = html(&snapshot, "http://dock");
        assert!(
            page.contains("git clone http://dock/git/github.com/OWNER/NAME.git"),
            "{page}"
        );
        snapshot.hosts.clear();
        assert!(html(&snapshot, "http://dock").contains("No upstream is open to you"));
    }

    #[test]
    fn many_repositories_are_cut_short() {
        let mut snapshot = snapshot();
        snapshot.repos = vec![snapshot.repos[0].clone(); MAX_ROWS + 7];
        let page = html(&snapshot, "http://dock");
        assert_eq!(page.matches("<tr><td").count(), MAX_ROWS);
        assert!(page.contains("And 7 more"));
    }

    #[test]
    fn spans_have_two_units() {
        let texts = [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (86_399, "23 h 59 min"),
            (90_000, "1 d 1 h"),
        ];
        for (seconds, text) in texts {
            assert_eq!(Span(Duration::from_secs(seconds)).to_string(), text);
        }
    }
}
