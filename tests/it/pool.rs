//! The pool of mirrors: what is fetched, when, how often, and what clients see of it.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use crate::support::cgi;
use crate::support::client::git_at;
use crate::support::compare::{Objects, assert_same, clone_is_whole};
use crate::support::http::{self, Request, Response};
use crate::support::pkt;
use crate::support::sshd::Sshd;
use crate::support::warmdock::{Builder, builder, files_below, target};
use crate::support::{Client, Fault, HOST, Repo, SAMPLE, Upstream, Warmdock, wait_for, warmdock};

/// The advertisement of protocol v0: never answered without knowing the references.
fn advertisement(warmdock: &Warmdock, name: &str) -> Response {
    http::get(
        warmdock.address(),
        &format!("{}/info/refs?service=git-upload-pack", target(name)),
    )
}

/// A service over HTTP that has mirrored the sample.
fn mirrored(configure: impl FnOnce(Builder) -> Builder) -> (Upstream, Repo, Warmdock) {
    let (upstream, repo) = Upstream::with_sample();
    let warm = json!([format!("{HOST}/{SAMPLE}")]);
    let warmdock = configure(builder(&upstream.url()).set("/git/warm", warm)).start();
    // Who asks before that may be passed through.
    warmdock.wait_log("the first fetch to end", |line| {
        line["message"] == "fetched"
    });
    (upstream, repo, warmdock)
}

/// Asks for an object by its id, with protocol v2: the references are not needed for it.
fn want(warmdock: &Warmdock, id: &str) -> Response {
    let headers = [
        ("Git-Protocol", "version=2"),
        ("Content-Type", "application/x-git-upload-pack-request"),
    ];
    let target = format!("{}/git-upload-pack", target(SAMPLE));
    http::request(
        warmdock.address(),
        "POST",
        &target,
        &headers,
        &pkt::v2_clone(id),
    )
}

#[test]
fn one_fetch_for_many_first_clones() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    upstream.fail(Fault::HoldPackAfter(2000));
    std::thread::scope(|scope| {
        let clones: Vec<_> = (0..20)
            .map(|number| {
                let url = warmdock.url(SAMPLE);
                scope.spawn(move || {
                    Client::new(number % 3)
                        .clone(&url, "ours", &["--bare"])
                        .ok()
                })
            })
            .collect();
        upstream.wait_held();
        // Whoever has not asked yet asks while the first fetch is under way. Asking later does no harm to the test.
        std::thread::sleep(std::time::Duration::from_secs(1));
        upstream.release();
        for clone in clones {
            clone.join().unwrap();
        }
    });
    warmdock.wait_mirrored(SAMPLE, &repo);
    assert_eq!(upstream.packs_for_mirror(), 1, "{:#?}", agents(&upstream));
    assert!(
        upstream.packs() <= 21,
        "at most one request passed through for each client: {:#?}",
        agents(&upstream)
    );
}

fn agents(upstream: &Upstream) -> Vec<String> {
    upstream
        .asked()
        .into_iter()
        .filter(|asked| asked.pack)
        .map(|asked| asked.agent)
        .collect()
}

#[test]
fn many_refreshes_at_once_are_few_fetches() {
    let (upstream, repo, warmdock) = mirrored(|builder| builder);
    let before = upstream.packs_for_mirror();
    repo.commit("main", &[("new.txt", b"new\n")]);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_eq!(advertisement(&warmdock, SAMPLE).status, 200));
        }
    });
    assert_eq!(
        upstream.packs_for_mirror() - before,
        1,
        "the objects are new only once"
    );
}

/// Whoever comes while a fetch is under way hears what the upstream says now, and not what it said when that began.
#[test]
fn a_fetch_that_asked_too_early_is_followed_by_another() {
    let (upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/git/when_upstream_fails", "fail"));
    upstream.fail(Fault::HoldPackAfter(0));
    repo.commit("main", &[("early.txt", b"early\n")]);
    std::thread::scope(|scope| {
        scope.spawn(|| advertisement(&warmdock, SAMPLE));
        upstream.wait_held();
        let late = repo.commit("main", &[("late.txt", b"late\n")]);
        let listed = scope.spawn(|| advertisement(&warmdock, SAMPLE));
        let (service, id) = (&warmdock, late.clone());
        let wanted = scope.spawn(move || want(service, &id));
        // Long enough for both to wait for the fetch that is held. Coming later does no harm to the test.
        std::thread::sleep(std::time::Duration::from_secs(2));
        upstream.release();
        assert!(listed.join().unwrap().text().contains(&late));
        let response = wanted.join().unwrap();
        assert_eq!(pkt::errors_of(&response.body), "");
        assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
    });
}

#[test]
fn new_commits_are_seen_when_older_than_max_age() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    let id = repo.commit("main", &[("new.txt", b"new\n")]);
    assert!(advertisement(&warmdock, SAMPLE).text().contains(&id));
}

#[test]
fn within_max_age_nobody_is_asked() {
    let (upstream, repo, warmdock) = mirrored(|builder| builder.set("/git/max_age", "1h"));
    let asked = upstream.asked().len();
    let id = repo.commit("main", &[("new.txt", b"new\n")]);
    assert!(!advertisement(&warmdock, SAMPLE).text().contains(&id));
    clone_at(&warmdock, &repo.id("main~1"));
    assert_eq!(upstream.asked().len(), asked);
}

