//! Request bodies: read within a limit, unpacked within the same limit.

use std::io::Read;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_ENCODING;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::Error;

/// How a body is packed. Git packs what is longer than 1 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
}

impl Encoding {
    /// Reads `Content-Encoding`.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for any but gzip.
    pub fn of(headers: &HeaderMap) -> Result<Self, Error> {
        match headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()) {
            None | Some(b"identity") => Ok(Self::Identity),
            Some(b"gzip" | b"x-gzip") => Ok(Self::Gzip),
            Some(other) => Err(Error::BadRequest(format!(
                "Expected the content encoding gzip or none, found {:?}.",
                String::from_utf8_lossy(other)
            ))),
        }
    }
}

/// A body of more than this, packed or unpacked, needs one of a few places: memory is bounded whoever comes.
const LARGE: usize = 1 << 20;
static LARGE_BODIES: Semaphore = Semaphore::const_new(8);

/// A body that was read, and its place among the large ones.
pub struct Whole {
    bytes: Bytes,
    place: Option<SemaphorePermit<'static>>,
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// [`Error::PayloadTooLarge`], or that the body broke off.
pub async fn read(mut body: Body, limit: u64) -> Result<Whole, Error> {
    let mut bytes = BytesMut::new();
    let mut place = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::from_body(&error))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() as u64 + data.len() as u64 > limit {
            return Err(Error::PayloadTooLarge { limit });
        }
        if place.is_none() && bytes.len() + data.len() > LARGE {
            place = LARGE_BODIES.acquire().await.ok();
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Whole {
        bytes: bytes.freeze(),
        place,
    })
}

impl Whole {
    /// The bytes as they came.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// The bytes unpacked, at most `limit` of them. Takes processor time: not for an async worker.
    ///
    /// # Errors
    /// [`Error::PayloadTooLarge`], or that they are not packed as they say.
    pub fn decoded(&self, encoding: Encoding, limit: u64) -> Result<Bytes, Error> {
        if encoding == Encoding::Identity {
            return Ok(self.bytes.clone());
        }
        let first = self.unpacked(LARGE as u64)?;
        if first.len() <= LARGE {
            return Ok(first.into());
        }
        // The place is kept while a body is unpacked, which takes less than a second.
        let _place = match &self.place {
            Some(_) => None,
            None => Some(LARGE_BODIES.try_acquire().map_err(|_| Error::Busy {
                retry_after: RETRY_AFTER,
            })?),
        };
        let all = self.unpacked(limit)?;
        if all.len() as u64 > limit {
            Err(Error::PayloadTooLarge { limit })
        } else {
            Ok(all.into())
        }
    }

    /// At most one byte more than `limit`, which tells that there is more.
    fn unpacked(&self, limit: u64) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        flate2::read::MultiGzDecoder::new(&*self.bytes)
            .take(limit + 1)
            .read_to_end(&mut out)
            .map_err(|error| {
                Error::BadRequest(format!(
                    "Expected a gzip body, found something else: {error}."
                ))
            })?;
        Ok(out)
    }
}

const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(2);
