//! The clone pool: mirrors of the repositories that the operator allows, served to any Git client.
//!
//! ```text
//! door (HTTP) ────────────────────────► exchange: one request ─► pool: the mirror, fresh enough ─► upstream
//! ssh_door ─► conversation: many of them ──►┘  │    └─► relay: passed through while there is no mirror
//!                                              ▼
//!                         upload_pack: what to send ─► serve: kept, coming or to be made ─► answers
//!                                                                    └─► pack_stream: the bytes for one client
//! ```

pub mod answers;
pub mod blocks;
pub mod body;
pub mod conversation;
pub mod door;
pub mod exchange;
pub mod file_at;
pub mod mirror;
pub mod name;
pub mod objects;
pub mod pack_stream;
pub mod pool;
pub mod refs;
pub mod relay;
pub mod serve;
pub mod snapshot;
pub mod ssh_door;
pub mod upload_pack;
pub mod upstream;
