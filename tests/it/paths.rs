//! Paths that try to leave the folder of mirrors, or to be another host: refused, and nothing is read or made.

use crate::support::http;
use crate::support::warmdock::files_below;
use crate::support::{Client, HOST, SAMPLE, Upstream, warmdock};

/// What is written instead of `git.example.test/team/sample`.
fn table() -> Vec<String> {
    let mut paths: Vec<String> = [
        "..",
        "../..",
        "../../../../../../etc/passwd",
        "git.example.test/../../../../etc",
        "git.example.test/../git.example.test/team/sample",
        "git.example.test/team/../team/sample",
        "git.example.test/team/./sample",
        "git.example.test//team/sample",
        "git.example.test/team//sample",
        "git.example.test/team/sample.git/../sample",
        "git.example.test/..%2f..%2fetc",
        "git.example.test/%2e%2e/%2e%2e/etc",
        "git.example.test/%2E%2E%2F%2E%2E%2Fsecret",
        "git.example.test/%252e%252e%252fsecret",
        "git.example.test/..%5c..%5csecret",
        "git.example.test/..\\..\\secret",
        "git.example.test/%c0%ae%c0%ae/secret",
        "git.example.test/%ff%fe",
        "git.example.test/team%00/sample",
        "git.example.test/team/sample%00.git",
        "git.example.test/team/sample%0a",
        "git.example.test/team/sample%20",
        "git.example.test/team/sample%",
        "git.example.test/team/sample%2",
        "git.example.test/team/sample%zz",
        "git.example.test/.git",
        "git.example.test/team/.git",
        "git.example.test/team/.hidden",
        "git.example.test/-upload-pack=x",
        "git.example.test/team/sample.git/objects",
        "git.example.test/team/sample.git/x",
        "git.example.test",
        "git.example.test/",
        "",
        "GIT.EXAMPLE.TEST./team/sample",
        "git.example.test./team/sample",
        "git.example.test:80/team/sample",
        "git.example.test:443/team/sample",
        "user@git.example.test/team/sample",
        "git.example.test@other.test/team/sample",
        "git.example.test%2fteam/sample",
        "git.example.test%2f..%2f../etc",
        "other.test/team/sample",
        "localhost/team/sample",
        "127.0.0.1/team/sample",
        "[::1]/team/sample",
        "file:/etc/passwd",
        "https:/git.example.test/team/sample",
        "secret",
        "secret/sample",
    ]
    .map(str::to_owned)
    .into();
    paths.push(format!("{HOST}/{}", "a".repeat(5000)));
    paths.push(format!("{HOST}/{}", "a/".repeat(2000)));
    paths.push(format!("{HOST}/{}", "%2e%2e%2f".repeat(200)));
    paths.push(format!("{}/sample", "h".repeat(5000)));
    paths
}

#[test]
fn every_path_that_leads_elsewhere_is_refused() {
    let upstream = Upstream::start();
    upstream.sample(SAMPLE);
    // Beside the folder of repositories lies one that nobody may have: the temporary folder's neighbour.
    let served = upstream.root().join("served");
    std::fs::create_dir(&served).unwrap();
    std::fs::rename(upstream.root().join("team"), served.join("team")).unwrap();
    crate::support::Repo::sample(&upstream.root().join("secret.git"), 3);
    crate::support::Repo::sample(&upstream.root().join("secret/sample.git"), 3);
    let warmdock = warmdock::builder(&format!("file://{}", served.display())).start();
    for path in table() {
        for (method, end) in [
            ("GET", ".git/info/refs?service=git-upload-pack"),
            ("GET", "/info/refs?service=git-upload-pack"),
            ("POST", ".git/git-upload-pack"),
            ("GET", ".git/info/refs?service=git-receive-pack"),
        ] {
            let target = format!("/git/{path}{end}");
            let mut request =
                format!("{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
            if method == "POST" {
                request +=
                    "Content-Type: application/x-git-upload-pack-request\r\nContent-Length: 4\r\n";
            }
            request += "\r\n";
            if method == "POST" {
                request += "0000";
            }
            let response =
                http::exchange(warmdock.address(), request.as_bytes()).expect("an answer");
            assert!(
                (400..500).contains(&response.status),
                "{method} {target}: {} {}",
                response.status,
                response.text()
            );
            assert!(!response.text().contains("refs/heads"), "{target}");
            assert!(!response.text().contains("root:"), "{target}");
        }
    }
    let mirrors: Vec<_> = files_below(&warmdock.data())
        .into_iter()
        .filter(|file| file.ends_with("HEAD"))
        .collect();
    assert_eq!(
        mirrors,
        Vec::<std::path::PathBuf>::new(),
        "nothing was mirrored"
    );
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &[])
        .ok();
}

/// An unknown host and an unknown repository look alike.
#[test]
fn an_unknown_host_is_missing() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    let get = |path: &str| {
        http::get(
            warmdock.address(),
            &format!("/git/{path}/info/refs?service=git-upload-pack"),
        )
    };
    let (host, repo) = (
        get("other.example.test/team/sample.git"),
        get(&format!("{HOST}/team/absent.git")),
    );
    assert_eq!((host.status, host.text()), (repo.status, repo.text()));
    assert_eq!(host.status, 404);
    assert!(
        upstream
            .asked()
            .iter()
            .all(|asked| !asked.request.path.contains("team/sample"))
    );
}

/// Host names are the same in upper and lower case; paths are not.
#[test]
fn hosts_have_no_case() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let status = |path: &str| {
        http::get(
            warmdock.address(),
            &format!("/git/{path}.git/info/refs?service=git-upload-pack"),
        )
        .status
    };
    assert_eq!(status("GIT.Example.TEST/team/sample"), 200);
    assert_eq!(status("git.example.test/Team/Sample"), 404);
}

/// A link in the folder of repositories that leads out of it.
#[test]
fn links_out_of_the_folder_are_not_followed() {
    let upstream = Upstream::start();
    let served = upstream.root().join("served");
    std::fs::create_dir_all(served.join("team")).unwrap();
    crate::support::Repo::sample(&upstream.root().join("secret.git"), 3);
    std::os::unix::fs::symlink("../../secret.git", served.join("team/link.git")).unwrap();
    std::os::unix::fs::symlink("../..", served.join("team/up")).unwrap();
    let warmdock = warmdock::builder(&format!("file://{}", served.display())).start();
    for path in ["team/link", "team/up/secret"] {
        let target = format!(
            "{}/info/refs?service=git-upload-pack",
            warmdock::target(path)
        );
        let response = http::get(warmdock.address(), &target);
        assert_eq!(response.status, 404, "{path}: {}", response.text());
    }
}
