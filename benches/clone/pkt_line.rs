//! Git's packets: four hexadecimal digits of length, then the payload (gitprotocol-common).

use std::io::{BufRead, Read};

use anyhow::{Context, Result, bail};

pub const FLUSH: &[u8] = b"0000";
pub const DELIMITER: &[u8] = b"0001";

/// Appends `text` as one packet.
pub fn write(into: &mut Vec<u8>, text: &str) {
    into.extend_from_slice(format!("{:04x}{text}\n", text.len() + 5).as_bytes());
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Packet {
    Flush,
    Delimiter,
    /// Length of the payload, which is still to be read.
    Data(usize),
}

/// The next packet's head; None at the end of the stream.
pub fn read_head(stream: &mut impl BufRead) -> Result<Option<Packet>> {
    if stream.fill_buf()?.is_empty() {
        return Ok(None);
    }
    let mut digits = [0; 4];
    stream.read_exact(&mut digits)?;
    let length = std::str::from_utf8(&digits)
        .ok()
        .and_then(|digits| usize::from_str_radix(digits, 16).ok())
        .with_context(|| format!("expected a packet length, found {digits:?}"))?;
    Ok(Some(match length {
        0 => Packet::Flush,
        1 => Packet::Delimiter,
        4.. => Packet::Data(length - 4),
        _ => bail!("expected a packet length of 0, 1 or at least 4, found {length}"),
    }))
}

/// A packet's payload as text, without its line end.
pub fn read_text(stream: &mut impl BufRead, length: usize) -> Result<String> {
    let mut payload = Vec::with_capacity(length);
    stream.take(length as u64).read_to_end(&mut payload)?;
    if payload.last() == Some(&b'\n') {
        payload.pop();
    }
    Ok(String::from_utf8_lossy(&payload).into_owned())
}
