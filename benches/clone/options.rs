//! The benchmark's command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Measures warmdock beside git http-backend with bitmaps (behind nginx and fcgiwrap) and beside nginx serving
/// recorded answers as files: the same repository, the same client, one run. Prints Markdown.
#[derive(Parser)]
#[command(name = "cargo bench --bench clone --", disable_version_flag = true)]
pub struct Options {
    /// A bare repository to measure with; it is copied, never changed. Without it a large one is generated (once)
    #[arg(long, value_name = "PATH.git")]
    pub repo: Option<PathBuf>,

    /// How many clients clone at once
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    pub clients: Vec<usize>,

    /// A small generated repository, to see whether everything works; its figures mean nothing
    #[arg(long)]
    pub quick: bool,

    /// Measure one side alone
    #[arg(long)]
    pub only: Option<Side>,

    /// Cases to measure
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "full,full-unchecked,depth1,fetch,refs"
    )]
    pub cases: Vec<CaseKind>,

    /// Also write the report to this file
    #[arg(long)]
    pub out: Option<PathBuf>,

    /// Seed of the generated repository
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// In the incremental fetch the client is this many commits behind, counted on the default branch
    #[arg(long, default_value_t = 200)]
    pub behind: usize,

    /// Worker processes of fcgiwrap: so many requests are answered by git at once, others wait
    #[arg(long, default_value_t = 8)]
    pub fcgi_workers: usize,

    /// Given by cargo
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    pub fn measures(&self, side: Side) -> bool {
        self.only.is_none_or(|only| only == side)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Side {
    Git,
    Warmdock,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Debug)]
pub enum CaseKind {
    Full,
    /// As `full`, but the client does not compute the checksum, which otherwise limits how fast it can be served
    FullUnchecked,
    Depth1,
    Fetch,
    Refs,
}
