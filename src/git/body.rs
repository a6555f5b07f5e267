//! Request bodies: read within a limit, unpacked within the same limit.

use std::io::Read;
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_ENCODING;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

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
/// Large bodies come and are worked on in seconds; whoever is behind slow ones is told to come again.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A place among the large bodies, kept as long as this lives; small ones need none.
pub struct Place(Option<SemaphorePermit<'static>>);

impl Place {
    /// For what is small yet.
    pub fn none() -> Self {
        Self(None)
    }

    /// Waits for a place when what is being read has grown to `bytes` and so needs one.
    ///
    /// # Errors
    /// [`Error::Busy`] when none becomes free for [`LONGEST_WAIT`].
    pub async fn make_room_for(&mut self, bytes: usize) -> Result<(), Error> {
        if self.0.is_none() && bytes > LARGE {
            let place = timeout(LONGEST_WAIT, LARGE_BODIES.acquire()).await;
            let place = place.ok().and_then(Result::ok).ok_or(BUSY)?;
            self.0 = Some(place);
        }
        Ok(())
    }
}

/// A body that was read, and its place among the large ones.
///
/// SECURITY: what is made of the bytes takes memory as they do, so this lives until nobody works on them any more.
pub struct Whole {
    bytes: Bytes,
    place: Place,
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// [`Error::PayloadTooLarge`], that the body broke off, or [`Error::Busy`] when too many large ones are under way.
pub async fn read(mut body: Body, limit: u64) -> Result<Whole, Error> {
    // What is announced need not be waited for.
    if http_body::Body::size_hint(&body).lower() > limit {
        return Err(Error::PayloadTooLarge { limit });
    }
    let mut bytes = BytesMut::new();
    let mut place = Place::none();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::from_body(&error))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() as u64 + data.len() as u64 > limit {
            return Err(Error::PayloadTooLarge { limit });
        }
        place.make_room_for(bytes.len() + data.len()).await?;
        bytes.extend_from_slice(&data);
    }
    Ok(Whole {
        bytes: bytes.freeze(),
        place,
    })
}

impl Whole {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes as they came, with their place, to be kept as long as they are in use.
    pub fn into_parts(self) -> (Bytes, Place) {
        (self.bytes, self.place)
    }

    /// The body unpacked, at most `limit` bytes of it. Takes processor time: not for an async worker.
    ///
    /// # Errors
    /// [`Error::PayloadTooLarge`], or that it is not packed as it says, or that no place is free.
    pub fn decoded(mut self, encoding: Encoding, limit: u64) -> Result<Self, Error> {
        if encoding == Encoding::Identity {
            return Ok(self);
        }
        let mut all = self.unpacked(LARGE as u64)?;
        if all.len() > LARGE {
            if self.place.0.is_none() {
                let place = LARGE_BODIES.try_acquire().map_err(|_| BUSY)?;
                self.place = Place(Some(place));
            }
            all = self.unpacked(limit)?;
        }
        if all.len() as u64 > limit {
            return Err(Error::PayloadTooLarge { limit });
        }
        self.bytes = all.into();
        Ok(self)
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

const BUSY: Error = Error::Busy {
    retry_after: Duration::from_secs(2),
};

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Places are counted in one number for all tests.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    async fn whole(bytes: impl Into<Body>) -> Whole {
        read(bytes.into(), 8 << 20).await.unwrap()
    }

    #[tokio::test]
    async fn a_large_body_has_its_place_until_nobody_works_on_it_any_more() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let large = vec![b'x'; 2 * LARGE];
        let free = || LARGE_BODIES.available_permits();
        let all = free();
        for (body, encoding) in [
            (large.clone(), Encoding::Identity),
            (packed(&large), Encoding::Gzip),
        ] {
            let decoded = whole(body).await.decoded(encoding, 8 << 20).unwrap();
            assert_eq!(decoded.bytes(), large);
            assert_eq!(free(), all - 1, "{encoding:?}");
            let (bytes, place) = decoded.into_parts();
            assert_eq!((bytes.len(), free()), (large.len(), all - 1));
            drop(place);
            assert_eq!(free(), all);
        }
        let small = whole(packed(b"x")).await;
        let small = small.decoded(Encoding::Gzip, 8 << 20).unwrap();
        assert_eq!((small.bytes(), free()), (&b"x"[..], all));

        let taken: Vec<_> = (0..all).map(|_| LARGE_BODIES.try_acquire()).collect();
        let refused = whole(packed(&large)).await.decoded(Encoding::Gzip, 8 << 20);
        assert!(matches!(refused, Err(Error::Busy { .. })));
        drop(taken);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_place_for_ever() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let taken: Vec<_> = (0..LARGE_BODIES.available_permits())
            .map(|_| LARGE_BODIES.try_acquire())
            .collect();
        let refused = read(Body::from(vec![b'x'; 2 * LARGE]), 8 << 20).await;
        assert!(matches!(refused, Err(Error::Busy { .. })));
        drop(taken);
    }

    #[tokio::test]
    async fn the_limit_holds_packed_and_unpacked() {
        let _alone = ONE_AT_A_TIME.lock().await;
        for limit in [10, LARGE as u64 + 10] {
            let body = vec![b'x'; limit as usize + 1];
            let refused = read(Body::from(body.clone()), limit).await;
            assert!(matches!(refused, Err(Error::PayloadTooLarge { .. })));
            let packed = |length: usize| read(Body::from(packed(&body[..length])), 8 << 20);
            let refused = packed(body.len())
                .await
                .unwrap()
                .decoded(Encoding::Gzip, limit);
            assert!(matches!(refused, Err(Error::PayloadTooLarge { .. })));
            let taken = packed(body.len() - 1)
                .await
                .unwrap()
                .decoded(Encoding::Gzip, limit);
            assert_eq!(taken.unwrap().bytes().len() as u64, limit);
        }
        let refused = whole("no gzip").await.decoded(Encoding::Gzip, 10);
        assert!(matches!(refused, Err(Error::BadRequest(_))));
    }
}
