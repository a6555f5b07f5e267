//! What fetches do while a pack is being written, in every order, with git's own repository as upstream.

use std::sync::Weak;

use gix_hash::ObjectId;

use super::*;
use crate::config::Config;
use crate::config::environment::Environment;
use crate::git::pool::entry::AtOnce;
use crate::git::pool::fetch::{self, Surroundings};
use crate::git::pool::flight::Flight;
use crate::git::pool::over_files::git_at;
use crate::git::upstream::Upstream;
use crate::storage::{Evict, Storage};

struct Mirror {
    folder: tempfile::TempDir,
    upstream: Upstream,
    storage: Arc<Storage>,
    entry: Entry,
    stop: Arc<AtomicBool>,
    keep_unreachable: Duration,
}

impl Mirror {
    /// Of a repository with one commit on main.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let upstreams = folder.path().join("upstreams");
        std::fs::create_dir_all(upstreams.join("team")).unwrap();
        let config = format!(
            r#"{{"git": {{"upstreams": [{{"host": "git.test", "url": "file://{}"}}]}}}}"#,
            upstreams.display()
        );
        let config = Config::parse(&config, &Environment::default()).unwrap();
        let upstream = Upstream::new(config.upstream("git.test").unwrap(), &config).unwrap();
        let storage = Storage::new(u64::MAX);
        let name = crate::git::name::RepoName::parse("git.test/team/app").unwrap();
        let mirror = MirrorFolder::at(folder.path().join("mirror.git"));
        let at_once = AtOnce {
            planning: 1,
            making: 1,
            waiting: 1,
        };
        let entry = Entry::new(name, mirror, storage.nothing(Part::Git), &at_once);
        let new = Self {
            folder,
            upstream,
            storage,
            entry,
            stop: Arc::default(),
            keep_unreachable: Duration::ZERO,
        };
        let git_dir = format!(
            "--separate-git-dir={}",
            upstreams.join("team/app.git").display()
        );
        git_at(
            new.folder.path(),
            &[
                "init",
                "--quiet",
                "--initial-branch=main",
                &git_dir,
                "checkout",
            ],
        );
        new.commit("first");
        new.fetch();
        new
    }

    fn checkout(&self) -> PathBuf {
        self.folder.path().join("checkout")
    }

    fn git(&self, args: &[&str]) -> String {
        git_at(&self.checkout(), args)
    }

    /// Commits a file with its own name as content, at HEAD.
    fn commit(&self, file: &str) -> ObjectId {
        std::fs::write(self.checkout().join(file), file).unwrap();
        self.git(&["add", "."]);
        self.git(&["commit", "--quiet", "--message", file]);
        self.id("HEAD")
    }

    fn id(&self, name: &str) -> ObjectId {
        ObjectId::from_hex(self.git(&["rev-parse", name]).as_bytes()).unwrap()
    }

    fn fetch(&self) -> Arc<Snapshot> {
        self.try_fetch().unwrap()
    }

    fn try_fetch(&self) -> Result<Arc<Snapshot>, UpstreamError> {
        self.fetch_after(self.entry.snapshot())
    }

    fn fetch_after(&self, before: Option<Arc<Snapshot>>) -> Result<Arc<Snapshot>, UpstreamError> {
        let scratch = self.scratch("fetch");
        std::fs::create_dir_all(&scratch.0).unwrap();
        let around = Surroundings {
            upstream: &self.upstream,
            storage: &self.storage,
            scratch: &scratch.0,
            keep_unreachable: self.keep_unreachable,
            stop: &self.stop,
        };
        let flight = Flight::new(before.is_none());
        fetch::fetch(&self.entry, before, &flight, &around)
    }

    fn scratch(&self, name: &str) -> Scratch {
        Scratch(self.folder.path().join(name))
    }

    fn write(&self, work: Work) -> Replacement {
        let before = self.entry.snapshot().unwrap();
        self.try_write(work, before).unwrap()
    }

    fn try_write(&self, work: Work, before: Arc<Snapshot>) -> Result<Replacement, Trouble> {
        let beside = self.entry.folder.bytes();
        let (scratch, nothing) = (self.scratch("new"), self.storage.nothing(Part::Git));
        Replacement::write(work, before, beside, scratch, nothing, &self.stop)
    }

    fn take_over(&self, replacement: Replacement) -> Option<Arc<Snapshot>> {
        let taken = replacement.take_over(&self.entry, &self.stop).unwrap();
        if taken.is_some() {
            assert_eq!(self.storage.used(Part::Git), self.entry.folder.bytes());
        }
        taken
    }

    fn has(&self, object: &ObjectId) -> bool {
        self.entry.snapshot().unwrap().packs.contains(object)
    }

    /// Everything that the upstream's references reach is in the files, as git sees them. What
    /// the mirror knows of itself is what a process that starts now would find.
    #[track_caller]
    fn is_whole(&self) {
        let path = self.entry.folder.path();
        git_at(path, &["fsck", "--full", "--strict", "--connectivity-only"]);
        let refs = [
            "for-each-ref",
            "--format=%(objectname) %(refname)",
            "refs/heads",
            "refs/tags",
        ];
        assert_eq!(git_at(path, &refs), self.git(&refs));
        let snapshot = self.entry.snapshot().unwrap();
        let packs = self.entry.folder.indices().unwrap();
        assert_eq!(packs.len(), snapshot.packs.packs().len());
        assert_eq!(self.entry.folder.has_garbage(), snapshot.has_garbage());
        assert!(!self.folder.path().join("new").exists());
    }
}

