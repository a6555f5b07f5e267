//! The Dockerfiles themselves: what linters find, and the rules that no linter knows.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::docker::{self, Build, ROOT, tool};
use crate::project::Project;
use crate::support::process;

const DOCKERFILES: [(&str, &str); 2] = [
    ("Dockerfile.musl", include_str!("../../Dockerfile.musl")),
    ("Dockerfile.debian", include_str!("../../Dockerfile.debian")),
];

#[test]
fn hadolint_finds_nothing() {
    let hadolint = |file: &Path| {
        let mut command = Command::new(tool("hadolint"));
        command
            .args(["--no-color", "--failure-threshold=style"])
            .arg(file);
        process::run(command, b"", Duration::from_secs(60))
    };
    for (name, text) in DOCKERFILES {
        hadolint(&Path::new(ROOT).join(name)).ok();
        // What is ignored is named on the line before, with its reason.
        let lines: Vec<_> = text.lines().collect();
        for pair in lines.windows(2) {
            let Some(ignored) = pair[1].strip_prefix("# hadolint ignore=") else {
                continue;
            };
            for rule in ignored.split(',') {
                let has_reason = pair[0].starts_with("# ") && pair[0].contains(rule);
                assert!(has_reason, "{name}: {rule} is ignored behind {:?}", pair[0]);
            }
        }
    }
    let folder = crate::support::temporary_folder();
    let bad = folder.path().join("Dockerfile");
    std::fs::write(&bad, "FROM debian:latest\nRUN cd / && sudo true\n").unwrap();
    let said = hadolint(&bad).failed();
    assert!(said.text().contains("DL3007"), "{}", said.describe());
}

#[test]
fn buildkit_finds_nothing() {
    let said = docker::run(&["buildx", "bake", "--file", "docker-bake.hcl", "check"]).ok();
    let text = format!("{}{}", said.text(), said.stderr);
    assert_eq!(
        text.matches("no warnings found").count(),
        2,
        "{}",
        said.describe()
    );
    // Groups are not listed, but can be asked for.
    for target in [
        "default",
        "all",
        "musl",
        "debian",
        "musl-distroless",
        "release",
        "check",
    ] {
        docker::run(&[
            "buildx",
            "bake",
            "--file",
            "docker-bake.hcl",
            "--print",
            target,
        ])
        .ok();
    }
}

/// The targets as bake prints them.
#[track_caller]
fn targets(name: &str, variables: &[(&str, &str)]) -> serde_json::Value {
    let mut command = docker::command(&["buildx", "bake", "--print", name]);
    command.envs(variables.iter().copied());
    let said = process::run(command, b"", Duration::from_secs(60)).ok();
    let printed: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    printed["target"].clone()
}

/// What is pushed where a registry is, and what tests of a release on Docker's own builder have to leave out.
#[test]
fn a_release_is_attested_reproducible_and_cached() {
    let registry = [
        ("REGISTRY", "registry.example/team"),
        ("TAG", "1.2.3"),
        ("SOURCE_DATE_EPOCH", "1700000000"),
    ];
    let release = targets("release", &registry);
    for (variant, suffix) in [
        ("musl", ""),
        ("musl-distroless", "-musl-distroless"),
        ("debian", "-debian"),
    ] {
        let target = &release[format!("release-{variant}")];
        assert_eq!(target["target"], "image");
        assert_eq!(target["platforms"], json!(["linux/amd64", "linux/arm64"]));
        assert_eq!(
            target["tags"],
            json!([format!("registry.example/team/warmdock:1.2.3{suffix}")])
        );
        assert_eq!(
            target["attest"],
            json!([{ "type": "provenance", "mode": "max" }, { "type": "sbom" }])
        );
        assert_eq!(
            target["output"],
            json!([{ "type": "image", "push": "true", "store": "false", "rewrite-timestamp": "true" }])
        );
        // Not in the image's repository, which may be public: it has the sources.
        let cache = format!("registry.example/team/warmdock-cache:warmdock-{variant}");
        assert_eq!(
            target["cache-from"],
            json!([{ "type": "registry", "ref": cache }])
        );
        assert_eq!(
            target["cache-to"],
            json!([{ "type": "registry", "ref": cache, "mode": "max", "compression": "zstd", "ignore-error": "true" }])
        );
        assert_eq!(target["args"]["SOURCE_DATE_EPOCH"], "1700000000");
    }

    for (cache, expected) in [
        (
            "registry.example/closed/cache",
            json!("registry.example/closed/cache:warmdock-musl"),
        ),
        ("", json!(null)),
    ] {
        let variables = [&registry[..], &[("CACHE", cache)]].concat();
        let release = targets("release", &variables);
        for key in ["cache-from", "cache-to"] {
            assert_eq!(release["release-musl"][key][0]["ref"], expected, "{key}");
        }
    }
}

