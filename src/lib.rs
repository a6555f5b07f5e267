//! warmdock keeps container builds warm.
//!
//! # The map
//!
//! ```text
//! git / cargo / BuildKit                                upstream Git hosts
//!    │ v0 v1 v2 over HTTP, SSH                                ▲ https, http, ssh, file
//!    ▼                                                        │ one fetch at a time per repository
//! server ─► router ─► git::door ──────┬─► access ─► git::pool ──► git::mirror (bare repository on disk)
//!    └────► ssh ────► git::ssh_door ──┘               │
//!                                                     ▼
//!                       git::exchange, git::conversation ──► git::upload_pack (knows neither HTTP nor SSH)
//!                                                     │ plan: whole pack, kept answer, or new pack
//!                                                     ▼
//!                                             git::answers (one writer, many readers)
//! ```
//!
//! One direction: a door parses the request, access decides, the pool makes the mirror fresh enough,
//! upload-pack decides what to send, answers sends it. Crates go the same way:
//!
//! ```text
//! cargo ─► server ─► router ─► crates::door ─► access ─┬─► crates::index (entries on disk, revalidated) ─► registries
//!                                                      └─► crates::download ─► blobs (by SHA-256) ───────► registries
//! ```
//!
//! [`storage`] is the one account of disk space: mirrors, answers, index entries and blobs reserve there before they
//! write, and what was not used for longest goes first.
//!
//! # The words
//!
//! | here | in the field |
//! | --- | --- |
//! | door | endpoint: what takes requests over one protocol |
//! | flight, landed | single-flight call, and its result for all who wait for it |
//! | coming | in-progress download, which readers follow |
//! | kept | cached |
//! | whole | full clone: all that the references reach |
//! | cold | not mirrored yet |
//! | passing, relayed | pass-through: from the upstream to the client, without being cached |
#![forbid(unsafe_code)]

pub mod access;
pub mod app;
pub mod blobs;
pub mod breaker;
pub mod buffers;
pub mod cli;
pub mod client_config;
pub mod config;
pub mod crates;
pub mod durable;
pub mod error;
pub mod git;
pub mod healthcheck;
pub mod http_client;
pub mod logging;
pub mod ops;
pub mod own_address;
pub mod router;
pub mod server;
pub mod ssh;
pub mod storage;
