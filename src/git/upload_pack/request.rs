//! What a client asks for, in the terms that both protocol generations share.

use gix_hash::ObjectId;
use gix_object::Kind;
use gix_object::bstr::{BString, ByteSlice};

use super::Refusal;
use crate::git::objects::walk::Filter;

/// How pack bytes are wrapped on their way to the client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Band {
    /// Bare pack bytes, without progress or errors.
    #[default]
    None,
    /// `side-band`: packets of at most 1,000 bytes.
    Small,
    /// `side-band-64k`: packets of at most 65,520 bytes.
    Large,
}

/// How a client wants history to be cut off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deepen {
    /// Number of commits along each line of history; [`Deepen::INFINITE`] for all.
    pub depth: Option<u32>,
    /// `depth` counts from the client's present boundary.
    pub relative: bool,
    /// Only commits at or after this time, in seconds since 1970.
    pub since: Option<i64>,
    /// No commits that these references reach.
    pub not: Vec<BString>,
}

impl Deepen {
    /// What `git fetch --unshallow` sends as depth.
    pub const INFINITE: u32 = 0x7fff_ffff;

    pub fn is_asked(&self) -> bool {
        self.depth.is_some() || self.since.is_some() || !self.not.is_empty()
    }
}

/// A fetch, without what is particular to a protocol version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchRequest {
    pub wants: Vec<ObjectId>,
    /// References that are wanted by name (`want-ref`).
    pub want_refs: Vec<BString>,
    pub haves: Vec<ObjectId>,
    pub done: bool,
    /// The boundary of the client's history.
    pub shallow: Vec<ObjectId>,
    pub deepen: Deepen,
    pub filter: Filter,
    pub thin_pack: bool,
    pub ofs_delta: bool,
    pub include_tag: bool,
    pub no_progress: bool,
    pub wait_for_done: bool,
    /// The whole response comes in the side band, and not only its pack.
    pub sideband_all: bool,
    pub band: Band,
}

/// More of these in one request is no client but an attack: git sends at most some ten thousand haves, and no
/// known repository has more references. A clone with `--mirror` wants each of them, by id or by name.
pub(super) const MAX_IDS: usize = 262_144;

/// People name these by hand.
const MAX_DEEPEN_NOT: usize = 4096;

/// Refuses one more line of a kind of which there are `present`.
pub(super) fn check_room(present: usize, limit: usize, what: &str) -> Result<(), Refusal> {
    if present < limit {
        return Ok(());
    }
    Err(Refusal::Malformed(format!(
        "expected at most {limit} `{what}` lines, found more"
    )))
}

impl FetchRequest {
    /// Whether the answer depends on where references are now: `want-ref` and `deepen-not`.
    pub fn names_references(&self) -> bool {
        !self.want_refs.is_empty() || !self.deepen.not.is_empty()
    }

