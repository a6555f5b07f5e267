//! The clone pool: mirrors of the repositories that the operator allows, served to any Git client.

pub mod door;
pub mod name;
pub mod pool;
