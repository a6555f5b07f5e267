//! Docker, as a builder uses it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::sources::{HOST, Sources};

pub struct Builds {
    /// The checkout of the service.
    pub service: PathBuf,
    folder: PathBuf,
    host: SocketAddr,
    /// Of the authority of warmdock's certificate.
    certificate: PathBuf,
}

/// Where a build's sources come from.
pub enum Through {
    /// Their hosts, over whatever network there is.
    Nothing,
    /// Their hosts, over the slow link.
    Link {
        proxy: SocketAddr,
        git_host: SocketAddr,
    },
    Warmdock(SocketAddr),
}

/// Where compiled crates are kept.
#[derive(Clone, Copy)]
pub enum Dependencies {
    Mount,
    Layer,
}

impl Dependencies {
    fn argument(self) -> String {
        let value = match self {
            Self::Mount => "mount",
            Self::Layer => "layer",
        };
        format!("--build-arg=DEPENDENCIES={value}")
    }
}

impl Builds {
    pub fn new(folder: &Path, sources: &Sources) -> Result<Self> {
        let service = folder.join("service");
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/warmth/service");
        fs::create_dir_all(service.join("src"))?;
        for name in ["Cargo.toml", "src/main.rs"] {
            fs::copy(template.join(name), service.join(name))?;
        }
        sources.lock(&service)?;
        Ok(Self {
            service,
            folder: folder.to_owned(),
            host: sources.host,
            certificate: sources.certificate.clone(),
        })
    }

    /// Builds all of the image.
    pub fn image(&self) -> Result<Duration> {
        self.build(&Through::Nothing, "image", &[])
    }

    /// The same, and writes the build cache to a registry, with all stages.
    pub fn export_cache(&self, reference: &str, dependencies: Dependencies) -> Result<Duration> {
        let to = format!("--cache-to=type=registry,ref={reference},mode=max");
        self.build(&Through::Nothing, "image", &[to, dependencies.argument()])
    }

    /// The same, with what a registry has of the build cache.
    pub fn import_cache(&self, reference: &str, dependencies: Dependencies) -> Result<Duration> {
        let from = format!("--cache-from=type=registry,ref={reference}");
        self.build(&Through::Nothing, "image", &[from, dependencies.argument()])
    }

    /// Fetches the sources and does nothing else.
    pub fn crates(&self, through: &Through) -> Result<Duration> {
        self.build(through, "crates", &[])
    }

    fn build(&self, through: &Through, target: &str, options: &[String]) -> Result<Duration> {
        let (scheme, git_host) = match through {
            Through::Nothing => ("http", self.host),
            Through::Link { git_host, .. } => ("http", *git_host),
            Through::Warmdock(address) => ("https", *address),
        };
        let gitconfig = self.folder.join("gitconfig");
        fs::write(&gitconfig, crate::sources::gitconfig(scheme, git_host))?;
        let mut command = Command::new("docker");
        command
            .args([
                "buildx",
                "build",
                "--quiet",
                "--network=host",
                "--allow=network.host",
            ])
            .args(["--build-arg=PACKAGE=orders", "--target", target])
            .args(options)
            .arg("--file")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Dockerfile.musl"))
            .arg(format!("--secret=id=gitconfig,src={}", gitconfig.display()));
        match through {
            Through::Nothing => {}
            Through::Link { proxy, .. } => {
                command.arg(format!("--build-arg=HTTPS_PROXY=http://{proxy}"));
            }
            Through::Warmdock(address) => {
                let config = self.folder.join("cargo_config.toml");
                let text = format!(
                    "[source.crates-io]\nreplace-with = \"warmdock\"\n[source.warmdock]\nregistry = \"sparse+https://{address}/crates/crates.io/\"\n"
                );
                fs::write(&config, text)?;
                command
                    .arg(format!("--secret=id=cargo_config,src={}", config.display()))
                    .arg(format!("--secret=id=ca,src={}", self.certificate.display()));
            }
        }
        let begin = Instant::now();
        run(command.arg(&self.service))
            .with_context(|| format!("crates of {HOST} and crates.io"))?;
        Ok(begin.elapsed())
    }

    /// A machine that has never built anything.
    pub fn forget_everything(&self) -> Result<()> {
        run(Command::new("docker").args(["buildx", "prune", "--all", "--force"]))
    }

    pub fn forget_mounts(&self) -> Result<()> {
        run(Command::new("docker").args([
            "buildx",
            "prune",
            "--force",
            "--filter=type=exec.cachemount",
        ]))
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().context("cannot run docker")?;
    ensure!(
        output.status.success(),
        "{command:?}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
