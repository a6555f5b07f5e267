//! Clients that come before the mirror is there: they get what a clone straight from the upstream gets, of all that is
//! mirrored.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::json;

use crate::support::compare::{Objects, assert_same, clone_is_whole};
use crate::support::http::Request;
use crate::support::{Client, Fault, Repo, SAMPLE, Upstream, cgi, wait_for, warmdock};

/// Clones with the first request that the service ever gets, and again when the mirror is there.
fn cold_and_warm(protocol: u8, args: &[&str], objects: Objects) {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    let client = Client::new(protocol);
    client.clone(&upstream.direct(SAMPLE), "direct", args).ok();
    client.clone(&warmdock.url(SAMPLE), "cold", args).ok();
    assert_same(&client, "cold", "direct", objects);
    warmdock.wait_mirrored(SAMPLE, &repo);
    client.clone(&warmdock.url(SAMPLE), "warm", args).ok();
    assert_same(&client, "warm", "direct", objects);
    warmdock.fsck_mirror(SAMPLE);
}

#[test]
fn v0_whole() {
    cold_and_warm(0, &["--bare"], Objects::Exactly);
}

#[test]
fn v1_whole() {
    cold_and_warm(1, &["--bare"], Objects::Exactly);
}

#[test]
fn v2_whole() {
    cold_and_warm(2, &["--bare"], Objects::Exactly);
}

#[test]
fn v0_depth_1() {
    cold_and_warm(0, &["--bare", "--depth=1"], Objects::Exactly);
}

#[test]
fn v2_depth_1() {
    cold_and_warm(2, &["--bare", "--depth=1"], Objects::Exactly);
}

#[test]
fn v0_partial() {
    cold_and_warm(
        0,
        &["--no-checkout", "--filter=blob:none"],
        Objects::Partial,
    );
}

#[test]
fn v2_partial() {
    cold_and_warm(
        2,
        &["--no-checkout", "--filter=blob:none"],
        Objects::Partial,
    );
}

/// A commit by its id, as the first thing that anybody wants of the repository.
#[test]
fn by_commit_id() {
    for protocol in [0, 2] {
        let (upstream, repo) = Upstream::with_sample();
        let warmdock = warmdock::over_http(&upstream);
        let client = Client::new(protocol);
        client.git(&["init", "--quiet", "--bare", "ours"]).ok();
        let id = repo.id("main~5");
        client
            .git_in(
                "ours",
                &["fetch", "--quiet", "--depth=1", &warmdock.url(SAMPLE), &id],
            )
            .ok();
        client
            .git_in("ours", &["cat-file", "-e", &format!("{id}^{{tree}}")])
            .ok();
    }
}

#[test]
fn an_empty_repository() {
    for protocol in [0, 1, 2] {
        let upstream = Upstream::start();
        Repo::init(&upstream.path(SAMPLE), &["--initial-branch=trunk"]);
        let warmdock = warmdock::over_http(&upstream);
        let client = Client::new(protocol);
        client.clone(&warmdock.url(SAMPLE), "cold", &[]).ok();
        client.clone(&warmdock.url(SAMPLE), "again", &[]).ok();
        client
            .clone(&format!("{}/{SAMPLE}.git", upstream.url()), "direct", &[])
            .ok();
        let head = |repo| client.git_in(repo, &["symbolic-ref", "HEAD"]).ok().text();
        assert_eq!(
            (head("cold"), head("again")),
            (head("direct"), head("direct"))
        );
    }
}

/// A server from before protocol v2 can be mirrored, and is served with every version.
#[test]
fn an_upstream_that_only_knows_v0() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.only_v0();
    let warmdock = warmdock::over_http(&upstream);
    for protocol in [0, 1, 2] {
        clone_is_whole(protocol, &upstream, &warmdock, SAMPLE);
    }
    warmdock.wait_mirrored(SAMPLE, &repo);
    repo.commit("main", &[("new.txt", b"new\n")]);
    repo.force_push("feature/one");
    let client = Client::new(2);
    client.git(&["ls-remote", &warmdock.url(SAMPLE)]).ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    warmdock.fsck_mirror(SAMPLE);
}

#[test]
fn a_repository_that_does_not_exist() {
    for over_http in [false, true] {
        let (upstream, _repo) = Upstream::with_sample();
        let warmdock = if over_http {
            warmdock::over_http(&upstream)
        } else {
            warmdock::over_files(&upstream)
        };
        for protocol in [0, 2] {
            let client = Client::new(protocol);
            let output = client
                .clone(&warmdock.url("team/absent"), "ours", &[])
                .failed();
            assert!(
                output.stderr.contains("not found"),
                "git's own words for 404: {}",
                output.describe()
            );
        }
        assert!(!warmdock.mirror("team/absent").exists());
    }
}