/// Clones and looks for the tip.
#[track_caller]
fn clone_at(warmdock: &Warmdock, tip: &str) {
    let client = Client::new(2);
    client.clone(&warmdock.url(SAMPLE), "ours", &[]).ok();
    assert_eq!(
        client.git_in("ours", &["rev-parse", "HEAD"]).ok().text(),
        tip
    );
}

#[test]
fn a_commit_that_is_present_is_served_without_asking() {
    let (upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/git/when_upstream_fails", "fail"));
    upstream.fail(Fault::CutOff);
    let response = want(&warmdock, &repo.id("main~3"));
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
}

/// A commit that was pushed a moment ago, and is asked for by its id before any reference was looked at.
#[test]
fn a_commit_that_is_not_present_is_fetched_first() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder.set("/git/max_age", "1h"));
    let id = repo.commit("main", &[("new.txt", b"new\n")]);
    let client = Client::new(2);
    client.git(&["init", "--quiet", "--bare", "ours"]).ok();
    // An upstream that was asked a moment ago may be spared for a moment.
    wait_for("the commit", || {
        let args = ["fetch", "--quiet", "--depth=1", &warmdock.url(SAMPLE), &id];
        client.git_in("ours", &args).status.success().then_some(())
    });
}

#[test]
fn serve_stale_serves_what_is_there_and_says_so() {
    let (upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/git/when_upstream_fails", "serve_stale"));
    let tip = repo.id("main");
    upstream.fail(Fault::CutOff);
    clone_at(&warmdock, &tip);
    warmdock.wait_log("a warning that the answer is stale", |event| {
        event["level"] == "WARN"
            && event.to_string().contains("stale")
            && event.to_string().contains(SAMPLE)
    });
    assert!(
        warmdock.metric(|name| name.contains("stale")) > 0.0,
        "{}",
        warmdock.metrics()
    );
    upstream.release();
    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    wait_for("the service to follow its upstream again", || {
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains(&new)
            .then_some(())
    });
}

#[test]
fn fail_says_why() {
    let (upstream, _repo, warmdock) =
        mirrored(|builder| builder.set("/git/when_upstream_fails", "fail"));
    upstream.fail(Fault::CutOff);
    let response = advertisement(&warmdock, SAMPLE);
    assert_eq!(response.status, 502);
    assert!(
        response.text().contains(HOST) || response.text().contains("127.0.0.1"),
        "names the upstream: {}",
        response.text()
    );
    upstream.release();
    wait_for("the service to work again", || {
        (advertisement(&warmdock, SAMPLE).status == 200).then_some(())
    });
}

#[test]
fn warm_repositories_are_refreshed_by_themselves() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder.set("/git/refresh", "1s"));
    repo.commit("main", &[("new.txt", b"new\n")]);
    repo.git(&["branch", "--delete", "--force", "feature/two"]);
    warmdock.wait_mirrored(SAMPLE, &repo);
}

/// As after a start at which the network comes up a moment later.
#[test]
fn a_warm_repository_is_tried_again_soon_after_a_failure() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.fail(Fault::CutOff);
    let warmdock = builder(&upstream.url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .set("/git/refresh", "1h")
        .start();
    warmdock.wait_log("a failure", |event| event["message"] == "fetch failed");
    upstream.release();
    warmdock.wait_mirrored(SAMPLE, &repo);
}

/// More of them than there are places for fetches at once, so that some wait for the slow answers to others.
#[test]
fn warm_repositories_are_refreshed_as_often_as_promised() {
    const REFRESH: Duration = Duration::from_secs(3);
    let upstream = Upstream::start();
    let names: Vec<_> = (0..10).map(|number| format!("team/r{number}")).collect();
    for name in &names {
        upstream.sample(name);
    }
    let (url, asked) = slow_host(&upstream);
    let warm: Vec<_> = names.iter().map(|name| format!("{HOST}/{name}")).collect();
    let _warmdock = builder(&url)
        .set("/git/warm", warm)
        .set("/git/first_clones", names.len())
        .set("/git/refresh", format!("{}s", REFRESH.as_secs()))
        .start();
    // A first clone, and five times more.
    let asked = wait_for("each repository to be asked for six times", || {
        let asked = asked.lock().unwrap();
        let is_enough = asked.len() == names.len() && asked.values().all(|times| times.len() >= 6);
        is_enough.then(|| asked.clone())
    });
    for (repo, times) in asked {
        let took = times[5] - times[1];
        // Half as often would take eight.
        assert!(took < REFRESH * 7, "{repo}: four times in {took:?}");
    }
}

/// When the references of each repository were asked for.
type AskedAt = Arc<Mutex<HashMap<String, Vec<Instant>>>>;

/// A host with the repositories of `upstream` that takes its time.
fn slow_host(upstream: &Upstream) -> (String, AskedAt) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (root, asked) = (upstream.root().to_owned(), AskedAt::default());
    let times = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (root, times) = (root.clone(), times.clone());
            std::thread::spawn(move || answer_slowly(&root, &stream, &times));
        }
    });
    (url, asked)
}

