//! Nobody is let in whose header does not hold the token.
#![no_main]

#[path = "../properties/authorization.rs"]
mod authorization;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| authorization::check(bytes));
