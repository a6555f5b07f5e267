//! Other services, as docs/images.md has them built: from their own checkouts, with what they bring along.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::docker::{self, ROOT, Tag};
use crate::project::Project;
use crate::support::process;

/// With a pinned toolchain that has components, a program that the build needs, flags for the compiler in a file that
/// cargo's configuration includes, and links instead of files and folders.
fn particular(name: &str) -> Project {
    let project = Project::hello(name);
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
    project.write(
        "build.rs",
        r#"fn main() {
    println!("cargo::rustc-check-cfg=cfg(flagged)");
    let m4 = std::process::Command::new("m4").arg("--version").output().expect("m4 runs");
    let text = String::from_utf8(m4.stdout).unwrap();
    println!("cargo::rustc-env=TOOL={}", text.split(' ').next().unwrap());
}
"#,
    );
    project.write(
        "src/main.rs",
        r#"fn main() {
    println!("{} {} {}", env!("TOOL"), cfg!(flagged), itoa::Buffer::new().format(41));
}
"#,
    );
    for (link, to) in [
        ("Cargo.lock", "particular.lock"),
        ("src/main.rs", "particular.rs"),
        ("src", "program"),
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
    // Profiles whose folders have other names.
    for (target, dockerfile, profile) in [
        ("musl", "Dockerfile.musl", "test"),
        ("debian", "Dockerfile.debian", "bench"),
    ] {
        let bake = |allowed: &[&Path]| {
            let mut command = docker::command(&["buildx", "bake", "--progress=plain", "--file"]);
            command
                .arg(Path::new(ROOT).join("docker-bake.hcl"))
                .args(["--set", "*.context=.", "--set"])
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
                .env("PROFILE", profile)
                .env("BUILD_PACKAGES", "m4")
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
        assert_eq!(project.run(&tag.0), "m4 true 41");
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
    }
}
