//! The clone pool: mirrors of the repositories that the operator allows, served to any Git client.

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
