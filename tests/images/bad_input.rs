//! What goes wrong ends the build with one sentence that says what to do.

use crate::corp::Corp;
use crate::docker::{Build, Tag};
use crate::project::Project;

const DOCKERFILES: [&str; 2] = ["Dockerfile.musl", "Dockerfile.debian"];

#[test]
fn an_unsupported_architecture() {
    let project = Project::hello("hello-wrong");
    for dockerfile in DOCKERFILES {
        // The base image need not be there for it.
        project
            .build(dockerfile)
            .arg("BASE", "scratch")
            .option("--platform=linux/riscv64")
            .run()
            .fails_with(&["riscv64", "--platform linux/amd64 or linux/arm64"]);
    }
}

#[test]
fn an_unknown_binary() {
    let project = Project::hello("hello-wrong");
    for dockerfile in DOCKERFILES {
        project
            .build(dockerfile)
            .arg("BINARY", "nonesuch")
            .run()
            .fails_with(&["hello-wrong has no binary nonesuch", "--build-arg BINARY="]);
    }
}

#[test]
fn an_unknown_package() {
    let project = Project::hello("hello-wrong");
    for dockerfile in DOCKERFILES {
        Build::new(dockerfile, &project.root())
            .arg("PACKAGE", "nonesuch")
            .run()
            .fails_with(&["no package nonesuch", "--build-arg PACKAGE="]);
    }
}

#[test]
fn an_unknown_feature() {
    let project = Project::hello("hello-wrong");
    for dockerfile in DOCKERFILES {
        project
            .build(dockerfile)
            .arg("FEATURES", "nonesuch")
            .run()
            .fails_with(&["nonesuch", "--build-arg FEATURES="]);
    }
}

#[test]
fn a_lock_file_out_of_date() {
    let project = Project::hello("hello-wrong");
    let manifest = project.read("Cargo.toml");
    project.write("Cargo.toml", &format!("{manifest}ryu = \"1\"\n"));
    for dockerfile in DOCKERFILES {
        project
            .build(dockerfile)
            .run()
            .fails_with(&["Cargo.lock does not fit Cargo.toml", "commit Cargo.lock"]);
    }
}

#[test]
fn a_lock_file_of_a_newer_cargo() {
    let project = Project::hello("hello-wrong");
    let lock = project.read("Cargo.lock");
    project.write("Cargo.lock", &lock.replace("version = 4", "version = 9"));
    for dockerfile in DOCKERFILES {
        project.build(dockerfile).run().fails_with(&[
            "Cargo.lock is of a newer cargo",
            "--build-arg RUST_VERSION=",
        ]);
    }
}

#[test]
fn no_lock_file() {
    let project = Project::hello("hello-wrong");
    std::fs::remove_file(project.path("Cargo.lock")).unwrap();
    for dockerfile in DOCKERFILES {
        project
            .build(dockerfile)
            .run()
            .fails_with(&["no Cargo.lock", "cargo generate-lockfile"]);
    }
}

#[test]
fn another_compiler_than_the_one_that_is_pinned() {
    for (file, text, pinned, how) in [
        (
            "rust-toolchain.toml",
            "[toolchain]\n# channel = \"nightly\"\nchannel = \"1.90.0\" # for now\n",
            "1.90.0",
            "--build-arg RUST_VERSION=1.90.0, or",
        ),
        (
            "rust-toolchain.toml",
            "toolchain.channel='1.90'\r\n",
            "1.90",
            "--build-arg RUST_VERSION=1.90, or",
        ),
        (
            "rust-toolchain",
            "nightly-2026-01-01\n",
            "nightly-2026-01-01",
            "pass the image of a builder that has it",
        ),
    ] {
        let project = Project::hello("hello-wrong");
        project.write(file, text);
        for dockerfile in DOCKERFILES {
            let built = project.build(dockerfile).run();
            let image = "--build-context rust:1.95.0-trixie=docker-image://IMAGE";
            built.fails_with(&[file, pinned, how, image]);
            assert!(!built.ran("/step/fetch-crates"), "{}", built.describe());
        }
    }
}

#[test]
fn another_nightly_than_the_one_that_is_pinned() {
    let project = Project::hello("hello-wrong");
    project.write(
        "nightly",
        "#!/bin/sh\ncase $0 in\n*/rustup) echo 'nightly-2026-01-01-x86_64-unknown-linux-gnu (default)' ;;\n\
         *) echo 'rustc 1.94.0-nightly (0123abcde 2025-12-31)' ;;\nesac\n",
    );
    project.write(
        "Dockerfile",
        "FROM rust:1.95.0-trixie\nCOPY --chmod=755 nightly /usr/local/cargo/bin/rustup\n\
         COPY --chmod=755 nightly /usr/local/cargo/bin/rustc\n",
    );
    let tag = Tag("hello-wrong:nightly".to_owned());
    Build::new(
        project.path("Dockerfile").to_str().unwrap(),
        &project.root(),
    )
    .option("--load")
    .option(format!("--tag={}", tag.0))
    .run()
    .ok();
    let build = |pinned: &str| {
        project.write("rust-toolchain", &format!("{pinned}\n"));
        let image = format!("rust:1.95.0-trixie=docker-image://{}", tag.0);
        project
            .build("Dockerfile.musl")
            .option("--target=manifests")
            .option(format!("--build-context={image}"))
            .run()
    };
    for pinned in ["nightly-2026-01-01", "nightly"] {
        build(pinned).ok();
    }
    build("nightly-2026-01-02").fails_with(&[
        "asks for Rust nightly-2026-01-02, and the builder has nightly-2026-01-01",
        "pass the image of a builder that has it",
    ]);
}

