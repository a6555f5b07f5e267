//! Whatever bytes come: packets end where they say, and what was read can be written again.
#![no_main]

#[path = "../properties/pkt_line.rs"]
mod pkt_line;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| pkt_line::check(bytes));
