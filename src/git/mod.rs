//! The clone pool: mirrors of the repositories that the operator allows, served to any Git client.

pub mod answers;
pub mod door;
pub mod durable;
pub mod name;
pub mod objects;
pub mod pool;
pub mod refs;
pub mod snapshot;
pub mod upload_pack;