/// Where nothing is kept that was dropped, a branch that moves on drops nothing.
#[test]
fn what_moves_forward_leaves_nothing_behind() {
    let mirror = Mirror::new();
    mirror.commit("second");
    assert!(!mirror.fetch().has_garbage());
    mirror.is_whole();
}

#[test]
fn what_comes_while_small_packs_are_merged_stays() {
    let mirror = Mirror::new();
    for file in ["second", "third"] {
        mirror.commit(file);
        mirror.fetch();
    }
    let merged = mirror.write(Work::MergeSmall);
    let fourth = mirror.commit("fourth");
    let now = mirror.fetch();
    assert_eq!(now.packs.packs().len(), 4);
    drop(now);
    let after = mirror.take_over(merged).unwrap();
    // The first, the merged one and the one that came.
    assert_eq!(after.packs.packs().len(), 3);
    assert!(mirror.has(&fourth) && !after.has_garbage());
    mirror.is_whole();
}

#[test]
fn a_mark_that_comes_while_small_packs_are_merged_stays() {
    let mirror = Mirror::new();
    let second = mirror.commit("second");
    mirror.fetch();
    let merged = mirror.write(Work::MergeSmall);
    mirror.git(&["reset", "--quiet", "--hard", "HEAD~1"]);
    mirror.fetch();
    assert!(mirror.take_over(merged).unwrap().has_garbage() && mirror.has(&second));
    mirror.is_whole();
    let rewritten = mirror.write(Work::Rewrite);
    assert!(!mirror.take_over(rewritten).unwrap().has_garbage() && !mirror.has(&second));
    mirror.is_whole();
}

/// Makes a mirror whose second commit was forgotten.
fn with_garbage() -> (Mirror, ObjectId) {
    let mirror = Mirror::new();
    let second = mirror.commit("second");
    mirror.fetch();
    mirror.git(&["branch", "old"]);
    mirror.git(&["reset", "--quiet", "--hard", "HEAD~1"]);
    mirror.git(&["update-ref", "-d", "refs/heads/old"]);
    assert!(mirror.fetch().has_garbage() && mirror.has(&second));
    (mirror, second)
}

#[test]
fn what_comes_while_all_is_rewritten_stays() {
    let (mirror, second) = with_garbage();
    let rewritten = mirror.write(Work::Rewrite);
    // Two, and the branch only moves forward: nothing is forgotten.
    for file in ["third", "fourth"] {
        mirror.commit(file);
        mirror.fetch();
    }
    mirror.git(&["tag", "--annotate", "--message=new", "v1"]);
    mirror.fetch();
    let after = mirror.take_over(rewritten).unwrap();
    assert!(!after.has_garbage() && !mirror.has(&second));
    assert_eq!(after.commits().number(&second), None);
    mirror.is_whole();
}

#[test]
fn what_comes_back_while_all_is_rewritten_stays() {
    let (mirror, second) = with_garbage();
    let rewritten = mirror.write(Work::Rewrite);
    mirror.git(&["branch", "back", &second.to_string()]);
    let packs = mirror.entry.snapshot().unwrap().packs.packs().len();
    // It is there, so nothing is fetched.
    assert_eq!(mirror.fetch().packs.packs().len(), packs);
    assert!(!mirror.take_over(rewritten).unwrap().has_garbage());
    assert!(mirror.has(&second));
    mirror.is_whole();
}

