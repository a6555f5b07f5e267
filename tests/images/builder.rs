//! deploy/compose.builder.yml: a build whose repositories and crates come through the running service.

use std::path::Path;

use serde_json::json;

use crate::compose::Compose;
use crate::corp;
use crate::docker::{self, ROOT, Tag};
use crate::project::Project;
use crate::support::{HOST, Repo, http, warmdock};

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

/// The two commands that deploy/compose.builder.yml begins with.
#[test]
fn repositories_and_crates_come_through_the_service() {
    let mut compose = Compose::new("musl").with_crates_io();
    // The folder's name makes a commit that is in no cache.
    let upstream = compose.upstream();
    let source = format!(
        "pub const WORD: &str = \"warm\";\n// {}\n",
        upstream.display()
    );
    Repo::empty(&upstream.join("team/word.git")).commit(
        "main",
        &[
            (
                "Cargo.toml",
                b"[package]\nname = \"word\"\nversion = \"0.1.0\"\n",
            ),
            ("src/lib.rs", source.as_bytes()),
        ],
    );
    compose.up();
    let project = Project::hello("hello-builder");
    let manifest = project.read("Cargo.toml");
    let word = format!("word = {{ git = \"https://{HOST}/team/word.git\" }}\n");
    project.write("Cargo.toml", &format!("{manifest}{word}"));
    project.write(
        "src/main.rs",
        "fn main() {\n    println!(\"{} {}\", word::WORD, itoa::Buffer::new().format(41));\n}\n",
    );
    project.lock(&[(
        &format!("url.file://{}/.insteadOf", upstream.display()),
        &format!("https://{HOST}/"),
    )]);
    let address = compose.address("8080");
    let url = format!("http://{address}");
    let mut secrets = json!({});
    for (client, name) in FILES {
        let file = project.beside(name);
        std::fs::write(&file, client_config(client, &compose.config, &url)).unwrap();
        secrets[name.trim_end_matches(".toml")] = json!({ "file": file });
    }
    compose.add_from_checkout("deploy/compose.builder.yml");
    // The service that runs has another port than the files in the checkout say. The name is for the builds of corp.rs: with
    // the same names and network they find the compilers that this one has installed.
    let names = json!({ "builder": { "build": { "extra_hosts": { corp::HOST: "127.0.0.1" } } } });
    compose.add("port", &json!({ "secrets": secrets, "services": names }));
    compose.set("SERVICE", docker::text(&project.root()));
    compose.set("PACKAGE", &project.name);
    let tag = Tag(format!("{}:built-through-warmdock", project.name));
    // Nothing of it is left from other builds: Cargo.lock has the new commit, and cargo keeps crates by the registry's
    // address, in which is the service's port.
    compose.run(&["build", "builder"]).ok();
    assert_eq!(project.run(&tag.0), "warm 41");
    let metrics = http::get(address.parse().unwrap(), "/metrics").text();
    let asked = |line: &str| line.starts_with("warmdock_crates_answers") && !line.ends_with(" 0");
    assert!(metrics.lines().any(asked), "nobody asked: {metrics}");
    let fetched = format!("\"repo\":\"{HOST}/team/word\"");
    let logs = compose.logs();
    assert!(logs.contains(&fetched), "nobody fetched: {logs}");
}
