//! Answers to cargo: headers, conditions and bodies.

use std::io::{self, Read};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_TYPE, ETAG, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE, VARY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{StreamExt, try_unfold};
use http_body::{Frame, SizeHint};

use super::counters::Kind;
use super::download::Opened;
use super::entry::Entry;
use super::name::CrateFile;
use super::range::Part;
use super::{Crates, Registry};
use crate::blobs::Failed;
use crate::buffers::Buffer;
use crate::error::Error;

/// cargo asks again three times, and waits as long as it is told.
pub const BUSY: Error = Error::Busy {
    retry_after: Duration::from_secs(5),
};

/// What is unpacked at once, in bytes: little enough for an async worker, and no more than a small buffer.
const PIECE: u64 = 64 << 10;

/// A request as far as answers depend on it.
pub struct Asked<'a> {
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
}

impl Asked<'_> {
    fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// What a header lists: several lines of it count as one (RFC 9110, section 5.2).
    fn list(&self, name: HeaderName) -> impl Iterator<Item = &str> {
        let lines = self.headers.get_all(name).into_iter();
        let texts = lines.filter_map(|line| line.to_str().ok());
        texts.flat_map(|text| text.split(',')).map(str::trim)
    }

    /// `If-None-Match` counts before `If-Modified-Since` (RFC 9110, section 13.2.2).
    fn has(&self, etag: &str, last_modified: Option<&str>) -> bool {
        fn bare(tag: &str) -> &str {
            tag.trim_start_matches("W/")
        }
        if self.headers.contains_key(IF_NONE_MATCH) {
            let mut tags = self.list(IF_NONE_MATCH);
            return tags.any(|tag| tag == "*" || bare(tag) == bare(etag));
        }
        // Whoever has our answer has this very text.
        last_modified.is_some() && self.header(IF_MODIFIED_SINCE) == last_modified
    }

    fn takes_gzip(&self) -> bool {
        let mut any = false;
        for one in self.list(ACCEPT_ENCODING) {
            let mut parts = one.split(';').map(str::trim);
            let coding = parts.next().unwrap_or_default();
            let refused = parts.any(|part| matches!(part, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"));
            if coding.eq_ignore_ascii_case("gzip") {
                return !refused;
            }
            // Only of what is not named itself (RFC 9110, section 12.5.3).
            any |= coding == "*" && !refused;
        }
        any
    }
}

/// An index entry.
pub fn entry(crates: &Crates, entry: &Entry, asked: &Asked<'_>) -> Response {
    let meta = &entry.meta;
    let mut headers = common("text/plain");
    // Others ask again each time; that is cheap here.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
    set(&mut headers, ETAG, &meta.etag);
    if let Some(mut at) = meta
        .last_modified
        .as_deref()
        .and_then(|at| at.parse::<HeaderValue>().ok())
    {
        // Not for the table of HTTP/2's compression: each entry has another time, and all of them would push out of it what
        // every answer has.
        at.set_sensitive(true);
        headers.insert(LAST_MODIFIED, at);
    }
    if asked.has(&meta.etag, meta.last_modified.as_deref()) {
        return response(StatusCode::NOT_MODIFIED, headers, Body::empty());
    }
    let packed = asked.takes_gzip();
    let length = if packed {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        entry.packed.len() as u64
    } else {
        meta.length
    };
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    if asked.method == Method::HEAD {
        return response(StatusCode::OK, headers, Body::empty());
    }
    crates.counters.sent(Kind::Index, length);
    let body = if packed {
        entry.packed.clone().into()
    } else {
        unpacked(entry)
    };
    response(StatusCode::OK, headers, body)
}

/// SECURITY: unpacked while it is sent. However large the entry is, a client who stops reading holds a piece of it, which
/// counts among all that clients hold, and of the packed bytes the one copy that all share. hyper asks for the first
/// piece of a stream before its client takes any: only who has got a buffer for it begins to unpack.
fn unpacked(entry: &Entry) -> Body {
    let begin = (entry.clone(), None, entry.meta.length);
    let pieces = try_unfold(begin, |(entry, begun, left)| async move {
        if left == 0 {
            return Ok(None);
        }
        let size = left.min(PIECE);
        let mut piece = Buffer::for_client(size as usize).await;
        if begun.is_some() {
            // Others have their turn between two pieces.
            tokio::task::yield_now().await;
        }
        let mut text = begun.unwrap_or_else(|| entry.text());
        text.read_exact(piece.as_mut())?;
        let rest = (entry, Some(text), left - size);
        io::Result::Ok(Some((Bytes::from_owner(piece), rest)))
    });
    let length = Some(entry.meta.length);
    Body::new(ExactBody::new(Body::from_stream(pieces), length))
}

/// A `.crate` file, or a part of it.
///
/// # Errors
/// As [`failed`], when the file breaks before its first byte.
pub async fn file(
    crates: &Arc<Crates>,
    registry: &Arc<Registry>,
    file: &CrateFile,
    mut opened: Opened,
    asked: &Asked<'_>,
) -> Result<Response, Error> {
    let etag = format!("\"{}\"", file.digest);
    let mut headers = common("application/gzip");
    // Its name is its checksum. Only for whoever asked: he may have had to show a token.
    headers.insert(
        CACHE_CONTROL,
        HeaderValue::from_static("private, max-age=31536000, immutable"),
    );
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    set(&mut headers, ETAG, &etag);
    if asked.has(&etag, None) {
        return Ok(response(StatusCode::NOT_MODIFIED, headers, Body::empty()));
    }
    let range = asked.header(RANGE).filter(|_| {
        let same = asked.header(IF_RANGE).is_none_or(|tag| tag == etag);
        same && asked.method == Method::GET
    });
    if let Opened::Coming(coming, None) = &opened
        && (range.is_some() || asked.method == Method::HEAD)
    {
        // Only its end tells the length.
        coming.ended().await.map_err(failed)?;
        opened = crates.open(registry, file).await.map_err(failed)?.0;
    }
    let part = opened
        .length()
        .map_or(Part::Whole, |length| Part::of(range, length));
    let (status, range) = match part {
        Part::Whole => (StatusCode::OK, 0..opened.length().unwrap_or(u64::MAX)),
        Part::Some(range) => (StatusCode::PARTIAL_CONTENT, range),
        Part::Outside => {
            let length = opened.length().unwrap_or_default();
            set(&mut headers, CONTENT_RANGE, &format!("bytes */{length}"));
            return Ok(response(
                StatusCode::RANGE_NOT_SATISFIABLE,
                headers,
                Body::empty(),
            ));
        }
    };
    if let Some(length) = opened.length() {
        if status == StatusCode::PARTIAL_CONTENT {
            let value = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            set(&mut headers, CONTENT_RANGE, &value);
        }
        headers.insert(CONTENT_LENGTH, HeaderValue::from(range.end - range.start));
    }
    let body = if asked.method == Method::HEAD {
        Body::empty()
    } else {
        let length = opened.length().map(|_| range.end - range.start);
        let is_passing = matches!(opened, Opened::Passing(_));
        let mut stream = Box::pin(crates.stream(registry, file, opened, range).peekable());
        // Nothing has come of it yet, so its trouble can still be told.
        if is_passing && let Some(Err(why)) = stream.as_mut().peek().await {
            return Err(failed(why.clone()));
        }
        Body::new(ExactBody::new(Body::from_stream(stream), length))
    };
    Ok(response(status, headers, body))
}

/// A body that knows its length, and so when it is over.
struct ExactBody {
    inner: Body,
    left: Option<u64>,
}

impl ExactBody {
    fn new(inner: Body, left: Option<u64>) -> Self {
        Self { inner, left }
    }
}

impl http_body::Body for ExactBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let (Some(left), Some(data)) = (&mut self.left, frame.data_ref())
        {
            *left = left.saturating_sub(data.len() as u64);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.left == Some(0)
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

/// What a client is told when there is no file.
pub fn failed(why: Failed) -> Error {
    match why {
        Failed::NotFound => Error::NotFound,
        Failed::Full => Error::StorageFull,
        Failed::Busy => BUSY,
        Failed::Source(why) | Failed::Wrong(why) => Error::UpstreamFailed(why.to_string()),
    }
}

fn common(content_type: &'static str) -> HeaderMap {
    // As many as an answer has: it does not grow.
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // SECURITY: what others wrote.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn response(status: StatusCode, headers: HeaderMap, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use http_body_util::BodyExt;

    use super::super::entry::Received;
    use super::*;

    fn asked<T>(pairs: &[(HeaderName, &str)], look: impl FnOnce(&Asked<'_>) -> T) -> T {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_str(value).unwrap());
        }
        look(&Asked {
            method: &Method::GET,
            headers: &headers,
        })
    }

    #[test]
    fn conditions() {
        let at = "Tue, 01 Jan 2030 00:00:00 GMT";
        let has = |pairs: &[(HeaderName, &str)]| asked(pairs, |asked| asked.has("\"a\"", Some(at)));
        assert!(!has(&[]));
        assert!(has(&[(IF_NONE_MATCH, "\"a\"")]));
        assert!(has(&[(IF_NONE_MATCH, "\"b\", W/\"a\"")]));
        assert!(has(&[(IF_NONE_MATCH, "*")]));
        assert!(has(&[(IF_NONE_MATCH, "\"b\""), (IF_NONE_MATCH, "\"a\"")]));
        assert!(!has(&[(IF_NONE_MATCH, "\"b\"")]));
        assert!(has(&[(IF_MODIFIED_SINCE, at)]));
        assert!(!has(&[(IF_NONE_MATCH, "\"b\""), (IF_MODIFIED_SINCE, at)]));
        assert!(!has(&[(
            IF_MODIFIED_SINCE,
            "Tue, 01 Jan 2029 00:00:00 GMT"
        )]));
    }

    #[test]
    fn who_takes_gzip() {
        for (value, expected) in [
            ("gzip", true),
            ("deflate, GZIP;q=0.5", true),
            ("*", true),
            ("br, zstd", false),
            ("gzip;q=0", false),
            ("gzip;q=0, *", false),
            ("*, gzip; q=0.0", false),
            ("*;q=0", false),
            ("*;q=0, gzip", true),
            ("br | gzip", true),
            ("* | gzip;q=0", false),
            ("", false),
        ] {
            // What stands in lines of its own.
            let lines: Vec<_> = value
                .split(" | ")
                .map(|line| (ACCEPT_ENCODING, line))
                .collect();
            let takes = asked(&lines, |asked| asked.takes_gzip());
            assert_eq!(takes, expected, "{value}");
        }
        assert!(!asked(&[], |asked| asked.takes_gzip()));
    }

    #[tokio::test]
    async fn an_entry_is_unpacked_in_pieces() {
        let piece = PIECE as usize;
        for length in [100, piece - 1, piece, piece + 1, 3 * piece] {
            let (begin, end) = (r#"{"name":"a","vers":"1.0.0","cksum":""#, "\"}\n");
            let checksum = "b".repeat(length - begin.len() - end.len());
            let text = format!("{begin}{checksum}{end}");
            let entry = Entry::receive("a", Received::default(), text.clone().into()).unwrap();
            let mut body = unpacked(&entry);
            assert_eq!(body.size_hint().exact(), Some(length as u64));
            let mut sent = Vec::new();
            while !body.is_end_stream() {
                let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
                assert!(!data.is_empty() && data.len() <= piece);
                sent.extend_from_slice(&data);
            }
            assert!(sent == text.as_bytes(), "{length}");
            assert!(body.frame().await.is_none());
        }
    }
}