fn answer_slowly(root: &Path, mut stream: &TcpStream, asked: &AskedAt) -> Option<()> {
    let request = Request::read(&mut BufReader::new(stream))?;
    if let Some(repo) = request.path.strip_suffix("/info/refs") {
        let mut asked = asked.lock().unwrap();
        asked
            .entry(repo.to_owned())
            .or_default()
            .push(Instant::now());
    }
    std::thread::sleep(Duration::from_millis(200));
    let mut answer = cgi::http_backend(root, &request, request.header("git-protocol"));
    let mut body = Vec::new();
    answer.body.read_to_end(&mut body).ok()?;
    let mut head = format!("HTTP/1.1 {} Whatever\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!(
        "Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), &body].concat()).ok()
}

#[test]
fn deleted_references_disappear() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    assert!(
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains("refs/heads/feature/two")
    );
    repo.git(&["branch", "--delete", "--force", "feature/two"]);
    repo.git(&["tag", "--delete", "v0.1"]);
    let text = advertisement(&warmdock, SAMPLE).text();
    assert!(
        !text.contains("refs/heads/feature/two") && !text.contains("refs/tags/v0.1"),
        "{text}"
    );
    assert!(text.contains("refs/heads/main"), "{text}");
}

/// A file becomes a folder of the same name: what stores references as files trips over it.
#[test]
fn a_branch_makes_room_for_a_folder_of_branches() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    repo.git(&["branch", "topic", "main"]);
    assert!(
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains("refs/heads/topic\n")
    );
    repo.git(&["branch", "--delete", "--force", "topic"]);
    repo.git(&["branch", "topic/one", "main"]);
    assert!(
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains("refs/heads/topic/one\n")
    );
    repo.git(&["branch", "--delete", "--force", "topic/one"]);
    repo.git(&["branch", "topic", "main~1"]);
    assert!(
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains("refs/heads/topic\n")
    );
}

#[test]
fn a_commit_from_before_a_force_push_is_still_there() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    let (old, new) = repo.force_push("main");
    assert!(advertisement(&warmdock, SAMPLE).text().contains(&new));
    let response = want(&warmdock, &old);
    assert_eq!(response.status, 200);
    assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
}

/// What was forgotten for longer than `keep_unreachable` goes from the disk.
#[test]
fn what_nobody_reaches_any_more_goes_in_the_end() {
    let (upstream, repo, warmdock) = mirrored(|builder| builder.set("/git/keep_unreachable", "1s"));
    let (old, new) = repo.force_push("main");
    assert!(advertisement(&warmdock, SAMPLE).text().contains(&new));
    let pack = want(&warmdock, &old).body;
    assert!(pkt::pack_of(&pack).starts_with(b"PACK"), "not at once");
    std::thread::sleep(Duration::from_millis(1100));
    // Fetches are what it is noticed at.
    let newest = repo.commit("main", &[("newest.txt", b"newest\n")]);
    assert!(advertisement(&warmdock, SAMPLE).text().contains(&newest));
    warmdock.wait_log("consolidation", |event| {
        event["message"] == "consolidated packs" && event.to_string().contains(SAMPLE)
    });
    let found = git_at(&warmdock.mirror(SAMPLE), &["cat-file", "-e", &old], b"");
    assert!(!found.status.success());
    assert!(pkt::errors_of(&want(&warmdock, &old).body).contains(&old));
    warmdock.fsck_mirror(SAMPLE);
    clone_is_whole(2, &upstream, &warmdock, SAMPLE);
}

#[test]
fn only_tips_under_the_policy_advertised() {
    let (_upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/git/allow_wants", "advertised"));
    assert!(pkt::pack_of(&want(&warmdock, &repo.id("v0.2")).body).starts_with(b"PACK"));
    let old = repo.id("main~4");
    let response = want(&warmdock, &old);
    let message = pkt::errors_of(&response.body);
    assert!(
        message.contains("not our ref") && message.contains(&old),
        "{} {message}",
        response.status
    );
}

#[test]
fn head_follows_the_upstream() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    let client = Client::new(2);
    let head = || {
        client
            .git(&["ls-remote", "--symref", &warmdock.url(SAMPLE), "HEAD"])
            .ok()
            .text()
    };
    assert!(head().contains("ref: refs/heads/main\tHEAD"));
    repo.git(&["symbolic-ref", "HEAD", "refs/heads/release/1.0"]);
    assert!(
        head().contains("ref: refs/heads/release/1.0\tHEAD"),
        "{}",
        head()
    );
    assert_eq!(
        git_at(&warmdock.mirror(SAMPLE), &["symbolic-ref", "HEAD"], b"")
            .ok()
            .text(),
        "refs/heads/release/1.0"
    );
}

/// Stock git reads the mirror: a person can look into it, and save it.
#[test]
fn a_mirror_is_a_bare_repository() {
    let (_upstream, repo, warmdock) = mirrored(|builder| builder);
    repo.commit("main", &[("new.txt", b"new\n")]);
    assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
    warmdock.fsck_mirror(SAMPLE);
    let refs = git_at(
        &warmdock.mirror(SAMPLE),
        &[
            "for-each-ref",
            "--format=%(objectname) %(refname) %(*objectname)",
        ],
        b"",
    );
    assert_eq!(refs.ok().text(), repo.refs());
    assert_eq!(
        git_at(
            &warmdock.mirror(SAMPLE),
            &["rev-parse", "--is-bare-repository"],
            b""
        )
        .ok()
        .text(),
        "true"
    );
}

