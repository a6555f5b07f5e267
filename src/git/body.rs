//! Request bodies: read within a limit, unpacked within the same limit.

use std::io::Read;
use std::pin::pin;
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_ENCODING;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::Error;
use crate::server::body::Progress;

/// How a body is packed. Git packs what is longer than 1 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Not at all.
    Identity,
    /// In gzip (RFC 1952), also in several members.
    Gzip,
}

impl Encoding {
    /// Reads `Content-Encoding`.
    ///
    /// # Errors
    /// [`Error::UnsupportedMediaType`] for any but gzip.
    pub fn of(headers: &HeaderMap) -> Result<Self, Error> {
        match headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()) {
            None | Some(b"identity") => Ok(Self::Identity),
            Some(b"gzip" | b"x-gzip") => Ok(Self::Gzip),
            Some(other) => Err(Error::UnsupportedMediaType(format!(
                "Expected the content encoding gzip or none, found {:?}.",
                String::from_utf8_lossy(other)
            ))),
        }
    }
}

/// What each body has room for in any case, of as many as there are places: memory is bounded whoever comes. Most of
/// Git's bodies need no more, so that large ones which come slowly do not keep them out.
const SMALL: usize = 64 << 10;
static PLACES: Semaphore = Semaphore::const_new(512);
/// Bytes of bodies, packed and unpacked, that are held at once beyond that: some MiB where a client wants all of many
/// references.
const ROOM: usize = 32 << 20;
/// The bytes that a permit of [`FREE`] stands for.
const UNIT: usize = 1 << 10;
static FREE: Semaphore = Semaphore::const_new(ROOM / UNIT);
/// Where there is no room, one body at a time goes on all the same and gives back what room it had: else bodies that
/// have a part of the room each would wait for each other, and one larger than all of it for ever.
static BEYOND: Semaphore = Semaphore::const_new(1);
/// Bodies that wait for room. Each has a piece in its hands that is not counted, so these are not many either.
static QUEUE: Semaphore = Semaphore::const_new(256);
/// Bodies come and are worked on in seconds; whoever is behind slow ones is told to come again.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// SECURITY: for a whole body, so that nobody keeps room for hours with a few bytes now and then. The largest that the
/// default of `limits.request_body` allows takes this long at 2 Mbit/s.
pub(super) const LONGEST_READ: Duration = Duration::from_secs(300);
/// SECURITY: while others wait for a place or for room, whoever has some may keep us waiting for so long without getting
/// further, so that few who dribble do not keep out all who do not.
const WHILE_OTHERS_WAIT: Duration = Duration::from_secs(2);
/// Bytes of small bodies that are kept at once while their clients wait for a first clone: of hundreds, which take minutes.
const KEPT: usize = 16 << 20;
static FREE_TO_KEEP: Semaphore = Semaphore::const_new(KEPT / UNIT);
/// What is unpacked between two looks at the room.
const PIECE: usize = 16 << 10;

/// The room that a body has, or the place beyond it, kept as long as this lives.
#[derive(Default)]
pub struct Place {
    small: Option<SemaphorePermit<'static>>,
    room: Option<SemaphorePermit<'static>>,
    /// Whoever has it needs no room.
    beyond: Option<SemaphorePermit<'static>>,
    /// How many bytes it was last to have room for.
    bytes: usize,
    progress: Progress,
}

impl Place {
    /// For what has no bytes yet.
    pub fn none() -> Self {
        Self::default()
    }

    /// Waits until there is room for `bytes` in all, in the order in which bodies come.
    ///
    /// # Errors
    /// [`Error::Busy`] when there is none for [`LONGEST_WAIT`], or too many wait already.
    pub async fn make_room_for(&mut self, bytes: usize) -> Result<(), Error> {
        let more = bytes.saturating_sub(self.bytes);
        self.progress.arrived(more, Duration::ZERO);
        self.bytes = bytes;
        if self.has_room_for(bytes) {
            return Ok(());
        }
        let _queued = QUEUE.try_acquire().map_err(|_| BUSY)?;
        let found = timeout(LONGEST_WAIT, async {
            if self.small.is_none() {
                self.small = Some(PLACES.acquire().await?);
            }
            let missing = self.missing(bytes);
            tokio::select! {
                biased;
                // What never fits would only keep what is given back from others.
                room = FREE.acquire_many(missing), if bytes <= ROOM => {
                    room.map(|room| self.add(room))
                }
                beyond = BEYOND.acquire() => beyond.map(|beyond| self.go_beyond(beyond)),
            }
        });
        found.await.ok().and_then(Result::ok).ok_or(BUSY)
    }

