//! The address under which a requester reached us: for commands to copy, and for what clients fetch next.
//!
//! SECURITY: the `Host` header comes from others, so it must look like a host. What a proxy before us says counts only
//! when its address is in `listen.trusted_proxies`, and `listen.public_url` counts before all.

use std::net::{Ipv6Addr, SocketAddrV6};

use axum::http::header::HOST;
use axum::http::{HeaderMap, Uri};

use crate::config::Listen;
use crate::git::name::is_host;
use crate::server::connection::Peer;

/// Scheme, host and whatever path is before ours, without a slash at the end. `None` where the request names no host
/// that could be one.
pub fn of_request(
    listen: &Listen,
    peer: Option<Peer>,
    uri: &Uri,
    headers: &HeaderMap,
) -> Option<String> {
    if let Some(url) = &listen.public_url {
        return Some(url.as_str().trim_end_matches('/').to_owned());
    }
    let trusted = peer.is_some_and(|peer| listen.trusts(peer.address.ip()));
    let forwarded = |name| {
        let value = trusted.then(|| headers.get(name)).flatten()?;
        // Each proxy appends to the list: the first is what the client said.
        Some(value.to_str().ok()?.split(',').next()?.trim())
    };
    let host = match (forwarded("x-forwarded-host"), headers.get(HOST)) {
        (Some(host), _) => host,
        (None, Some(host)) => host.to_str().ok()?,
        // HTTP/2 has the host in the address instead.
        (None, None) => uri.authority()?.as_str(),
    };
    if !is_host(host) && !is_ipv6(host) {
        return None;
    }
    // Some proxies put the port into the host, and some say it apart.
    let port = forwarded("x-forwarded-port").and_then(|port| port.parse::<u16>().ok());
    let scheme = match forwarded("x-forwarded-proto") {
        Some("https") => "https",
        Some("http") => "http",
        _ if peer.is_some_and(|peer| peer.tls) => "https",
        _ => "http",
    };
    let usual = if scheme == "https" { 443 } else { 80 };
    let port = port.filter(|port| {
        *port != usual && forwarded("x-forwarded-host").is_some() && !has_port(host)
    });
    let port = port.map_or_else(String::new, |port| format!(":{port}"));
    // What the proxy took off the path before it came here.
    let prefix = forwarded("x-forwarded-prefix").unwrap_or_default();
    let prefix = prefix.trim_end_matches('/');
    if !prefix.is_empty() && !is_path(prefix) {
        return None;
    }
    Some(format!("{scheme}://{host}{port}{prefix}"))
}

fn has_port(host: &str) -> bool {
    !host.ends_with(']') && host.contains(':')
}

/// Segments of what needs no quotes anywhere.
fn is_path(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    text.split('/').skip(1).all(|segment| {
        !segment.is_empty() && !matches!(segment, "." | "..") && segment.bytes().all(plain)
    }) && text.starts_with('/')
}

fn is_ipv6(host: &str) -> bool {
    let bracketed = || host.strip_prefix('[')?.strip_suffix(']');
    host.parse::<SocketAddrV6>().is_ok()
        || bracketed().is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;
    use crate::config::Config;
    use crate::config::environment::Environment;

    fn listen(text: &str) -> Listen {
        let text = format!(r#"{{"listen": {text}}}"#);
        Config::parse(&text, &Environment::default())
            .unwrap()
            .listen
    }

    fn address(
        listen: &Listen,
        pairs: &[(&'static str, &str)],
        from: &str,
        tls: bool,
    ) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let peer = Peer {
            address: format!("{from}:1").parse().unwrap(),
            tls,
        };
        of_request(listen, Some(peer), &Uri::from_static("/"), &headers)
    }

    #[test]
    fn it_comes_from_what_looks_like_a_host() {
        let listen = listen("{}");
        let of = |host, tls| address(&listen, &[("host", host)], "10.0.0.1", tls);
        assert_eq!(of("dock:8080", false).as_deref(), Some("http://dock:8080"));
        assert_eq!(of("dock.corp", true).as_deref(), Some("https://dock.corp"));
        assert_eq!(
            of("[::1]:8080", false).as_deref(),
            Some("http://[::1]:8080")
        );
        assert_eq!(of("[::1]", false).as_deref(), Some("http://[::1]"));
        for evil in [
            "\"><script>",
            "a b",
            "user:pw@host",
            "host/path",
            "$(reboot)",
            "`x`",
            "",
            "[x]",
            "a;b",
        ] {
            assert_eq!(of(evil, false), None, "{evil}");
        }
        let uri = Uri::from_static("https://dock:8443/");
        let peer = Peer {
            address: "10.0.0.1:1".parse().unwrap(),
            tls: true,
        };
        assert_eq!(
            of_request(&listen, Some(peer), &uri, &HeaderMap::new()).as_deref(),
            Some("https://dock:8443")
        );
    }

    #[test]
    fn a_proxy_is_believed_when_it_is_trusted() {
        let listen = listen(r#"{"trusted_proxies": ["10.0.0.0/8", "::1"]}"#);
        let pairs = [
            ("host", "inner:8080"),
            ("x-forwarded-host", "dock.corp, other"),
            ("x-forwarded-proto", "https"),
        ];
        assert_eq!(
            address(&listen, &pairs, "10.1.2.3", false).as_deref(),
            Some("https://dock.corp")
        );
        assert_eq!(
            address(&listen, &pairs, "[::1]", false).as_deref(),
            Some("https://dock.corp")
        );
        assert_eq!(
            address(&listen, &pairs, "11.0.0.1", false).as_deref(),
            Some("http://inner:8080")
        );
        let more = |name: &'static str, value: &str| {
            let pairs = [&pairs[..], &[(name, value)]].concat();
            address(&listen, &pairs, "10.1.2.3", false)
        };
        for (name, value, expected) in [
            ("x-forwarded-port", "8443", Some("https://dock.corp:8443")),
            ("x-forwarded-port", "443", Some("https://dock.corp")),
            ("x-forwarded-port", "x", Some("https://dock.corp")),
            (
                "x-forwarded-prefix",
                "/warm/dock/",
                Some("https://dock.corp/warm/dock"),
            ),
            ("x-forwarded-prefix", "/", Some("https://dock.corp")),
            ("x-forwarded-prefix", "/$(reboot)", None),
            ("x-forwarded-prefix", "/..", None),
            ("x-forwarded-prefix", "@evil", None),
        ] {
            assert_eq!(more(name, value).as_deref(), expected, "{name}: {value}");
        }
        let evil = [("host", "inner"), ("x-forwarded-proto", "javascript")];
        assert_eq!(
            address(&listen, &evil, "10.1.2.3", false).as_deref(),
            Some("http://inner")
        );
    }

    #[test]
    fn the_configured_one_counts_before_all() {
        let listen = listen(r#"{"public_url": "https://dock.corp/warm/"}"#);
        assert_eq!(
            address(&listen, &[("host", "x")], "10.0.0.1", false).as_deref(),
            Some("https://dock.corp/warm")
        );
    }
}
