//! pkt-line, the framing of Git's protocols (gitprotocol-common): four hexadecimal digits for the length with
//! themselves, then the data.

/// The most data that one packet takes.
pub const MAX_DATA: usize = 65516;

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    Data(&'a [u8]),
    /// `0000`, ends a message.
    Flush,
    /// `0001`, between the sections of a message (v2).
    Delim,
    /// `0002`, ends a response on a stateless connection (v2).
    ResponseEnd,
}

/// Why bytes are no packets.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error("expected a pkt-line length of four hexadecimal digits, found {0:?}")]
    Length(String),
    #[error(
        "expected {expected} more bytes of a pkt-line, found {found}: the request is truncated"
    )]
    Truncated { expected: usize, found: usize },
}

/// Reads packets from a buffer.
#[derive(Clone)]
pub struct Packets<'a> {
    rest: &'a [u8],
}

impl<'a> Packets<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What was not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next packet, or `None` at the end of the buffer.
    ///
    /// # Errors
    /// [`PacketError`], after which the position is undefined.
    pub fn next_packet(&mut self) -> Result<Option<Packet<'a>>, PacketError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let truncated = |expected, found| PacketError::Truncated { expected, found };
        let (head, rest) = self
            .rest
            .split_at_checked(4)
            .ok_or_else(|| truncated(4, self.rest.len()))?;
        let length = length(head)
            .ok_or_else(|| PacketError::Length(String::from_utf8_lossy(head).into_owned()))?;
        self.rest = rest;
        let packet = match length {
            0 => Packet::Flush,
            1 => Packet::Delim,
            2 => Packet::ResponseEnd,
            3 => return Err(PacketError::Length("0003".to_owned())),
            _ => {
                let (data, rest) = rest
                    .split_at_checked(length - 4)
                    .ok_or_else(|| truncated(length - 4, rest.len()))?;
                self.rest = rest;
                Packet::Data(data)
            }
        };
        Ok(Some(packet))
    }
}

/// The length that the four digits `head` stand for.
pub fn length(head: &[u8]) -> Option<usize> {
    head.iter().try_fold(0, |length, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(length * 16 + digit as usize)
    })
}

/// The four digits of a packet that has `length` bytes with them.
pub fn head(length: usize) -> [u8; 4] {
    [12, 8, 4, 0].map(|shift| b"0123456789abcdef"[(length >> shift) & 0xf])
}

/// The text of a data packet: without the newline that senders may add.
pub fn text(data: &[u8]) -> &[u8] {
    data.strip_suffix(b"\n").unwrap_or(data)
}

/// More data than one packet takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected at most {MAX_DATA} bytes for a pkt-line, found {0}")]
pub struct TooLong(pub usize);

/// Appends a data packet.
///
/// # Errors
/// [`TooLong`]; nothing is appended then, so that what stands in `out` stays readable.
pub fn write_data(out: &mut Vec<u8>, data: &[u8]) -> Result<(), TooLong> {
    if data.len() > MAX_DATA {
        return Err(TooLong(data.len()));
    }
    out.extend_from_slice(&head(data.len() + 4));
    out.extend_from_slice(data);
    Ok(())
}

/// Appends a data packet with `line` and a newline. Only for what we word ourselves; what others name may be longer
/// than a packet and goes through [`write_data`].
pub fn write_line(out: &mut Vec<u8>, line: &str) {
    write_data(out, &[line.as_bytes(), b"\n"].concat()).expect("lines of our own are short");
}

pub const FLUSH: &[u8] = b"0000";
pub const DELIM: &[u8] = b"0001";

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(bytes: &[u8]) -> Result<Vec<Packet<'_>>, PacketError> {
        let mut packets = Packets::new(bytes);
        let mut found = Vec::new();
        while let Some(packet) = packets.next_packet()? {
            found.push(packet);
        }
        Ok(found)
    }

    #[test]
    fn reads_what_it_wrote() {
        let mut bytes = Vec::new();
        write_line(&mut bytes, "want");
        bytes.extend_from_slice(DELIM);
        write_data(&mut bytes, b"").unwrap();
        bytes.extend_from_slice(FLUSH);
        let expected = [
            Packet::Data(b"want\n"),
            Packet::Delim,
            Packet::Data(b""),
            Packet::Flush,
        ];
        assert_eq!(read_all(&bytes).unwrap(), expected);
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let mut bytes = Vec::new();
        let full = vec![b'x'; MAX_DATA];
        write_data(&mut bytes, &full).unwrap();
        let longer = vec![b'x'; MAX_DATA + 1];
        assert_eq!(write_data(&mut bytes, &longer), Err(TooLong(longer.len())));
        assert_eq!(read_all(&bytes).unwrap(), [Packet::Data(&full)]);
    }

    #[test]
    fn refuses_what_is_no_packet() {
        for bytes in [
            &b"zzzz"[..],
            b"0003",
            b"+123",
            b"-001",
            b"00",
            b"0009done",
            b"\xff\xff\xff\xff",
        ] {
            assert!(read_all(bytes).is_err(), "{bytes:?}");
        }
    }
}