/// The upstream would give any object. Where clients may want less, they are not passed through to it.
#[test]
fn what_is_not_advertised_is_not_to_be_had_before_there_is_a_mirror() {
    for protocol in [0, 2] {
        let (upstream, repo) = Upstream::with_sample();
        let config = warmdock::builder(&upstream.url());
        let warmdock = config.set("/git/allow_wants", "advertised").start();
        let client = Client::new(protocol);
        client.git(&["init", "--quiet", "--bare", "ours"]).ok();
        let fetch =
            |id: &str| client.git_in("ours", &["fetch", "--quiet", &warmdock.url(SAMPLE), id]);
        let old = repo.id("main~5");
        let output = fetch(&old).failed();
        assert!(output.stderr.contains(&old), "{}", output.describe());
        fetch(&repo.id("main")).ok();
        assert_eq!(upstream.packs(), upstream.packs_for_mirror());
    }
}

/// The upstream would list every namespace.
#[test]
fn references_that_are_not_mirrored_are_not_listed_before_there_is_a_mirror() {
    for protocol in [0, 2] {
        let (upstream, _repo) = Upstream::with_sample();
        let config = warmdock::builder(&upstream.url());
        let warmdock = config.set("/git/refs", json!(["refs/heads/*"])).start();
        let client = Client::new(protocol);
        let listed = client.git(&["ls-remote", &warmdock.url(SAMPLE)]).ok();
        let listed = listed.text();
        assert!(
            listed.contains("refs/heads/main") && !listed.contains("refs/tags"),
            "{listed}"
        );
    }
}

/// As Azure DevOps and AWS CodeCommit do. It is asked as it knows a repository from the first answer on, which what passes
/// through and the mirror may both be the first to find out.
#[test]
fn a_host_that_knows_no_names_with_git_at_their_end() {
    for protocol in [0, 2] {
        let (upstream, repo) = Upstream::with_sample();
        upstream.sample("team/other");
        upstream.without_git();
        let warmdock = warmdock::over_http(&upstream);
        for name in [SAMPLE, "team/other"] {
            let client = Client::new(protocol);
            client.clone(&warmdock.url(name), "ours", &["--bare"]).ok();
            client
                .clone(&upstream.direct(name), "direct", &["--bare"])
                .ok();
            assert_same(&client, "ours", "direct", Objects::Reachable);
        }
        warmdock.wait_mirrored(SAMPLE, &repo);
        repo.commit("main", &[("new.txt", b"new\n")]);
        let client = Client::new(protocol);
        client.git(&["ls-remote", &warmdock.url(SAMPLE)]).ok();
        warmdock.wait_mirrored(SAMPLE, &repo);
        let asked = upstream.asked().into_iter();
        let in_vain = asked.filter(|asked| asked.request.path.contains(".git/"));
        let in_vain = in_vain.count();
        assert!((2..=4).contains(&in_vain), "{in_vain}");
        let absent = warmdock.url("team/absent");
        let output = Client::new(protocol).clone(&absent, "ours", &[]).failed();
        assert!(output.stderr.contains("not found"), "{}", output.describe());
    }
}

/// A folder of which some have `.git` at their end, and some have not.
#[test]
fn a_host_with_names_of_both_kinds() {
    for protocol in [0, 2] {
        let (upstream, repo) = Upstream::with_sample();
        let plain = Repo::sample(&upstream.root().join("team/plain"), 2);
        let warmdock = warmdock::over_http(&upstream);
        for (name, repo) in [(SAMPLE, &repo), ("team/plain", &plain)] {
            let client = Client::new(protocol);
            client.clone(&warmdock.url(name), "ours", &["--bare"]).ok();
            let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
            assert_eq!(tip, repo.id("main"));
            warmdock.wait_mirrored(name, repo);
        }
        for (name, repo) in [(SAMPLE, &repo), ("team/plain", &plain)] {
            repo.commit("main", &[("new.txt", b"new\n")]);
            let url = warmdock.url(name);
            Client::new(protocol).git(&["ls-remote", &url]).ok();
            warmdock.wait_mirrored(name, repo);
        }
    }
}

