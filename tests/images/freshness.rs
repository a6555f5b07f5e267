//! Nothing stale ever ends in an image, and nothing is repeated that need not be.

use std::process::Command;
use std::time::Duration;

use crate::archive::{Archive, Binary};
use crate::corp::Corp;
use crate::docker::{self, Build, Built, Tag};
use crate::project::{Project, unique};
use crate::support::process;

const DOCKERFILES: [&str; 2] = ["Dockerfile.musl", "Dockerfile.debian"];

/// Builds all of the image and keeps it nowhere: what counts are the steps.
#[track_caller]
fn build(project: &Project, dockerfile: &str) -> Built {
    let build = project.build(dockerfile);
    build.option("--output=type=cacheonly").run().ok()
}

/// Builds, runs, and gives what the program said.
#[track_caller]
fn build_and_run(project: &Project, dockerfile: &str) -> (Built, String) {
    run_of(project, project.build(dockerfile))
}

#[track_caller]
fn run_of(project: &Project, build: Build) -> (Built, String) {
    let tag = Tag(format!("{}:freshness", project.name));
    let built = build
        .option("--load")
        .option(format!("--tag={}", tag.0))
        .run()
        .ok();
    let said = project.run(&tag.0);
    (built, said)
}

/// Gives every file of a checkout a time that is older than any cache.
fn age(project: &Project) {
    let mut touch = Command::new("find");
    touch
        .arg(project.root())
        .args(["-exec", "touch", "-d", "2001-01-01", "{}", "+"]);
    process::run(touch, b"", Duration::from_secs(10)).ok();
}

#[test]
fn a_changed_source_ends_in_the_image_also_when_it_looks_old() {
    let project = Project::hello("hello-freshness");
    let [first, second] = ["first", "second"].map(|what| format!("{what} {}", unique()));
    for dockerfile in DOCKERFILES {
        for what in [&first, &second, &first] {
            project.says(what);
            age(&project);
            let (built, said) = build_and_run(&project, dockerfile);
            assert_eq!(
                said,
                format!("{what} 41"),
                "{dockerfile}: {}",
                built.describe()
            );
        }
    }
}

#[test]
fn a_changed_source_does_not_fetch_again() {
    let project = Project::hello("hello-fetch");
    // Never fetched before: of what an earlier run has left, BuildKit may have forgotten by which files it is found.
    let manifest = project.read("Cargo.toml");
    project.write("Cargo.toml", &format!("{manifest}# {}\n", unique()));
    for dockerfile in DOCKERFILES {
        project.says("before");
        build(&project, dockerfile);
        project.says(&unique());
        let built = build(&project, dockerfile);
        assert!(built.ran("/step/compile"), "{}", built.describe());
        for step in built.steps("/step/fetch-crates") {
            assert!(step.cached, "{step:?} ran again: {}", built.describe());
        }
        // Nor do new files that are no targets of their own, nor what cargo leaves in a checkout.
        let unneeded = [
            "src/another.rs",
            "target/package/hello-fetch-0.1.0/Cargo.toml",
            ".cargo/registry/src/itoa-1.0.0/Cargo.toml",
        ];
        for file in unneeded {
            project.write(file, "");
        }
        let built = build(&project, dockerfile);
        assert!(built.ran("/step/copy-manifests"), "{}", built.describe());
        for step in built.steps("/step/fetch-crates") {
            assert!(step.cached, "{step:?} ran again: {}", built.describe());
        }
        for file in unneeded {
            std::fs::remove_file(project.path(file)).unwrap();
        }
    }
}

/// Each commit has a time of its own, and a release passes it.
#[test]
fn another_source_date_epoch_repeats_nothing() {
    let project = Project::hello("hello-epoch");
    project.says(&unique());
    for dockerfile in DOCKERFILES {
        let build = |epoch: &str| {
            project
                .build(dockerfile)
                .arg("SOURCE_DATE_EPOCH", epoch)
                .option("--output=type=cacheonly")
                .run()
                .ok()
        };
        build("1700000000");
        let built = build("1700000001");
        for what in ["copy-manifests", "fetch-crates", "compile"] {
            for step in built.steps(&format!("/step/{what}")) {
                assert!(step.cached, "{step:?} ran again: {}", built.describe());
            }
        }
    }
}

/// For sources that are not trusted: what they leave behind, no other build takes up.
#[test]
fn builds_of_another_scope_share_no_mount() {
    let project = Project::hello("hello-scope");
    let manifest = project.read("Cargo.toml");
    project.write("Cargo.toml", &format!("{manifest}# {}\n", unique()));
    docker::empty_mounts("target-hello-scope-");
    for scope in ["", "forks"] {
        project.says(&unique());
        let build = project.build("Dockerfile.musl").arg("CACHE_SCOPE", scope);
        let built = build.option("--output=type=cacheonly").run().ok();
        assert!(
            built.log.contains("Compiling itoa"),
            "{scope}: {}",
            built.describe()
        );
        for mount in ["target-hello-scope-musl-", "cargo-home"] {
            let mut ids = docker::cache_mounts(mount).into_values();
            let found = ids.any(|id| id.ends_with("-forks") != scope.is_empty());
            assert!(found, "{scope}: none of {mount}");
        }
    }
}

