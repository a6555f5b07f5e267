//! The two servers, each on a port of its own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::git_command::{output, run};
use crate::process;

const SSHD: &str = "/usr/sbin/sshd";
const HOST: &str = "bench.test";

/// The key of the clients, and the one that both servers show.
pub struct Keys {
    pub user: PathBuf,
    host: PathBuf,
}

/// A running server. Stopped when dropped.
pub struct Server {
    child: Child,
    pub port: u16,
    pub user: String,
    /// As clients name the repository.
    pub path: String,
    pub known_hosts: PathBuf,
}

impl Keys {
    pub fn make(folder: &Path) -> Result<Self> {
        let keys = Self {
            user: folder.join("user"),
            host: folder.join("host"),
        };
        for key in [&keys.user, &keys.host] {
            let mut keygen = Command::new("ssh-keygen");
            run(keygen
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(key))?;
        }
        Ok(keys)
    }
}

impl Server {
    /// OpenSSH's server, which starts git's upload-pack.
    pub fn sshd(folder: &Path, keys: &Keys, repository: &Path) -> Result<Self> {
        ensure!(
            Path::new(SSHD).exists(),
            "expected {SSHD}: install openssh-server"
        );
        // Where root separates privileges.
        let _ = fs::create_dir_all("/run/sshd");
        let authorized = folder.join("authorized_keys");
        fs::copy(keys.user.with_extension("pub"), &authorized)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = folder.join("sshd_config");
        fs::write(
            &config,
            format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
                 PidFile none\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 1000\n\
                 AcceptEnv GIT_PROTOCOL\nLogLevel ERROR\nSetEnv HOME={}\n",
                keys.host.display(),
                authorized.display(),
                // What is in the user's own start files of the shell is not git's time.
                folder.display(),
            ),
        )?;
        let child = Command::new(SSHD)
            .args(["-D", "-e", "-f"])
            .arg(&config)
            .spawn()
            .context("cannot start sshd")?;
        let server = Self {
            child,
            port,
            user: output(Command::new("id").arg("-un"))?,
            path: repository.display().to_string(),
            known_hosts: known_hosts(folder, keys, port)?,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(Instant::now() < deadline, "sshd does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Processor time so far, with that of the processes which it started for clients that have left.
    pub fn cpu_time(&self) -> Duration {
        process::cpu_time_with_ended_children(self.child.id())
    }

    /// warmdock with the repository `repo` of a folder as warm.
    pub fn warmdock(folder: &Path, keys: &Keys, repositories: &Path) -> Result<Self> {
        let config = json!({
            "listen": { "http": "127.0.0.1:0", "ssh": { "address": "127.0.0.1:0", "host_key_file": keys.host } },
            "data_dir": folder.join("data"),
            "git": {
                "upstreams": [{ "host": HOST, "url": format!("file://{}", repositories.display()) }],
                "warm": [format!("{HOST}/repo")],
                "max_age": "1h",
                "refresh": "1h",
            },
            "access": { "anonymous": "none", "keys": { "authorized_keys_file": folder.join("authorized_keys") } },
        });
        let path = folder.join("warmdock.json");
        fs::write(&path, config.to_string())?;
        let mut child = Command::new(env!("CARGO_BIN_EXE_warmdock"))
            .arg("--config")
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start warmdock")?;
        let log = BufReader::new(child.stderr.take().expect("piped"));
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if let Some(port) = ssh_port(&line) {
                    let _ = sender.send(port);
                }
            }
        });
        let port = receiver
            .recv_timeout(Duration::from_secs(30))
            .context("warmdock does not say where it listens")?;
        Ok(Self {
            child,
            port,
            user: "git".to_owned(),
            path: format!("/{HOST}/repo.git"),
            known_hosts: known_hosts(folder, keys, port)?,
        })
    }
}

fn known_hosts(folder: &Path, keys: &Keys, port: u16) -> Result<PathBuf> {
    let key = fs::read_to_string(keys.host.with_extension("pub"))?;
    let path = folder.join(format!("known_hosts-{port}"));
    fs::write(&path, format!("[127.0.0.1]:{port} {key}"))?;
    Ok(path)
}

fn ssh_port(line: &str) -> Option<u16> {
    let event: Value = serde_json::from_str(line).ok()?;
    if event.get("message")? != "listening" || event.get("listener")? != "ssh" {
        return None;
    }
    event
        .get("address")?
        .as_str()?
        .rsplit(':')
        .next()?
        .parse()
        .ok()
}

impl Drop for Server {
    fn drop(&mut self) {
        process::terminate(&mut self.child);
    }
}
