//! The table in Markdown.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Row;
use crate::run::CLIENTS;

pub fn table(rows: &[Row]) -> String {
    let mut text = String::from(
        "| libc, allocator | base | architecture | compressed MB | unpacked MB | layers | files | binary MB | packages seen | start to ready ms | idle MB | clones/s | under load MB |\n\
         | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |\n",
    );
    for Row { image, figures } in rows {
        let variant = image.variant;
        let _ = write!(
            text,
            "| {}, {} | {} | {} | {} | {} | {} | {} | {} | {} Debian, {} crates |",
            variant.libc,
            variant.allocator,
            variant.base,
            image.architecture.name(),
            megabytes(image.compressed),
            megabytes(image.unpacked),
            image.layers,
            image.files,
            megabytes(image.binary),
            image.debian_packages,
            image.crates,
        );
        let _ = match figures {
            Some(figures) => writeln!(
                text,
                " {:.1} | {} | {:.0} | {} |",
                figures.ready.as_secs_f64() * 1e3,
                megabytes(figures.idle),
                figures.clones_per_second,
                megabytes(figures.loaded),
            ),
            None => writeln!(text, " – | – | – | – |"),
        };
    }
    text
}

/// What the figures were measured with.
pub fn facts(rounds: usize, load: Duration, repository: &Path) -> Result<String> {
    let output = Command::new("git")
        .arg("-C")
        .arg(repository)
        .args(["count-objects", "-v"])
        .output()
        .context("cannot run git")?;
    let counts = String::from_utf8_lossy(&output.stdout).into_owned();
    let count = |key: &str| -> u64 {
        counts
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())
            .unwrap_or_default()
    };
    Ok(format!(
        "MB are 10^6 bytes. Start to ready: median of {rounds} starts, from exec to the answer of /readyz. Clones: {CLIENTS} \
         clients on the same {} cores for {} s, full clones of a repository with {} objects and {:.1} MB.",
        std::thread::available_parallelism()?,
        load.as_secs(),
        count("in-pack:"),
        count("size-pack:") as f64 * 1024.0 / 1e6,
    ))
}

pub fn megabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e6)
}
