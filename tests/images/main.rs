//! The images, built by a real BuildKit and run: `tests/run --images`, or with Docker at hand
//! `eval "$(tests/images/engine up)" && cargo nextest run --test images`.
//!
//! What can be tested with a small service is: builds of warmdock itself take minutes. All builds share the engine's
//! cache, as those of a team do, so tests that need a builder that knows nothing remove what they made themselves.
#![forbid(unsafe_code)]

#[expect(
    dead_code,
    unused_imports,
    reason = "shared with the tests of the service, which need more of it"
)]
#[path = "../it/support/mod.rs"]
mod support;

mod archive;
mod corp;
mod docker;
mod project;
mod registry;

mod bad_input;
mod builder;
mod buildkit;
mod compose;
mod contents;
mod dockerfiles;
mod freshness;
mod kubernetes;
mod own_service;
mod private_crate;
mod release;
mod reproducible;