/// Small packs from many fetches are put together in the background, and nothing is lost by it. A pack that a fetch left
/// which failed goes as well.
#[test]
fn many_small_packs_are_consolidated() {
    let (upstream, repo, warmdock) = mirrored(|builder| builder);
    let first = &warmdock.packs(SAMPLE)[0];
    let left = first.with_file_name("pack-0000000000000000000000000000000000000000.pack");
    for extension in ["pack", "idx"] {
        let from = first.with_extension(extension);
        std::fs::copy(from, left.with_extension(extension)).unwrap();
    }
    for number in 0..60 {
        repo.commit("main", &[("counter.txt", format!("{number}\n").as_bytes())]);
        assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
    }
    warmdock.wait_log("consolidation", |event| {
        event["message"] == "consolidated packs" && event.to_string().contains(SAMPLE)
    });
    assert!(warmdock.packs(SAMPLE).len() < 60 && !left.exists());
    warmdock.fsck_mirror(SAMPLE);
    clone_is_whole(2, &upstream, &warmdock, SAMPLE);
}

/// A large mirror is rewritten for minutes.
#[test]
fn references_stay_fresh_while_packs_are_consolidated() {
    for commits in [4_000, 16_000, 64_000] {
        let (upstream, repo, warmdock) = mirrored(|builder| {
            let builder = builder.set("/git/keep_unreachable", "0s");
            builder.set("/git/when_upstream_fails", "fail")
        });
        repo.commits("main", commits);
        assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
        let (old, _) = repo.force_push("main");
        assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
        warmdock.wait_log("consolidation", |event| {
            event["message"] == "consolidating packs"
        });
        let newest = repo.commit("main", &[("newest.txt", b"newest\n")]);
        assert!(advertisement(&warmdock, SAMPLE).text().contains(&newest));
        let was_meanwhile = !warmdock.log().contains("consolidated packs");
        warmdock.wait_log("its end", |event| event["message"] == "consolidated packs");
        let found = git_at(&warmdock.mirror(SAMPLE), &["cat-file", "-e", &old], b"");
        assert!(!found.status.success());
        warmdock.fsck_mirror(SAMPLE);
        clone_is_whole(2, &upstream, &warmdock, SAMPLE);
        if was_meanwhile {
            return;
        }
    }
    panic!("each consolidation was quicker than a commit and a fetch, or held them up");
}

/// What only tags reach is nobody's who did not ask for them: here another service, which mirrors branches alone.
#[test]
fn whoever_asks_for_branches_gets_nothing_of_tags() {
    let (upstream, repo) = Upstream::with_sample();
    let write = ["hash-object", "-t", "blob", "-w", "--stdin"];
    let key = git_at(&repo.path, &write, b"a key\n").ok().text();
    repo.git(&["tag", "key", &key]);
    let tag = [
        "tag",
        "--annotate",
        "--message=of main",
        "annotated",
        "main",
    ];
    repo.git(&tag);
    let annotated = repo.id("annotated");
    let first = warmdock::over_http(&upstream);
    let client = Client::new(2);
    client.git(&["ls-remote", &first.url(SAMPLE)]).ok();
    first.wait_mirrored(SAMPLE, &repo);

    let second = builder(&first.as_upstream())
        .set("/git/refs", json!(["refs/heads/*"]))
        .start();
    client.git(&["ls-remote", &second.url(SAMPLE)]).ok();
    second.wait_log("the fetch to end", |line| line["message"] == "fetched");
    for id in [&repo.id("main"), &annotated, &key] {
        let found = git_at(&second.mirror(SAMPLE), &["cat-file", "-e", id], b"");
        assert_eq!(found.status.success(), *id == repo.id("main"), "{id}");
    }
    // Nor was there anything of it to clean up.
    assert!(!second.has_had_garbage(SAMPLE));
}

/// An upstream may send more than was asked for, as this service does to whoever wants nearly everything. What nothing
/// reaches here is found out and goes, so that a thin pack never builds on it.
#[test]
fn what_an_upstream_sends_too_much_goes() {
    let (upstream, repo) = Upstream::with_sample();
    let refs = json!(["refs/heads/*", "refs/tags/*", "refs/pull/*"]);
    let first = builder(&upstream.url()).set("/git/refs", refs).start();
    let pull = repo.commit_to(
        "refs/pull/7/head",
        Some(&repo.id("main")),
        &[("pull.txt", b"pull\n")],
    );
    let client = Client::new(2);
    client.git(&["ls-remote", &first.url(SAMPLE)]).ok();
    first.wait_mirrored(SAMPLE, &repo);

    let second = builder(&first.as_upstream()).start();
    client.git(&["ls-remote", &second.url(SAMPLE)]).ok();
    second.wait_log("consolidation", |event| {
        event["message"] == "consolidated packs" && event.to_string().contains(SAMPLE)
    });
    let pull = git_at(&second.mirror(SAMPLE), &["cat-file", "-e", &pull], b"");
    assert!(!pull.status.success());
    second.fsck_mirror(SAMPLE);
    clone_is_whole(2, &upstream, &second, SAMPLE);
}

#[test]
fn restart_keeps_the_mirrors() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = warmdock::over_http(&upstream);
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let tip = repo.id("main");
    warmdock.stop();
    upstream.fail(Fault::CutOff);
    warmdock.start_again();
    clone_at(&warmdock, &tip);
    // Its age is known, although the upstream has not answered since.
    let text = warmdock.metrics();
    assert!(text.contains(&staleness_of(SAMPLE)), "{text}");
}

