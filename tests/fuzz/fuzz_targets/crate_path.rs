//! What is asked of a registry names one file below a folder, and only under one path.
#![no_main]

#[path = "../properties/crate_path.rs"]
mod crate_path;

libfuzzer_sys::fuzz_target!(|text: &str| crate_path::check(text));
