//! The same sources give the same image, to the last bit.

use std::thread;

use crate::archive::Archive;
use crate::docker;
use crate::project::Project;

/// Builds a service for both architectures from its sources alone, and gives the images' digests.
#[track_caller]
fn digests(project: &Project, dockerfile: &str, again: &str) -> [String; 2] {
    let archive = project.beside(&format!("{dockerfile}.tar"));
    let built = project
        .build(dockerfile)
        // All that makes the image; not cargo-auditable, whose version is pinned with all that it is made of.
        .option(format!(
            "--no-cache-filter={again}manifests,crates,binary,rootfs,service"
        ))
        .option("--platform=linux/amd64,linux/arm64")
        .arg("SOURCE_DATE_EPOCH", "1700000000")
        .option(format!(
            "--output=type=oci,rewrite-timestamp=true,dest={}",
            archive.display()
        ))
        .run()
        .ok();
    assert!(built.ran("/step/compile"), "{}", built.describe());
    let archive = Archive::open(&archive);
    ["amd64", "arm64"].map(|architecture| archive.image(architecture).digest)
}

#[test]
fn two_builds_from_clean_caches_have_one_digest() {
    // The second time in another checkout in another folder, with other times, and for musl with compilers installed anew.
    let [here, elsewhere] = [false, true].map(|second| {
        let project = Project::hello("hello-twice");
        // It has C code, which writes down when it was compiled; how well it is optimised is none of this test's business.
        let manifest = project.read("Cargo.toml");
        let quickly = "[profile.release.package.libmimalloc-sys]\nopt-level = 1\n";
        project.write(
            "Cargo.toml",
            &format!("{manifest}mimalloc = \"0.1\"\n\n{quickly}"),
        );
        let source = project.read("src/main.rs");
        let allocator =
            "#[global_allocator]\nstatic GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;\n";
        project.write("src/main.rs", &format!("{allocator}{source}"));
        project.lock(&[]);
        docker::forget_downloads();
        docker::empty_mounts("target-hello-twice-");
        thread::scope(|scope| {
            let project = &project;
            let compilers = if second { "toolchain," } else { "" };
            [("Dockerfile.musl", compilers), ("Dockerfile.debian", "")]
                .map(|(dockerfile, again)| scope.spawn(move || digests(project, dockerfile, again)))
                .map(|build| build.join().unwrap())
        })
    });
    assert_eq!(here, elsewhere, "musl and Debian");
}
