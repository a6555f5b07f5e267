//! Reads a fetch response: skips its sections up to the pack, takes the side-band apart, and checks the pack while
//! throwing it away.

use std::io::BufRead;

use anyhow::{Context, Result, bail, ensure};
use aws_lc_rs::digest;

use crate::pkt_line::{self, Packet};

const CHECKSUM: usize = 20;

/// A pack whose header was right, and its trailing checksum too if it was to be verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pack {
    pub bytes: u64,
    pub objects: u32,
}

/// Whether the pack's checksum is computed. Computing it can cost the client more than sending it costs the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    Verified,
    Unchecked,
}

/// Reads the response body to its end (gitprotocol-v2, "fetch": output).
pub fn read(body: &mut impl BufRead, checksum: Checksum) -> Result<Pack> {
    skip_to_pack(body)?;
    let mut check = Check::new(checksum);
    while let Some(packet) = pkt_line::read_head(body)? {
        let length = match packet {
            Packet::Data(length) => length,
            Packet::Flush => break,
            Packet::Delimiter => bail!("expected a side-band packet, found a delimiter"),
        };
        ensure!(
            length > 0,
            "expected a side-band packet, found an empty one"
        );
        let band = body.fill_buf()?.first().copied();
        let band = band.context("the response ended within a packet")?;
        body.consume(1);
        match band {
            1 => read_pack_data(body, length - 1, &mut check)?,
            2 => drop(pkt_line::read_text(body, length - 1)?),
            3 => bail!(
                "the server says: {}",
                pkt_line::read_text(body, length - 1)?
            ),
            band => bail!("expected side band 1, 2 or 3, found {band}"),
        }
    }
    check.finish()
}

fn skip_to_pack(body: &mut impl BufRead) -> Result<()> {
    loop {
        match pkt_line::read_head(body)? {
            Some(Packet::Delimiter) => {}
            Some(Packet::Data(length)) => {
                let line = pkt_line::read_text(body, length)?;
                if line == "packfile" {
                    return Ok(());
                }
                ensure!(!line.starts_with("ERR "), "the server says: {line}");
            }
            Some(Packet::Flush) | None => bail!("expected a pack, found the end of the response"),
        }
    }
}

fn read_pack_data(body: &mut impl BufRead, mut left: usize, check: &mut Check) -> Result<()> {
    while left > 0 {
        let buffer = body.fill_buf()?;
        ensure!(!buffer.is_empty(), "the response ended within a packet");
        let length = buffer.len().min(left);
        check.push(&buffer[..length]);
        body.consume(length);
        left -= length;
    }
    Ok(())
}

/// Hashes all but the last 20 bytes, which are the pack's own checksum.
struct Check {
    /// None when the checksum is not looked at.
    hash: Option<digest::Context>,
    header: Vec<u8>,
    tail: Vec<u8>,
    bytes: u64,
}

impl Check {
    fn new(checksum: Checksum) -> Self {
        let hash = || digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        Self {
            hash: (checksum == Checksum::Verified).then(hash),
            header: Vec::with_capacity(12),
            tail: Vec::with_capacity(2 * CHECKSUM),
            bytes: 0,
        }
    }

    fn push(&mut self, data: &[u8]) {
        self.bytes += data.len() as u64;
        let missing = 12 - self.header.len();
        self.header
            .extend_from_slice(&data[..missing.min(data.len())]);
        let Some(hash) = &mut self.hash else {
            return;
        };
        let Some(sure) = data.len().checked_sub(CHECKSUM) else {
            self.tail.extend_from_slice(data);
            let surplus = self.tail.len().saturating_sub(CHECKSUM);
            hash.update(&self.tail[..surplus]);
            self.tail.drain(..surplus);
            return;
        };
        hash.update(&self.tail);
        hash.update(&data[..sure]);
        self.tail.clear();
        self.tail.extend_from_slice(&data[sure..]);
    }

    fn finish(self) -> Result<Pack> {
        ensure!(
            self.header.starts_with(b"PACK\0\0\0\x02") && self.header.len() == 12,
            "expected a pack of version 2, found {:?}",
            self.header
        );
        if let Some(hash) = self.hash {
            let computed = hash.finish();
            ensure!(
                computed.as_ref() == self.tail,
                "the pack's checksum is wrong: computed {computed:?}, found {:02x?}",
                self.tail
            );
        }
        let count = self.header[8..12].try_into().expect("four bytes");
        Ok(Pack {
            bytes: self.bytes,
            objects: u32::from_be_bytes(count),
        })
    }
}
