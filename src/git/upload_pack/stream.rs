//! The requests of a client that keeps its connection: bytes as they come, cut where each request ends.
//!
//! Over HTTP a body is one request. On a stream (git over SSH) only the packets tell where one ends: in version 2 at a
//! flush, in versions 0 and 1 at the flush behind the wants, and then at the flush or the `done` behind each batch of
//! haves.

use super::Refusal;
use super::pktline::{self, Packet, Packets};

/// What is to be cut off next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything up to a flush: a request of version 2, or what is wanted in versions 0 and 1.
    UpToFlush,
    /// A batch of haves: up to a flush, or to `done`.
    Batch,
}

/// Bytes that have come and are not cut off yet.
pub struct Stream {
    bytes: Vec<u8>,
    /// How many of them are whole packets that do not end the part.
    looked_at: usize,
    limit: usize,
}

impl Stream {
    /// `limit` is the most bytes that one part may have.
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            looked_at: 0,
            limit,
        }
    }

    /// Takes what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// How many bytes have come that no part was made of.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none of these.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Cuts off the next part, its end included; `None` while it has not come whole. Ask with the same `part` again.
    ///
    /// # Errors
    /// [`Refusal::Malformed`] for what is no packet, and for a part that is too large.
    pub fn next_part(&mut self, part: Part) -> Result<Option<Vec<u8>>, Refusal> {
        loop {
            let rest = &self.bytes[self.looked_at..];
            let Some(length) = whole_packet(rest) else {
                if self.bytes.len() > self.limit {
                    return Err(Refusal::Malformed(format!(
                        "expected at most {} bytes in a request, found more",
                        self.limit
                    )));
                }
                return Ok(None);
            };
            let packet = Packets::new(&rest[..length]).next_packet()?;
            self.looked_at += length;
            let ends = match packet {
                Some(Packet::Flush) => true,
                Some(Packet::Data(data)) => part == Part::Batch && pktline::text(data) == b"done",
                _ => false,
            };
            if ends {
                let behind = self.bytes.split_off(self.looked_at);
                self.looked_at = 0;
                return Ok(Some(std::mem::replace(&mut self.bytes, behind)));
            }
        }
    }
}

/// The length of the packet that `bytes` begin with, if it is there as a whole. What is no packet counts as one, for
/// the parser to say so.
fn whole_packet(bytes: &[u8]) -> Option<usize> {
    let head = bytes.first_chunk::<4>()?;
    let length = pktline::length(head).unwrap_or(4).max(4);
    (bytes.len() >= length).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(bytes: &[u8], kinds: &[Part], piece: usize) -> Vec<String> {
        let mut stream = Stream::new(1000);
        let mut kinds = kinds.iter().copied();
        let mut wanted = kinds.next();
        let mut found = Vec::new();
        for piece in bytes.chunks(piece) {
            stream.push(piece);
            while let Some(kind) = wanted {
                let Some(part) = stream.next_part(kind).unwrap() else {
                    break;
                };
                found.push(String::from_utf8(part).unwrap());
                wanted = kinds.next();
            }
        }
        assert!(stream.is_empty());
        found
    }

    #[test]
    fn parts_are_cut_wherever_the_pieces_end() {
        use Part::{Batch, UpToFlush};
        for piece in [1, 3, 7, 1000] {
            let cut = parts(
                b"000awant x00000008have0000000ahave y0008done0009done\n",
                &[UpToFlush, Batch, Batch, Batch],
                piece,
            );
            assert_eq!(
                cut,
                [
                    "000awant x0000",
                    "0008have0000",
                    "000ahave y0008done",
                    "0009done\n"
                ]
            );
        }
        let v2 = b"0014command=ls-refs\n00010009peel\n0000000cdonedone0000";
        assert_eq!(parts(v2, &[UpToFlush, UpToFlush], 5).len(), 2);
    }

    #[test]
    fn done_ends_a_batch_only() {
        let mut stream = Stream::new(1000);
        stream.push(b"0008done");
        assert_eq!(stream.next_part(Part::UpToFlush).unwrap(), None);
        stream.push(b"0000");
        assert_eq!(
            stream.next_part(Part::UpToFlush).unwrap().unwrap(),
            b"0008done0000"
        );
    }

    #[test]
    fn what_is_no_packet_and_what_is_too_large_is_refused() {
        for bytes in [&b"hello, is this a shell?"[..], b"+123"] {
            let mut stream = Stream::new(1000);
            stream.push(bytes);
            assert!(stream.next_part(Part::UpToFlush).is_err());
        }
        let mut stream = Stream::new(1000);
        for _ in 0..101 {
            stream.push(b"000ahave x");
        }
        let refusal = stream.next_part(Part::Batch).unwrap_err().to_string();
        assert!(refusal.contains("at most 1000 bytes"), "{refusal}");
    }
}
