//! Measures the SSH door beside OpenSSH's sshd with git-upload-pack, in one run, on the same repository, with the same
//! client, which is OpenSSH's:
//!
//! ```text
//! benches/setup
//! cargo bench --bench ssh -- --clients 1,8         # makes a large repository, once, and measures with it
//! cargo bench --bench ssh -- --repo PATH.git       # measures with a repository of yours
//! ```
//!
//! The client throws the pack away: what it would do with it is the same for both. `server` runs the two servers,
//! `client` is the client; the repository is made and prepared by the modules of the benchmark `clone`.

#![forbid(unsafe_code)]

mod client;
#[path = "../clone/generate.rs"]
mod generate;
#[path = "../clone/git_command.rs"]
mod git_command;
#[path = "../clone/history.rs"]
mod history;
#[path = "../clone/process.rs"]
#[expect(
    dead_code,
    reason = "memory, and processes that come and go, are measured over HTTP only"
)]
mod process;
#[path = "../clone/random.rs"]
mod random;
#[path = "../clone/repository.rs"]
#[expect(dead_code, reason = "fetches are measured over HTTP only")]
mod repository;
mod server;
#[path = "../clone/text.rs"]
mod text;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use client::{Case, Figures};
use history::Shape;
use repository::Repository;
use server::{Keys, Server};

/// Measures the SSH door beside sshd with git-upload-pack. Prints Markdown.
#[derive(Parser)]
#[command(name = "cargo bench --bench ssh --", disable_version_flag = true)]
struct Options {
    /// A bare repository to measure with; it is copied, never changed. Without it a large one is generated (once)
    #[arg(long, value_name = "PATH.git")]
    repo: Option<PathBuf>,

    /// How many clients clone at once
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    clients: Vec<usize>,

    /// A small generated repository, to see whether everything works; its figures mean nothing
    #[arg(long)]
    quick: bool,

    /// Also write the report to this file
    #[arg(long)]
    out: Option<PathBuf>,

    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    if std::env::args().len() == 1 {
        // `cargo test --all-targets` runs this program without arguments; a measurement is no test.
        println!("this is a benchmark: cargo bench --bench ssh -- --clients 1,8");
        return Ok(());
    }
    let options = Options::parse();
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench");
    fs::create_dir_all(&kept)?;
    let source = match &options.repo {
        Some(path) => fs::canonicalize(path).with_context(|| format!("{}", path.display()))?,
        None => generate::repository(&shape(options.quick), &kept)?,
    };
    let folder = Temporary(kept.join(format!("ssh-{}", std::process::id())));
    let repositories = folder.0.join("repositories");
    fs::create_dir_all(&repositories)?;
    eprintln!("copying and packing {}", source.display());
    let repository = Repository::prepare(&source, repositories.join("repo.git"))?;
    let keys = Keys::make(&folder.0)?;
    let peer = Server::sshd(&folder.0, &keys, &repository.path)?;
    let ours = Server::warmdock(&folder.0, &keys, &repositories)?;

    let mut rows = Vec::new();
    for case in Case::all(&repository)? {
        for &clients in &options.clients {
            eprintln!("{} with {clients}", case.name);
            let theirs = client::measure(&peer, &keys, &case, clients)?;
            let ours = client::measure(&ours, &keys, &case, clients)?;
            rows.push((case.name, clients, theirs, ours));
        }
    }
    let report = report(&repository, &rows);
    println!("{report}");
    if let Some(out) = &options.out {
        fs::write(out, &report).with_context(|| format!("cannot write {}", out.display()))?;
    }
    Ok(())
}

fn shape(quick: bool) -> Shape {
    let (commits, files, tags, branches) = if quick {
        (2_000, 400, 450, 170)
    } else {
        // The repository of the benchmark `clone`.
        (33_000, 3_000, 6_900, 2_600)
    };
    Shape {
        seed: 1,
        commits,
        files,
        tags,
        branches,
    }
}

type Row = (&'static str, usize, Figures, Figures);

fn report(repository: &Repository, rows: &[Row]) -> String {
    let mut text = format!(
        "{:.1} MB packed, {} objects, {} references; {} beside warmdock {}\n\n",
        repository.pack_bytes as f64 / 1e6,
        repository.objects,
        repository.refs,
        client::version(),
        env!("CARGO_PKG_VERSION"),
    );
    text += "| case | clients | sshd and git, per second | warmdock, per second | ratio | first byte, sshd | first byte, warmdock | server CPU each, sshd | server CPU each, warmdock |\n";
    text += "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n";
    for (case, clients, theirs, ours) in rows {
        let rate = |figures: &Figures| *clients as f64 / figures.wall.as_secs_f64();
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let _ = writeln!(
            text,
            "| {case} | {clients} | {:.2} | {:.2} | {:.1} × | {:.0} ms | {:.0} ms | {:.0} ms | {:.1} ms |",
            rate(theirs),
            rate(ours),
            rate(ours) / rate(theirs),
            milliseconds(theirs.first_byte),
            milliseconds(ours.first_byte),
            milliseconds(theirs.cpu),
            milliseconds(ours.cpu),
        );
    }
    text
}

/// A folder that goes away with its owner.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
