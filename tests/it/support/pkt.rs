//! pkt-lines, the framing of the git protocol (gitprotocol-common), for requests that no client would send.

/// One packet with its length before it.
pub fn line(text: &str) -> Vec<u8> {
    let mut packet = format!("{:04x}", text.len() + 4).into_bytes();
    packet.extend(text.as_bytes());
    packet
}

pub const FLUSH: &[u8] = b"0000";
pub const DELIMITER: &[u8] = b"0001";

/// A v2 request: the command, its capabilities and its arguments.
pub fn v2(command: &str, arguments: &[&str]) -> Vec<u8> {
    let mut body = line(&format!("command={command}\n"));
    body.extend(line("agent=git/2.test\n"));
    body.extend(line("object-format=sha1\n"));
    body.extend(DELIMITER);
    for argument in arguments {
        body.extend(line(&format!("{argument}\n")));
    }
    body.extend(FLUSH);
    body
}

/// A v2 fetch of everything that `want` reaches.
pub fn v2_clone(want: &str) -> Vec<u8> {
    v2("fetch", &["ofs-delta", &format!("want {want}"), "done"])
}

/// The packets of a response: flush, delimiter and response-end as empty ones.
///
/// # Panics
/// When the bytes are no packets.
#[track_caller]
pub fn read(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut packets = Vec::new();
    while !bytes.is_empty() {
        let length = std::str::from_utf8(&bytes[..4]).expect("a pkt-line length");
        let length = usize::from_str_radix(length, 16)
            .expect("a pkt-line length")
            .max(4);
        packets.push(&bytes[4..length]);
        bytes = &bytes[length..];
    }
    packets
}

/// The pack in the side band of a v2 fetch response.
#[track_caller]
pub fn pack_of(body: &[u8]) -> Vec<u8> {
    let packets = read(body);
    let begin = packets
        .iter()
        .position(|packet| *packet == b"packfile\n")
        .expect("a packfile section");
    packets[begin..]
        .iter()
        .filter(|packet| packet.first() == Some(&1))
        .flat_map(|packet| &packet[1..])
        .copied()
        .collect()
}

/// Everything in a response that a person would be shown: error packets and side band 3.
pub fn errors_of(body: &[u8]) -> String {
    let shown = |packet: &&[u8]| packet.starts_with(b"ERR ") || packet.first() == Some(&3);
    read(body)
        .into_iter()
        .filter(shown)
        .map(String::from_utf8_lossy)
        .collect::<Vec<_>>()
        .join("\n")
}
