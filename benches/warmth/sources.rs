//! Where sources come from: a Git host with the service's own crate, and a warmdock that mirrors it and crates.io.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

pub const HOST: &str = "git.corp.example";

pub struct Sources {
    /// The Git host: another warmdock, on a folder of repositories.
    pub host: SocketAddr,
    /// Over TLS, as cargo is faster there: it asks for everything at once.
    pub warmdock: SocketAddr,
    /// The certificate of that one.
    pub certificate: PathBuf,
    folder: PathBuf,
    running: [Child; 2],
}

impl Sources {
    pub fn start(folder: &Path) -> Result<Self> {
        repository(&folder.join("repositories/team/audit.git"), folder)?;
        let upstream = format!("file://{}", folder.join("repositories").display());
        let (host, first) = serve(folder, "host", &upstream, Value::Null)?;
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])
            .context("cannot make a certificate")?;
        let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
        fs::write(&certificate, made.cert.pem())?;
        fs::write(&key, made.signing_key.serialize_pem())?;
        let upstream = format!("http://{host}/git/{HOST}");
        let tls = json!({ "cert": certificate, "key": key });
        let (warmdock, second) = serve(folder, "warmdock", &upstream, tls)?;
        Ok(Self {
            host,
            warmdock,
            certificate,
            folder: folder.to_owned(),
            running: [first, second],
        })
    }

    /// Writes the service's Cargo.lock, for what its Cargo.toml says now.
    pub fn lock(&self, service: &Path) -> Result<()> {
        let config = self.folder.join("lock-gitconfig");
        fs::write(&config, gitconfig("http", self.host))?;
        let status = Command::new("cargo")
            .args(["metadata", "--quiet", "--format-version=1"])
            .current_dir(service)
            .env("CARGO_NET_GIT_FETCH_WITH_CLI", "true")
            .env("GIT_CONFIG_GLOBAL", config)
            .stdout(Stdio::null())
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "cargo cannot lock the service's crates");
        Ok(())
    }
}

impl Drop for Sources {
    fn drop(&mut self) {
        for child in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends git to a warmdock at `address`.
pub fn gitconfig(scheme: &str, address: SocketAddr) -> String {
    format!("[url \"{scheme}://{address}/git/{HOST}/\"]\n\tinsteadOf = https://{HOST}/\n")
}

/// A crate with a history: this project's, with the crate on top.
fn repository(target: &Path, folder: &Path) -> Result<()> {
    let checkout = folder.join("audit");
    let git = |arguments: &[&str]| -> Result<()> {
        let status = Command::new("git")
            .arg("-C")
            .arg(&checkout)
            .args([
                "-c",
                "user.name=Bench",
                "-c",
                "user.email=bench@example.com",
            ])
            .args(arguments)
            .status()
            .context("cannot run git")?;
        ensure!(status.success(), "git {arguments:?} failed");
        Ok(())
    };
    fs::create_dir_all(&checkout)?;
    git(&[
        "clone",
        "--quiet",
        "--no-local",
        env!("CARGO_MANIFEST_DIR"),
        ".",
    ])?;
    git(&["checkout", "--quiet", "-B", "main"])?;
    git(&["rm", "-r", "--quiet", "."])?;
    fs::create_dir_all(checkout.join("src"))?;
    fs::write(
        checkout.join("Cargo.toml"),
        "[package]\nname = \"audit\"\nversion = \"0.1.0\"\nedition = \"2024\"\n",
    )?;
    fs::write(
        checkout.join("src/lib.rs"),
        "pub fn note(what: &str) {\n    println!(\"{what}\");\n}\n",
    )?;
    git(&["add", "."])?;
    git(&["commit", "--quiet", "--message", "The crate"])?;
    let target = target.to_str().context("the temporary folder is text")?;
    git(&["clone", "--quiet", "--bare", "--single-branch", ".", target])
}

/// A warmdock on a free port, which it says in its log.
fn serve(folder: &Path, name: &str, upstream: &str, tls: Value) -> Result<(SocketAddr, Child)> {
    let configuration = json!({
        "listen": { "http": "127.0.0.1:0", "tls": tls },
        "data_dir": folder.join(name),
        "git": {
            "upstreams": [ { "host": HOST, "url": upstream } ],
            "warm": [ format!("{HOST}/team/audit") ],
        },
    });
    let path = folder.join(format!("{name}.json"));
    fs::write(&path, configuration.to_string())?;
    let mut child = Command::new(env!("CARGO_BIN_EXE_warmdock"))
        .arg("--config")
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run warmdock")?;
    let mut log = BufReader::new(child.stderr.take().context("its log is piped")?).lines();
    let address = log
        .by_ref()
        .map_while(Result::ok)
        .find_map(|line| listening(&line))
        .context("warmdock ended before it listened")?;
    std::thread::spawn(move || log.for_each(drop));
    Ok((address, child))
}

fn listening(line: &str) -> Option<SocketAddr> {
    let event: Value = serde_json::from_str(line).ok()?;
    event["address"].as_str()?.parse().ok()
}