/// For builders that begin empty: a cache in a registry has layers, and no mounts.
#[test]
fn crates_that_are_compiled_in_a_layer() {
    let project = Project::hello("hello-layer");
    let manifest = project.read("Cargo.toml");
    let member = "[package]\nname = \"own\"\nversion = \"0.1.0\"\nedition = \"2024\"\n";
    project.write("own/Cargo.toml", member);
    project.write("build.rs", "fn main() {}\n");
    for dockerfile in DOCKERFILES {
        // Never built before.
        let own = format!("own = {{ path = \"own\" }} # {}\n", unique());
        project.write("Cargo.toml", &format!("{manifest}{own}"));
        let says = |what: &str| {
            let source = format!("pub const WORD: &str = \"{what}\";\n");
            project.write("own/src/lib.rs", &source);
            let main = "fn main() {\n    println!(\"{} {}\", own::WORD, itoa::Buffer::new().format(41));\n}\n";
            project.write("src/main.rs", main);
            project.lock(&[]);
            let build = project.build(dockerfile).arg("DEPENDENCIES", "layer");
            let (built, said) = run_of(&project, build);
            assert_eq!(said, format!("{what} 41"), "{}", built.describe());
            built
        };
        let built = says("first");
        assert_eq!(
            built.log.matches("Compiling itoa").count(),
            1,
            "{}",
            built.describe()
        );
        assert!(!built.log.contains("error"), "{}", built.describe());
        docker::empty_mounts("target-hello-layer-");
        for what in ["on an empty builder", "on a warm one"] {
            let built = says(&format!("{what} {}", unique()));
            assert!(built.log.contains("Compiling own"), "{}", built.describe());
            assert!(
                !built.log.contains("Compiling itoa"),
                "{}",
                built.describe()
            );
        }
        // What has been compiled in the mount meanwhile is of no use with another layer.
        project.write("Cargo.toml", &format!("{manifest}{own}# {}\n", unique()));
        let built = says(&unique());
        assert_eq!(
            built.log.matches("Compiling itoa").count(),
            1,
            "{}",
            built.describe()
        );
    }
}

#[test]
fn a_module_that_comes_and_goes() {
    let project = Project::hello("hello-module");
    let [word, another] = ["word", "another"].map(|word| format!("{word} {}", unique()));
    project.write(
        "src/word.rs",
        &format!("pub const WORD: &str = \"{word}\";\n"),
    );
    project.write(
        "src/main.rs",
        "mod word;\nfn main() {\n    println!(\"{}\", word::WORD);\n}\n",
    );
    assert_eq!(build_and_run(&project, "Dockerfile.musl").1, word);
    std::fs::remove_file(project.path("src/word.rs")).unwrap();
    project.write(
        "src/word/mod.rs",
        &format!("pub const WORD: &str = \"{another}\";\n"),
    );
    age(&project);
    assert_eq!(build_and_run(&project, "Dockerfile.musl").1, another);
}

#[test]
fn a_git_dependency_that_changes_under_the_same_version() {
    let corp = Corp::start();
    let project = corp.greeter();
    let tag = Tag("greeter:freshness".to_owned());
    // Git for Windows gives lines another end.
    for (text, end) in [("one", "\n"), ("two", "\r\n"), ("three", "\r\n")] {
        corp.publish_greeting(text);
        corp.lock(&project);
        let lock = project.read("Cargo.lock").replace('\n', end);
        project.write("Cargo.lock", &lock);
        let build = corp.build_directly(&project).option("--load");
        let built = build.option(format!("--tag={}", tag.0)).run().ok();
        assert_eq!(project.run(&tag.0), format!("{text}, 41"));
        // With what an earlier build has compiled: of nothing, nothing could be stale.
        let anew = built.log.contains("Compiling tally");
        assert_eq!(anew, text == "one", "{}", built.describe());
        // Where cargos newer than the builder's keep a crate: what was there before is gone.
        let folder = "/target/release/build/greeting";
        in_target(
            "greeter",
            &format!("test ! -e {folder} && mkdir -p {folder}/0123456789abcdef"),
        );
    }
}