/// Git asks where its first request was sent on to from then on. A POST that is sent on comes there without its body.
#[test]
fn a_repository_that_was_renamed() {
    for protocol in [0, 2] {
        let (upstream, _repo) = Upstream::with_sample();
        let warmdock = warmdock::builder(&renaming_host(&upstream)).start();
        let client = Client::new(protocol);
        let url = warmdock.url("old/sample");
        client.clone(&url, "ours", &["--bare"]).ok();
        client
            .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
            .ok();
        assert_same(&client, "ours", "direct", Objects::Reachable);
    }
}

/// A host with the repositories of `upstream` that sends on to `/team/` whoever asks for what is below `/old/`.
fn renaming_host(upstream: &Upstream) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let root = upstream.root().to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let root = root.clone();
            std::thread::spawn(move || send_on_or_answer(&root, &stream));
        }
    });
    url
}

fn send_on_or_answer(root: &Path, mut stream: &TcpStream) -> Option<()> {
    let request = Request::read(&mut BufReader::new(stream))?;
    let (mut head, mut body) = (String::from("HTTP/1.1 "), Vec::new());
    if let Some(name) = request.path.strip_prefix("/old/") {
        head += &format!("301 Moved\r\nLocation: /team/{name}?{}\r\n", request.query);
    } else {
        let mut answer = cgi::http_backend(root, &request, request.header("git-protocol"));
        head += &format!("{} Whatever\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        answer.body.read_to_end(&mut body).ok()?;
    }
    head += &format!(
        "Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).ok()
}

/// A first clone takes long: whoever waits for it is not cut off, and sees that something happens.
#[test]
fn a_slow_first_clone_is_waited_for() {
    let (upstream, repo) = Upstream::with_sample();
    // Shorter than the wait below: the service must not count time in which its own upstream is slow.
    let config = warmdock::builder(&upstream.url()).set("/limits/body_idle_timeout", "3s");
    let warmdock = config.set("/limits/header_timeout", "3s").start();
    upstream.fail(Fault::HoldPackAfter(2000));
    std::thread::scope(|scope| {
        let url = warmdock.url(SAMPLE);
        let clones: Vec<_> = [0, 2]
            .into_iter()
            .map(|protocol| {
                let url = url.clone();
                scope.spawn(move || Client::new(protocol).clone(&url, "ours", &["--bare"]).ok())
            })
            .collect();
        upstream.wait_held();
        std::thread::sleep(std::time::Duration::from_secs(5));
        upstream.release();
        for clone in clones {
            clone.join().unwrap();
        }
    });
    warmdock.wait_mirrored(SAMPLE, &repo);
}

/// Builders that start together do not make the upstream pack the same for each of them, or share the way there with all
/// others: most wait for the mirror, which only few slow down. Whoever cannot be told how far it is does not wait.
#[test]
fn many_at_once_wait_for_the_mirror() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    upstream.fail(Fault::HoldPackAfter(2000));
    let client = Client::new(2);
    // The first one makes the service begin to clone.
    let mut first = client.command(&["clone", "--quiet", "--bare", &warmdock.url(SAMPLE), "first"]);
    let mut first = first.spawn().unwrap();
    wait_for("the first clone to begin", || {
        (upstream.packs_for_mirror() == 1).then_some(())
    });
    std::thread::scope(|scope| {
        let clone = |into: String, depth: &'static str| {
            let (client, url) = (&client, warmdock.url(SAMPLE));
            scope.spawn(move || client.clone(&url, &into, &["--bare", depth]).ok())
        };
        let mut clones: Vec<_> = (0..8)
            .map(|number| clone(format!("whole-{number}"), "--no-tags"))
            .collect();
        wait_for("all places to be taken", || {
            (upstream.packs() == 5).then_some(())
        });
        clones.push(clone("shallow".to_owned(), "--depth=1"));
        wait_for("one that cannot be told to be passed on", || {
            (upstream.packs() == 6).then_some(())
        });
        std::thread::sleep(std::time::Duration::from_millis(500));
        assert_eq!(upstream.packs(), 6);
        upstream.release();
        for clone in clones {
            clone.join().unwrap();
        }
    });
    assert!(first.wait().unwrap().success());
    warmdock.wait_mirrored(SAMPLE, &repo);
    assert_eq!(upstream.packs(), 6);
    client
        .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
        .ok();
    client
        .clone(
            &upstream.direct(SAMPLE),
            "untagged",
            &["--bare", "--no-tags"],
        )
        .ok();
    assert_same(&client, "first", "direct", Objects::Reachable);
    for number in 0..8 {
        assert_same(
            &client,
            &format!("whole-{number}"),
            "untagged",
            Objects::Reachable,
        );
    }
}

