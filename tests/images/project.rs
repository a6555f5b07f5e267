//! Checkouts of services that the Dockerfiles build, unchanged.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::docker::{Build, Tag};
use crate::support::process;
use crate::support::temporary_folder;

/// A service's checkout.
pub struct Project {
    folder: tempfile::TempDir,
    pub name: String,
}

/// What no run has written before: of earlier ones the engine still has the layers, and would do nothing.
pub fn unique() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_nanos().to_string()
}

impl Project {
    /// A service with a crate from crates.io, which prints what `says` gives. The engine keeps caches by the name.
    pub fn hello(name: &str) -> Self {
        let project = Self::empty(name);
        project.write(
            "Cargo.toml",
            &format!(
                "[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n[dependencies]\nitoa = \"1\"\n"
            ),
        );
        project.says("hello");
        // As cargo would write it, without asking a registry for each of many tests: this checkout has the crate as well.
        let itoa = include_str!("../../Cargo.lock")
            .split("\n\n")
            .find(|package| package.contains("name = \"itoa\""))
            .expect("itoa in Cargo.lock");
        project.write(
            "Cargo.lock",
            &format!(
                "version = 4\n\n[[package]]\nname = \"{name}\"\nversion = \"0.1.0\"\ndependencies = [\n \"itoa\",\n]\n\n{itoa}\n"
            ),
        );
        project
    }

    pub fn empty(name: &str) -> Self {
        let folder = temporary_folder();
        std::fs::create_dir(folder.path().join("checkout")).unwrap();
        let name = name.to_owned();
        Self { folder, name }
    }

    /// A path in the checkout.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("checkout").join(name)
    }

    /// A path beside the checkout, for what is made of it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn root(&self) -> PathBuf {
        self.folder.path().join("checkout")
    }

    /// Writes a file, and makes the folders that it lies in.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        // BuildKit takes files of one path, size and time for one file, also those of two checkouts, and the kernel's
        // times are the same for milliseconds.
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_modified(SystemTime::now()).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Changes the source: this is printed from now on.
    pub fn says(&self, what: &str) {
        self.write(
            "src/main.rs",
            &format!(
                "fn main() {{\n    println!(\"{what} {{}}\", itoa::Buffer::new().format(41));\n}}\n"
            ),
        );
    }

    /// Writes Cargo.lock; git is given these settings.
    pub fn lock(&self, git: &[(&str, &str)]) {
        self.lock_in(".", git);
    }

    /// The same in a folder of the checkout.
    pub fn lock_in(&self, folder: &str, git: &[(&str, &str)]) {
        let home = temporary_folder();
        let mut command = Command::new(std::env::var_os("CARGO").expect("cargo says where it is"));
        command
            .args(["generate-lockfile", "--quiet"])
            .current_dir(self.path(folder))
            .env("CARGO_HOME", home.path())
            .env("CARGO_NET_GIT_FETCH_WITH_CLI", "true")
            .env("GIT_CONFIG_COUNT", git.len().to_string());
        for (number, (key, value)) in git.iter().enumerate() {
            command
                .env(format!("GIT_CONFIG_KEY_{number}"), key)
                .env(format!("GIT_CONFIG_VALUE_{number}"), value);
        }
        process::run(command, b"", Duration::from_secs(120)).ok();
    }

    /// A build of it by one of the Dockerfiles.
    pub fn build(&self, dockerfile: &str) -> Build {
        Build::new(dockerfile, &self.root()).arg("PACKAGE", &self.name)
    }

    /// Makes a builder's image of one's own, with these instructions and what is in the checkout, and gives the option that
    /// has it used.
    #[track_caller]
    pub fn builder(&self, tag: &Tag, instructions: &str) -> String {
        let dockerfile = self.beside("Dockerfile.builder");
        let text = format!("FROM rust:1.95.0-trixie\n{instructions}");
        std::fs::write(&dockerfile, text).unwrap();
        Build::new(dockerfile.to_str().unwrap(), &self.root())
            .option("--load")
            .option(format!("--tag={}", tag.0))
            .run()
            .ok();
        format!(
            "--build-context=rust:1.95.0-trixie=docker-image://{}",
            tag.0
        )
    }

    /// What the image's program prints, in a container.
    #[track_caller]
    pub fn run(&self, tag: &str) -> String {
        crate::docker::run(&["run", "--rm", tag]).ok().text()
    }
}
