//! What is in the images of warmdock itself, for both architectures, and that it runs.

use object::elf;

use crate::archive::{Archive, Binary, Image};
use crate::docker::Build;
use crate::support::temporary_folder;

const MEGABYTE: u64 = 1_000_000;

const MACHINES: [(&str, elf::Machine); 2] = [("amd64", elf::EM_X86_64), ("arm64", elf::EM_AARCH64)];

/// The image of one variant for one architecture.
#[track_caller]
fn image(variant: &str, architecture: &str) -> Image {
    let folder = temporary_folder();
    let file = folder.path().join("image.tar");
    Build::bake(&[&format!("all-{variant}")])
        .variable("SOURCE", "https://git.corp.example/team/warmdock")
        .variable("REVISION", "0123456789abcdef")
        .variable("TAG", "1.2.3")
        .variable("SOURCE_DATE_EPOCH", "1700000000")
        .option(format!("--set=*.platform=linux/{architecture}"))
        .option(format!("--set=*.output=type=oci,dest={}", file.display()))
        .run()
        .ok();
    Archive::open(&file).image(architecture)
}

/// What all variants have to have.
#[track_caller]
fn common(image: &Image, machine: elf::Machine) -> Binary {
    let file = image.file("usr/local/bin/warmdock");
    assert_eq!((file.mode & 0o7777, file.uid, file.gid), (0o555, 0, 0));
    let binary = Binary::of(&file.content);
    assert_eq!(binary.machine, machine);
    assert!(!binary.has_symbols, "symbols are stripped");
    for name in ["warmdock", "tokio", "rustls", "gix-pack"] {
        assert!(
            binary.crates.iter().any(|found| found == name),
            "no {name} in {:?}",
            binary.crates
        );
    }

    let data = image.file("var/lib/warmdock");
    assert!(data.kind.is_dir());
    assert_eq!(
        (data.mode & 0o7777, data.uid, data.gid),
        (0o750, 65532, 65532)
    );
    let bundle = &image.file("etc/ssl/certs/ca-certificates.crt").content;
    let certificates = String::from_utf8_lossy(bundle);
    assert!(certificates.matches("-----BEGIN CERTIFICATE-----").count() > 50);
    assert!(image.file("config").kind.is_dir());

    let config = &image.config["config"];
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(
        config["Entrypoint"],
        serde_json::json!(["/usr/local/bin/warmdock"])
    );
    assert_eq!(config["StopSignal"], "SIGTERM");
    assert_eq!(
        config["Healthcheck"]["Test"],
        serde_json::json!(["CMD", "/usr/local/bin/warmdock", "healthcheck"])
    );
    let labels = &config["Labels"];
    for (label, value) in [
        ("title", "warmdock"),
        ("source", "https://git.corp.example/team/warmdock"),
        ("revision", "0123456789abcdef"),
        ("version", "1.2.3"),
        ("licenses", "Apache-2.0"),
        ("created", "2023-11-14T22:13:20Z"),
    ] {
        let label = format!("org.opencontainers.image.{label}");
        assert_eq!(labels[&label], value, "{label}");
    }
    assert_eq!(image.config["created"], "2023-11-14T22:13:20Z");
    binary
}

#[test]
fn musl() {
    for (architecture, machine) in MACHINES {
        let image = image("musl", architecture);
        let binary = common(&image, machine);
        assert!(!binary.interpreter, "{architecture}: wants a loader");
        assert_eq!(binary.needed, 0, "{architecture}: wants libraries");
        let (unpacked, compressed) = (image.unpacked(), image.compressed);
        eprintln!("musl, {architecture}: {unpacked} bytes unpacked, {compressed} compressed");
        assert!(
            unpacked <= 12 * MEGABYTE,
            "{architecture}: {unpacked} bytes unpacked"
        );
        assert!(
            compressed <= 6 * MEGABYTE,
            "{architecture}: {compressed} bytes compressed"
        );
        // The service, what it trusts, and folders; nobody can log in to anything.
        let files: Vec<_> = image
            .files
            .iter()
            .filter(|(_, file)| file.kind.is_file())
            .map(|(name, _)| name)
            .collect();
        assert_eq!(
            files,
            [
                "etc/ssl/certs/ca-certificates.crt",
                "usr/local/bin/warmdock"
            ]
        );
        for (name, file) in &image.files {
            assert_eq!(file.mode & 0o6000, 0, "{name} is setuid or setgid");
            assert!(file.mtime <= 1_700_000_000, "{name} is from {}", file.mtime);
        }
    }
}
