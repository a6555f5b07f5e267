//! deploy/compose.builder.yml: a build whose repositories and crates come through the running service.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use crate::corp;
use crate::docker::{self, ROOT, Tag};
use crate::project::Project;
use crate::support::warmdock::{self, Builder};
use crate::support::{HOST, Repo, process, temporary_folder};

const FILES: [(&str, &str); 2] = [("git", "gitconfig"), ("cargo", "cargo_config.toml")];

/// What `client-config` prints for a configuration and an address.
#[track_caller]
pub fn client_config(client: &str, config: &Path, url: &str) -> String {
    let config = ["--config", config.to_str().unwrap(), "--url", url];
    let output = warmdock::run(&[&["client-config", client], &config[..]].concat()).ok();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn its_files_are_what_the_service_says() {
    let config = Path::new(ROOT).join("config/app_config.json");
    for (client, name) in FILES {
        let file = Path::new(ROOT).join("deploy/builder").join(name);
        let said = client_config(client, &config, "http://127.0.0.1:8080");
        assert_eq!(std::fs::read_to_string(file).unwrap(), said, "{name}");
    }
}

#[test]
fn repositories_and_crates_come_through_the_service() {
    let folder = temporary_folder();
    // The folder's name makes a commit that is in no cache.
    let source = format!(
        "pub const WORD: &str = \"warm\";\n// {}\n",
        folder.path().display()
    );
    Repo::empty(&folder.path().join("team/word.git")).commit(
        "main",
        &[
            (
                "Cargo.toml",
                b"[package]\nname = \"word\"\nversion = \"0.1.0\"\n",
            ),
            ("src/lib.rs", source.as_bytes()),
        ],
    );
    let upstream = format!("file://{}", folder.path().display());
    let service = Builder::of(json!({
        "listen": { "http": "127.0.0.1:0" },
        "git": { "upstreams": [{ "host": HOST, "url": upstream }] },
        "crates": { "registries": [{ "name": "crates.io" }] },
    }))
    .start();
    let project = Project::hello("hello-builder");
    let manifest = project.read("Cargo.toml");
    let word = format!("word = {{ git = \"https://{HOST}/team/word.git\" }}\n");
    project.write("Cargo.toml", &format!("{manifest}{word}"));
    project.write(
        "src/main.rs",
        "fn main() {\n    println!(\"{} {}\", word::WORD, itoa::Buffer::new().format(41));\n}\n",
    );
    project.lock(&[(
        &format!("url.{upstream}/.insteadOf"),
        &format!("https://{HOST}/"),
    )]);
    let url = format!("http://{}", service.address());
    let mut secrets = json!({});
    for (client, name) in FILES {
        let file = project.beside(name);
        std::fs::write(&file, client_config(client, &service.config_file(), &url)).unwrap();
        secrets[name.trim_end_matches(".toml")] = json!({ "file": file });
    }
    // The service that runs has another port than the files in the checkout say. The name is for the builds of corp.rs: with
    // the same names and network they find the compilers that this one has installed.
    let more = project.beside("port.json");
    let names = json!({ "builder": { "build": { "extra_hosts": { corp::HOST: "127.0.0.1" } } } });
    std::fs::write(
        &more,
        json!({ "secrets": secrets, "services": names }).to_string(),
    )
    .unwrap();
    let tag = Tag(format!("{}:built-through-warmdock", project.name));
    let mut command = docker::command(&["compose", "--progress=plain"]);
    command
        .args([
            "--file=docker-compose.yml",
            "--file=deploy/compose.builder.yml",
        ])
        .arg("--file")
        .arg(&more)
        .args(["build", "builder"])
        .env("SERVICE", project.root())
        .env("PACKAGE", &project.name);
    // Nothing of it is left from other builds: Cargo.lock has the new commit, and cargo keeps crates by the registry's
    // address, in which is the service's port.
    process::run(command, b"", Duration::from_secs(600)).ok();
    assert_eq!(project.run(&tag.0), "warm 41");
    let sent = service.metric(|sample| sample.starts_with("warmdock_crates_answers"));
    assert!(sent > 0.0, "nobody asked: {}", service.metrics());
    let mirror = service.data().join(format!("git/{HOST}/team/word.git"));
    assert!(mirror.exists(), "nobody fetched: {}", service.metrics());
}
