//! Whatever text comes: problems that can be shown, or a configuration that can be written and read again.
#![no_main]

#[path = "../properties/configuration.rs"]
mod configuration;

libfuzzer_sys::fuzz_target!(|text: &str| configuration::check(text));
