//! The plan of a generated repository: which commits there are, what each changes, and which references point where.
//!
//! A main line with topic branches, half of which are merged. A file's versions are numbered in the order in which
//! commits make them, whatever the branch; so a merge takes the newer version of each file and needs no text merge.

use std::collections::BTreeMap;

use crate::random::Random;

/// How large a repository to make.
#[derive(Clone, Copy)]
pub struct Shape {
    pub seed: u64,
    pub commits: usize,
    pub files: usize,
    pub tags: usize,
    pub branches: usize,
}

pub type Version = u32;

pub struct Commit {
    /// None for the first commit.
    pub parent: Option<usize>,
    pub merged: Option<usize>,
    pub on_main: bool,
    /// File and its version in this commit, where it differs from the first parent.
    pub changes: BTreeMap<usize, Version>,
}

pub struct Tag {
    pub commit: usize,
    pub annotated: bool,
}

pub struct History {
    pub commits: Vec<Commit>,
    /// How many versions each file has.
    pub versions: Vec<Version>,
    pub tags: Vec<Tag>,
    /// Commits that a branch points to besides `main`.
    pub branches: Vec<usize>,
}

struct Topic {
    tip: usize,
    changes: BTreeMap<usize, Version>,
    commits_left: usize,
}

impl History {
    pub fn plan(shape: &Shape) -> Self {
        let mut planning = Planning {
            random: Random::new(shape.seed),
            commits: Vec::with_capacity(shape.commits),
            versions: vec![0; shape.files],
            born: shape.files / 2,
            main: vec![0; shape.files],
            main_tip: 0,
        };
        let topics_left_open = planning.run(shape.commits);
        let Planning {
            mut random,
            commits,
            versions,
            main_tip,
            ..
        } = planning;

        // Tags on the main line, evenly spread; branches: topics that were never merged, then old main commits.
        let main_line: Vec<usize> = (0..=main_tip).filter(|&c| commits[c].on_main).collect();
        let tags = (0..shape.tags)
            .map(|tag| Tag {
                commit: main_line[tag * main_line.len() / shape.tags],
                annotated: random.percent(15),
            })
            .collect();
        let mut branches = topics_left_open;
        branches.truncate(shape.branches);
        while branches.len() < shape.branches {
            branches.push(main_line[random.below(main_line.len())]);
        }
        Self {
            commits,
            versions,
            tags,
            branches,
        }
    }
}

struct Planning {
    random: Random,
    commits: Vec<Commit>,
    /// Versions made so far of each file.
    versions: Vec<Version>,
    /// Files with a smaller number exist.
    born: usize,
    /// The version of each file at the tip of the main line.
    main: Vec<Version>,
    main_tip: usize,
}

impl Planning {
    /// Makes the commits; returns the tips of the topics that nobody merged.
    fn run(&mut self, count: usize) -> Vec<usize> {
        let first = (0..self.born).map(|file| (file, self.new_version(file)));
        let first = first.collect();
        self.commit_on_main(None, first);

        let mut open: Vec<Topic> = Vec::new();
        let mut abandoned = Vec::new();
        while self.commits.len() < count {
            if open.len() < 6 && self.random.percent(14) {
                open.push(Topic {
                    tip: self.main_tip,
                    changes: BTreeMap::new(),
                    commits_left: 1 + self.random.below(6),
                });
            }
            if !open.is_empty() && self.random.percent(60) {
                let number = self.random.below(open.len());
                if open[number].commits_left > 0 {
                    self.commit_on_topic(&mut open[number]);
                    continue;
                }
                let topic = open.swap_remove(number);
                // Half of the topics were dropped, squashed or rebased: a quarter of all references is not merged then,
                // as in rust-lang/cargo with its pull requests.
                if self.random.percent(50) {
                    abandoned.push(topic.tip);
                } else {
                    self.merge(&topic);
                }
                continue;
            }
            let changes = self.some_changes();
            self.commit_on_main(None, changes);
        }
        abandoned
    }

    fn new_version(&mut self, file: usize) -> Version {
        self.versions[file] += 1;
        self.versions[file]
    }

    /// Most commits touch one or two files, usually neighbours in one folder.
    fn some_changes(&mut self) -> BTreeMap<usize, Version> {
        let mut changes = BTreeMap::new();
        if self.born < self.versions.len() && self.random.percent(10) {
            let file = self.born;
            self.born += 1;
            changes.insert(file, self.new_version(file));
        }
        let mut file = self.random.low_below(self.born);
        loop {
            changes.entry(file).or_insert_with(|| {
                self.versions[file] += 1;
                self.versions[file]
            });
            if !self.random.percent(38) {
                return changes;
            }
            file = if self.random.percent(70) {
                (file + super::generate::FOLDERS) % self.born
            } else {
                self.random.low_below(self.born)
            };
        }
    }

    fn commit_on_main(&mut self, merged: Option<usize>, changes: BTreeMap<usize, Version>) {
        for (&file, &version) in &changes {
            self.main[file] = version;
        }
        let parent = (!self.commits.is_empty()).then_some(self.main_tip);
        self.main_tip = self.commits.len();
        self.commits.push(Commit {
            parent,
            merged,
            on_main: true,
            changes,
        });
    }

    fn commit_on_topic(&mut self, topic: &mut Topic) {
        let changes = self.some_changes();
        topic.changes.extend(&changes);
        topic.commits_left -= 1;
        self.commits.push(Commit {
            parent: Some(topic.tip),
            merged: None,
            on_main: false,
            changes,
        });
        topic.tip = self.commits.len() - 1;
    }

    fn merge(&mut self, topic: &Topic) {
        let newer = topic
            .changes
            .iter()
            .filter(|&(&file, &version)| version > self.main[file])
            .map(|(&file, &version)| (file, version))
            .collect();
        self.commit_on_main(Some(topic.tip), newer);
    }
}