/// Every variable says what it takes before anything is built, and takes that.
#[test]
fn bake_refuses_what_no_build_could_use() {
    let bake = |name: &str, value: &str| {
        let mut command = docker::command(&["buildx", "bake", "--print"]);
        command.env(name, value);
        process::run(command, b"", Duration::from_secs(60))
    };
    let file = &format!("{ROOT}/Cargo.lock");
    let wrong_and_right = [
        ("PACKAGE", "team/service", "my-service"),
        ("PACKAGE", "--all", "my_service"),
        ("BINARY", "a b", "admin_tool"),
        ("BINARY", "--release", ""),
        ("FEATURES", "a b", "default,words/loud"),
        ("FEATURES", "--all", ""),
        ("PROFILE", "--release", "quick"),
        ("RUST_VERSION", "stable", "1.95"),
        (
            "BUILD_PACKAGES",
            "cmake;ls",
            "libssl-dev:amd64 cmake=3.31.6-2+b1 m4/trixie-backports",
        ),
        (
            "BUILD_PACKAGES",
            "--allow-unauthenticated m4",
            "m4\ncmake=1.0~RC1\n",
        ),
        ("HEALTHCHECK", "no", "none"),
        ("CACHE_SCOPE", "a/b", "pull-requests"),
        ("DEPENDENCIES", "layers", "layer"),
        (
            "REGISTRY",
            "https://registry.example",
            "127.0.0.1:5000/team",
        ),
        (
            "CACHE",
            "registry.example/cache:1",
            "registry.example:5000/closed/cache",
        ),
        ("TAG", "v1/2", "1.2.3"),
        ("SOURCE", "over there", "https://git.example/team/service"),
        ("REVISION", "main or so", "0123456789abcdef"),
        (
            "LICENSES",
            "MIT, Apache-2.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
        ),
        ("SOURCE_DATE_EPOCH", "yesterday", "1700000000"),
        ("KNOWN_HOSTS", "a,b", file),
        ("GITCONFIG", "a,b", file),
        ("CARGO_CONFIG", "a,b", file),
        ("CA", "a,b", file),
    ];
    for (name, wrong, right) in wrong_and_right {
        let said = bake(name, wrong).failed();
        let sentence = format!("Validation failed; {name} ");
        assert!(said.stderr.contains(&sentence), "{}", said.describe());
        bake(name, right).ok();
    }
    // By its type; an agent is looked for where there is one to be handed over.
    let said = bake("SSH", "yes").failed();
    assert!(said.stderr.contains("SSH as bool"), "{}", said.describe());
    let text = include_str!("../../docker-bake.hcl");
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("variable \""));
    for name in names.map(|rest| rest.split('"').next().unwrap()) {
        let tried = name == "SSH" || wrong_and_right.iter().any(|(tried, ..)| *tried == name);
        assert!(tried, "{name} has no validation, or none that is tried");
    }
}

/// Of a mirror, or one's own.
#[test]
fn base_images_are_replaced_by_name() {
    for image in ["rust:1.95.0-trixie", "debian:trixie-slim"] {
        let mirrored = format!("docker-image://mirror.example/{image}");
        let set = format!("--set=*.contexts.{image}={mirrored}");
        let said = docker::run(&["buildx", "bake", "--print", &set, "all"]).ok();
        let printed: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        let targets = printed["target"].as_object().unwrap();
        assert_eq!(targets.len(), 3);
        for target in targets.values() {
            assert_eq!(target["contexts"][image], mirrored);
        }
    }
}