/// How the line of a repository begins in the metrics.
fn staleness_of(name: &str) -> String {
    format!("warmdock_git_mirror_staleness_seconds{{repo=\"{HOST}/{name}\"}}")
}

#[test]
fn other_namespaces_by_configuration() {
    let (upstream, repo) = Upstream::with_sample();
    let id = repo.commit_to(
        "refs/pull/7/head",
        Some(&repo.id("main")),
        &[("pull.txt", b"pull\n")],
    );
    let plain = warmdock::over_http(&upstream);
    // What is passed through before the mirror is there is the upstream's own answer.
    Client::new(2).git(&["ls-remote", &plain.url(SAMPLE)]).ok();
    wait_for("an answer without refs/pull", || {
        let answer = advertisement(&plain, SAMPLE);
        (answer.status == 200 && !answer.text().contains("refs/pull")).then_some(())
    });
    let refs = json!(["refs/heads/*", "refs/tags/*", "refs/pull/*"]);
    let warmdock = builder(&upstream.url()).set("/git/refs", refs).start();
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    assert!(
        advertisement(&warmdock, SAMPLE)
            .text()
            .contains(&format!("{id} refs/pull/7/head"))
    );
    let client = Client::new(2);
    client
        .clone(&warmdock.url(SAMPLE), "ours", &["--mirror"])
        .ok();
    client
        .clone(&upstream.direct(SAMPLE), "direct", &["--mirror"])
        .ok();
    assert_same(&client, "ours", "direct", Objects::Exactly);
}

#[test]
fn sha256_is_refused_clearly() {
    for over_http in [false, true] {
        let upstream = Upstream::start();
        let repo = Repo::init(
            &upstream.path(SAMPLE),
            &["--initial-branch=main", "--object-format=sha256"],
        );
        repo.commit("main", &[("a.txt", b"a\n")]);
        let warmdock = if over_http {
            warmdock::over_http(&upstream)
        } else {
            warmdock::over_files(&upstream)
        };
        // The first requests may be passed through, before the service itself has talked to the upstream.
        let output = wait_for("the refusal", || {
            let output = Client::new(2).clone(&warmdock.url(SAMPLE), "ours", &[]);
            (!output.status.success()).then_some(output)
        });
        let response = advertisement(&warmdock, SAMPLE);
        assert!(response.status >= 400, "{}", response.text());
        let text = format!("{} {}", output.stderr, response.text()).to_lowercase();
        assert!(
            text.contains("sha256") || text.contains("sha-256"),
            "{text}"
        );
    }
}

/// First-time clones wait for each other, so that a start with a cold disk does not flood the upstream.
#[test]
fn first_clones_wait_in_order() {
    let upstream = Upstream::start();
    let (one, two) = (upstream.sample("team/one"), upstream.sample("team/two"));
    let warm = json!([format!("{HOST}/team/one"), format!("{HOST}/team/two")]);
    upstream.fail(Fault::HoldPackAfter(2000));
    let warmdock = builder(&upstream.url())
        .set("/git/warm", warm)
        .set("/git/first_clones", 1)
        .start();
    upstream.wait_held();
    // Long enough for a second one to begin, if it would.
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(upstream.packs_for_mirror(), 1);
    // Nor are references asked for that nobody waits for.
    let asked = upstream.asked();
    let repos: BTreeSet<_> = asked
        .iter()
        .filter_map(|asked| asked.request.path.split(".git").next())
        .collect();
    assert_eq!(repos.len(), 1, "{repos:?}");
    upstream.release();
    warmdock.wait_mirrored("team/one", &one);
    warmdock.wait_mirrored("team/two", &two);
}

#[test]
fn clients_are_served_while_many_warm_repositories_wait() {
    let (upstream, _repo) = Upstream::with_sample();
    upstream.sample("team/other");
    let mut warm = vec![format!("{HOST}/{SAMPLE}")];
    warm.extend((0..100).map(|number| format!("{HOST}/team/absent{number}")));
    upstream.fail(Fault::HoldPackAfter(2000));
    let warmdock = builder(&upstream.url())
        .set("/git/warm", warm)
        .set("/git/first_clones", 1)
        // So nothing passes through: clients wait for the mirror.
        .set("/git/allow_wants", "advertised")
        .start();
    upstream.wait_held();
    wait_for("the others to wait", || {
        let queue = |name: &str| name == "warmdock_git_queue_length{queue=\"first_clone\"}";
        (warmdock.metric(queue) > 70.0).then_some(())
    });
    let response = advertisement(&warmdock, "team/other");
    assert_eq!(response.status, 200, "{}", response.text());
}

fn bytes_below(folder: &Path) -> u64 {
    files_below(folder)
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|metadata| metadata.len())
        .sum()
}

