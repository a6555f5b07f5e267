//! BuildKit itself as a client: it reads no gitconfig, so addresses are written out.

use crate::archive::Archive;
use crate::docker::Build;
use crate::support::upstream::Upstream;
use crate::support::warmdock::over_http;
use crate::support::{Client, Repo, SAMPLE, Warmdock};

/// A running service with a mirror of a repository that has a Dockerfile and a submodule, on a branch and on a tag.
fn service() -> (Upstream, Repo, Warmdock) {
    let upstream = Upstream::start();
    let repo = upstream.sample(SAMPLE);
    // BuildKit takes submodules along; the sample's is at `../lib.git`.
    let lib = Repo::empty(&upstream.path("team/lib"));
    let commit = lib.commit("main", &[("lib.txt", b"a submodule's\n")]);
    repo.git(&["read-tree", "main"]);
    let link = format!("160000,{commit},vendor/lib");
    repo.git(&["update-index", "--add", "--cacheinfo", &link]);
    let tree = repo.git(&["write-tree"]);
    let commit = ["commit-tree", "-p", "main", "-m", "A submodule", &tree];
    let commit = repo.git(&commit);
    repo.git(&["update-ref", "refs/heads/main", &commit]);
    repo.commit(
        "main",
        &[
            (
                "Dockerfile",
                b"FROM scratch\nCOPY content.txt /copied\nCOPY vendor/lib /lib\n",
            ),
            ("content.txt", b"first\n"),
        ],
    );
    let tag = ["tag", "--annotate", "--message=first", "v9", "main"];
    repo.git(&tag);
    repo.commit("main", &[("content.txt", b"second\n")]);
    let warmdock = over_http(&upstream);
    // The first clone is passed through; what follows comes from the mirror.
    let client = Client::new(2);
    client.clone(&warmdock.url(SAMPLE), "first", &[]).ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    (upstream, repo, warmdock)
}

#[test]
fn adds_a_git_repository() {
    let (_upstream, repo, warmdock) = service();
    let context = crate::support::temporary_folder();
    let url = warmdock.url(SAMPLE);
    let archive = context.path().join("image.tar");
    let commit = repo.id("main");
    for (reference, content) in [
        ("main", "second\n"),
        ("v9", "first\n"),
        (&commit, "second\n"),
    ] {
        let dockerfile = context.path().join("Dockerfile");
        std::fs::write(
            &dockerfile,
            format!("FROM scratch\nADD {url}#{reference} /lib\n"),
        )
        .unwrap();
        Build::new(dockerfile.to_str().unwrap(), context.path())
            .into_archive(&archive)
            .run()
            .ok();
        let image = Archive::open(&archive).image("amd64");
        assert_eq!(
            image.file("lib/content.txt").content,
            content.as_bytes(),
            "{reference}"
        );
        let submodule = &image.file("lib/vendor/lib/lib.txt").content;
        assert_eq!(submodule, b"a submodule's\n");
        let module = &image.file("lib/src/deep/er/module0.rs").content;
        assert_eq!(
            String::from_utf8_lossy(module).trim_end(),
            repo.git(&["show", "main:src/deep/er/module0.rs"])
        );
    }
    let answered = warmdock.metric(|sample| {
        sample.starts_with("warmdock_git_answers_total") && !sample.contains("relayed")
    });
    assert!(answered > 0.0, "{}", warmdock.metrics());
}

#[test]
fn builds_a_git_repository() {
    let (_upstream, _, warmdock) = service();
    let folder = crate::support::temporary_folder();
    let archive = folder.path().join("image.tar");
    for (reference, content) in [("v9", "first\n"), ("main", "second\n")] {
        Build::at(&format!("{}#{reference}", warmdock.url(SAMPLE)))
            .into_archive(&archive)
            .run()
            .ok();
        let image = Archive::open(&archive).image("amd64");
        assert_eq!(
            image.file("copied").content,
            content.as_bytes(),
            "{reference}"
        );
    }
}