/// Git for Windows ends lines with CR LF, with which no script in a Dockerfile runs.
#[test]
fn a_checkout_on_windows_has_the_same_lines() {
    let folder = crate::support::temporary_folder();
    let git = |args: &[&str]| {
        let mut command = Command::new("git");
        command
            .args(["-c", "core.autocrlf=true"])
            .args(args)
            .current_dir(folder.path());
        process::run(command, b"", Duration::from_secs(60)).ok();
    };
    let attributes = include_str!("../../.gitattributes");
    std::fs::write(folder.path().join(".gitattributes"), attributes).unwrap();
    for (name, text) in DOCKERFILES {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    git(&["init", "--quiet"]);
    git(&["add", "."]);
    for (name, text) in DOCKERFILES {
        let file = folder.path().join(name);
        std::fs::remove_file(&file).unwrap();
        git(&["checkout-index", name]);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), text, "{name}");
    }
}

/// The build through the service, from whatever folder.
#[test]
fn compose_finds_the_dockerfile() {
    let service = crate::support::temporary_folder();
    let mut command = docker::command(&["compose", "--profile=builder"]);
    for file in ["docker-compose.yml", "deploy/compose.builder.yml"] {
        command.arg("--file").arg(Path::new(ROOT).join(file));
    }
    command
        .args(["config", "--format=json"])
        .current_dir(service.path())
        .env("PWD", service.path())
        .env("SERVICE", service.path())
        .env("WARMDOCK", ROOT);
    let said = process::run(command, b"", Duration::from_secs(60)).ok();
    let config: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let build = &config["services"]["builder"]["build"];
    assert_eq!(build["context"], docker::text(service.path()));
    assert_eq!(build["dockerfile"], format!("{ROOT}/Dockerfile.musl"));
}

/// With the machine as well, where that is wanted.
#[test]
fn compose_restarts_as_it_is_told() {
    for (told, restart) in [
        (None, "on-failure:5"),
        (Some("unless-stopped"), "unless-stopped"),
    ] {
        let mut command = docker::command(&["compose", "config", "--format=json"]);
        command.envs(told.map(|told| ("RESTART", told)));
        let said = process::run(command, b"", Duration::from_secs(60)).ok();
        let config: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(config["services"]["warmdock"]["restart"], restart);
    }
}

/// `docker image prune --filter until=24h` would remove what was just built, if that claimed to be from 1970.
#[test]
fn an_image_is_from_when_it_is_made_or_from_when_it_is_told() {
    for (epoch, created) in [("", ""), ("1700000000", "2023-11-14T22:13:20Z")] {
        let targets = targets("musl", &[("SOURCE_DATE_EPOCH", epoch)]);
        let args = &targets["musl"]["args"];
        assert_eq!(args["SOURCE_DATE_EPOCH"], epoch);
        assert_eq!(args["CREATED"], created);
    }
}

/// The bake file that a CI's metadata action writes comes after ours.
#[test]
fn labels_and_tags_of_a_ci() {
    let folder = crate::support::temporary_folder();
    let bake = |target: &str, definition: serde_json::Value| {
        let file = folder.path().join("metadata.json");
        std::fs::write(&file, definition.to_string()).unwrap();
        let files = ["--file=docker-bake.hcl", "--file", docker::text(&file)];
        let said = docker::run(&[&["buildx", "bake"], &files[..], &["--print", target]].concat());
        let printed: serde_json::Value = serde_json::from_slice(&said.ok().stdout).unwrap();
        printed["target"][target].clone()
    };
    let labels = json!({ "org.opencontainers.image.version": "7" });
    let general = json!({ "tags": ["registry.example/team/warmdock:7"], "labels": labels });
    let definition = json!({ "target": { "docker-metadata-action": general } });
    let musl = bake("all-musl", definition.clone());
    assert_eq!(musl["tags"], general["tags"]);
    assert_eq!(musl["labels"], labels);
    let debian = bake("all-debian", definition);
    assert_eq!(debian["tags"], json!(["warmdock:latest-debian"]));
    assert_eq!(debian["labels"], labels);

    let own = json!({ "tags": ["registry.example/team/warmdock:7-debian"] });
    let definition = json!({ "target": { "docker-metadata-action-debian": own } });
    assert_eq!(bake("all-debian", definition)["tags"], own["tags"]);
}

