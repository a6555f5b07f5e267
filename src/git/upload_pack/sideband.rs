//! The side band: pack bytes, progress and errors on one stream (gitprotocol-pack, "Packfile Data").

use std::io::{self, Write};

use super::pktline::{self, FLUSH, Packet, Packets};
use super::request::Band;

/// Pack bytes in one packet of `side-band-64k`: 65,520 with length and band.
pub const LARGE_PAYLOAD: usize = 65_515;
/// A full packet of `side-band-64k`.
pub const LARGE_PACKET: usize = LARGE_PAYLOAD + HEAD;
/// Pack bytes in one packet of `side-band`: 1,000 with length and band.
const SMALL_PAYLOAD: usize = 995;

pub const PACK: u8 = 1;
pub const PROGRESS: u8 = 2;
pub const ERROR: u8 = 3;

/// Frames what is written as pack data of `side-band-64k`, in full packets.
pub struct Framed<W> {
    out: W,
    packet: Vec<u8>,
}

const HEAD: usize = 5;

impl<W: Write> Framed<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            packet: head(),
        }
    }

    /// Sends what does not fill a packet and gives back the writer.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<W> {
        self.send()?;
        Ok(self.out)
    }

    fn send(&mut self) -> io::Result<()> {
        if self.packet.len() > HEAD {
            let length = pktline::head(self.packet.len());
            self.packet[..4].copy_from_slice(&length);
            self.out.write_all(&self.packet)?;
            self.packet.truncate(HEAD);
        }
        Ok(())
    }
}

fn head() -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEAD + LARGE_PAYLOAD);
    packet.extend_from_slice(b"0000");
    packet.push(PACK);
    packet
}

impl<W: Write> Write for Framed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(HEAD + LARGE_PAYLOAD - self.packet.len());
        self.packet.extend_from_slice(&bytes[..taken]);
        if self.packet.len() == HEAD + LARGE_PAYLOAD {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A progress text. Git shows it behind `remote: `.
pub fn progress(band: Band, text: &str) -> Vec<u8> {
    packet(band, PROGRESS, text.as_bytes())
}

/// An error that ends the transfer. Without a band there is no way to tell; the truncated pack has to.
pub fn error(band: Band, text: &str) -> Vec<u8> {
    packet(band, ERROR, text.as_bytes())
}

/// Empty packets of pack data, which keep a connection from looking dead: more than one, for whoever counts bytes.
pub fn keepalive(band: Band) -> Vec<u8> {
    match band {
        Band::None => Vec::new(),
        Band::Small | Band::Large => b"0005\x01".repeat(4),
    }
}

/// The same for a client of `sideband-all` that waits for what comes before the pack: there, data would be an empty line.
pub fn keepalive_before_pack() -> Vec<u8> {
    b"0005\x02".repeat(4)
}

/// What comes before the pack, for a client of `sideband-all`: its lines in the band (gitprotocol-v2).
pub fn wrapped(head: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(2 * head.len());
    let mut packets = Packets::new(head);
    loop {
        let before = packets.rest();
        match packets.next_packet() {
            Ok(Some(Packet::Data(line))) => out.extend_from_slice(&packet(Band::Large, PACK, line)),
            Ok(Some(_)) => out.extend_from_slice(&before[..before.len() - packets.rest().len()]),
            Ok(None) | Err(_) => return out,
        }
    }
}

/// What follows the last byte of the pack.
pub fn end(band: Band) -> &'static [u8] {
    match band {
        Band::None => b"",
        Band::Small | Band::Large => FLUSH,
    }
}

fn packet(band: Band, channel: u8, data: &[u8]) -> Vec<u8> {
    let most = match band {
        Band::None => return Vec::new(),
        Band::Small => SMALL_PAYLOAD,
        Band::Large => LARGE_PAYLOAD,
    };
    let data = &data[..data.len().min(most)];
    let mut out = Vec::with_capacity(HEAD + data.len());
    out.extend_from_slice(&pktline::head(HEAD + data.len()));
    out.push(channel);
    out.extend_from_slice(data);
    out
}

/// Turns the stored form, `side-band-64k`, into what a client with another band takes. Packets may be split between
/// calls in any way.
pub struct Reframe {
    band: Band,
    /// Bytes of the packet's head that came so far.
    head: Vec<u8>,
    /// Bytes of the packet's data that are still to come.
    left: usize,
}

impl Reframe {
    pub fn to(band: Band) -> Self {
        Self {
            band,
            head: Vec::with_capacity(HEAD),
            left: 0,
        }
    }

    /// Whether bytes pass as they are.
    pub fn is_identity(&self) -> bool {
        self.band == Band::Large
    }

    pub fn push(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 100);
        while !bytes.is_empty() {
            if self.left == 0 {
                let taken = bytes.len().min(HEAD - self.head.len());
                self.head.extend_from_slice(&bytes[..taken]);
                bytes = &bytes[taken..];
                if self.head.len() == HEAD {
                    let length = pktline::length(&self.head[..4]);
                    self.left = length.unwrap_or(HEAD).saturating_sub(HEAD);
                    self.head.clear();
                }
                continue;
            }
            let taken = bytes.len().min(self.left);
            let (data, rest) = bytes.split_at(taken);
            (bytes, self.left) = (rest, self.left - taken);
            match self.band {
                Band::None => out.extend_from_slice(data),
                Band::Small | Band::Large => {
                    for part in data.chunks(if self.band == Band::Small {
                        SMALL_PAYLOAD
                    } else {
                        LARGE_PAYLOAD
                    }) {
                        out.extend_from_slice(&packet(self.band, PACK, part));
                    }
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(data: &[u8]) -> Vec<u8> {
        let mut framed = Framed::new(Vec::new());
        framed.write_all(data).unwrap();
        framed.finish().unwrap()
    }

    /// Lines are in the band, and what stands between them is not.
    #[test]
    fn what_comes_before_a_pack_is_wrapped() {
        let plain = b"0010shallow-info000dshallow 10001000dpackfile\n0000";
        let expected = b"0011\x01shallow-info000e\x01shallow 10001000e\x01packfile\n0000";
        assert_eq!(wrapped(plain), expected);
        assert_eq!(wrapped(b""), b"");
    }

    #[test]
    fn reframing_keeps_every_byte() {
        let data: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        let stored = framed(&data);
        assert_eq!(&stored[..5], b"fff0\x01");
        for step in [1, 3, 7, 4096, stored.len()] {
            let mut bare = Reframe::to(Band::None);
            let bytes: Vec<u8> = stored
                .chunks(step)
                .flat_map(|chunk| bare.push(chunk))
                .collect();
            assert!(bytes == data, "chunks of {step}");
            let mut small = Reframe::to(Band::Small);
            let small: Vec<u8> = stored
                .chunks(step)
                .flat_map(|chunk| small.push(chunk))
                .collect();
            let mut back = Reframe::to(Band::None);
            assert!(back.push(&small) == data, "small, chunks of {step}");
        }
    }
}