/// From a folder, no object is fetched that is there, whether something reaches it or not.
#[test]
fn a_file_that_comes_back_while_all_is_rewritten_stays() {
    let (mirror, second) = with_garbage();
    let rewritten = mirror.write(Work::Rewrite);
    let blob = mirror.id(&format!("{second}:second"));
    let third = mirror.commit("third");
    let below = mirror.checkout().join("below");
    std::fs::create_dir(&below).unwrap();
    std::fs::write(below.join("again"), "second").unwrap();
    mirror.commit("fourth");
    mirror.fetch();
    assert!(!mirror.take_over(rewritten).unwrap().has_garbage());
    assert!(mirror.has(&blob) && mirror.has(&third) && !mirror.has(&second));
    mirror.is_whole();
}

#[test]
fn what_is_forgotten_while_all_is_rewritten_keeps_the_mark() {
    for forgotten in ["branch", "tag", "tag of a file"] {
        let (mirror, _) = with_garbage();
        mirror.git(&["checkout", "--quiet", "-b", "side"]);
        mirror.commit("side");
        mirror.git(&["checkout", "--quiet", "main"]);
        mirror.git(&["tag", "--annotate", "--message=of main", "annotated"]);
        mirror.git(&["tag", "file", "main:first"]);
        mirror.fetch();
        let rewritten = mirror.write(Work::Rewrite);
        let gone = match forgotten {
            "branch" => "refs/heads/side",
            "tag" => "refs/tags/annotated",
            _ => "refs/tags/file",
        };
        mirror.git(&["update-ref", "-d", gone]);
        mirror.commit("third");
        mirror.fetch();
        assert!(
            mirror.take_over(rewritten).unwrap().has_garbage(),
            "{forgotten}"
        );
        mirror.is_whole();
        let again = mirror.write(Work::Rewrite);
        assert!(
            !mirror.take_over(again).unwrap().has_garbage(),
            "{forgotten}"
        );
        mirror.is_whole();
    }
}

/// What an upstream dropped is kept for a while: that is nothing to clean up.
#[test]
fn what_is_kept_for_a_while_is_not_forgotten() {
    for tagged in [false, true] {
        let (mut mirror, _) = with_garbage();
        mirror.keep_unreachable = Duration::from_secs(3600);
        let third = mirror.commit("third");
        if tagged {
            mirror.git(&["tag", "--annotate", "--message=third", "v3"]);
            mirror.git(&["reset", "--quiet", "--hard", "HEAD~1"]);
        }
        mirror.fetch();
        let rewritten = mirror.write(Work::Rewrite);
        if tagged {
            mirror.git(&["tag", "--delete", "v3"]);
        } else {
            mirror.git(&["reset", "--quiet", "--hard", "HEAD~1"]);
        }
        mirror.fetch();
        assert!(
            !mirror.take_over(rewritten).unwrap().has_garbage(),
            "{tagged}"
        );
        assert!(mirror.has(&third));
        mirror.is_whole();
    }
}

#[test]
fn another_mirror_is_left_alone() {
    for work in [Work::Rewrite, Work::MergeSmall] {
        let (mirror, second) = with_garbage();
        let replacement = mirror.write(work);
        {
            let mut state = mirror.entry.state();
            state.snapshot = None;
            state.on_disk = false;
        }
        assert!(mirror.take_over(replacement).is_none());
        mirror.fetch();
        let replacement = mirror.write(work);
        mirror.entry.state().snapshot = None;
        mirror.fetch();
        let packs = mirror.entry.folder.indices().unwrap();
        assert!(mirror.take_over(replacement).is_none());
        assert_eq!(mirror.entry.folder.indices().unwrap(), packs);
        assert!(!mirror.has(&second));
        mirror.is_whole();
    }
}

/// Nothing is dropped, so the new pack has the name of the old one.
#[test]
fn a_pack_that_replaces_itself_stays() {
    let mirror = Mirror::new();
    let rewritten = mirror.write(Work::Rewrite);
    mirror.take_over(rewritten).unwrap();
    let rewritten = mirror.write(Work::Rewrite);
    let before = mirror.entry.folder.indices().unwrap();
    mirror.take_over(rewritten).unwrap();
    assert_eq!(mirror.entry.folder.indices().unwrap(), before);
    mirror.is_whole();
}