    /// Takes an argument line that both protocol versions know. Returns false for any other line.
    ///
    /// # Errors
    /// [`Refusal`] when the line is one of these but its value is wrong.
    pub fn take_line(&mut self, line: &[u8]) -> Result<bool, Refusal> {
        let (key, value) = line.split_once_str(" ").unwrap_or((line, b""));
        match key {
            b"want" => push_id(&mut self.wants, "want", value)?,
            b"have" => push_id(&mut self.haves, "have", value)?,
            b"shallow" => push_id(&mut self.shallow, "shallow", value)?,
            b"deepen" => self.deepen.depth = Some(parse_depth(value)?),
            b"deepen-since" => self.deepen.since = Some(parse_number("deepen-since", value)?),
            b"deepen-not" => {
                check_room(self.deepen.not.len(), MAX_DEEPEN_NOT, "deepen-not")?;
                self.deepen.not.push(value.into());
            }
            b"filter" => self.filter = parse_filter(value)?,
            b"done" if value.is_empty() => self.done = true,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn push_id(ids: &mut Vec<ObjectId>, what: &str, hex: &[u8]) -> Result<(), Refusal> {
    check_room(ids.len(), MAX_IDS, what)?;
    let id = ObjectId::from_hex(hex)
        .ok()
        .filter(|id| id.kind() == gix_hash::Kind::Sha1);
    ids.push(id.ok_or_else(|| {
        Refusal::Malformed(format!(
            "expected a SHA-1 object id after `{what}`, found {:?}",
            shown(hex)
        ))
    })?);
    Ok(())
}

fn parse_depth(value: &[u8]) -> Result<u32, Refusal> {
    let depth: u32 = parse_number("deepen", value)?;
    if depth == 0 {
        Err(Refusal::Malformed(
            "expected a depth above 0, found 0".to_owned(),
        ))
    } else {
        Ok(depth)
    }
}

fn parse_number<N: std::str::FromStr>(what: &str, value: &[u8]) -> Result<N, Refusal> {
    value
        .to_str()
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| {
            Refusal::Malformed(format!(
                "expected a number after `{what}`, found {:?}",
                shown(value)
            ))
        })
}

/// Filters as `git rev-list --filter` writes them; what several of them combined leave out is left out.
fn parse_filter(spec: &[u8]) -> Result<Filter, Refusal> {
    let refused = || {
        Refusal::Malformed(format!(
            "expected the filter blob:none, blob:limit=<n>[kmg], tree:<depth>, object:type=<type> or combine:, found {:?}",
            shown(spec)
        ))
    };
    let text = spec.to_str().map_err(|_| refused())?;
    let mut filter = Filter::default();
    if let Some(parts) = text.strip_prefix("combine:") {
        for part in parts.split('+') {
            let part = percent_decoded(part).ok_or_else(refused)?;
            if part.starts_with("combine:") {
                return Err(refused());
            }
            filter = combined(filter, parse_filter(part.as_bytes())?).ok_or_else(refused)?;
        }
    } else if text == "blob:none" {
        filter.blob_limit = Some(0);
    } else if let Some(limit) = text.strip_prefix("blob:limit=") {
        filter.blob_limit = Some(parse_size(limit).ok_or_else(refused)?);
    } else if let Some(depth) = text.strip_prefix("tree:") {
        filter.tree_depth = Some(depth.parse().map_err(|_| refused())?);
    } else if let Some(kind) = text.strip_prefix("object:type=") {
        filter.kind = Some(Kind::from_bytes(kind.as_bytes()).map_err(|_| refused())?);
    } else {
        return Err(refused());
    }
    Ok(filter)
}

fn combined(a: Filter, b: Filter) -> Option<Filter> {
    let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    if a.kind.is_some() && b.kind.is_some() && a.kind != b.kind {
        return None;
    }
    Some(Filter {
        blob_limit: least(a.blob_limit, b.blob_limit),
        tree_depth: least(a.tree_depth, b.tree_depth),
        kind: a.kind.or(b.kind),
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()?.to_ascii_lowercase() {
        b'k' => (&text[..text.len() - 1], 1 << 10),
        b'm' => (&text[..text.len() - 1], 1 << 20),
        b'g' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// The beginning of what a client sent, for a message.
pub(super) fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read() {
        let limit = |blob_limit| Filter {
            blob_limit: Some(blob_limit),
            ..Filter::default()
        };
        assert_eq!(parse_filter(b"blob:none").unwrap(), limit(0));
        assert_eq!(parse_filter(b"blob:limit=2k").unwrap(), limit(2048));
        assert_eq!(
            parse_filter(b"object:type=tree").unwrap().kind,
            Some(Kind::Tree)
        );
        let both = parse_filter(b"combine:blob:none+tree%3A3").unwrap();
        assert_eq!((both.blob_limit, both.tree_depth), (Some(0), Some(3)));
        for wrong in [
            "sparse:oid=main",
            "blob:limit=",
            "tree:x",
            "combine:combine:blob:none",
            "combine:%zz",
            "",
        ] {
            assert!(parse_filter(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lines_with_wrong_values_are_refused() {
        for line in [
            "want 123",
            "have zz",
            "deepen 0",
            "deepen x",
            "deepen-since soon",
            "filter sparse:path=x",
        ] {
            assert!(
                FetchRequest::default().take_line(line.as_bytes()).is_err(),
                "{line}"
            );
        }
        assert!(!FetchRequest::default().take_line(b"thin-pack").unwrap());
    }

    #[test]
    fn a_line_too_many_says_so() {
        let lines = [
            ("want 1111111111111111111111111111111111111111", MAX_IDS),
            ("deepen-not main", MAX_DEEPEN_NOT),
        ];
        for (line, limit) in lines {
            let mut request = FetchRequest::default();
            for _ in 0..limit {
                assert!(request.take_line(line.as_bytes()).unwrap());
            }
            let refusal = request.take_line(line.as_bytes()).unwrap_err().to_string();
            assert!(refusal.contains(&format!("at most {limit} `")), "{refusal}");
        }
    }
}