#[test]
fn one_version_of_a_crate_from_two_sources() {
    let corp = Corp::start();
    let project = corp.greeter();
    let manifest = project.read("Cargo.toml");
    // Another branch of the same repository, with the same version.
    corp.publish_greeting_on("next", "what comes next");
    let line = manifest.lines().find(|line| line.starts_with("greeting"));
    let next = line.unwrap().replace(
        "greeting = {",
        "next = { package = \"greeting\", branch = \"next\",",
    );
    project.write("Cargo.toml", &format!("{manifest}{next}\n"));
    corp.lock(&project);
    let build = corp.build_directly(&project).option("--target=crates");
    build
        .run()
        .fails_with(&["one version of a crate from two sources"]);
}

#[test]
fn a_source_that_does_not_compile() {
    let project = Project::hello("hello-wrong");
    project.write("src/main.rs", "fn main() { nonesuch() }\n");
    for dockerfile in DOCKERFILES {
        let built = project.build(dockerfile).run();
        built.fails_with(&["hello-wrong does not compile"]);
        assert!(
            built.log.contains("cannot find function"),
            "{}",
            built.describe()
        );
    }
}

#[test]
fn no_agent() {
    let corp = Corp::start();
    let project = corp.greeter();
    let before = corp.sshd.connections();
    for dockerfile in DOCKERFILES {
        let built = project.build(dockerfile).run();
        built.fails_with(&["no SSH agent", "--ssh default"]);
        assert!(!built.ran("/step/compile"), "{}", built.describe());
    }
    assert_eq!(
        corp.sshd.connections(),
        before,
        "fails before anybody is asked"
    );
}

#[test]
fn an_agent_with_a_key_that_is_not_let_in() {
    let corp = Corp::start();
    let project = corp.greeter();
    let agent = crate::support::ssh_door::Agent::start();
    let build = || {
        corp.build(&project)
            .option("--target=crates")
            .secret("known_hosts", &corp.known_hosts())
            .secret("cargo_config", &corp.with_one_retry())
            .agent(&agent.socket())
    };
    build()
        .run()
        .fails_with(&["no SSH agent with a key", "ssh-add"]);
    agent.add(&corp.sshd.keygen("stranger", &["-t", "ed25519"]));
    // cargo may begin with the crate that comes over HTTPS.
    build()
        .secret("gitconfig", &corp.gitconfig_for_https())
        .run()
        .fails_with(&["takes none of the agent's keys", "ssh-add -l"]);
}

#[test]
fn no_known_hosts_and_wrong_ones() {
    let corp = Corp::start();
    let project = corp.greeter();
    let build = || {
        corp.build(&project)
            .option("--target=crates")
            .secret("cargo_config", &corp.with_one_retry())
            .agent(&corp.agent.socket())
    };
    build()
        .run()
        .fails_with(&["no host key is known", "--secret id=known_hosts"]);
    build()
        .secret("known_hosts", &corp.wrong_known_hosts())
        .secret("gitconfig", &corp.gitconfig_for_https())
        .run()
        .fails_with(&["is not the one in known_hosts", "[host]:port"]);
}

#[test]
fn variables_of_the_bake_file() {
    for (name, value, says) in [
        ("PACKAGE", "my package", "PACKAGE is the name of a package"),
        ("BINARY", "bin/name", "BINARY is the name of a binary"),
        ("FEATURES", "one two", "FEATURES are names"),
        ("PROFILE", "quick one", "PROFILE is the name"),
        ("REGISTRY", "registry.example/team/", "REGISTRY is a host"),
        ("REGISTRY", "https://registry.example", "REGISTRY is a host"),
        (
            "RUST_VERSION",
            "stable",
            "RUST_VERSION is a version of Rust",
        ),
        ("TAG", "a/b", "TAG is a tag of an image"),
        (
            "SOURCE_DATE_EPOCH",
            "now",
            "SOURCE_DATE_EPOCH is a number of seconds",
        ),
    ] {
        let built = Build::bake(&["--print"]).variable(name, value).run();
        assert!(!built.output.status.success(), "{name}={value}");
        assert!(built.output.stderr.contains(says), "{}", built.describe());
    }
}

/// Nothing is built and then pushed to somebody else's registry.
#[test]
fn a_release_without_a_registry() {
    let built = Build::bake(&["release"]).run();
    assert!(!built.output.status.success());
    let says = "REGISTRY is empty: REGISTRY=registry.example/team docker buildx bake release";
    assert!(built.output.stderr.contains(says), "{}", built.describe());
    assert!(!built.ran("/step/copy-manifests"), "{}", built.describe());
}
