//! The whole service from outside: the built binary, real clients, real upstream servers.
//!
//! One binary, so that it links once. Every test has its own folder, upstream and service, on ports that the system
//! chose, and a limit in time for every process that it starts: tests run side by side in any order.
#![forbid(unsafe_code)]

mod support;

mod access;
mod answers;
mod ask_upstream;
mod authorization;
mod bad_input;
mod bad_upstream;
mod cargo;
mod command_line;
mod configuration;
mod crash;
mod crates_access;
mod crates_cache;
mod crates_cargo;
mod crates_overload;
#[cfg(feature = "s3")]
mod crates_s3;
mod crates_warm;
mod full_disk;
mod git_clients;
mod gix_client;
mod limits;
mod name;
mod passing_through;
mod paths;
mod pool;
mod private_crates;
mod properties;
mod reload;
mod server;
mod ssh_door;
mod ssh_limits;
mod ssh_upstream;
mod tls;
