//! `bake release` against a real registry: what is pushed can be pulled, runs, and says how it was made.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::docker::{self, Build, Built, Container, ROOT, Tag};
use crate::project::{Project, unique};
use crate::registry::Registry;
use crate::support::{http, process, temporary_folder};

const VARIANTS: [(&str, &str); 3] = [
    ("musl", "Dockerfile.musl"),
    ("musl-distroless", "Dockerfile.musl"),
    ("debian", "Dockerfile.debian"),
];

/// Releases a small service by the bake file, unchanged.
#[track_caller]
fn release(project: &Project, registry: &Registry) -> Built {
    let mut build = Build::bake(&["release"])
        .variable("PACKAGE", &project.name)
        .variable("REGISTRY", &format!("{}/team", registry.address))
        .variable("TAG", "1.0.0")
        .variable("SOURCE_DATE_EPOCH", "1700000000")
        .option(format!("--set=*.context={}", project.root().display()));
    for (variant, dockerfile) in VARIANTS {
        build = build.option(format!(
            "--set=release-{variant}.dockerfile={ROOT}/{dockerfile}"
        ));
    }
    // BuildKit makes the list of packages by an image from a hub.
    if std::env::var("WARMDOCK_ENGINE").unwrap() == "own" {
        eprintln!(
            "left out: the SBOM attestation, whose scanner's image cannot be had here; the bake file asks for it"
        );
        build = build.option("--set=*.attest=type=sbom,disabled=true");
    }
    build.run().ok()
}

fn reference(project: &Project, registry: &Registry, tag: &str) -> String {
    format!("{}/team/{}:{tag}", registry.address, project.name)
}

#[test]
fn pushed_pulled_and_run() {
    let project = Project::hello("hello-release");
    let says = format!("released {}", unique());
    project.says(&says);
    let said = format!("{says} 41");
    let folder = temporary_folder();
    let registry = Registry::start(folder.path()).unwrap();
    let before = docker::cache_records();
    release(&project, &registry);
    // The cache has the sources: it is nowhere where the image is.
    let tags = |repository: &str| {
        let list = format!("/v2/team/{repository}/tags/list");
        let answer: Value =
            serde_json::from_slice(&http::get(registry.address, &list).body).unwrap();
        let tags = answer["tags"].as_array().expect("tags").iter();
        tags.map(|tag| tag.as_str().unwrap().to_owned())
            .collect::<BTreeSet<_>>()
    };
    let of_images = VARIANTS.map(|(variant, _)| tag_of(variant));
    assert_eq!(tags("hello-release"), BTreeSet::from(of_images));
    let of_caches = VARIANTS.map(|(variant, _)| format!("hello-release-{variant}"));
    assert_eq!(tags("hello-release-cache"), BTreeSet::from(of_caches));
    for tag in ["1.0.0", "1.0.0-musl-distroless", "1.0.0-debian"] {
        let name = reference(&project, &registry, tag);
        let index = docker::run(&["buildx", "imagetools", "inspect", "--raw", &name]).ok();
        let index: Value = serde_json::from_str(&index.text()).unwrap();
        let platforms: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|manifest| &manifest["platform"]["architecture"])
            .collect();
        for architecture in ["amd64", "arm64"] {
            assert!(
                platforms.iter().any(|found| *found == architecture),
                "{tag}: {index}"
            );
        }
        let provenance = docker::run(&[
            "buildx",
            "imagetools",
            "inspect",
            "--format={{json .Provenance}}",
            &name,
        ])
        .ok();
        let provenance: Value = serde_json::from_str(&provenance.text()).unwrap();
        for platform in ["linux/amd64", "linux/arm64"] {
            let made = provenance[platform]["SLSA"].to_string();
            assert!(
                made.contains("fetch-crates"),
                "{tag} {platform}: provenance has not all steps: {made}"
            );
        }

        let _tag = Tag(name.clone());
        docker::run(&["pull", "--quiet", &name]).ok();
        assert_eq!(project.run(&name), said);
        let root = pulled_files(&project, &name, "arm64");
        let mut emulated = Command::new("qemu-aarch64-static");
        emulated.arg("-L").arg(&root);
        emulated.arg(root.join("usr/local/bin").join(&project.name));
        let output = process::run(emulated, b"", Duration::from_secs(60));
        assert_eq!(output.ok().text(), said);
    }

    // The same again has the same digests, and comes from the registry's cache once the builder has forgotten it.
    let digest = |tag: &str| digest(&reference(&project, &registry, tag));
    let first = VARIANTS.map(|(variant, _)| digest(&tag_of(variant)));
    let mut new = docker::cache_records();
    new.retain(|id, _| !before.contains_key(id));
    for mounts in ["target-hello-release-", "cargo-home"] {
        new.append(&mut docker::cache_mounts(mounts));
    }
    docker::prune(&new.into_keys().collect::<Vec<_>>());
    let again = release(&project, &registry);
    for step in again.steps("/step/compile") {
        assert!(
            step.cached,
            "{step:?} did not come from the registry: {}",
            again.describe()
        );
    }
    assert_eq!(VARIANTS.map(|(variant, _)| digest(&tag_of(variant))), first);
    // What has changed since is compiled, with all of the cache mounts gone.
    project.says(&unique());
    let build = project.build("Dockerfile.musl");
    let built = build.option("--output=type=cacheonly").run().ok();
    assert!(built.log.contains("Compiling itoa"), "{}", built.describe());
}