#[test]
fn the_data_limit_holds_and_the_least_recently_used_goes_first() {
    let upstream = Upstream::start();
    let names: Vec<String> = (0..10)
        .map(|number| format!("team/large{number}"))
        .collect();
    for name in &names {
        Repo::large(&upstream.path(name), 3 << 20);
    }
    let limit = 20 << 20;
    let warm = json!([format!("{HOST}/{}", names[0])]);
    let config = builder(&upstream.file_url())
        .set("/git/warm", warm)
        .set("/git/max_age", "1h");
    let warmdock = config.set("/storage/max_size", "20MiB").start();
    warmdock.wait_mirrored(&names[0], &Repo::at(&upstream.path(&names[0])));
    let client = Client::new(2);
    for name in &names[1..] {
        client.clone(&warmdock.url(name), name, &["--bare"]).ok();
        // What the file system adds for folders is not counted by anybody.
        assert!(
            bytes_below(&warmdock.data()) <= limit,
            "{} bytes after {name}",
            bytes_below(&warmdock.data())
        );
    }
    assert!(
        warmdock.mirror(&names[0]).is_dir(),
        "a warm repository stays"
    );
    assert!(
        warmdock.mirror(&names[9]).is_dir(),
        "the last one used stays"
    );
    assert!(
        !warmdock.mirror(&names[1]).is_dir(),
        "the one that was not used for longest is gone"
    );
    let evicted = warmdock.metric(|name| name == "warmdock_git_mirrors_evicted_total");
    assert!(evicted >= 1.0);
    let text = warmdock.metrics();
    assert!(text.contains(&staleness_of(&names[9])), "{text}");
    assert!(!text.contains(&staleness_of(&names[1])), "{text}");
    // It comes back when somebody asks.
    client
        .clone(&warmdock.url(&names[1]), "again", &["--bare"])
        .ok();
    client
        .clone(&warmdock.url(&names[0]), "warm", &["--bare"])
        .ok();
}

#[test]
fn a_repository_that_can_never_fit_is_refused() {
    let upstream = Upstream::start();
    Repo::large(&upstream.path("team/large"), 6 << 20);
    let small = upstream.sample(SAMPLE);
    let warmdock = builder(&upstream.file_url())
        .set("/storage/max_size", "4MiB")
        .start();
    warmdock_refuses(&warmdock, "team/large");
    assert!(bytes_below(&warmdock.data()) <= 4 << 20);
    // The others are served as before.
    assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
    warmdock.wait_mirrored(SAMPLE, &small);
    clone_is_whole(2, &upstream, &warmdock, SAMPLE);
}

/// What is new does not fit, and is gone a moment later.
#[test]
fn a_short_lack_of_room_leaves_no_mirror_stale() {
    let (_upstream, repo, warmdock) = mirrored(|builder| {
        let builder = builder.set("/storage/max_size", "2MiB");
        builder.set("/git/refresh", "1s")
    });
    let noise = crate::support::repo::Rng(3).bytes(4 << 20);
    repo.commit("large", &[("large.bin", &noise)]);
    warmdock.wait_log("the refusal", |event| {
        event["message"] == "fetch failed" && event.to_string().contains("storage.max_size")
    });
    repo.git(&["branch", "--delete", "--force", "large"]);
    repo.commit("main", &[("new.txt", b"new\n")]);
    warmdock.wait_mirrored(SAMPLE, &repo);
}

#[track_caller]
fn warmdock_refuses(warmdock: &Warmdock, name: &str) {
    let output = Client::new(2)
        .clone(&warmdock.url(name), "ours", &["--bare"])
        .failed();
    assert!(
        output.stderr.contains("error: 507"),
        "{}",
        output.describe()
    );
}

/// Patterns of the upstream: what is not listed is as missing as what is not there.
#[test]
fn repositories_outside_the_patterns_are_missing() {
    let (upstream, _repo) = Upstream::with_sample();
    upstream.sample("other/sample");
    let config = builder(&upstream.url()).set("/git/upstreams/0/repos", json!(["team/*"]));
    let warmdock = config.start();
    assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
    let (outside, absent) = (
        advertisement(&warmdock, "other/sample"),
        advertisement(&warmdock, "other/absent"),
    );
    assert_eq!((outside.status, absent.status), (404, 404));
    let asked = upstream.asked();
    assert!(
        asked
            .iter()
            .all(|asked| !asked.request.path.contains("other")),
        "the upstream is not asked for what the operator does not allow"
    );
}

#[test]
fn a_name_with_and_without_dot_git_is_one_mirror() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    let client = Client::new(2);
    let url = warmdock.url(SAMPLE);
    client.clone(&url, "with", &["--bare"]).ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    client
        .clone(url.strip_suffix(".git").unwrap(), "without", &["--bare"])
        .ok();
    assert_same(&client, "without", "with", Objects::Reachable);
    assert_eq!(upstream.packs_for_mirror(), 1);
}

/// Also where the uses follow each other so closely that not each was noted.
#[test]
fn after_a_restart_the_least_recently_used_goes_first() {
    let upstream = Upstream::start();
    let names: Vec<_> = (0..4).map(|number| format!("team/large{number}")).collect();
    for name in &names {
        Repo::large(&upstream.path(name), 4 << 20);
    }
    let mut warmdock = builder(&upstream.file_url())
        .set("/git/max_age", "1h")
        .set("/storage/max_size", "16MiB")
        .start();
    let make_use_of = |warmdock: &Warmdock, name: &str| {
        assert_eq!(advertisement(warmdock, name).status, 200);
        warmdock.wait_mirrored(name, &Repo::at(&upstream.path(name)));
    };
    for number in [0, 1, 2, 0, 1, 2, 0] {
        make_use_of(&warmdock, &names[number]);
    }
    let used_by = SystemTime::now();
    warmdock.stop();
    for name in &names[..3] {
        let note = warmdock.mirror(name).join("warmdock-last-used");
        let noted = note.metadata().unwrap().modified().unwrap();
        assert!(noted <= used_by, "{name}: {noted:?}, {used_by:?}");
    }
    warmdock.start_again();
    make_use_of(&warmdock, &names[3]);
    let is_there = |number: usize| warmdock.mirror(&names[number]).is_dir();
    wait_for("room for the last one", || (!is_there(1)).then_some(()));
    assert!([0, 2, 3].into_iter().all(is_there));
}

