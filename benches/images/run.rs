//! The service in its image's file system: how fast it starts, what it holds, what it serves.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::answer::Checksum;
use crate::image::Image;
use crate::wire::{self, Kind, Remote, Work};

/// As many clients as two cores can have work for.
pub const CLIENTS: usize = 8;
const HOST: &str = "bench.test";
/// The user of the images.
const USER: &str = "65532:65532";
/// Everything below takes milliseconds when it works.
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Figures {
    pub ready: Duration,
    /// Resident bytes, some seconds after the start.
    pub idle: u64,
    pub clones_per_second: f64,
    /// The most that was resident while clones were served.
    pub loaded: u64,
}

/// The repository that is cloned, as a bare one in `folder`.
pub fn repository(given: Option<&Path>, folder: &Path) -> Result<PathBuf> {
    let source = given.unwrap_or(Path::new(env!("CARGO_MANIFEST_DIR")));
    let target = folder.join("repositories/repository.git");
    let status = Command::new("git")
        .args(["clone", "--quiet", "--bare", "--no-local", "--no-hardlinks"])
        .arg(source)
        .arg(&target)
        .status()
        .context("cannot run git")?;
    ensure!(status.success(), "git cannot clone {}", source.display());
    Ok(target)
}

pub fn measure(image: &Image, repository: &Path, rounds: usize, load: Duration) -> Result<Figures> {
    let repositories = image.root.join("repositories");
    let status = Command::new("cp")
        .arg("--recursive")
        .arg(
            repository
                .parent()
                .context("a repository lies in a folder")?,
        )
        .arg(&repositories)
        .status()?;
    ensure!(status.success(), "the repository cannot be copied");
    let mut ready = Vec::new();
    for _ in 0..rounds {
        ready.push(Service::start(image)?.ready);
    }
    ready.sort();
    let service = Service::start(image)?;
    thread::sleep(Duration::from_secs(5));
    let idle = service.resident("VmRSS")?;
    // The first clone makes the mirror and the answer.
    service.clone_once()?;
    wait_for_mirror(&service)?;
    let clones = service.clones_during(load)?;
    Ok(Figures {
        ready: ready[ready.len() / 2],
        idle,
        clones_per_second: clones as f64 / load.as_secs_f64(),
        loaded: service.resident("VmHWM")?,
    })
}

struct Service {
    child: Child,
    address: SocketAddr,
    ready: Duration,
}

impl Service {
    /// Starts it in the image's file system, as the image's user, and asks until it is ready.
    fn start(image: &Image) -> Result<Self> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let configuration = json!({
            "listen": { "http": address.to_string() },
            "data_dir": "/var/lib/warmdock",
            "git": {
                "upstreams": [ { "host": HOST, "url": "file:///repositories" } ],
                "max_age": "1h",
            },
        });
        fs::write(
            image.root.join("config/app_config.json"),
            configuration.to_string(),
        )?;
        let begin = Instant::now();
        let child = Command::new("chroot")
            .arg(format!("--userspec={USER}"))
            .arg(&image.root)
            .arg("/usr/local/bin/warmdock")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run chroot")?;
        let mut service = Self {
            child,
            address,
            ready: Duration::ZERO,
        };
        while !is_ready(address) {
            if let Some(status) = service.child.try_wait()? {
                bail!("the service ended ({status}) instead of being ready; run this as root");
            }
            ensure!(
                begin.elapsed() < PATIENCE,
                "the service is not ready after {PATIENCE:?}"
            );
            thread::sleep(Duration::from_micros(200));
        }
        service.ready = begin.elapsed();
        Ok(service)
    }

    /// `VmRSS` or `VmHWM` of /proc/PID/status in bytes.
    fn resident(&self, key: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            .with_context(|| format!("/proc has no {key}"))?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kilobytes << 10)
    }

    fn clone_once(&self) -> Result<()> {
        let remote = Remote {
            address: self.address,
            path: format!("/git/{HOST}/repository.git"),
            kind: Kind::GitServer,
        };
        wire::perform(&Work::FullClone(Checksum::Unchecked), &remote, None).map(drop)
    }

    fn clones_during(&self, load: Duration) -> Result<usize> {
        let stop = AtomicBool::new(false);
        let clones = AtomicUsize::new(0);
        thread::scope(|scope| {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|_| {
                    scope.spawn(|| -> Result<()> {
                        while !stop.load(Ordering::Relaxed) {
                            self.clone_once()?;
                            clones.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(())
                    })
                })
                .collect();
            thread::sleep(load);
            let clones = clones.load(Ordering::Relaxed);
            stop.store(true, Ordering::Relaxed);
            for client in clients {
                client.join().expect("a client does not panic")?;
            }
            Ok(clones)
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream
            .write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

/// Until the repository is served from its mirror: the first clone passes through.
fn wait_for_mirror(service: &Service) -> Result<()> {
    thread::sleep(Duration::from_secs(2));
    for _ in 0..3 {
        service.clone_once()?;
    }
    Ok(())
}
