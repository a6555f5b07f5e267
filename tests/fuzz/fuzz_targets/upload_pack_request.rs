//! Requests of all versions: none may end in a panic, and what is answered is made of packets.
#![no_main]

#[path = "../properties/upload_pack_request.rs"]
mod upload_pack_request;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| upload_pack_request::check(bytes));