/// Nobody has asked for them since the start, and the upstream cannot be asked.
#[test]
fn warm_answers_are_prepared_while_the_upstream_is_away() {
    let (upstream, _repo, mut warmdock) = mirrored(|builder| builder);
    warmdock.stop();
    upstream.fail(Fault::CutOff);
    warmdock.start_again();
    wait_for("the prepared answers", || {
        let answers = warmdock.data().join("answers");
        let mut files = files_below(&answers);
        // What was there before goes in its own time.
        files.retain(|file| !file.starts_with(answers.join("leftovers")));
        // Each is smaller than a block, so that it is written at once.
        let is_written = files
            .iter()
            .all(|file| file.metadata().is_ok_and(|found| found.len() > 0));
        (files.len() == 2 && is_written).then_some(())
    });
    let client = Client::new(2);
    for (into, args) in [("shallow", &["--depth", "1"][..]), ("whole", &["--bare"])] {
        client.clone(&warmdock.url(SAMPLE), into, args).ok();
    }
    let answers = ["whole", "cached", "made"].map(|kind| {
        let sample = format!("warmdock_git_answers_total{{kind=\"{kind}\"}}");
        warmdock.metric(|name| name == sample)
    });
    assert_eq!(answers, [1.0, 1.0, 0.0]);
}

/// Where there is no room for them, that is found out once, and not as often as the upstream would be asked.
#[test]
fn answers_are_prepared_once_while_the_upstream_is_away() {
    let (upstream, _repo, mut warmdock) = mirrored(|builder| builder.set("/git/refresh", "1s"));
    warmdock.stop();
    upstream.fail(Fault::CutOff);
    let mut config = warmdock.config();
    let used = bytes_below(&warmdock.data().join("git"));
    config["storage"] = json!({ "max_size": format!("{used}B") });
    warmdock.write_config(&config.to_string());
    warmdock.start_again();
    // Between two such questions the mirror is looked at several times.
    let said = |what: &str| warmdock.log().matches(what).count();
    wait_for("the upstream to be asked twice", || {
        (said("fetch failed") >= 2).then_some(())
    });
    assert_eq!(said("an answer was not prepared"), 1);
}

/// By the clients of two repositories, and not by each for its own.
#[test]
fn a_host_that_hangs_is_not_waited_for_by_all() {
    let upstream = Upstream::start();
    let names: Vec<_> = (0..12).map(|number| format!("team/r{number}")).collect();
    let repos: Vec<_> = names.iter().map(|name| upstream.sample(name)).collect();
    let warm: Vec<_> = names.iter().map(|name| format!("{HOST}/{name}")).collect();
    let warmdock = builder(&upstream.url())
        .set("/git/warm", warm)
        .set("/git/first_clones", names.len())
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    wait_for("all mirrors", || {
        let fetched = warmdock.metric(|name| name == "warmdock_git_fetches_total{result=\"ok\"}");
        (fetched >= names.len() as f64).then_some(())
    });
    upstream.fail(Fault::Hang);
    let begin = Instant::now();
    for name in names.iter().chain(&names) {
        assert_eq!(advertisement(&warmdock, name).status, 200);
        // Who waits does so for ten seconds.
        assert!(begin.elapsed() < Duration::from_secs(60), "at {name}");
    }
    // An error is an answer.
    upstream.fail(Fault::Status(503));
    wait_for("the service to hear from its upstream", || {
        assert_eq!(advertisement(&warmdock, &names[0]).status, 200);
        warmdock.log().contains("answers again").then_some(())
    });
    upstream.release();
    let new = repos[1].commit("main", &[("new.txt", b"new\n")]);
    wait_for("the service to follow its upstream again", || {
        let listed = advertisement(&warmdock, &names[1]).text();
        listed.contains(&new).then_some(())
    });
}

/// Somebody asks for it again and again.
#[test]
fn a_repository_that_hangs_makes_no_other_of_its_host_stale() {
    let (upstream, repo) = Upstream::with_sample();
    let hanging = "team/hanging";
    upstream.sample(hanging);
    let warmdock = builder(&upstream.url())
        .set(
            "/git/warm",
            [hanging, SAMPLE].map(|name| format!("{HOST}/{name}")),
        )
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    wait_for("both mirrors", || {
        let fetched = warmdock.metric(|name| name == "warmdock_git_fetches_total{result=\"ok\"}");
        (fetched >= 2.0).then_some(())
    });
    upstream.fail(Fault::HangFor("/team/hanging.git"));
    for number in 0..4 {
        assert_eq!(advertisement(&warmdock, hanging).status, 200);
        let new = repo.commit("main", &[("new.txt", format!("{number}\n").as_bytes())]);
        let listed = advertisement(&warmdock, SAMPLE).text();
        assert!(listed.contains(&new), "{number}: {listed}");
    }
    assert!(!warmdock.log().contains("answers none"));
}

