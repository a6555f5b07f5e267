//! Other services, as docs/images.md has them built: from their own checkouts, with what they bring along.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::archive::Binary;
use crate::docker::{self, Container, ROOT, Tag};
use crate::project::Project;
use crate::support::process;

/// A workspace in the folder `rust`: the package `name`, whose binary is called `particular`, and `admin`, which is not
/// shipped. The library `words` that it uses lies beside the workspace. Features of the package and, through it, of the
/// library are in what the program says.
///
/// With a pinned toolchain that has components, a program that the build needs, flags for the compiler in a file that
/// cargo's configuration includes, and links instead of files and folders.
fn particular(name: &str) -> Project {
    let project = Project::empty(name);
    project.write(
        "rust/Cargo.toml",
        "[workspace]\nresolver = \"3\"\nmembers = [\"service\", \"admin\"]\n",
    );
    let package = |name: &str, more: &str| {
        format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n{more}")
    };
    project.write(
        "rust/service/Cargo.toml",
        &package(
            name,
            r#"[[bin]]
name = "particular"
path = "src/main.rs"

[features]
default = ["polite"]
polite = []
loud = ["words/loud"]

[dependencies]
itoa = "1"
words = { path = "../../words" }
"#,
        ),
    );
    project.write(
        "words/Cargo.toml",
        &package("words", "[features]\nloud = []\n"),
    );
    project.write(
        "words/src/lib.rs",
        "pub const HELLO: &str = if cfg!(feature = \"loud\") { \"HELLO\" } else { \"hello\" };\n",
    );
    // Compiled together with the service, it would make the library loud as well. Nor does it compile.
    let loud = "[dependencies]\nwords = { path = \"../../words\", features = [\"loud\"] }\n";
    project.write("rust/admin/Cargo.toml", &package("admin", loud));
    project.write(
        "rust/admin/src/main.rs",
        "compile_error!(\"nobody asked for it\");\n",
    );
    project.write(
        "rust/service/build.rs",
        r#"fn main() {
    println!("cargo::rustc-check-cfg=cfg(flagged)");
    let m4 = std::process::Command::new("m4").arg("--version").output().expect("m4 runs");
    let text = String::from_utf8(m4.stdout).unwrap();
    println!("cargo::rustc-env=TOOL={}", text.split(' ').next().unwrap());
}
"#,
    );
    project.write(
        "rust/service/src/main.rs",
        r#"fn main() {
    let please = if cfg!(feature = "polite") { "please" } else { "now" };
    let number = itoa::Buffer::new().format(41).to_owned();
    println!("{} {} {} {please} {number}", env!("TOOL"), cfg!(flagged), words::HELLO);
}
"#,
    );
    project.lock_in("rust", &[]);
    project.write(
        "rust-toolchain.toml",
        "[toolchain]\nchannel = \"stable\"\ncomponents = [\"rustfmt\", \"rust-analyzer\"]\n",
    );
    project.write(
        ".cargo/config.toml",
        "include = [\"flags/all.toml\"]\n[build]\nrustc-wrapper = \"sccache\"\n[term]\nquiet = true\n",
    );
    project.write(
        ".cargo/flags/all.toml",
        "[build]\nrustflags = [\"--cfg\", \"flagged\"]\n",
    );
    for (link, to) in [
        ("rust/Cargo.lock", "particular.lock"),
        ("rust/service/src/main.rs", "particular.rs"),
        ("rust/service/src", "program"),
    ] {
        let link = project.path(link);
        std::fs::rename(&link, link.with_file_name(to)).unwrap();
        symlink(to, link).unwrap();
    }
    symlink("circle.rs", project.path("circle.rs")).unwrap();
    project
}

