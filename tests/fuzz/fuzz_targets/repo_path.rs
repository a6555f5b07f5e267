//! A name that is taken stays below the folder that it is joined to, and names one repository.
#![no_main]

#[path = "../properties/repo_path.rs"]
mod repo_path;

libfuzzer_sys::fuzz_target!(|text: &str| repo_path::check(text));