/// The stages of a Dockerfile by name, with the comments before them.
fn stages(text: &str) -> Vec<(&str, &str)> {
    text.split("# ── ")
        .skip(1)
        .map(|stage| {
            let name = stage.split([':', ' ']).next().unwrap();
            (name, stage.trim_end())
        })
        .collect()
}

#[test]
fn both_tell_the_same_story() {
    let [musl, debian] = DOCKERFILES.map(|(_, text)| stages(text));
    let names = |stages: &[(&str, &str)]| {
        stages
            .iter()
            .map(|stage| stage.0.to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&musl), names(&debian));
    for ((name, musl), (_, debian)) in musl.iter().zip(&debian) {
        match *name {
            // Compilers are what the two are about.
            "toolchain" => {}
            "compile" | "binary" => {
                let same = |text: &str| {
                    text.replace("-musl", "-LIBC")
                        .replace("-gnu", "-LIBC")
                        .replace("-glibc", "-LIBC")
                };
                assert_eq!(same(musl), same(debian), "{name}");
            }
            _ => assert_eq!(musl, debian, "{name}"),
        }
    }
}

#[test]
fn versions_are_those_of_the_toolchain_file() {
    let toolchain = include_str!("../../rust-toolchain.toml");
    let version = toolchain.split('"').nth(1).unwrap();
    for (name, text) in DOCKERFILES {
        assert!(
            text.contains(&format!("\nARG RUST_VERSION={version}\n")),
            "{name}"
        );
    }
    let bake = include_str!("../../docker-bake.hcl");
    assert!(bake.contains(&format!("\"{version}\"")));
    let stand_in = include_str!("stand-ins/rust/Dockerfile");
    assert!(stand_in.contains(&format!("RUST_VERSION={version}\n")));
}

/// But for the place of sources, which is the image's alone.
#[test]
fn a_machine_compiles_for_musl_as_the_image_does() {
    let all = instructions(DOCKERFILES[0].1);
    let image = all
        .iter()
        .find(|line| line.contains("_LINKER="))
        .expect("ENV of the linkers");
    let machine = include_str!("../../.cargo/config.toml");
    for arch in ["x86_64", "aarch64"] {
        let target = format!("{arch}_unknown_linux_musl");
        let linker = format!("CARGO_TARGET_{}_LINKER=ld.lld ", target.to_uppercase());
        assert!(image.contains(&linker), "{image}");
        let linker = format!("[target.{arch}-unknown-linux-musl]\nlinker = \"ld.lld\"\n");
        assert!(machine.contains(&linker), "{machine}");
        assert!(image.contains(&format!("CC_{target}=clang ")), "{image}");
        let compiler = format!("CC_{target} = \"clang\"\n");
        assert!(machine.contains(&compiler), "{machine}");
        let flags = |text: &str, equals: &str| {
            let (_, value) = text
                .split_once(&format!("CFLAGS_{target}{equals}\""))
                .unwrap();
            value.split('"').next().unwrap().to_owned()
        };
        assert_eq!(
            flags(image, "="),
            format!(
                "{} -ffile-prefix-map=/crates/sources/=",
                flags(machine, " = ")
            ),
            "{arch}"
        );
    }
}