/// Nothing is built that would claim to be from 1970.
#[test]
fn without_its_time() {
    for epoch in ["", "0"] {
        let built = Build::bake(&["release"])
            .variable("REGISTRY", "registry.example/team")
            .variable("CACHE", "")
            .variable("TAG", "1.2.3")
            .variable("SOURCE_DATE_EPOCH", epoch)
            // BuildKit would first look for the scanner of the SBOM.
            .option("--set=*.attest=type=sbom,disabled=true")
            .run();
        assert!(!built.output.status.success(), "{}", built.describe());
        let says = "SOURCE_DATE_EPOCH is empty or 0: SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)";
        assert!(built.output.stderr.contains(says), "{}", built.describe());
        assert!(!built.ran("/step/copy-manifests"), "{}", built.describe());
    }
}

fn tag_of(variant: &str) -> String {
    match variant {
        "musl" => "1.0.0".to_owned(),
        other => format!("1.0.0-{other}"),
    }
}

/// The digest of the manifest for this machine: that of the index has the time of the build in its provenance.
#[track_caller]
fn digest(name: &str) -> String {
    let index = docker::run(&["buildx", "imagetools", "inspect", "--raw", name]).ok();
    let index: Value = serde_json::from_str(&index.text()).unwrap();
    let manifests = index["manifests"].as_array().unwrap();
    let own = manifests
        .iter()
        .filter(|manifest| manifest["platform"]["os"] == "linux");
    own.map(|manifest| manifest["digest"].as_str().unwrap())
        .collect::<Vec<_>>()
        .join(" ")
}

/// What was pushed for an architecture, in a folder.
#[track_caller]
fn pulled_files(project: &Project, name: &str, architecture: &str) -> PathBuf {
    let platform = format!("--platform=linux/{architecture}");
    docker::run(&["pull", "--quiet", &platform, name]).ok();
    let container = Container {
        id: docker::run(&["create", &platform, name]).ok().text(),
    };
    let file = project.beside("files.tar");
    docker::run(&["export", "--output", docker::text(&file), &container.id]).ok();
    let tag = name.rsplit(':').next().unwrap();
    let root = project.beside(&format!("{tag}-{architecture}"));
    tar::Archive::new(std::fs::File::open(&file).unwrap())
        .unpack(&root)
        .unwrap();
    root
}
