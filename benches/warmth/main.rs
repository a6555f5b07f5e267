//! Measures how warm builds are: a service's image, cold and after what happens between builds, and how long a cold
//! machine waits for sources, straight from their hosts and through warmdock, over a slow link.
//!
//! ```text
//! eval "$(tests/images/engine up)"
//! cargo bench --profile dev --bench warmth
//! ```
//!
//! It empties the engine's build cache several times, and does so only where that engine is the project's own.
//!
//! `service` is what is built; `link` is the slow link; `builds` runs Docker; `sources` is where the sources come from;
//! `registry`, of the image tests, keeps the build cache.

#![forbid(unsafe_code)]

mod builds;
mod link;
#[path = "../../tests/images/registry.rs"]
mod registry;
mod sources;

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use builds::{Builds, Dependencies, Through};
use link::{Far, Speed};
use registry::Registry;
use sources::Sources;

/// A home office, or a build machine behind a busy line.
const SPEED: Speed = Speed {
    rate: 20_000_000 / 8,
    round_trip: Duration::from_millis(60),
};

#[tokio::main]
async fn main() -> Result<()> {
    ensure!(
        std::env::var("WARMDOCK_ENGINE").as_deref() == Ok("own"),
        "this empties Docker's build cache, so it wants the engine of the project's own: WARMDOCK_ENGINE=own tests/images/engine up"
    );
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let sources = Sources::start(folder.path())?;
    let builds = Builds::new(folder.path(), &sources)?;
    let service = &builds.service;

    let mut report = Report::default();
    builds.forget_everything()?;
    let cold = report.row("cold: no layer, no cache mount", builds.image()?, None);
    report.row("nothing has changed", builds.image()?, Some(cold));
    let registry = Registry::start(folder.path())?;
    let cache = format!("{}/team/orders:cache", registry.address);
    report.row(
        "nothing has changed, the cache goes to a registry",
        builds.export_cache(&cache, Dependencies::Mount)?,
        Some(cold),
    );
    builds.forget_everything()?;
    report.row(
        "an empty builder, the cache comes from the registry",
        builds.import_cache(&cache, Dependencies::Mount)?,
        Some(cold),
    );
    builds.forget_everything()?;
    edit(&service.join("src/main.rs"), "×", "by")?;
    report.row(
        "an empty builder, the cache comes from the registry, a source has changed",
        builds.import_cache(&cache, Dependencies::Mount)?,
        Some(cold),
    );
    builds.forget_everything()?;
    let layers = format!("{}/team/orders:layers", registry.address);
    report.row(
        "cold, `DEPENDENCIES=layer`, the cache goes to a registry",
        builds.export_cache(&layers, Dependencies::Layer)?,
        Some(cold),
    );
    builds.forget_everything()?;
    edit(&service.join("src/main.rs"), "by", "lots of")?;
    report.row(
        "an empty builder, `DEPENDENCIES=layer`, the cache comes from the registry, a source has changed",
        builds.import_cache(&layers, Dependencies::Layer)?,
        Some(cold),
    );
    builds.image()?;
    edit(&service.join("src/main.rs"), "lots of", "times")?;
    report.row("a source has changed", builds.image()?, Some(cold));
    edit(&service.join("Cargo.toml"), "=1.0.14", "=1.0.15")?;
    sources.lock(service)?;
    report.row("a crate has a new version", builds.image()?, Some(cold));
    builds.forget_mounts()?;
    edit(&service.join("src/main.rs"), "times", "pieces of")?;
    report.row(
        "the cache mounts are gone, a source has changed",
        builds.image()?,
        Some(cold),
    );

    let [proxy, git_host, far_warmdock] = link::open(
        SPEED,
        [
            Far::Proxy,
            Far::Fixed(sources.host),
            Far::Fixed(sources.warmdock),
        ],
    )
    .await?;
    // Warms it, as any build before did.
    builds.forget_everything()?;
    builds.crates(&Through::Warmdock(sources.warmdock))?;
    let mut fetches = Report::default();
    builds.forget_everything()?;
    let direct = fetches.row(
        "straight from crates.io and the Git host, over the link",
        builds.crates(&Through::Link { proxy, git_host })?,
        None,
    );
    for (what, address) in [
        ("through a warm warmdock, over the same link", far_warmdock),
        (
            "through a warm warmdock on this side of the link",
            sources.warmdock,
        ),
    ] {
        builds.forget_everything()?;
        fetches.row(
            what,
            builds.crates(&Through::Warmdock(address))?,
            Some(direct),
        );
    }

    let crates = fs::read_to_string(service.join("Cargo.lock"))?
        .matches("[[package]]")
        .count();
    println!(
        "A service of {crates} crates, one of them from Git; {} cores.\n",
        std::thread::available_parallelism()?
    );
    print!(
        "| build of the musl image | seconds | of cold |\n| --- | ---: | ---: |\n{}",
        report.text
    );
    print!(
        "\n| a cold machine fetches all sources (20 Mbit/s, 60 ms) | seconds | of direct |\n| --- | ---: | ---: |\n{}",
        fetches.text
    );
    Ok(())
}

#[derive(Default)]
struct Report {
    text: String,
}

impl Report {
    fn row(&mut self, what: &str, time: Duration, of: Option<Duration>) -> Duration {
        let share = of.map_or("".into(), |of| {
            format!("{:.2}", time.as_secs_f64() / of.as_secs_f64())
        });
        let row = format!("| {what} | {:.1} | {share} |\n", time.as_secs_f64());
        eprint!("{row}");
        self.text.push_str(&row);
        time
    }
}

fn edit(path: &Path, old: &str, new: &str) -> Result<()> {
    let text = fs::read_to_string(path)?;
    ensure!(text.contains(old), "{} has no {old:?}", path.display());
    Ok(fs::write(path, text.replace(old, new))?)
}
