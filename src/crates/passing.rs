//! A file that there is no room for: passed on to one client, checked all the same, and not kept.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::download::of_trouble;
use super::name::CrateFile;
use super::upstream::{Body, Trouble, Upstream};
use crate::blobs::{Digest, Failed, Hasher};

/// Reads a part of a file from its registry.
pub struct Passing {
    upstream: Arc<Upstream>,
    /// What had come already.
    begun: Option<Bytes>,
    /// What has yet to come.
    rest: Option<Body>,
    length: Option<u64>,
    digest: Digest,
    hasher: Hasher,
    /// Bytes that have come.
    received: u64,
    left: Range<u64>,
    /// SECURITY: goes out only when the next piece has come, and the last one when the whole is known to be right.
    held: Option<Bytes>,
    ended: bool,
    /// Among those that are passed on at once.
    _place: OwnedSemaphorePermit,
}

impl Passing {
    /// Asks for the file as a whole.
    ///
    /// # Errors
    /// What the registry answers instead.
    pub async fn begin(
        upstream: Arc<Upstream>,
        file: &CrateFile,
        place: OwnedSemaphorePermit,
    ) -> Result<Self, Trouble> {
        let body = upstream.file(file, 0).await?;
        Ok(Self::of(upstream, file, Bytes::new(), Some(body), place))
    }

    /// An answer of which something has come, or all where there is no rest.
    pub fn of(
        upstream: Arc<Upstream>,
        file: &CrateFile,
        begun: Bytes,
        rest: Option<Body>,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let length = match &rest {
            Some(body) => body.length,
            None => Some(begun.len() as u64),
        };
        Self {
            upstream,
            begun: Some(begun),
            rest,
            length,
            digest: file.digest,
            hasher: Hasher::default(),
            received: 0,
            left: 0..u64::MAX,
            held: None,
            ended: false,
            _place: place,
        }
    }

    /// In bytes, where the registry has said it.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Only this part of the file.
    pub fn part(mut self, range: Range<u64>) -> Self {
        self.left = range;
        self
    }

    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    /// That it breaks off, or is not what it should be.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failed> {
        while !self.ended {
            let chunk = match (self.begun.take(), &mut self.rest) {
                (None, Some(body)) => self.upstream.chunk(body).await.map_err(of_trouble)?,
                (begun, _) => begun,
            };
            let Some(chunk) = chunk else {
                self.ended = true;
                let found = std::mem::take(&mut self.hasher).finish();
                if found != self.digest {
                    let text = format!(
                        "expected a file with the SHA-256 {}, found {} bytes with {found}",
                        self.digest, self.received
                    );
                    return Err(Failed::Wrong(text.into()));
                }
                break;
            };
            self.hasher.update(&chunk);
            let wanted = self.wanted(&chunk);
            self.received += chunk.len() as u64;
            if !wanted.is_empty()
                && let Some(ready) = self.held.replace(wanted)
            {
                return Ok(Some(ready));
            }
        }
        Ok(self.held.take())
    }

    /// What of the piece that begins at `received` the client gets.
    fn wanted(&mut self, chunk: &Bytes) -> Bytes {
        let length = chunk.len() as u64;
        let start = self.left.start.saturating_sub(self.received).min(length);
        let end = self.left.end.saturating_sub(self.received).min(length);
        if start >= end {
            return Bytes::new();
        }
        self.left.start = self.received + end;
        chunk.slice(start as usize..end as usize)
    }
}