    /// Waits for more bytes to come, which [`Self::make_room_for`] then hears of.
    ///
    /// # Errors
    /// [`Error::RequestTimeout`] when they do not come and others wait for what this has.
    pub async fn keep_while<T>(&mut self, more: impl Future<Output = T>) -> Result<T, Error> {
        let mut more = pin!(more);
        loop {
            let mut next_look = self.progress.left(WHILE_OTHERS_WAIT);
            if next_look.is_zero() && !self.is_wanted() {
                next_look = WHILE_OTHERS_WAIT;
            }
            let since = Instant::now();
            if let Ok(came) = timeout(next_look, &mut more).await {
                self.waited(since);
                return Ok(came);
            }
            self.waited(since);
            if self.progress.left(WHILE_OTHERS_WAIT).is_zero() && self.is_wanted() {
                return Err(Error::RequestTimeout);
            }
        }
    }

    fn waited(&mut self, since: Instant) {
        if self.small.is_some() {
            self.progress.arrived(0, since.elapsed());
        }
    }

    /// Whether others wait for what this has. Whoever waits for room is given it bit by bit, so that none is left.
    fn is_wanted(&self) -> bool {
        let has_room = self.room.is_some() || self.beyond.is_some();
        self.small.is_some() && PLACES.available_permits() == 0
            || has_room && FREE.available_permits() == 0
    }

    /// Whether there is room for `bytes` in all without waiting, which is taken then.
    fn has_room_for(&mut self, bytes: usize) -> bool {
        if self.small.is_none() {
            self.small = PLACES.try_acquire().ok();
        }
        if self.small.is_none() {
            return false;
        }
        let missing = self.missing(bytes);
        if missing == 0 {
            true
        } else if let Ok(room) = FREE.try_acquire_many(missing) {
            self.add(room);
            true
        } else if let Ok(beyond) = BEYOND.try_acquire() {
            self.go_beyond(beyond);
            true
        } else {
            false
        }
    }

    /// The permits of [`FREE`] that are yet to be had.
    fn missing(&self, bytes: usize) -> u32 {
        if self.beyond.is_some() {
            return 0;
        }
        let had = self.room.as_ref().map_or(0, SemaphorePermit::num_permits);
        let missing = bytes.saturating_sub(SMALL).div_ceil(UNIT);
        let missing = missing.saturating_sub(had);
        u32::try_from(missing).unwrap_or(u32::MAX)
    }

    fn add(&mut self, more: SemaphorePermit<'static>) {
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
    }

    fn go_beyond(&mut self, beyond: SemaphorePermit<'static>) {
        self.beyond = Some(beyond);
        self.room = None;
    }
}

