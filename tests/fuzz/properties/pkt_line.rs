//! Whatever bytes come: packets end where they say, and what was read can be written again.

use warmdock::git::upload_pack::pktline::{self, DELIM, FLUSH, Packet, Packets};

/// Panics where it does not hold.
pub fn check(bytes: &[u8]) {
    let mut packets = Packets::new(bytes);
    let mut again = Vec::new();
    let mut read = 0;
    while let Ok(Some(packet)) = packets.next_packet() {
        match packet {
            Packet::Data(data) => {
                let line = pktline::text(data);
                assert!(data.starts_with(line) && data.len() - line.len() <= 1);
                // A length of `ffff` is read, but more than git's limit is not written.
                if pktline::write_data(&mut again, data).is_err() {
                    assert!(data.len() > pktline::MAX_DATA);
                    return;
                }
            }
            Packet::Flush => again.extend_from_slice(FLUSH),
            Packet::Delim => again.extend_from_slice(DELIM),
            Packet::ResponseEnd => again.extend_from_slice(b"0002"),
        }
        read = bytes.len() - packets.rest().len();
        assert_eq!(read, again.len());
    }
    // Lengths may be written with capital digits.
    assert!(bytes[..read].eq_ignore_ascii_case(&again));
}
