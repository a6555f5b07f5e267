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
//! write, and what was not used for longest goes first. [`config`] is read and validated before anything is bound, and
//! again at a reload; [`ops`] is what operators see of all of it. What several rooms need lies beside them: [`durable`]
//! (writes that a crash leaves done or not done), [`buffers`] (bounded memory for what clients are sent), [`breaker`] and
//! [`http_client`] (upstreams), [`own_address`] and [`client_config`] (what clients are told of us).
//!
//! `tests/it` runs the program beside real clients and upstreams, `tests/images` builds and runs its images on a real
//! BuildKit, `tests/fuzz` holds the fuzz targets, and `benches` measures it side by side with others.
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
//! | hot | small, asked for again, and so in memory as well |
//! | second tier | a bucket behind the files on disk, shared by several services |
//! | set aside | quarantined: found damaged, kept out of use, fetched again |
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