/// A body that was read, and its room.
///
/// SECURITY: what is made of the bytes takes memory as they do, so this lives until nobody works on them any more.
pub struct Whole {
    bytes: Bytes,
    place: Place,
}

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// [`Error::PayloadTooLarge`], that the body broke off or came too slowly, or [`Error::Busy`] when there is no room.
pub async fn read(mut body: Body, limit: u64) -> Result<Whole, Error> {
    // What is announced need not be waited for.
    if http_body::Body::size_hint(&body).lower() > limit {
        return Err(Error::PayloadTooLarge { limit });
    }
    let until = Instant::now() + LONGEST_READ;
    let mut bytes = BytesMut::new();
    let mut place = Place::none();
    loop {
        let frame = timeout_at(until, place.keep_while(body.frame())).await;
        let Some(frame) = frame.map_err(|_| Error::RequestTimeout)?? else {
            break;
        };
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

/// A small body that is kept for long, apart from those that are worked on.
pub struct Kept {
    pub bytes: Bytes,
    _room: SemaphorePermit<'static>,
}

impl Kept {
    /// None for a large body, and where too many are kept.
    pub fn new(bytes: Bytes) -> Option<Self> {
        let units = bytes.len().div_ceil(UNIT) as u32;
        let room = (bytes.len() <= SMALL).then(|| FREE_TO_KEEP.try_acquire_many(units));
        Some(Self {
            bytes,
            _room: room?.ok()?,
        })
    }
}

impl Whole {
    /// The bytes, packed or not.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The body if it takes more than the small ones have room for in any case: what was made of it may be as large.
    pub fn if_large(self) -> Option<Self> {
        (self.bytes.len() > SMALL).then_some(self)
    }

    /// The bytes as they came, which have room as long as this lives.
    pub fn shared(&self) -> Bytes {
        self.bytes.clone()
    }

    /// The body unpacked, at most `limit` bytes of it. Takes processor time: not for an async worker.
    ///
    /// # Errors
    /// [`Error::PayloadTooLarge`], or that it is not packed as it says, or that there is no room.
    pub fn decoded(self, encoding: Encoding, limit: u64) -> Result<Self, Error> {
        if encoding == Encoding::Identity {
            return Ok(self);
        }
        let Self { bytes, mut place } = self;
        let mut gzip = flate2::read::MultiGzDecoder::new(&*bytes);
        let mut all = Vec::new();
        loop {
            if !place.has_room_for(bytes.len() + all.len() + PIECE) {
                return Err(BUSY);
            }
            let mut piece = gzip.by_ref().take(PIECE as u64);
            let length = piece.read_to_end(&mut all).map_err(|error| {
                Error::BadRequest(format!(
                    "Expected a gzip body, found something else: {error}."
                ))
            })?;
            if all.len() as u64 > limit {
                return Err(Error::PayloadTooLarge { limit });
            }
            if length < PIECE {
                break;
            }
        }
        Ok(Self {
            bytes: all.into(),
            place,
        })
    }
}

const BUSY: Error = Error::Busy {
    retry_after: Duration::from_secs(2),
};

#[cfg(test)]
mod tests {
    use std::io::Write;

    use futures_util::StreamExt;

    use super::*;

    /// Room is counted in one number for all tests.
    static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    const MIB: usize = 1 << 20;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        gzip.finish().unwrap()
    }

    async fn whole(bytes: impl Into<Body>) -> Whole {
        read(bytes.into(), 8 << 20).await.unwrap()
    }

    /// A body of `count` pieces of `length` bytes, each of which comes after a pause.
    fn pieces(count: usize, length: usize, pause: Duration) -> Body {
        let piece = Bytes::from(vec![b'x'; length]);
        Body::from_stream(futures_util::stream::unfold(count, move |left| {
            let piece = piece.clone();
            async move {
                tokio::time::sleep(pause).await;
                let left = left.checked_sub(1)?;
                Some((Ok::<_, std::io::Error>(piece), left))
            }
        }))
    }

    #[tokio::test]
    async fn a_body_has_its_room_until_nobody_works_on_it_any_more() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let all = FREE.available_permits();
        let taken = || all - FREE.available_permits();
        let places = PLACES.available_permits();
        for length in [1, 2 * MIB] {
            let body = vec![b'x'; length];
            for (sent, encoding) in [
                (body.clone(), Encoding::Identity),
                (packed(&body), Encoding::Gzip),
            ] {
                let decoded = whole(sent).await.decoded(encoding, 8 << 20).unwrap();
                assert_eq!(decoded.bytes(), body);
                let room = taken();
                assert!(room * UNIT + SMALL >= length, "{encoding:?}: {room}");
                assert_eq!(PLACES.available_permits(), places - 1);
                assert_eq!((decoded.shared().len(), taken()), (length, room));
                drop(decoded);
                assert_eq!((taken(), PLACES.available_permits()), (0, places));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_bodies_have_no_more_room_than_there_is() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let large = vec![b'x'; SMALL + MIB];
        let mut held = Vec::new();
        for _ in 0..ROOM / MIB {
            held.push(whole(large.clone()).await);
        }
        assert_eq!(FREE.available_permits(), 0);
        let beyond = whole(large.clone()).await;
        let again = || read(Body::from(large.clone()), 8 << 20);
        assert!(matches!(again().await, Err(Error::Busy { .. })));
        // Small ones are not concerned, packed or not.
        let small = whole(packed(&vec![b'x'; SMALL / 2])).await;
        small.decoded(Encoding::Gzip, 8 << 20).unwrap();
        let giving_back = async { drop(held.pop()) };
        let (served, ()) = tokio::join!(again(), giving_back);
        assert_eq!(served.unwrap().bytes(), large);
        drop(beyond);
    }

    #[tokio::test(start_paused = true)]
    async fn small_bodies_have_places() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let all = u32::try_from(PLACES.available_permits()).unwrap();
        let taken = PLACES.try_acquire_many(all).unwrap();
        assert!(matches!(
            read(Body::from("x"), 10).await,
            Err(Error::Busy { .. })
        ));
        let giving_back = async { drop(taken) };
        let (served, ()) = tokio::join!(read(Body::from("x"), 10), giving_back);
        assert_eq!(served.unwrap().bytes(), b"x");
    }

    #[tokio::test(start_paused = true)]
    async fn bodies_that_have_no_room_together_are_read_one_after_the_other() {
        let _alone = ONE_AT_A_TIME.lock().await;
        for length in [ROOM / 2, ROOM + MIB] {
            let read = async || {
                let body = pieces(length / MIB, MIB, Duration::from_millis(1));
                read(body, length as u64).await.unwrap().bytes().len()
            };
            let lengths = tokio::join!(read(), read(), read());
            assert_eq!(lengths, (length, length, length));
        }
        assert_eq!(FREE.available_permits(), ROOM / UNIT);
    }

    #[tokio::test]
    async fn what_is_unpacked_needs_room() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let body = whole(packed(&vec![b'x'; 2 * SMALL])).await;
        let all = u32::try_from(FREE.available_permits()).unwrap();
        let taken = (FREE.try_acquire_many(all), BEYOND.try_acquire());
        let refused = body.decoded(Encoding::Gzip, 8 << 20);
        assert!(matches!(refused, Err(Error::Busy { .. })));
        drop(taken);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_dribbles_gives_its_room_back() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let body = pieces(1000, 1024, Duration::from_secs(20));
        let refused = read(body, 8 << 20).await;
        assert!(matches!(refused, Err(Error::RequestTimeout)));
        assert_eq!(FREE.available_permits(), ROOM / UNIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_dribbles_gives_its_place_to_whoever_waits() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let all = u32::try_from(PLACES.available_permits()).unwrap();
        let second = Duration::from_secs(1);
        for (length, pause, is_kept) in [
            // As little as nobody minds where there are places.
            (1024, second * 10, false),
            (64, second, false),
            (1024, second, true),
            (2048, second * 3 / 2, true),
        ] {
            let dribbles = async || read(pieces(20, length, pause), 8 << 20).await.is_ok();
            assert!(dribbles().await);
            let _taken = PLACES.try_acquire_many(all - 1).unwrap();
            let waits = async {
                tokio::time::sleep(second * 12).await;
                read(Body::from("x"), 10).await
            };
            let (dribbled, served) = tokio::join!(dribbles(), waits);
            assert_eq!(dribbled, is_kept, "{length} bytes");
            assert_eq!(served.unwrap().bytes(), b"x");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_dribbles_gives_its_room_to_whoever_waits() {
        let _alone = ONE_AT_A_TIME.lock().await;
        let dribbles = async {
            let large = Body::from(vec![b'x'; ROOM - MIB]).into_data_stream();
            let rest = pieces(20, 1024, Duration::from_secs(10)).into_data_stream();
            let body = Body::from_stream(large.chain(rest));
            read(body, ROOM as u64).await
        };
        let _beyond = BEYOND.try_acquire().unwrap();
        let large = vec![b'x'; 2 * MIB];
        let waits = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            read(Body::from(large.clone()), 8 << 20).await
        };
        let (dribbled, served) = tokio::join!(dribbles, waits);
        assert!(matches!(dribbled, Err(Error::RequestTimeout)));
        assert_eq!(served.unwrap().bytes(), large);
    }

    #[tokio::test]
    async fn the_limit_holds_packed_and_unpacked() {
        let _alone = ONE_AT_A_TIME.lock().await;
        for limit in [10, PIECE as u64, MIB as u64 + 10] {
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
