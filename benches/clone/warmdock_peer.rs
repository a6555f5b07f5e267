//! The measured service: the release binary with a data folder of its own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::http::{Connection, Method};
use crate::process;
use crate::wire::{Kind, Remote};

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_warmdock");
const HOST: &str = "bench.test";

pub struct Warmdock {
    child: Child,
    address: SocketAddr,
}

/// Whether the repository is in `warm`: then it is mirrored, and its usual answers are made, before anybody asks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Warming {
    Warm,
    OnDemand,
}

impl Warmdock {
    /// Serves `repository` (a name without `.git`) of the folder `repositories`, and waits until it is ready.
    pub fn start(
        repositories: &Path,
        repository: &str,
        data_dir: &Path,
        warming: Warming,
    ) -> Result<Self> {
        fs::create_dir_all(data_dir)?;
        let warm: Vec<String> = match warming {
            Warming::Warm => vec![format!("{HOST}/{repository}")],
            Warming::OnDemand => Vec::new(),
        };
        let configuration = json!({
            "listen": { "http": "127.0.0.1:0" },
            "data_dir": data_dir,
            "git": {
                "upstreams": [ { "host": HOST, "url": format!("file://{}", repositories.display()) } ],
                "warm": warm,
                "max_age": "1h",
                "refresh": "1h",
            },
            "access": { "anonymous": "read" },
        });
        let path = data_dir.with_extension("json");
        fs::write(&path, configuration.to_string())?;
        let mut child = Command::new(PROGRAM)
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {PROGRAM}"))?;
        let log = data_dir.with_extension("log");
        let address = match listening_address(&mut child, &log) {
            Ok(address) => address,
            Err(error) => {
                process::terminate(&mut child);
                return Err(error);
            }
        };
        let service = Self { child, address };
        service.wait_until_ready(&log)?;
        Ok(service)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn remote(&self, repository: &str) -> Remote {
        Remote {
            address: self.address,
            path: format!("/git/{HOST}/{repository}.git"),
            kind: Kind::GitServer,
        }
    }

    fn wait_until_ready(&self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(600);
        loop {
            let mut connection = Connection::open(self.address)?;
            let response = connection.request(Method::Get, "/readyz")?;
            let status = response.status;
            let text = response.into_text();
            if status == 200 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "warmdock is not ready after ten minutes: {status} {text}; see {}",
                    log.display()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Warmdock {
    fn drop(&mut self) {
        process::terminate(&mut self.child);
    }
}

/// Waits for the event that tells the address; all that the service logs goes to the file `log`.
fn listening_address(child: &mut Child, log: &Path) -> Result<SocketAddr> {
    let stderr = child.stderr.take().expect("stderr is piped");
    let mut copy = fs::File::create(log)?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _ = writeln!(copy, "{line}");
            if let Some(address) = address_in(&line) {
                let _ = sender.send(address);
            }
        }
    });
    receiver.recv_timeout(Duration::from_secs(30)).map_err(|_| {
        let said = fs::read_to_string(log).unwrap_or_default();
        anyhow::anyhow!("warmdock does not say where it listens; it said: {said}")
    })
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let event: serde_json::Value = serde_json::from_str(line).ok()?;
    if event.get("message")? != "listening" || event.get("listener")? != "http" {
        return None;
    }
    event.get("address")?.as_str()?.parse().ok()
}