#[test]
fn nothing_is_evicted_for_what_will_not_fit() {
    /// Somebody else's files.
    struct Others(AtomicBool);
    impl Evict for Others {
        fn evict(&self, _: u64) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (mirror, _) = with_garbage();
    let others = Arc::new(Others(AtomicBool::new(false)));
    let evictor: Weak<dyn Evict> = Arc::downgrade(&others) as _;
    mirror.storage.add_evictor(evictor);
    let before = mirror.entry.snapshot().unwrap();
    // Nor where it would fit but for its index.
    let new = reached_since(&Refs::default(), &before, &before.packs, &mirror.stop).unwrap();
    for room in [0, before.packs.bytes_of(&new)] {
        let limit = mirror.entry.folder.bytes() + room;
        mirror.storage.set_limit(limit);
        let written = mirror.try_write(Work::Rewrite, Arc::clone(&before));
        assert!(matches!(
            written.err(),
            Some(Trouble::Other(UpstreamError::Storage(_)))
        ));
        assert!(!others.0.load(Ordering::Relaxed));
    }
}

/// Five thousand of them with long names are more than a megabyte.
#[test]
fn references_take_room_as_packs_do() {
    let mirror = Mirror::new();
    let all_is_counted = || {
        let used = mirror.storage.used(Part::Git);
        assert_eq!(used, mirror.entry.folder.bytes());
        used
    };
    let few = all_is_counted();
    let head = mirror.id("HEAD");
    let mut references = "# pack-refs with: peeled fully-peeled sorted \n".to_owned();
    for number in 0..5000 {
        references += &format!("{head} refs/heads/{number:0>200}\n");
    }
    let packed = mirror
        .folder
        .path()
        .join("upstreams/team/app.git/packed-refs");
    std::fs::write(&packed, references).unwrap();

    mirror.storage.set_limit(few + (1 << 20));
    let refused = mirror.try_fetch().err();
    assert!(matches!(refused, Some(UpstreamError::Storage(_))));
    assert_eq!(all_is_counted(), few);

    mirror.storage.set_limit(few + (3 << 20));
    assert_eq!(mirror.fetch().refs.names.len(), 5001);
    assert!(all_is_counted() > few + (1 << 20));
    mirror.is_whole();
    std::fs::remove_file(packed).unwrap();
    mirror.fetch();
    assert_eq!(all_is_counted(), few);
}

#[test]
fn only_what_nobody_uses_is_closed() {
    let mirror = Mirror::new();
    let held = mirror.fetch();
    let is_open_after = |idle| {
        mirror.entry.close_if_idle(idle);
        mirror.entry.snapshot().is_some()
    };
    let (now, hour) = (Duration::ZERO, Duration::from_secs(3600));
    assert!(is_open_after(now));
    drop(held);
    assert!(is_open_after(hour));
    let busy = mirror.entry.busy.try_lock().unwrap();
    assert!(is_open_after(now));
    drop(busy);
    assert!(!is_open_after(now));
}

/// Until the next consolidation, or the next first clone.
#[test]
fn what_a_fetch_that_fails_leaves_behind_is_counted() {
    let mirror = Mirror::new();
    let is_counted = || {
        let counted = mirror.storage.used(Part::Git);
        assert_eq!(counted, mirror.entry.folder.bytes());
    };
    let packs = || mirror.entry.folder.indices().unwrap().len();

    mirror.commit("second");
    let in_the_way = mirror.entry.folder.path().join("packed-refs.warmdock-new");
    std::fs::create_dir(&in_the_way).unwrap();
    let refused = mirror.try_fetch();
    assert!(refused.is_err() && packs() == 2);
    is_counted();
    std::fs::remove_dir(in_the_way).unwrap();
    mirror.fetch();
    is_counted();

    let before = mirror.entry.snapshot();
    mirror.commit("third");
    mirror.entry.state().snapshot = None;
    let refused = mirror.fetch_after(before);
    assert!(refused.is_err() && packs() == 3);
    is_counted();
    mirror.fetch();
    is_counted();
    mirror.is_whole();
}
