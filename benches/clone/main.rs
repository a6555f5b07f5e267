//! Measures warmdock beside `git http-backend` with bitmaps, in one run, on the same repository, with the same client:
//!
//! ```text
//! benches/setup                                   # installs nginx and fcgiwrap
//! cargo bench --bench clone                       # makes a large repository, once, and measures with it
//! cargo bench --bench clone -- --repo PATH.git    # measures with a repository of yours
//! ```
//!
//! `options` has the other switches. The map: `generate` (with `history`, `text`, `random`) makes the repository,
//! `repository` prepares it; `git_peer` and `warmdock_peer` run the servers; `wire` (with `http`, `pkt_line`,
//! `answer`) is the client; `measure`, `process` and `cases` measure; `report` and `targets` tell.

#![forbid(unsafe_code)]

mod answer;
mod cases;
mod generate;
mod git_command;
mod git_peer;
mod history;
mod http;
mod measure;
mod options;
mod pkt_line;
#[expect(
    dead_code,
    reason = "processes that have ended are counted over SSH only"
)]
mod process;
mod random;
mod report;
mod repository;
mod targets;
mod text;
mod warmdock_peer;
mod wire;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Parser;

use crate::cases::Servers;
use crate::history::Shape;
use crate::options::{Options, Side};
use crate::report::Facts;
use crate::repository::Repository;

fn main() -> Result<()> {
    if std::env::args().len() == 1 {
        // `cargo test --all-targets` runs this program without arguments; a measurement is no test.
        println!("this is a benchmark: cargo bench --bench clone");
        return Ok(());
    }
    let options = Options::parse();
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    fs::create_dir_all(&kept)?;
    let source = match &options.repo {
        Some(path) => fs::canonicalize(path).with_context(|| format!("{}", path.display()))?,
        None => generate::repository(&shape(&options), &kept)?,
    };

    let run_folder = Temporary::new(kept.join(format!("run-{}", std::process::id())))?;
    let short_folder = std::env::temp_dir().join(format!("warmdock-bench-{}", std::process::id()));
    let short_folder = Temporary::new(short_folder)?;
    let repositories = run_folder.0.join("repositories");
    fs::create_dir_all(&repositories)?;
    eprintln!("copying and packing {}", source.display());
    let repository = Repository::prepare(&source, repositories.join("repo.git"))?;

    let all_cases = cases::all(&options, &repository)?;
    let servers = Servers::start(
        &options,
        repositories,
        run_folder.0.clone(),
        short_folder.0.clone(),
    )?;
    let outcomes: Vec<_> = all_cases
        .into_iter()
        .map(|case| servers.measure(case))
        .collect();
    let report = report::write(&outcomes, &facts(&options, &repository, &servers)?);
    drop(servers);

    println!("{report}");
    if let Some(out) = &options.out {
        fs::write(out, &report).with_context(|| format!("cannot write {}", out.display()))?;
    }
    Ok(())
}

fn shape(options: &Options) -> Shape {
    if options.quick {
        Shape {
            seed: options.seed,
            commits: 2_000,
            files: 400,
            tags: 450,
            branches: 170,
        }
    } else {
        Shape {
            seed: options.seed,
            commits: 33_000,
            files: 3_000,
            tags: 6_900,
            branches: 2_600,
        }
    }
}

fn facts(options: &Options, repository: &Repository, servers: &Servers) -> Result<Facts> {
    let mut lines: Vec<(String, String)> = process::machine()
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    let mut fact = |name: &str, value: String| lines.push((name.to_owned(), value));
    let origin = match &options.repo {
        Some(path) => path
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        None => format!("generated from seed {}", options.seed),
    };
    fact(
        "repository",
        format!(
            "{origin}: {:.1} MB packed, {} objects, {} commits, {} references, HEAD {}",
            repository.pack_bytes as f64 / 1e6,
            repository.objects,
            repository.commits,
            repository.refs,
            &repository.head[..12]
        ),
    );
    if let Some(git) = &servers.git {
        fact(
            "git",
            format!(
                "{}; {} fcgiwrap workers, nginx with a worker per core, repository with bitmap and commit-graph",
                git.versions, options.fcgi_workers
            ),
        );
    }
    if options.measures(Side::Warmdock) {
        let version = git_command::output(Command::new(warmdock_peer::PROGRAM).arg("--version"))
            .unwrap_or_else(|_| concat!("warmdock ", env!("CARGO_PKG_VERSION")).to_owned());
        fact("warmdock", version);
    }
    if let Some(mirrored_in) = servers.mirrored_in {
        fact(
            "first mirroring",
            format!("{mirrored_in:.1?}, from a file upstream"),
        );
    }
    if options.quick {
        fact(
            "quick",
            "a small repository: these figures mean nothing".to_owned(),
        );
    }
    Ok(Facts { lines })
}

/// A folder that goes away with its owner.
struct Temporary(PathBuf);

impl Temporary {
    fn new(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
