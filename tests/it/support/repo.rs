//! Upstream repositories: made by git itself, from a seed, with everything that real ones have.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::client::git_at;

/// The day of the first commit; each further one is a day later, for `--shallow-since`.
pub const FIRST_DAY: u64 = 1_600_000_000;
pub const DAY: u64 = 86_400;

/// A bare repository on the upstream's disk.
pub struct Repo {
    pub path: PathBuf,
    /// Commits made so far, which is also their date in days.
    commits: AtomicU64,
}

impl Repo {
    /// `git init --bare`, with what public Git hosts allow switched on.
    pub fn empty(path: &Path) -> Self {
        Self::init(path, &["--initial-branch=main"])
    }

    /// An empty repository with further arguments for `git init`.
    pub fn init(path: &Path, args: &[&str]) -> Self {
        std::fs::create_dir_all(path).unwrap();
        let repo = Self {
            path: path.to_owned(),
            commits: AtomicU64::new(0),
        };
        repo.git(&[&["init", "--quiet", "--bare"], args].concat());
        for (key, value) in [
            ("uploadpack.allowFilter", "true"),
            ("uploadpack.allowAnySHA1InWant", "true"),
            ("gc.auto", "0"),
            ("receive.autogc", "false"),
            ("user.name", "T"),
            ("user.email", "t@example.test"),
        ] {
            repo.git(&["config", key, value]);
        }
        repo
    }

    /// A repository that is there already.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            commits: AtomicU64::new(2000),
        }
    }

    /// A repository with branches, merges, renames, deletions, binary files, nested folders, a submodule, a symbolic
    /// link, an executable, and tags of all kinds. Equal seeds give equal object ids.
    pub fn sample(path: &Path, seed: u64) -> Self {
        let repo = Self::empty(path);
        let mut history = History {
            rng: Rng(seed),
            stream: Vec::new(),
            mark: 0,
            day: 0,
        };
        history.write();
        repo.commits.store(history.day, Ordering::Relaxed);
        repo.import(&history.stream);
        repo
    }

    /// One branch `main` with one commit that has one file of `bytes` bytes that do not compress.
    pub fn large(path: &Path, bytes: usize) -> Self {
        let repo = Self::empty(path);
        let content = Rng(7).bytes(bytes);
        repo.commit(
            "main",
            &[("README.md", b"large\n"), ("large.bin", &content)],
        );
        repo
    }

    /// Runs git here; gives its output as text.
    #[track_caller]
    pub fn git(&self, args: &[&str]) -> String {
        git_at(&self.path, args, b"").ok().text()
    }

    /// The id that a revision has.
    #[track_caller]
    pub fn id(&self, revision: &str) -> String {
        self.git(&["rev-parse", "--verify", revision])
    }

    /// A commit on top of `branch` (or the first one there) that writes `files`; gives its id.
    #[track_caller]
    pub fn commit(&self, branch: &str, files: &[(&str, &[u8])]) -> String {
        let parent = git_at(
            &self.path,
            &[
                "rev-parse",
                "--verify",
                "--quiet",
                &format!("refs/heads/{branch}"),
            ],
            b"",
        );
        let parent = parent.status.success().then(|| parent.text());
        self.commit_to(&format!("refs/heads/{branch}"), parent.as_deref(), files)
    }

    /// A commit whose parent is given, at any reference.
    #[track_caller]
    pub fn commit_to(
        &self,
        reference: &str,
        parent: Option<&str>,
        files: &[(&str, &[u8])],
    ) -> String {
        let day = self.commits.fetch_add(1, Ordering::Relaxed);
        let mut stream = Vec::new();
        begin_commit(
            &mut stream,
            reference,
            1,
            day,
            &format!("commit of day {day}"),
        );
        if let Some(parent) = parent {
            stream.extend(format!("from {parent}\n").bytes());
        }
        for (path, content) in files {
            stream.extend(format!("M 100644 inline {path}\n").bytes());
            data(&mut stream, content);
        }
        self.import(&stream);
        self.id(reference)
    }

    /// Replaces the tip of `branch` by another commit on its parent: what a force-push does. Gives old and new.
    #[track_caller]
    pub fn force_push(&self, branch: &str) -> (String, String) {
        let old = self.id(&format!("refs/heads/{branch}"));
        let parent = self.id(&format!("{old}^"));
        let reference = format!("refs/heads/{branch}");
        let text = format!("instead of {old}\n");
        let new = self.commit_to(
            &reference,
            Some(&parent),
            &[("rewritten.txt", text.as_bytes())],
        );
        (old, new)
    }

    /// That many commits in a row on top of `branch`.
    pub fn commits(&self, branch: &str, count: u64) {
        let reference = format!("refs/heads/{branch}");
        let mut stream = Vec::new();
        for number in 1..=count {
            let day = self.commits.fetch_add(1, Ordering::Relaxed);
            begin_commit(
                &mut stream,
                &reference,
                number,
                day,
                &format!("one of many: {number}"),
            );
            if number == 1 {
                stream.extend(format!("from {}\n", self.id(&reference)).bytes());
            }
            stream.extend(b"M 100644 inline counter\n");
            data(&mut stream, number.to_string().as_bytes());
        }
        self.import(&stream);
    }

    /// That many annotated tags `many/…` on the commits of `main`.
    pub fn tag_often(&self, count: usize) {
        let commits = self.git(&["rev-list", "main"]);
        let mut stream = Vec::new();
        for (number, commit) in commits.lines().cycle().take(count).enumerate() {
            let date = FIRST_DAY + DAY * 500;
            stream.extend(format!("tag many/{number:05}\nfrom {commit}\n").bytes());
            stream.extend(format!("tagger T <t@example.test> {date} +0000\n").bytes());
            data(&mut stream, format!("{number}\n").as_bytes());
        }
        self.import(&stream);
    }

    /// All references with their objects, peeled ones too.
    pub fn refs(&self) -> String {
        self.git(&[
            "for-each-ref",
            "--format=%(objectname) %(refname) %(*objectname)",
        ])
    }

    fn import(&self, stream: &[u8]) {
        git_at(
            &self.path,
            &["fast-import", "--quiet", "--force", "--date-format=raw"],
            stream,
        )
        .ok();
    }
}