/// Others go on with what is here, and who wants what is not has to wait.
#[test]
fn a_commit_that_a_slow_fetch_brings_is_waited_for() {
    let (upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/limits/upstream_idle_timeout", "10m"));
    upstream.fail(Fault::HoldPackAfter(0));
    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    let listed = advertisement(&warmdock, SAMPLE);
    assert!(listed.status == 200 && !listed.text().contains(&new));
    std::thread::scope(|scope| {
        let wanted = scope.spawn(|| want(&warmdock, &new));
        // Asking later does no harm to the test.
        std::thread::sleep(Duration::from_secs(1));
        upstream.release();
        let pack = wanted.join().unwrap().body;
        assert!(pkt::pack_of(&pack).starts_with(b"PACK"));
    });
}

/// A pack that takes long says nothing of the host.
#[test]
fn a_slow_fetch_is_waited_for_once() {
    let (upstream, repo, warmdock) =
        mirrored(|builder| builder.set("/limits/upstream_idle_timeout", "10m"));
    upstream.fail(Fault::HoldPackAfter(0));
    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    let begin = Instant::now();
    for number in 0..12 {
        let listed = advertisement(&warmdock, SAMPLE);
        assert!(listed.status == 200 && !listed.text().contains(&new));
        assert!(begin.elapsed() < Duration::from_secs(60), "at {number}");
    }
    assert!(!warmdock.log().contains("answers none"));
    upstream.release();
    wait_for("what came in the end", || {
        let listed = advertisement(&warmdock, SAMPLE).text();
        listed.contains(&new).then_some(())
    });
}

/// Something else is configured in another way, and nobody has to log in anew for that.
#[test]
fn a_reload_keeps_connections_to_upstreams() {
    let (upstream, repo) = Upstream::with_sample();
    let sshd = Sshd::start();
    let warmdock = builder("file:///nowhere")
        .set("/git/upstreams", json!([sshd.upstream(upstream.root())]))
        .start();
    assert_eq!(advertisement(&warmdock, SAMPLE).status, 200);
    warmdock.wait_mirrored(SAMPLE, &repo);
    let mut config = warmdock.config();
    config["git"]["warm"] = json!([format!("{HOST}/{SAMPLE}")]);
    config["git"]["refresh"] = json!("1s");
    warmdock.write_config(&config.to_string());
    warmdock.signal("HUP");
    // Which comes without anybody who asks, as soon as that holds.
    repo.commit("main", &[("new.txt", b"new\n")]);
    warmdock.wait_mirrored(SAMPLE, &repo);
    assert_eq!(sshd.connections(), 1);
}

/// As git tells it: of all of them in version 2, before that of HEAD alone.
#[test]
fn where_symbolic_references_lead_is_told() {
    for url in [Upstream::url, Upstream::file_url] {
        let (upstream, repo) = Upstream::with_sample();
        let link = |name: &str, target: &str| repo.git(&["symbolic-ref", name, target]);
        repo.git(&["branch", "twin", "main"]);
        link("refs/heads/latest", "refs/heads/main");
        link("refs/heads/newest", "refs/heads/latest");
        link("refs/heads/nowhere", "refs/heads/absent");
        link("refs/tags/stable", "refs/tags/v1.0");
        let mut warmdock = builder(&url(&upstream)).start();
        let clients = [0, 1, 2].map(Client::new);
        let lists = |url: &str| {
            let list = |client: &Client| client.git(&["ls-remote", "--symref", url]).ok().text();
            clients.each_ref().map(list)
        };
        let direct = lists(&upstream.direct(SAMPLE));
        assert!(direct[2].contains("ref: refs/heads/main\trefs/heads/newest"));
        assert_eq!(lists(&warmdock.url(SAMPLE)), direct);

        // Nothing else is new then, no object either.
        link("refs/heads/latest", "refs/heads/twin");
        let direct = lists(&upstream.direct(SAMPLE));
        assert!(direct[2].contains("ref: refs/heads/twin\trefs/heads/newest"));
        warmdock.wait_mirrored(SAMPLE, &repo);
        assert_eq!(lists(&warmdock.url(SAMPLE)), direct);
        warmdock.fsck_mirror(SAMPLE);

        // What is on disk has to do.
        warmdock.stop();
        let mut config = warmdock.config();
        config["git"]["upstreams"][0]["url"] = json!(upstream.url());
        warmdock.write_config(&config.to_string());
        upstream.fail(Fault::CutOff);
        warmdock.start_again();
        assert_eq!(lists(&warmdock.url(SAMPLE)), direct);
    }
}

/// As git tells it.
#[test]
fn head_is_the_branch_behind_its_alias() {
    let (upstream, repo) = Upstream::with_sample();
    repo.git(&["symbolic-ref", "refs/heads/alias", "refs/heads/main"]);
    repo.git(&["symbolic-ref", "HEAD", "refs/heads/alias"]);
    let warmdock = warmdock::over_files(&upstream);
    let client = Client::new(2);
    let [ours, direct] = [warmdock.url(SAMPLE), upstream.direct(SAMPLE)].map(|url| {
        let head = client.git(&["ls-remote", "--symref", &url, "HEAD"]);
        head.ok().text()
    });
    assert!(ours.contains("ref: refs/heads/main\tHEAD"), "{ours}");
    assert_eq!(ours, direct);
}