/// A commit that comes after the first clone began is not in what that brings. Lists are passed through, and have it.
#[test]
fn what_is_pushed_during_a_first_clone_is_had_from_it() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    upstream.fail(Fault::HoldPackAfter(2000));
    let url = warmdock.url(SAMPLE);
    let client = Client::new(0);
    let early = all_passed_through(&client, &upstream, &url);
    let pushed = repo.commit("main", &[("new.txt", b"new\n")]);
    let others = Client::new(2);
    others.git(&["init", "--quiet", "--bare", "by-id"]).ok();
    let by_id = ["-C", "by-id", "fetch", "--progress", &url, &pushed];
    let late = [
        Waiting::begin(
            &client,
            "clone",
            &["clone", "--progress", "--bare", &url, "clone"],
        ),
        Waiting::begin(&others, "by-id", &by_id),
    ];
    late.iter().for_each(Waiting::is_told);
    upstream.release();
    for mut clone in early {
        assert!(clone.wait().unwrap().success());
    }
    for waiting in late {
        waiting.ends_well();
    }
    let tip = client.git_in("clone", &["rev-parse", "main"]).ok();
    assert_eq!(tip.text(), pushed);
    others
        .git_in("by-id", &["cat-file", "-e", &format!("{pushed}^{{tree}}")])
        .ok();
}

/// Lists are as fresh while a first clone is under way as those of a mirror, and so is what is wanted by name.
#[test]
fn what_is_pushed_during_a_first_clone_is_listed() {
    for protocol in [0, 2] {
        let (upstream, repo) = Upstream::with_sample();
        // Nobody is passed through.
        let config = warmdock::builder(&upstream.url());
        let warmdock = config.set("/git/allow_wants", "advertised").start();
        upstream.fail(Fault::HoldPackAfter(2000));
        let (client, url) = (Client::new(protocol), warmdock.url(SAMPLE));
        client.git(&["ls-remote", &url]).ok();
        upstream.wait_held();
        let pushed = repo.commit("new", &[("new.txt", b"new\n")]);
        let clone = [
            "clone",
            "--progress",
            "--bare",
            "--branch=new",
            &url,
            "clone",
        ];
        let clone = Waiting::begin(&client, "clone", &clone);
        clone.is_told();
        upstream.release();
        clone.ends_well();
        let tip = client.git_in("clone", &["rev-parse", "new"]).ok();
        assert_eq!(tip.text(), pushed);
    }
}

/// Where the upstream does not tell it any more, there is the list of the clone's beginning.
#[test]
fn the_first_list_does_while_there_is_none_newer() {
    let (upstream, repo) = Upstream::with_sample();
    let config = warmdock::builder(&upstream.url());
    let warmdock = config.set("/git/allow_wants", "advertised").start();
    upstream.fail(Fault::HoldPackAfter(2000));
    let (client, url) = (Client::new(2), warmdock.url(SAMPLE));
    let before = client.git(&["ls-remote", &url]).ok().text();
    upstream.wait_held();
    repo.commit("new", &[("new.txt", b"new\n")]);
    upstream.require("Bearer something-else");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(client.git(&["ls-remote", &url]).ok().text(), before));
        }
    });
    upstream.release();
}

/// Who waits for a mirror that cannot be made gets the rest of the answer from the upstream, as whoever comes later does.
#[test]
fn who_waits_for_a_mirror_that_does_not_fit_is_passed_through() {
    let upstream = Upstream::start();
    let repo = Repo::large(&upstream.path(SAMPLE), 4 << 20);
    let config = warmdock::builder(&upstream.url());
    let warmdock = config.set("/storage/max_size", "2MiB").start();
    upstream.fail(Fault::HoldPackAfter(2000));
    let url = warmdock.url(SAMPLE);
    let clients = [0, 2].map(Client::new);
    let early = all_passed_through(&clients[1], &upstream, &url);
    let clones: Vec<_> = (0..6)
        .map(|number: usize| {
            let (client, into) = (&clients[number % 2], format!("waiting-{number}"));
            let args = ["clone", "--progress", "--bare", &url, &into];
            (client, Waiting::begin(client, &into, &args), into)
        })
        .collect();
    clones.iter().for_each(|(_, waiting, _)| waiting.is_told());
    assert_eq!(upstream.packs(), 5);
    upstream.release();
    for mut clone in early {
        assert!(clone.wait().unwrap().success());
    }
    for (client, waiting, into) in clones {
        waiting.ends_well();
        client.git_in(&into, &["fsck", "--strict"]).ok();
        let tip = client.git_in(&into, &["rev-parse", "main"]).ok();
        assert_eq!(tip.text(), repo.id("main"));
    }
    assert_eq!((upstream.packs(), upstream.packs_for_mirror()), (11, 1));
    assert!(!warmdock.mirror(SAMPLE).exists());
}

