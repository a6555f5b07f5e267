//! An image: how it is built, and what is in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    pub fn is_native(self) -> bool {
        let native = match std::env::consts::ARCH {
            "aarch64" => Self::Arm64,
            _ => Self::Amd64,
        };
        self == native
    }
}

/// What is compared: two C libraries, two allocators.
#[derive(Clone, Copy)]
pub struct Variant {
    /// The target in docker-bake.hcl.
    pub target: &'static str,
    pub libc: &'static str,
    pub base: &'static str,
    /// cargo features as docker-bake.hcl takes them.
    features: &'static str,
    pub allocator: &'static str,
}

impl Variant {
    pub const ALL: [Self; 4] = [
        Self::new("musl", "musl", "scratch", "default", "mimalloc"),
        Self::new("musl", "musl", "scratch", "", "musl's own"),
        Self::new(
            "debian",
            "glibc",
            "debian:trixie-slim",
            "default",
            "mimalloc",
        ),
        Self::new("debian", "glibc", "debian:trixie-slim", "", "glibc's own"),
    ];

    const fn new(
        target: &'static str,
        libc: &'static str,
        base: &'static str,
        features: &'static str,
        allocator: &'static str,
    ) -> Self {
        Self {
            target,
            libc,
            base,
            features,
            allocator,
        }
    }

    pub fn title(self) -> String {
        format!("{} with {}", self.libc, self.allocator)
    }
}

/// Sizes are bytes.
pub struct Image {
    pub variant: Variant,
    pub architecture: Architecture,
    /// The layers as a registry stores them.
    pub compressed: u64,
    /// The files of all layers.
    pub unpacked: u64,
    pub layers: usize,
    pub files: usize,
    pub binary: u64,
    /// What a scanner sees: Debian's packages, and the crates that the binary names.
    pub debian_packages: usize,
    pub crates: usize,
    /// The image's file system, unpacked.
    pub root: PathBuf,
}

impl Image {
    /// Builds with `docker buildx bake`, whose caches make this a matter of seconds when nothing has changed.
    pub fn build(variant: Variant, architecture: Architecture, folder: &Path) -> Result<Self> {
        let layout = folder.join(format!(
            "{}-{}-{}",
            variant.target,
            if variant.features.is_empty() {
                "own"
            } else {
                variant.features
            },
            architecture.name()
        ));
        let output = Command::new("docker")
            .args(["buildx", "bake", "--allow=fs=*", "--progress=plain"])
            .arg(format!("--set=*.platform=linux/{}", architecture.name()))
            .arg(format!(
                "--set=*.output=type=oci,tar=false,dest={}",
                layout.display()
            ))
            .arg(variant.target)
            .env("FEATURES", variant.features)
            .output()
            .context("cannot run docker: see the head of this benchmark")?;
        ensure!(
            output.status.success(),
            "docker buildx bake {}: {}",
            variant.target,
            String::from_utf8_lossy(&output.stderr)
        );
        Self::read(variant, architecture, &layout)
    }

    fn read(variant: Variant, architecture: Architecture, layout: &Path) -> Result<Self> {
        let index = json(&layout.join("index.json"))?;
        let mut manifest = json(&blob(layout, &index["manifests"][0])?)?;
        if let Some(inner) = manifest.get("manifests") {
            manifest = json(&blob(layout, &inner[0])?)?;
        }
        let layers = manifest["layers"]
            .as_array()
            .context("the manifest has no layers")?;
        let root = layout.join("root");
        fs::create_dir(&root)?;
        // A later layer's file takes the place of an earlier one's; each is counted as it is stored.
        let mut unpacked = 0;
        let mut files = BTreeMap::new();
        let mut compressed = 0;
        for layer in layers {
            compressed += layer["size"].as_u64().context("a layer has no size")?;
            let path = blob(layout, layer)?;
            let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(&path)?));
            for entry in archive.entries()? {
                let entry = entry?;
                if entry.header().entry_type().is_file() {
                    unpacked += entry.size();
                    files.insert(entry.path()?.into_owned(), entry.size());
                }
            }
            // As root, so that owners are kept.
            let status = Command::new("tar")
                .args([
                    "--extract",
                    "--gzip",
                    "--same-owner",
                    "--preserve-permissions",
                ])
                .arg("--file")
                .arg(&path)
                .arg("--directory")
                .arg(&root)
                .status()?;
            ensure!(
                status.success(),
                "a layer cannot be unpacked: run this as root"
            );
        }
        let program = root.join("usr/local/bin/warmdock");
        let bytes = fs::read(&program).context("the image has no warmdock")?;
        let crates = auditable_info::audit_info_from_slice(&bytes, 16 << 20)
            .context("the binary does not name its crates")?
            .packages
            .len();
        let status = fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap_or_default();
        Ok(Self {
            variant,
            architecture,
            compressed,
            unpacked,
            layers: layers.len(),
            files: files.len(),
            binary: bytes.len() as u64,
            debian_packages: status
                .lines()
                .filter(|line| line.starts_with("Package: "))
                .count(),
            crates,
            root,
        })
    }
}

fn json(path: &Path) -> Result<Value> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

/// Where a descriptor's content lies in an OCI layout.
fn blob(layout: &Path, descriptor: &Value) -> Result<PathBuf> {
    let Some((algorithm, hash)) = descriptor["digest"]
        .as_str()
        .and_then(|d| d.split_once(':'))
    else {
        bail!("a descriptor has no digest: {descriptor}");
    };
    Ok(layout.join("blobs").join(algorithm).join(hash))
}