/// With the compilers of Dockerfile.musl, and nothing of its environment: cargo's configuration tells the rest.
#[test]
fn a_machine_compiles_a_static_binary() {
    let project = Project::hello("hello-machine");
    let manifest = project.read("Cargo.toml");
    project.write(
        "Cargo.toml",
        &format!("{manifest}\n[build-dependencies]\ncc = \"1\"\n"),
    );
    project.write(
        "build.rs",
        "fn main() {\n    cc::Build::new().file(\"src/forty.c\").compile(\"forty\");\n}\n",
    );
    project.write(
        "src/forty.c",
        "#include <stdlib.h>\nint forty(void) { return abs(-40); }\n",
    );
    project.write(
        "src/main.rs",
        r#"unsafe extern "C" {
    safe fn forty() -> i32;
}

fn main() {
    println!("{}", itoa::Buffer::new().format(forty() + 1));
}
"#,
    );
    let machine = include_str!("../../.cargo/config.toml");
    project.write(".cargo/config.toml", machine);
    project.lock(&[]);
    let targets = ["x86_64", "aarch64"].map(|arch| format!("{arch}-unknown-linux-musl"));
    let dockerfile = project.beside("Dockerfile");
    let text = format!(
        "{}
FROM toolchain AS machine
COPY . /checkout
RUN cd /checkout && unset ${{!CARGO_TARGET_*}} ${{!CC_*}} ${{!CFLAGS_*}} && cargo build --target {} --target {}
FROM scratch AS binaries
COPY --from=machine /checkout/target /
",
        DOCKERFILES[0].1, targets[0], targets[1]
    );
    std::fs::write(&dockerfile, text).unwrap();
    let binaries = project.beside("binaries");
    Build::new(docker::text(&dockerfile), &project.root())
        .option("--target=binaries")
        .option(format!("--output=type=local,dest={}", binaries.display()))
        .run()
        .ok();
    // Without a loader and libraries for musl, neither would run if it were not static.
    for (target, mut command) in targets
        .iter()
        .zip([Command::new("env"), Command::new("qemu-aarch64-static")])
    {
        command.arg(binaries.join(target).join("debug/hello-machine"));
        let said = process::run(command, b"", Duration::from_secs(60)).ok();
        assert_eq!(said.text(), "41", "{target}");
    }
}