/// As many clones as are passed through while the first clone is under way, which the upstream holds.
fn all_passed_through(client: &Client, upstream: &Upstream, url: &str) -> Vec<Child> {
    let clone = |number: usize| {
        let into = format!("passed-{number}");
        let mut command = client.command(&["clone", "--quiet", "--bare", url, &into]);
        command.spawn().unwrap()
    };
    // The first one makes the service begin to clone.
    let mut clones = vec![clone(0)];
    wait_for("the first clone to begin", || {
        (upstream.packs_for_mirror() == 1).then_some(())
    });
    clones.extend((1..4).map(clone));
    wait_for("all places to be taken", || {
        (upstream.packs() == 5).then_some(())
    });
    clones
}

/// A client that waits for the mirror, and sees so.
struct Waiting {
    said: PathBuf,
    command: Child,
}

impl Waiting {
    #[track_caller]
    fn begin(client: &Client, name: &str, args: &[&str]) -> Self {
        let said = client.path(&format!("{name}.log"));
        let mut command = client.command(args);
        let command = command
            .stderr(File::create(&said).unwrap())
            .spawn()
            .unwrap();
        Self { said, command }
    }

    #[track_caller]
    fn is_told(&self) {
        wait_for("word that it waits", || {
            let said = self.said();
            said.contains("first clone of this repository")
                .then_some(())
        });
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.said).unwrap()
    }

    #[track_caller]
    fn ends_well(mut self) {
        let status = wait_for("a client to end", || self.command.try_wait().unwrap());
        assert!(status.success(), "{}", self.said());
    }
}

/// The client goes away in the middle: the mirror is still made, and the next client is served.
#[test]
fn a_client_that_leaves_early() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    upstream.fail(Fault::HoldPackAfter(2000));
    let client = Client::new(2);
    let mut command = client.command(&["clone", "--quiet", &warmdock.url(SAMPLE), "ours"]);
    let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
    upstream.wait_held();
    crate::support::process::signal("TERM", &child.id().to_string());
    child.wait().unwrap();
    upstream.release();
    client
        .clone(&warmdock.url(SAMPLE), "again", &["--bare"])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
}

/// What upstreams list and no mirror has.
const OTHERS: [&str; 3] = [
    "refs/changes/1/head",
    "refs/merge-requests/1/head",
    "refs/pull/1/head",
];

fn with_others() -> (Upstream, Repo) {
    let (upstream, repo) = Upstream::with_sample();
    let main = repo.id("main");
    for name in OTHERS {
        repo.commit_to(name, Some(&main), &[("other.txt", name.as_bytes())]);
    }
    (upstream, repo)
}

/// Who was told of references first may come back for them to the mirror.
#[test]
fn the_same_references_are_listed_before_there_is_a_mirror() {
    for protocol in [0, 1, 2] {
        // Without a HEAD that is there, up to version 1 one of the others has the capabilities behind its name.
        for head in ["refs/heads/main", "refs/heads/absent"] {
            let (upstream, repo) = with_others();
            repo.git(&["symbolic-ref", "HEAD", head]);
            let warmdock = warmdock::over_http(&upstream);
            upstream.fail(Fault::HoldPackAfter(2000));
            let (client, url) = (Client::new(protocol), warmdock.url(SAMPLE));
            let list = |names: &[&str]| {
                let args = [&["ls-remote", &url], names].concat();
                client.git(&args).ok().text()
            };
            let cold = list(&[]);
            assert!(cold.contains("refs/tags/v1.0^{}"), "{cold}");
            assert_eq!(list(&OTHERS), "");
            // All that was before the mirror.
            upstream.wait_held();
            upstream.release();
            warmdock.wait_mirrored(SAMPLE, &repo);
            assert_eq!(cold, list(&[]));
            assert_eq!(list(&OTHERS), "");
        }
    }
}

#[test]
fn a_mirror_clone_of_what_has_other_references() {
    for protocol in [0, 1, 2] {
        let (upstream, repo) = with_others();
        let warmdock = warmdock::over_http(&upstream);
        let client = Client::new(protocol);
        let args = ["--mirror"];
        client.clone(&warmdock.url(SAMPLE), "cold", &args).ok();
        warmdock.wait_mirrored(SAMPLE, &repo);
        client.clone(&warmdock.url(SAMPLE), "warm", &args).ok();
        assert_same(&client, "cold", "warm", Objects::Exactly);
    }
}