/// A sequence of numbers that looks random and is the same for each seed (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.next().to_le_bytes())
            .flatten()
            .take(count)
            .collect()
    }
}

/// Writes the sample's history in git fast-import's format.
struct History {
    rng: Rng,
    stream: Vec<u8>,
    mark: u64,
    day: u64,
}

impl History {
    fn write(&mut self) {
        let mut tips = vec![("main", self.first())];
        for (branch, at) in [("feature/one", 6), ("feature/two", 14), ("release/1.0", 20)] {
            while self.day < at {
                tips[0].1 = self.change("main", tips[0].1);
            }
            tips.push((branch, self.change(branch, tips[0].1)));
            for _ in 0..3 {
                let tip = tips.last().unwrap().1;
                tips.last_mut().unwrap().1 = self.change(branch, tip);
                tips[0].1 = self.change("main", tips[0].1);
            }
        }
        tips[0].1 = self.merge(tips[0].1, tips[1].1);
        self.reset("refs/tags/v0.1", tips[0].1);
        for _ in 0..8 {
            tips[0].1 = self.change("main", tips[0].1);
        }
        self.tag("v0.2", tips[0].1);
        tips[0].1 = self.merge(tips[0].1, tips[2].1);
        for _ in 0..8 {
            tips[0].1 = self.change("main", tips[0].1);
        }
        self.tag("v1.0", tips[3].1);
        self.tag("v1.1", tips[0].1);
        tips[0].1 = self.change("main", tips[0].1);
    }

    fn first(&mut self) -> u64 {
        let mark = self.commit("main", "Begin");
        self.file("100644", "README.md", b"# Sample\n");
        self.file("100755", "bin/run", b"#!/bin/sh\nexec true\n");
        self.file("120000", "link-to-readme", b"README.md");
        self.file(
            "100644",
            ".gitmodules",
            b"[submodule \"lib\"]\n\tpath = vendor/lib\n\turl = ../lib.git\n",
        );
        self.stream
            .extend(b"M 160000 1111111111111111111111111111111111111111 vendor/lib\n");
        for number in 0..12 {
            let lines = self.lines(60);
            self.file("100644", &format!("src/deep/er/module{number}.rs"), &lines);
        }
        mark
    }