/// The instructions of a Dockerfile with their lines joined, without comments and inline files.
fn instructions(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut continued = false;
    let mut inline = false;
    for line in text.lines() {
        if inline {
            inline = line != "SCRIPT";
        } else if line.starts_with('#') || line.is_empty() {
        } else if continued {
            let last = found.last_mut().unwrap();
            last.push_str(line.trim_end_matches('\\').trim());
            last.push(' ');
            continued = line.ends_with('\\');
        } else {
            inline = line.contains("<<'SCRIPT'");
            found.push(format!("{} ", line.trim_end_matches('\\').trim()));
            continued = line.ends_with('\\');
        }
    }
    found.iter().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn rules_of_images() {
    for (name, text) in DOCKERFILES {
        for (what, part) in [
            ("trusts whoever answers", "ssh-keyscan"),
            ("trusts whoever answers", "StrictHostKeyChecking=no"),
            ("needs a frontend from a hub", "# syntax"),
            ("floats", ":latest"),
            ("emulates", "qemu"),
            ("adds where copying is meant", "\nADD "),
            ("caches nothing with the official image", "/root/.cargo"),
            ("hides cargo", "target=/usr/local/cargo"),
        ] {
            assert!(!text.contains(part), "{name} {what}: {part}");
        }
        assert!(text.starts_with("# check=error=true\n"), "{name}");
        let all = instructions(text);
        let begins = |word: &str| {
            all.iter()
                .filter(|line| line.starts_with(word))
                .collect::<Vec<_>>()
        };

        // `base` and what is made of it are for the wanted architecture; nothing else, and nothing of it runs.
        let from = begins("FROM ");
        assert!(
            from[0].starts_with("FROM --platform=$BUILDPLATFORM rust:${RUST_VERSION}-trixie "),
            "{name}"
        );
        let by_base_and_healthcheck = [
            "FROM ${BASE} AS base",
            "FROM healthcheck-${HEALTHCHECK} AS image",
        ];
        for line in by_base_and_healthcheck {
            assert!(from.iter().any(|from| *from == line), "{name}: no {line}");
        }
        assert_eq!(**from.last().unwrap(), by_base_and_healthcheck[1], "{name}");
        let mut stage = "";
        for line in &all {
            if line.starts_with("FROM ") {
                stage = line.rsplit(' ').next().unwrap();
            }
            let of_image =
                stage.starts_with("healthcheck-") || ["base", "service", "image"].contains(&stage);
            assert!(
                !(of_image && line.starts_with("RUN ")),
                "{name}: {stage} runs {line}"
            );
        }
        let stages: Vec<_> = from
            .iter()
            .filter_map(|line| line.split(" AS ").nth(1))
            .collect();
        let chosen = [
            "healthcheck-self",
            "healthcheck-none",
            "dependencies-mount",
            "dependencies-layer",
        ];
        for stage in chosen {
            assert!(stages.contains(&stage), "{name}: no {stage}");
        }
        let by_argument = [
            by_base_and_healthcheck[0],
            by_base_and_healthcheck[1],
            "FROM dependencies-${DEPENDENCIES} AS dependencies",
        ];
        for line in from[1..]
            .iter()
            .filter(|line| !by_argument.contains(&line.as_str()))
        {
            let base = line.split(' ').nth(1).unwrap();
            let script = line.starts_with("FROM --platform=$BUILDPLATFORM scratch ");
            assert!(
                script || stages.contains(&base),
                "{name}: {line} is no stage"
            );
        }
        // What bears the time of SOURCE_DATE_EPOCH makes whatever is above it run again for every commit.
        assert!(begins("WORKDIR ").is_empty(), "{name}");
        let inline = begins("COPY ")
            .into_iter()
            .filter(|line| line.contains("<<"));
        assert_eq!(inline.count(), 4, "{name}: scripts in stages of their own");

        // What the container is.
        assert_eq!(begins("USER "), ["USER 65532:65532"], "{name}");
        for word in ["ENTRYPOINT ", "SHELL "] {
            for line in begins(word) {
                let form = &line[word.len()..];
                assert!(
                    serde_json::from_str::<Vec<String>>(form).is_ok(),
                    "{name}: {line}"
                );
            }
        }
        assert_eq!(begins("ENTRYPOINT ").len(), 1);
        let health = begins("HEALTHCHECK ");
        let (_, form) = health[0].split_once("CMD ").unwrap();
        assert!(
            serde_json::from_str::<Vec<String>>(form).is_ok(),
            "{name}: {form}"
        );
        assert_eq!(begins("STOPSIGNAL "), ["STOPSIGNAL SIGTERM"]);
        assert!(
            begins("CMD ").is_empty(),
            "{name}: the entrypoint serves without arguments"
        );

        // Secrets and the agent: only where crates are fetched, never as an argument.
        for line in begins("RUN ") {
            let runs = |command: &str| line.ends_with(command);
            assert_eq!(
                line.contains("type=ssh"),
                runs("/step/fetch-crates"),
                "{name}: {line}"
            );
            if line.contains("id=known_hosts") || line.contains("id=gitconfig") {
                assert!(runs("/step/fetch-crates"), "{name}: {line}");
            }
            assert_eq!(
                line.contains("--network=none"),
                runs("/step/compile"),
                "{name}: {line}"
            );
            if line.contains("apt-get install") {
                assert!(line.contains("--no-install-recommends"), "{name}: {line}");
                assert!(
                    line.contains("rm -rf /var/lib/apt/lists/*"),
                    "{name}: {line}"
                );
            }
        }
        for line in begins("ARG ").into_iter().chain(begins("ENV ")) {
            for word in ["TOKEN", "PASSWORD", "SECRET"] {
                assert!(!line.to_uppercase().contains(word), "{name}: {line}");
            }
        }
        // Compiled code is kept apart by package, libc and architecture.
        let compile = begins("RUN ")
            .into_iter()
            .find(|line| line.ends_with("/step/compile") && line.contains("type=cache"))
            .unwrap()
            .clone();
        let libc = if name.ends_with("musl") {
            "musl"
        } else {
            "glibc"
        };
        let scope = "${CACHE_SCOPE:+-${CACHE_SCOPE}},";
        let id = format!("id=target-${{PACKAGE}}-{libc}-${{TARGETARCH}}{scope}target=/target");
        assert!(compile.contains(&id), "{name}: {compile}");
        // And by scope, as downloads are. Where cargo-auditable is installed, there are no sources yet.
        for line in begins("RUN ") {
            let mounts = line.matches("type=cache").count();
            let of_builder = line.contains("cargo-auditable@");
            let scoped = if of_builder { 0 } else { mounts };
            assert_eq!(line.matches(scope).count(), scoped, "{name}: {line}");
            assert_eq!(
                line.contains("id=cargo-auditable,"),
                of_builder,
                "{name}: {line}"
            );
        }
        assert!(
            begins("COPY ").iter().any(|line| line.contains("--link")),
            "{name}"
        );
    }
}
