//! Makes the large repository that is measured when none is given, by `git fast-import`, repeatable from a seed.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::git_command::run;
use crate::history::{History, Shape, Version};
use crate::random::Random;
use crate::text::{TextFile, Vocabulary};

/// Folders that files are spread over, in two levels.
pub const FOLDERS: usize = 24 * 11;
/// Raised when the generator changes what it makes: a kept repository of an older generator is then made anew.
const GENERATION: u32 = 1;
/// 2020-01-01, the time of the first commit; each further one is seconds later.
const FIRST_SECOND: usize = 1_577_836_800;
const SECONDS_APART: usize = 5400;

/// The generated repository of this shape below `folder`, made now unless an earlier run left it.
pub fn repository(shape: &Shape, folder: &Path) -> Result<PathBuf> {
    let name = format!(
        "generated-v{GENERATION}-{}-{}.git",
        shape.seed, shape.commits
    );
    let finished = folder.join(&name);
    if finished.exists() {
        return Ok(finished);
    }
    let started = Instant::now();
    let unfinished = folder.join(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished)?;
    }
    eprintln!(
        "making a repository of {} commits, once (seed {})",
        shape.commits, shape.seed
    );
    run(Command::new("git")
        .args(["init", "--quiet", "--bare", "--initial-branch=main"])
        .arg(&unfinished))?;
    import(shape, &unfinished)?;
    eprintln!("imported after {:.0?}; repacking", started.elapsed());
    // fast-import finds deltas only against the object before; real repositories were packed with a window.
    run(Command::new("git").arg("-C").arg(&unfinished).args([
        "repack",
        "-q",
        "-a",
        "-d",
        "-f",
        "--depth=50",
        "--window=10",
    ]))?;
    run(Command::new("git")
        .arg("-C")
        .arg(&unfinished)
        .args(["pack-refs", "--all"]))?;
    fs::rename(&unfinished, &finished)?;
    eprintln!("made {} in {:.0?}", finished.display(), started.elapsed());
    Ok(finished)
}

fn import(shape: &Shape, repository: &Path) -> Result<()> {
    let mut git = Command::new("git")
        .arg("-C")
        .arg(repository)
        .args(["fast-import", "--quiet", "--force", "--depth=50"])
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot start git fast-import")?;
    let pipe = git.stdin.take().expect("stdin is piped");
    let mut stream = BufWriter::with_capacity(1 << 20, pipe);
    let written = write_stream(shape, &mut stream).and_then(|()| Ok(stream.flush()?));
    drop(stream);
    let status = git.wait()?;
    ensure!(status.success(), "git fast-import ended with {status}");
    written.context("git fast-import stopped reading")
}

fn write_stream(shape: &Shape, out: &mut impl Write) -> Result<()> {
    let history = History::plan(shape);
    let vocabulary = Vocabulary::new(shape.seed);
    let marks = Marks::new(&history);

    // All versions of a file in a row: each is stored as a delta to the one before.
    let mut content = Vec::new();
    for (file, &versions) in history.versions.iter().enumerate() {
        let mut text = TextFile::new(&vocabulary, Random::stream(shape.seed, file as u64));
        for version in 1..=versions {
            if version > 1 {
                text.edit();
            }
            text.write_to(&mut content);
            writeln!(out, "blob\nmark :{}", marks.blob(file, version))?;
            write_data(out, &content)?;
        }
    }

    let mut random = Random::stream(shape.seed, u64::MAX - 1);
    for (number, commit) in history.commits.iter().enumerate() {
        let branch = if commit.on_main {
            "refs/heads/main"
        } else {
            SCRATCH
        };
        let time = FIRST_SECOND + number * SECONDS_APART;
        let author = random.low_below(300);
        writeln!(out, "commit {branch}\nmark :{}", marks.commit(number))?;
        writeln!(
            out,
            "author Author {author} <author{author}@bench.test> {} +0000",
            time - random.below(50_000)
        )?;
        writeln!(out, "committer {COMMITTER} {time} +0000")?;
        write_data(
            out,
            message(commit.merged, &vocabulary, &mut random).as_bytes(),
        )?;
        if let Some(parent) = commit.parent {
            writeln!(out, "from :{}", marks.commit(parent))?;
        }
        if let Some(merged) = commit.merged {
            writeln!(out, "merge :{}", marks.commit(merged))?;
        }
        for (&file, &version) in &commit.changes {
            writeln!(
                out,
                "M 100644 :{} {}",
                marks.blob(file, version),
                path(file)
            )?;
        }
        writeln!(out)?;
    }
    // The null object id removes a reference.
    writeln!(out, "reset {SCRATCH}\nfrom {}\n", "0".repeat(40))?;

    for (number, &commit) in history.branches.iter().enumerate() {
        let name = format!("refs/heads/topic/{}/{number}", number % 40);
        writeln!(out, "reset {name}\nfrom :{}\n", marks.commit(commit))?;
    }
    for (number, tag) in history.tags.iter().enumerate() {
        let name = format!("v{}.{}.{}", number / 400, number / 20 % 20, number % 20);
        let commit = marks.commit(tag.commit);
        if tag.annotated {
            let time = FIRST_SECOND + tag.commit * SECONDS_APART + 60;
            writeln!(
                out,
                "tag {name}\nfrom :{commit}\ntagger {COMMITTER} {time} +0000"
            )?;
            let words = 4 + random.below(30);
            write_data(out, vocabulary.sentence(words, &mut random).as_bytes())?;
        } else {
            writeln!(out, "reset refs/tags/{name}\nfrom :{commit}\n")?;
        }
    }
    Ok(())
}

/// Topic commits are made on this one reference, which does not stay.
const SCRATCH: &str = "refs/scratch/topic";
const COMMITTER: &str = "Committer <committer@bench.test>";

fn write_data(out: &mut impl Write, content: &[u8]) -> Result<()> {
    writeln!(out, "data {}", content.len())?;
    out.write_all(content)?;
    writeln!(out)?;
    Ok(())
}

fn message(merged: Option<usize>, vocabulary: &Vocabulary, random: &mut Random) -> String {
    let mut message = match merged {
        Some(commit) => format!("Merge topic {commit}"),
        None => vocabulary.sentence(7, random),
    };
    if random.percent(40) {
        message.push('\n');
        for _ in 0..1 + random.below(6) {
            message.push('\n');
            message.push_str(&vocabulary.sentence(10, random));
        }
    }
    message.push('\n');
    message
}

/// Folders in two levels; neighbours in a folder are `FOLDERS` numbers apart. Every file has a name of its own, as git
/// looks for deltas among files whose paths end alike.
fn path(file: usize) -> String {
    let folder = file % FOLDERS;
    let kind = ["rs", "md", "toml", "txt"][(file / FOLDERS) % 4];
    format!(
        "part{:02}/module{:02}/file_{file:04}.{kind}",
        folder % 24,
        folder / 24
    )
}

/// The numbers by which the stream names blobs and commits.
struct Marks {
    /// Versions of all files before each file.
    blobs_before: Vec<usize>,
    blobs: usize,
}

impl Marks {
    fn new(history: &History) -> Self {
        let mut blobs = 0;
        let before = history.versions.iter().map(|&versions| {
            let before = blobs;
            blobs += versions as usize;
            before
        });
        Self {
            blobs_before: before.collect(),
            blobs,
        }
    }

    fn blob(&self, file: usize, version: Version) -> usize {
        self.blobs_before[file] + version as usize
    }

    fn commit(&self, number: usize) -> usize {
        self.blobs + 1 + number
    }
}