    /// A commit that changes some files: edits, a binary file, a rename there and back, a deletion.
    fn change(&mut self, branch: &str, parent: u64) -> u64 {
        let mark = self.commit(branch, "Change");
        self.from(parent);
        for _ in 0..=self.rng.below(2) {
            let number = self.rng.below(12);
            // Mostly the same lines, so that there is something to find deltas for.
            let mut lines = self.lines(60);
            writeln!(lines, "// {mark}").unwrap();
            self.file(
                "100644",
                &format!("src/deep/er/module{number}.rs"),
                lines.as_bytes(),
            );
        }
        let name = branch.replace('/', "-");
        match self.day % 5 {
            0 => {
                let length = 100 + self.rng.below(4000) as usize;
                let content = self.rng.bytes(length);
                self.file(
                    "100644",
                    &format!("assets/{name}-{}.bin", self.day),
                    &content,
                );
            }
            1 => self.file(
                "100644",
                &format!("notes/{name}.txt"),
                format!("{mark}\n").as_bytes(),
            ),
            2 => self.rename("README.md", "docs/README.md"),
            3 => self.rename("docs/README.md", "README.md"),
            _ => self.stream.extend(format!("D notes/{name}.txt\n").bytes()),
        }
        mark
    }

    /// To git a rename is a deletion and the same content at another path. Deleting what is not there is fine.
    fn rename(&mut self, old: &str, new: &str) {
        self.stream.extend(format!("D {old}\n").bytes());
        self.file("100644", new, b"# Sample\n");
    }

    fn merge(&mut self, parent: u64, other: u64) -> u64 {
        let mark = self.commit("main", "Merge");
        self.from(parent);
        self.stream.extend(format!("merge :{other}\n").bytes());
        self.file("100644", "MERGED", format!("{parent} {other}\n").as_bytes());
        mark
    }

    fn commit(&mut self, branch: &str, message: &str) -> u64 {
        self.mark += 1;
        begin_commit(
            &mut self.stream,
            &format!("refs/heads/{branch}"),
            self.mark,
            self.day,
            message,
        );
        self.day += 1;
        self.mark
    }

    fn from(&mut self, parent: u64) {
        self.stream.extend(format!("from :{parent}\n").bytes());
    }

    fn reset(&mut self, reference: &str, mark: u64) {
        self.stream
            .extend(format!("reset {reference}\nfrom :{mark}\n\n").bytes());
    }

    fn tag(&mut self, name: &str, mark: u64) {
        let day = FIRST_DAY + self.day * DAY;
        self.stream.extend(
            format!("tag {name}\nfrom :{mark}\ntagger T <t@example.test> {day} +0100\n").bytes(),
        );
        data(&mut self.stream, format!("Version {name}\n").as_bytes());
    }

    fn file(&mut self, mode: &str, path: &str, content: impl AsRef<[u8]>) {
        self.stream
            .extend(format!("M {mode} inline {path}\n").bytes());
        data(&mut self.stream, content.as_ref());
    }

    fn lines(&mut self, count: u64) -> String {
        let mut text = String::new();
        for line in 0..count {
            let value = if self.rng.below(30) == 0 {
                self.rng.below(1000)
            } else {
                line
            };
            writeln!(text, "pub const LINE_{line}: u64 = {value};").unwrap();
        }
        text
    }
}

fn begin_commit(stream: &mut Vec<u8>, reference: &str, mark: u64, day: u64, message: &str) {
    let date = FIRST_DAY + day * DAY;
    let who = format!("A U Thor <author@example.test> {date} +0000");
    stream.extend(
        format!("commit {reference}\nmark :{mark}\nauthor {who}\ncommitter {who}\n").bytes(),
    );
    data(stream, message.as_bytes());
}

fn data(stream: &mut Vec<u8>, content: &[u8]) {
    stream.extend(format!("data {}\n", content.len()).bytes());
    stream.extend(content);
    stream.push(b'\n');
}
