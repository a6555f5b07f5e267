//! One entry of an index: the versions of a crate, a JSON object in each line. Kept compressed, in the form in which
//! it goes over the wire.

use std::io::{self, Read, Write};

use bytes::Bytes;
use bytes::buf::{Buf, Reader};
use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::blobs::Digest;

/// The largest entries of crates.io have some 2 MB. SECURITY: each question may hold this twice, packed and not.
pub const MOST_BYTES: u64 = 8 << 20;

/// An entry as a registry gave it.
#[derive(Clone, Debug)]
pub struct Entry {
    pub meta: Meta,
    /// gzip.
    pub packed: Bytes,
}

/// What stands before the packed bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// The registry's, to ask it with and to pass on; where it has none, one of our own to pass on.
    pub etag: String,
    /// It is the registry's.
    pub etag_is_theirs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
    /// Without compression.
    pub length: u64,
}

/// What came with an entry.
#[derive(Debug, Default)]
pub struct Received {
    pub etag: Option<String>,
    pub last_modified: Option<String>,
    pub is_packed: bool,
}

impl Entry {
    /// Checks and packs what a registry sent. Takes processor time: not for an async worker.
    ///
    /// # Errors
    /// What was found instead of an entry for `name`, for instance a web page that came with a 200.
    pub fn receive(name: &str, received: Received, body: Bytes) -> Result<Self, String> {
        let (text, packed) = if received.is_packed {
            let text = unpack(&body).map_err(|error| format!("expected gzip ({error})"))?;
            (text, body)
        } else {
            let packed = pack(&body);
            (body.into(), packed)
        };
        check_lines(name, &text)?;
        let etag_is_theirs = received.etag.is_some();
        let meta = Meta {
            etag: received.etag.unwrap_or_else(|| own_etag(&text)),
            etag_is_theirs,
            last_modified: received.last_modified,
            length: text.len() as u64,
        };
        Ok(Self { meta, packed })
    }

    /// The entry without compression, unpacked as it is read: that fails only if memory rots, as what is kept was read
    /// once before. Takes processor time.
    pub fn text(&self) -> impl Read + Send + use<> {
        text(&self.packed)
    }

    /// As a file: [`Meta`] in a line of JSON, the packed bytes, and the CRC-32 of all that.
    pub fn to_file(&self) -> Vec<u8> {
        let mut file = serde_json::to_vec(&self.meta).expect("text and numbers are JSON");
        file.push(b'\n');
        file.extend_from_slice(&self.packed);
        let check = crc32fast::hash(&file);
        file.extend_from_slice(&check.to_le_bytes());
        file
    }

    /// From a file. `None` for one that is damaged.
    pub fn from_file(file: Vec<u8>) -> Option<Self> {
        let (content, check) = file.split_last_chunk()?;
        if crc32fast::hash(content) != u32::from_le_bytes(*check) {
            return None;
        }
        let line = content.iter().position(|byte| *byte == b'\n')?;
        let meta = serde_json::from_slice(&content[..line]).ok()?;
        let packed = line + 1..content.len();
        let packed = Bytes::from(file).slice(packed);
        Some(Self { meta, packed })
    }
}

fn pack(text: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    let packed = encoder
        .write_all(text)
        .and_then(|()| encoder.finish())
        .expect("memory takes everything");
    packed.into()
}

fn text(packed: &Bytes) -> MultiGzDecoder<Reader<Bytes>> {
    MultiGzDecoder::new(packed.clone().reader())
}

fn unpack(packed: &Bytes) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    // SECURITY: a small body can unpack to any size.
    text(packed).take(MOST_BYTES + 1).read_to_end(&mut all)?;
    if all.len() as u64 > MOST_BYTES {
        return Err(io::Error::other("it is too large"));
    }
    Ok(all)
}

fn own_etag(text: &[u8]) -> String {
    let digest = Digest::of(text).to_string();
    format!("\"wd-{}\"", &digest[..32])
}

/// What every line has. cargo skips lines of later formats, and those have these as well.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    name: std::borrow::Cow<'a, str>,
    #[serde(rename = "vers")]
    _version: IgnoredAny,
    #[serde(rename = "cksum")]
    _checksum: IgnoredAny,
}

fn check_lines(name: &str, text: &[u8]) -> Result<(), String> {
    let mut lines = text
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.trim_ascii().is_empty())
        .peekable();
    if lines.peek().is_none() {
        return Err("expected an index entry, found nothing".into());
    }
    for line in lines {
        let line: Line<'_> = serde_json::from_slice(line)
            .map_err(|error| format!("expected an index entry, found something else ({error})"))?;
        if !line.name.eq_ignore_ascii_case(name) {
            return Err(format!(
                "expected the entry of {name}, found that of another crate"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"{\"name\":\"Serde\",\"vers\":\"1.0.0\",\"deps\":[],\"cksum\":\"ab\",\"features\":{},\"yanked\":false}\n\
        {\"name\":\"Serde\",\"vers\":\"1.0.1\",\"cksum\":\"cd\",\"v\":9}\n";

    fn receive(body: &[u8], is_packed: bool) -> Result<Entry, String> {
        let received = Received {
            is_packed,
            ..Received::default()
        };
        Entry::receive("serde", received, Bytes::copy_from_slice(body))
    }

    #[test]
    fn passes_through_unchanged_packed_or_not() {
        let plain = receive(TEXT, false).unwrap();
        let packed = receive(&plain.packed, true).unwrap();
        for entry in [&plain, &packed] {
            let text = io::read_to_string(entry.text()).unwrap();
            assert_eq!(text.as_bytes(), TEXT);
            assert_eq!(entry.meta.length, TEXT.len() as u64);
            assert_eq!(entry.meta.etag, plain.meta.etag);
            let again = Entry::from_file(entry.to_file()).unwrap();
            assert_eq!(
                (again.meta, again.packed),
                (entry.meta.clone(), entry.packed.clone())
            );
        }
    }

    #[test]
    fn refuses_what_is_no_entry() {
        let whole = String::from_utf8(TEXT.to_vec()).unwrap();
        for body in [
            "",
            "\n",
            "<!doctype html><title>Service unavailable</title>",
            "{\"error\":\"x\"}",
            "[]",
            &whole[..whole.len() - 5],
            &whole.replace("Serde", "serde_json"),
        ] {
            assert!(receive(body.as_bytes(), false).is_err(), "{body}");
        }
        assert!(receive(TEXT, true).is_err());
        let packed = receive(TEXT, false).unwrap().packed;
        assert!(receive(&packed[..packed.len() - 9], true).is_err());
    }

    #[test]
    fn refuses_what_is_larger_than_any_entry() {
        let line = TEXT.split_inclusive(|byte| *byte == b'\n').next().unwrap();
        let lines = |bytes: usize| line.repeat(bytes.div_ceil(line.len()));
        let small = pack(&lines(7 << 20));
        assert!(receive(&small, true).is_ok());
        let large = pack(&lines(9 << 20));
        let why = receive(&large, true).unwrap_err();
        assert!(why.contains("too large"), "{why}");
    }

    #[test]
    fn any_flipped_byte_is_found() {
        let entry = receive(TEXT, false).unwrap();
        let file = entry.to_file();
        for at in 0..file.len() {
            // The first makes a digit another one: JSON all the same.
            for bit in [0x01, 0x10] {
                let mut file = file.clone();
                file[at] ^= bit;
                assert!(Entry::from_file(file).is_none(), "{at}");
            }
        }
        for length in 0..file.len() {
            assert!(Entry::from_file(file[..length].to_vec()).is_none());
        }
    }
}
