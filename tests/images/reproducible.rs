//! The same sources give the same image, to the last bit.

use crate::archive::Archive;
use crate::docker;
use crate::project::Project;

#[test]
fn two_builds_from_clean_caches_have_one_digest() {
    for dockerfile in ["Dockerfile.musl", "Dockerfile.debian"] {
        let digests = ["here", "elsewhere"].map(|place| {
            // Another checkout in another folder, with other times; on a builder that has none of it.
            let project = Project::hello("hello-twice");
            // It has C code, which writes down when it was compiled.
            let manifest = project.read("Cargo.toml");
            project.write("Cargo.toml", &format!("{manifest}mimalloc = \"0.1\"\n"));
            let source = project.read("src/main.rs");
            let allocator =
                "#[global_allocator]\nstatic GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;\n";
            project.write("src/main.rs", &format!("{allocator}{source}"));
            project.lock(&[]);
            docker::forget_downloads();
            docker::empty_mounts("target-hello-twice-");
            let archive = project.beside("image.tar");
            let built = project
                .build(dockerfile)
                .option(match (place, dockerfile) {
                    ("here", _) => "--no-cache-filter=manifests,crates,binary,rootfs,image",
                    (_, "Dockerfile.musl") => "--no-cache",
                    // All but cargo-auditable, which is the same for both.
                    _ => "--no-cache-filter=toolchain,manifests,crates,binary,rootfs,image",
                })
                .option("--platform=linux/amd64,linux/arm64")
                .arg("SOURCE_DATE_EPOCH", "1700000000")
                .option(format!(
                    "--output=type=oci,rewrite-timestamp=true,dest={}",
                    archive.display()
                ))
                .run()
                .ok();
            assert!(built.ran("/step/compile"), "{}", built.describe());
            let opened = Archive::open(&archive);
            ["amd64", "arm64"].map(|architecture| opened.image(architecture).digest)
        });
        assert_eq!(digests[0], digests[1], "{dockerfile}");
    }
}
