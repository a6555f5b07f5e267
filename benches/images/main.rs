//! Compares the images: musl and glibc, each with mimalloc and with the C library's own allocator, for both
//! architectures. Prints a table in Markdown, and draws it as SVG:
//!
//! ```text
//! eval "$(tests/images/engine up)"
//! cargo bench --profile dev --bench images -- --svg docs/image-comparison.svg
//! ```
//!
//! `image` builds an image with `docker buildx bake` and looks at what is in it; `run` starts the service in the image's
//! own file system and measures it, on this machine's architecture only; `report` writes the table, `chart` draws it.
//! The container engine's own work is the same for all of them and would hide the differences, so none is measured.

#![forbid(unsafe_code)]

#[path = "../clone/answer.rs"]
mod answer;
mod chart;
#[path = "../clone/http.rs"]
mod http;
mod image;
#[path = "../clone/pkt_line.rs"]
mod pkt_line;
mod report;
mod run;
#[path = "../clone/wire.rs"]
#[expect(dead_code, reason = "only full clones are measured")]
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use image::{Architecture, Image, Variant};
use run::Figures;

#[derive(Parser)]
struct Options {
    /// Where the picture goes.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Which architectures.
    #[arg(long, value_delimiter = ',', default_value = "amd64,arm64")]
    architectures: Vec<Architecture>,
    /// How often each service is started; the median counts.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long each service is asked for clones.
    #[arg(long, default_value = "10", value_parser = seconds)]
    seconds: Duration,
    /// A bare repository that is cloned; this checkout's own history without it.
    #[arg(long)]
    repository: Option<PathBuf>,
    /// cargo passes this to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "expected whole seconds")?;
    Ok(Duration::from_secs(seconds))
}

/// A row of the table.
pub struct Row {
    pub image: Image,
    /// None for another architecture than this machine's.
    pub figures: Option<Figures>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let repository = run::repository(options.repository.as_deref(), folder.path())?;
    let mut rows = Vec::new();
    for architecture in &options.architectures {
        for variant in Variant::ALL {
            eprintln!("builds {} for {}", variant.title(), architecture.name());
            let image = Image::build(variant, *architecture, folder.path())?;
            let figures = architecture
                .is_native()
                .then(|| {
                    eprintln!("measures {}", variant.title());
                    run::measure(&image, &repository, options.rounds, options.seconds)
                })
                .transpose()?;
            rows.push(Row { image, figures });
        }
    }
    print!("{}", report::table(&rows));
    println!(
        "\n{}",
        report::facts(options.rounds, options.seconds, &repository)?
    );
    if let Some(path) = &options.svg {
        chart::draw(&rows, path)?;
        eprintln!("drew {}", path.display());
    }
    Ok(())
}