/// Runs a command where builds of a service by Dockerfile.musl keep what they have compiled. BuildKit would forget that
/// with `--no-cache`.
#[track_caller]
fn in_target(package: &str, command: &str) {
    let mut mounts = docker::cache_mounts(&format!("target-{package}-musl-"));
    let (_, id) = mounts.pop_first().expect("a cache mount");
    let mount = format!("--mount=type=cache,id={id},sharing=locked,target=/target");
    let dockerfile = format!(
        "FROM debian:trixie-slim\nRUN {mount} : {} && {command}\n",
        unique()
    );
    let mut build = docker::command(&["buildx", "build", "--output=type=cacheonly"]);
    build.arg("-");
    process::run(build, dockerfile.as_bytes(), Duration::from_secs(120)).ok();
}

/// Gives a service what C code brings along: a build script that links a program, as `configure` and cmake do to try a
/// compiler, and with glibc a library of the system, which is found by pkg-config.
fn with_c(project: &Project) {
    let manifest = project.read("Cargo.toml");
    let more = "[target.'cfg(target_env = \"gnu\")'.dependencies]\nlibz-sys = \"1\"\n\n[build-dependencies]\ncc = \"1\"\n";
    project.write("Cargo.toml", &format!("{manifest}\n{more}"));
    project.write(
        "build.rs",
        r##"fn main() {
    let folder = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap());
    let (source, program) = (folder.join("conftest.c"), folder.join("conftest"));
    // What on aarch64 is done by the compiler's own library.
    let text = "#include <stdio.h>\nstatic _Atomic int calls;\n\
        int main(int argc, char **argv) { return ++calls + printf(\"%Lf\", argc * 1.5L) < 1; }\n";
    std::fs::write(&source, text).unwrap();
    let mut compiler = cc::Build::new().get_compiler().to_command();
    let status = compiler.arg(source).arg("-o").arg(program).status().unwrap();
    assert!(status.success(), "{compiler:?} does not link: {status}");
}
"##,
    );
    project.write(
        "src/main.rs",
        r#"mod round;
fn main() {
    println!("{} {}", round::ROUND, itoa::Buffer::new().format(41));
    #[cfg(target_env = "gnu")]
    println!("{:?}", unsafe { libz_sys::zlibVersion() });
}
"#,
    );
    project.write("src/round.rs", "");
    project.lock(&[]);
}

#[test]
fn both_architectures_at_once_from_an_empty_cache() {
    let project = Project::hello("hello-both");
    with_c(&project);
    let archive = project.beside("image.tar");
    for (round, dockerfile) in DOCKERFILES.into_iter().cycle().take(4).enumerate() {
        let expected = format!("round {round} {}", unique());
        project.write(
            "src/round.rs",
            &format!("pub const ROUND: &str = \"{expected}\";\n"),
        );
        // Those of both Dockerfiles, which share none.
        if dockerfile == DOCKERFILES[0] {
            docker::empty_mounts("target-hello-both-");
        }
        project
            .build(dockerfile)
            .arg("BASE", "scratch") // it is not run
            .arg(
                "BUILD_PACKAGES",
                match dockerfile {
                    "Dockerfile.debian" => "zlib1g-dev:amd64 zlib1g-dev:arm64",
                    _ => "",
                },
            )
            .option("--platform=linux/amd64,linux/arm64")
            .into_archive(&archive)
            .run()
            .ok();
        let archive = Archive::open(&archive);
        for architecture in ["amd64", "arm64"] {
            let image = archive.image(architecture);
            let binary = &image.file("usr/local/bin/hello-both").content;
            let needs_zlib = Binary::of(binary).needed.contains(&"libz.so.1".to_owned());
            assert_eq!(
                needs_zlib,
                dockerfile == "Dockerfile.debian",
                "{architecture}"
            );
            assert!(
                binary
                    .windows(expected.len())
                    .any(|part| part == expected.as_bytes()),
                "{architecture} has another round's binary"
            );
        }
    }
}

#[test]
fn a_build_after_the_cache_mounts_are_pruned() {
    let project = Project::hello("hello-pruned");
    project.says(&unique());
    for dockerfile in DOCKERFILES {
        build(&project, dockerfile);
    }
    // Layers stay, with the crates that were fetched: only what is in the mounts goes, cargo's home as well.
    docker::empty_mounts("target-hello-pruned-");
    docker::empty_mounts("cargo-home");
    let after = format!("after {}", unique());
    project.says(&after);
    let another = Project::hello("hello-pruned");
    let manifest = another.read("Cargo.toml");
    another.write("Cargo.toml", &format!("{manifest}# {}\n", unique()));
    for dockerfile in DOCKERFILES {
        let (built, said) = build_and_run(&project, dockerfile);
        assert_eq!(said, format!("{after} 41"), "{}", built.describe());
        for step in built.steps("/step/fetch-crates") {
            assert!(step.cached, "{step:?} ran again: {}", built.describe());
        }
        let compiled = built.log.contains("Compiling itoa");
        assert!(compiled, "{}", built.describe());
        assert_eq!(build_and_run(&another, dockerfile).1, "hello 41");
    }
}