/// The commands of docs/images.md, and nothing that a person would not have in the environment.
#[test]
fn by_the_bake_file_from_its_own_checkout() {
    let project = particular("hello-particular");
    // Bake asks before it reads what lies outside of the working directory.
    let known_hosts = project.beside("known_hosts");
    std::fs::write(&known_hosts, "").unwrap();
    // Profiles whose folders have other names; no features, and some besides those by default.
    let health = json!(["CMD", "/usr/local/bin/warmdock", "healthcheck"]);
    for (target, dockerfile, profile, features, says, healthcheck, test) in [
        (
            "musl",
            "Dockerfile.musl",
            "test",
            "",
            "m4 true hello now 41",
            "none",
            Value::Null,
        ),
        (
            "debian",
            "Dockerfile.debian",
            "bench",
            "default,loud",
            "m4 true HELLO please 41",
            "self",
            health,
        ),
    ] {
        let bake = |allowed: &[&Path]| {
            let mut command = docker::command(&["buildx", "bake", "--progress=plain", "--file"]);
            command
                .arg(Path::new(ROOT).join("docker-bake.hcl"))
                .args(["--set", "*.context=.", "--set", "*.args.WORKSPACE=rust"])
                .arg("--set")
                .arg(format!("*.dockerfile={ROOT}/{dockerfile}"))
                .args(
                    allowed
                        .iter()
                        .map(|path| format!("--allow=fs.read={}", path.display())),
                )
                .arg(target)
                .current_dir(project.root())
                .env("PWD", project.root())
                .env_remove("BUILDX_BAKE_ENTITLEMENTS_FS")
                .env("PACKAGE", &project.name)
                .env("BINARY", "particular")
                .env("FEATURES", features)
                .env("PROFILE", profile)
                .env("BUILD_PACKAGES", "m4")
                .env("HEALTHCHECK", healthcheck)
                .env("KNOWN_HOSTS", &known_hosts);
            process::run(command, b"", Duration::from_secs(600))
        };
        let refused = bake(&[]).failed();
        assert!(refused.stderr.contains("fs.read"), "{}", refused.describe());
        bake(&[Path::new(ROOT), known_hosts.parent().unwrap()]).ok();

        let tag = match target {
            "musl" => "latest".to_owned(),
            other => format!("latest-{other}"),
        };
        let tag = Tag(format!("{}:{tag}", project.name));
        assert_eq!(project.run(&tag.0), says);
        // The binary, and what ENTRYPOINT calls it; nothing else of the workspace.
        let programs = project.beside(target);
        let container = Container {
            id: docker::run(&["create", &tag.0]).ok().text(),
        };
        let copy = |from: &str, to: &Path| {
            let from = format!("{}:{from}", container.id);
            docker::run(&["cp", &from, docker::text(to)]).ok();
        };
        copy("/usr/local/bin", &programs);
        copy("/var/lib/particular", &project.beside("data"));
        assert_eq!(names(&programs), ["particular", "warmdock"]);
        let link = std::fs::read_link(programs.join("warmdock")).unwrap();
        assert_eq!(link, Path::new("particular"));
        let binary = std::fs::read(programs.join("particular")).unwrap();
        let mut crates = Binary::of(&binary).crates;
        crates.sort();
        assert_eq!(crates, [project.name.as_str(), "itoa", "words"]);
        let config = docker::run(&["inspect", "--format={{json .Config}}", &tag.0]).ok();
        let config: Value = serde_json::from_str(&config.text()).unwrap();
        let labels = &config["Labels"];
        assert_eq!(labels["org.opencontainers.image.title"], project.name);
        assert_eq!(
            labels["org.opencontainers.image.licenses"], "",
            "not warmdock's"
        );
        assert_eq!(config["User"], "65532:65532");
        assert_eq!(config["Entrypoint"], json!(["/usr/local/bin/warmdock"]));
        assert_eq!(config["Healthcheck"]["Test"], test);
    }
}

/// What need not be compiled, and cannot be where no registry is reached.
#[test]
fn a_builder_that_has_cargo_auditable() {
    let project = Project::hello("hello-builder-image");
    let without_retries = project.beside("cargo_config.toml");
    std::fs::write(&without_retries, "[net]\nretry = 0\n").unwrap();
    let build = || {
        project
            .build("Dockerfile.musl")
            .option("--target=auditable")
            .option("--network=none")
            .secret("cargo_config", &without_retries)
    };
    build().run().fails_with(&[
        "cargo-auditable cannot be installed",
        "--secret id=cargo_config",
        "a builder's image",
    ]);
    project.write("cargo-auditable", "#!/bin/sh\n");
    let tag = Tag("hello-builder-image:rust".to_owned());
    for folder in ["/usr/local/bin", "/usr/local/cargo/bin"] {
        let image = project.builder(
            &tag,
            &format!("COPY --chmod=755 cargo-auditable {folder}/\n"),
        );
        build().option(image).run().ok();
    }
}

/// What is in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
