//! What goes wrong ends the build with one sentence that says what to do.

use crate::corp::Corp;
use crate::docker::{Build, Tag};
use crate::project::Project;

const DOCKERFILES: [&str; 2] = ["Dockerfile.musl", "Dockerfile.debian"];

/// The base image is there for many more: Debian's and distroless' have riscv64.
#[test]
fn an_unsupported_architecture() {
    let project = Project::hello("hello-wrong");
    let base = Tag("hello-wrong:base-for-riscv64".to_owned());
    let platform = "--platform=linux/riscv64";
    let dockerfile = project.beside("Dockerfile.base");
    std::fs::write(&dockerfile, "FROM scratch\nCOPY Cargo.lock /\n").unwrap();
    Build::new(dockerfile.to_str().unwrap(), &project.root())
        .option(platform)
        .option("--load")
        .option(format!("--tag={}", base.0))
        .run()
        .ok();
    let here = format!("docker-image://{}", base.0);
    let expected = &["riscv64", "--platform linux/amd64 or linux/arm64"];
    for (dockerfile, base) in [
        ("Dockerfile.musl", "scratch"),
        ("Dockerfile.musl", "gcr.io/distroless/static-debian13"),
        ("Dockerfile.debian", "debian:trixie-slim"),
    ] {
        let mut build = project.build(dockerfile).arg("BASE", base).option(platform);
        if base != "scratch" {
            build = build.option(format!("--build-context={base}={here}"));
        }
        build.run().fails_with(expected);
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
        project.build(dockerfile).run().fails_with(&[
            "no Cargo.lock",
            "cargo generate-lockfile",
            ".dockerignore",
        ]);
    }
    // In a repository with several of them, the one that is meant has to be named.
    project.write("services/orders/Cargo.lock", "");
    let built = project.build("Dockerfile.musl").run();
    built.fails_with(&[
        "no Cargo.lock",
        "--build-arg WORKSPACE=FOLDER (bake: --set '*.args.WORKSPACE=FOLDER'; there is services/orders/Cargo.lock)",
        "cargo generate-lockfile",
    ]);
}

/// A stage that is not there, which is then looked for as an image. The bake file has a better word.
#[test]
fn an_unknown_healthcheck() {
    let project = Project::hello("hello-wrong");
    for dockerfile in DOCKERFILES {
        let built = project.build(dockerfile).arg("HEALTHCHECK", "other").run();
        assert!(!built.output.status.success(), "{}", built.describe());
        let says = "healthcheck-other";
        assert!(built.output.stderr.contains(says), "{}", built.describe());
        assert!(!built.ran("/step/copy-manifests"), "{}", built.describe());
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
    let tag = Tag("hello-wrong:nightly".to_owned());
    let image = project.builder(
        &tag,
        "COPY --chmod=755 nightly /usr/local/cargo/bin/rustup\nCOPY --chmod=755 nightly /usr/local/cargo/bin/rustc\n",
    );
    let build = |pinned: &str| {
        project.write("rust-toolchain", &format!("{pinned}\n"));
        project
            .build("Dockerfile.musl")
            .option("--target=manifests")
            .option(&image)
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
        // One crate comes over https, and only that one goes another way.
        let with_token = project
            .build(dockerfile)
            .secret("gitconfig", &corp.gitconfig_for_https());
        for build in [project.build(dockerfile), with_token] {
            let built = build.run();
            built.fails_with(&["no SSH agent", "--ssh default", "bake: SSH=true"]);
            assert!(!built.ran("/step/compile"), "{}", built.describe());
        }
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
fn an_agent_with_a_key_that_opens_too_little() {
    let corp = Corp::start();
    let project = corp.greeter();
    let build = |gitconfig: &std::path::Path| {
        corp.build(&project)
            .option("--target=crates")
            .secret("known_hosts", &corp.known_hosts())
            .secret("gitconfig", gitconfig)
            .secret("cargo_config", &corp.with_one_retry())
            .agent(&corp.agent.socket())
            .run()
    };
    // What comes over https wants a token.
    let with_token = corp.gitconfig_for_https();
    let text = std::fs::read_to_string(&with_token).unwrap();
    let lines = text.lines().filter(|line| !line.contains("extraHeader"));
    let without = project.beside("without");
    std::fs::write(&without, lines.collect::<Vec<_>>().join("\n")).unwrap();
    build(&without).fails_with(&["over https", "an extraHeader", "--secret id=gitconfig"]);
    // What a key may not read, a host does not know. The commit is one that no build has fetched.
    corp.publish_greeting("for others");
    corp.lock(&project);
    std::fs::rename(corp.path("team/greeting.git"), corp.path("team/other.git")).unwrap();
    build(&with_token).fails_with(&["no such repository", "ssh-add -l"]);
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
    for build in [
        build(),
        build().secret("gitconfig", &corp.gitconfig_for_https()),
    ] {
        build.run().fails_with(&[
            "no host key is known",
            "--secret id=known_hosts",
            "bake: KNOWN_HOSTS=",
        ]);
    }
    build()
        .secret("known_hosts", &corp.wrong_known_hosts())
        .secret("gitconfig", &corp.gitconfig_for_https())
        .run()
        .fails_with(&["is not the one in known_hosts", "[host]:port"]);

    // A builder's image may know it: the crate over SSH is all that there is to fetch.
    let over_ssh: Vec<_> = project
        .read("Cargo.toml")
        .lines()
        .filter(|line| !line.starts_with("tally"))
        .map(|line| format!("{line}\n"))
        .collect();
    project.write("Cargo.toml", &over_ssh.concat());
    corp.lock(&project);
    std::fs::copy(corp.known_hosts(), project.path("ssh_known_hosts")).unwrap();
    let tag = Tag("greeter:rust".to_owned());
    let image = project.builder(&tag, "COPY ssh_known_hosts /etc/ssh/\n");
    build().option(image).run().ok();
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

/// Nor under a tag that the next release would take away.
#[test]
fn a_release_without_a_version() {
    for tag in [None, Some("latest")] {
        let mut build = Build::bake(&["release"])
            .variable("REGISTRY", "registry.example/team")
            .variable("CACHE", "")
            .variable("SOURCE_DATE_EPOCH", "1700000000")
            // As in release.rs: what Docker's own builder would complain about first.
            .option("--set=*.output=type=cacheonly")
            .option("--set=*.attest=type=sbom,disabled=true");
        if let Some(tag) = tag {
            build = build.variable("TAG", tag);
        }
        let built = build.run();
        assert!(!built.output.status.success(), "{}", built.describe());
        let says = "TAG is latest: TAG=1.2.3 docker buildx bake release";
        assert!(built.output.stderr.contains(says), "{}", built.describe());
        assert!(!built.ran("/step/copy-manifests"), "{}", built.describe());
    }
}
