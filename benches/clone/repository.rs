//! The measured repository: a copy of what was given, packed as well as git can serve it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::git_command::{git_in, run};

pub struct Repository {
    pub path: PathBuf,
    pub commits: usize,
    pub objects: usize,
    pub pack_bytes: u64,
    pub refs: usize,
    pub head: String,
}

impl Repository {
    /// Copies `source` to `into` and packs the copy for serving: one pack, a bitmap, packed references, and the
    /// commit-graph that `git gc` writes as well.
    pub fn prepare(source: &Path, into: PathBuf) -> Result<Self> {
        ensure!(
            source.join("HEAD").exists(),
            "expected a bare repository at {}, found no HEAD in it",
            source.display()
        );
        run(Command::new("git")
            .args(["clone", "--quiet", "--mirror", "--no-hardlinks"])
            .args([source, &into]))?;
        // Packs so marked are left out of the new pack, and then git writes no bitmap.
        for entry in fs::read_dir(into.join("objects/pack"))? {
            let path = entry?.path();
            let mark = path.extension().and_then(|extension| extension.to_str());
            if matches!(mark, Some("keep" | "promisor")) {
                fs::remove_file(path)?;
            }
        }
        for arguments in [
            &["repack", "-q", "-a", "-d", "-b"][..],
            &["pack-refs", "--all"],
            &["commit-graph", "write", "--reachable", "--no-progress"],
        ] {
            run(Command::new("git").arg("-C").arg(&into).args(arguments))?;
        }
        let has_bitmap = fs::read_dir(into.join("objects/pack"))?
            .filter_map(|entry| entry.ok())
            .any(|entry| entry.path().extension().is_some_and(|e| e == "bitmap"));
        ensure!(
            has_bitmap,
            "git repack wrote no bitmap; the comparison is with bitmaps"
        );
        let counts = git_in(&into, &["count-objects", "-v"])?;
        let count = |key: &str| -> Result<u64> {
            let line = counts.lines().find_map(|line| line.strip_prefix(key));
            Ok(line.context("git count-objects")?.trim().parse()?)
        };
        Ok(Self {
            commits: git_in(&into, &["rev-list", "--all", "--count"])?.parse()?,
            objects: count("in-pack:")? as usize,
            pack_bytes: count("size-pack:")? * 1024,
            refs: git_in(&into, &["for-each-ref", "--format=x"])?
                .lines()
                .count(),
            head: git_in(&into, &["rev-parse", "HEAD"])?,
            path: into,
        })
    }

    /// What a client sends that was up to date when the default branch stood `behind` commits back: what it has
    /// (no more ids than git sends in its first rounds), and the tips that are new to it.
    pub fn fetch_since(&self, behind: usize) -> Result<(Vec<String>, Vec<String>)> {
        const MOST_HAVES: usize = 256;
        let skip = format!("--skip={behind}");
        let then = git_in(
            &self.path,
            &[
                "log",
                "-1",
                "--first-parent",
                &skip,
                "--format=%H %ct",
                "HEAD",
            ],
        )?;
        let (tip, time) = then.split_once(' ').with_context(|| {
            format!("the default branch has fewer than {behind} commits; choose another --behind")
        })?;
        let time: u64 = time.parse()?;
        let refs = git_in(
            &self.path,
            &[
                "for-each-ref",
                "--sort=-creatordate",
                "--format=%(objectname) %(*objectname) %(committerdate:unix)%(*committerdate:unix)",
                "refs/heads",
                "refs/tags",
            ],
        )?;
        let mut haves = vec![tip.to_owned()];
        let mut wants = BTreeSet::new();
        for line in refs.lines() {
            let mut fields = line.split(' ');
            let (Some(id), Some(peeled), Some(made)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            // Tags of trees and blobs have no commit and no date.
            let Ok(made) = made.parse::<u64>() else {
                continue;
            };
            if made > time {
                wants.insert(id.to_owned());
            } else if haves.len() < MOST_HAVES {
                let commit = if peeled.is_empty() { id } else { peeled };
                if !haves.iter().any(|have| have == commit) {
                    haves.push(commit.to_owned());
                }
            }
        }
        ensure!(
            !wants.is_empty(),
            "nothing is newer than {behind} commits ago"
        );
        Ok((haves, wants.into_iter().collect()))
    }
}
