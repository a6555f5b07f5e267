//! The peer: git http-backend behind nginx and fcgiwrap, and nginx alone serving recorded answers as files.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::git_command::output;
use crate::process;
use crate::wire::{Kind, Remote};

pub struct GitPeer {
    nginx: Child,
    /// Each answers one request at a time.
    fcgiwraps: Vec<Child>,
    address: SocketAddr,
    /// Where CGI processes write down what CPU time they took.
    accounts: PathBuf,
    recorded: PathBuf,
    pub versions: String,
}

impl GitPeer {
    /// Serves the repositories in `repositories`; `folder` takes sockets, logs and recordings, so its path is short.
    pub fn start(repositories: &Path, folder: &Path, workers: usize) -> Result<Self> {
        let nginx_program = find("nginx")?;
        let fcgiwrap_program = find("fcgiwrap")?;
        let versions = versions(&nginx_program, &fcgiwrap_program)?;
        let backend =
            PathBuf::from(output(Command::new("git").arg("--exec-path"))?).join("git-http-backend");
        ensure!(backend.exists(), "git has no {}", backend.display());

        fs::create_dir_all(folder.join("recorded"))?;
        let accounts = folder.join("cgi-times");
        let accounting = folder.join("accounting-backend");
        fs::write(
            &accounting,
            format!(
                "#!/bin/bash\n{} <&0\ntimes >> {}\n",
                backend.display(),
                accounts.display()
            ),
        )?;
        fs::set_permissions(&accounting, fs::Permissions::from_mode(0o755))?;

        // They share a listening socket that we make and that they get as standard input, as FastCGI has it. With -c
        // fcgiwrap would fork them itself, and leave them behind when it ends.
        let socket = UnixListener::bind(folder.join("fcgi.sock"))?;
        let mut fcgiwraps = Vec::new();
        for _ in 0..workers {
            let worker = Command::new(&fcgiwrap_program)
                .stdin(OwnedFd::from(socket.try_clone()?))
                .stderr(fs::File::create(folder.join("fcgiwrap.log"))?)
                .spawn()
                .context("cannot start fcgiwrap")?;
            fcgiwraps.push(worker);
        }

        let address = free_address()?;
        let configuration = folder.join("nginx.conf");
        fs::write(
            &configuration,
            nginx_configuration(address, folder, repositories, &backend, &accounting)?,
        )?;
        let nginx = Command::new(nginx_program)
            .arg("-e")
            .arg(folder.join("nginx.log"))
            .arg("-p")
            .arg(folder)
            .arg("-c")
            .arg(&configuration)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start nginx")?;
        let peer = Self {
            nginx,
            fcgiwraps,
            address,
            accounts,
            recorded: folder.join("recorded"),
            versions,
        };
        peer.wait_until_listening(folder)?;
        Ok(peer)
    }

    fn wait_until_listening(&self, folder: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(self.address).is_err() {
            if Instant::now() > deadline {
                let log = fs::read_to_string(folder.join("nginx.log")).unwrap_or_default();
                bail!("nginx does not listen at {}: {log}", self.address);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    pub fn remote(&self, repository: &str) -> Remote {
        self.at(format!("/git/{repository}"), Kind::GitServer)
    }

    /// The same, but the CPU time of git's processes is written down; starting bash costs a moment, so such rounds
    /// are not timed.
    pub fn accounted_remote(&self, repository: &str) -> Remote {
        self.at(format!("/accounted/{repository}"), Kind::GitServer)
    }

    /// Recorded answers as static files.
    pub fn recorded_remote(&self, name: &str) -> Remote {
        self.at(format!("/recorded/{name}"), Kind::Recorded)
    }

    fn at(&self, path: String, kind: Kind) -> Remote {
        Remote {
            address: self.address,
            path,
            kind,
        }
    }

    /// Where recordings under `name` belong.
    pub fn recording_folder(&self, name: &str) -> Result<PathBuf> {
        let folder = self.recorded.join(name);
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// The processes that everything else of this peer descends from.
    pub fn roots(&self) -> Vec<u32> {
        let workers = self.fcgiwraps.iter().map(Child::id);
        workers.chain([self.nginx.id()]).collect()
    }

    /// CPU time so far: nginx, fcgiwrap, and git's processes that served `accounted_remote`.
    pub fn cpu_time(&self) -> Duration {
        let accounts = fs::read_to_string(&self.accounts).unwrap_or_default();
        process::cpu_time_of_tree(&self.roots()) + accounted(&accounts)
    }

    pub fn nginx_cpu_time(&self) -> Duration {
        process::cpu_time_of_tree(&[self.nginx.id()])
    }
}

impl Drop for GitPeer {
    fn drop(&mut self) {
        process::terminate(&mut self.nginx);
        for worker in &mut self.fcgiwraps {
            process::terminate(worker);
        }
    }
}

/// bash's `times` prints two lines: of the shell itself, then of its children, each "0m0.010s 0m0.002s".
fn accounted(times: &str) -> Duration {
    let of_children = times.lines().skip(1).step_by(2);
    of_children
        .flat_map(str::split_whitespace)
        .filter_map(|time| {
            let (minutes, seconds) = time.trim_end_matches('s').split_once('m')?;
            let seconds: f64 = seconds.parse().ok()?;
            let minutes: f64 = minutes.parse().ok()?;
            Some(Duration::from_secs_f64(60.0 * minutes + seconds))
        })
        .sum()
}

fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!(
                "{program} is not installed; run benches/setup, or measure with --only warmdock"
            )
        })
}

fn versions(nginx: &Path, fcgiwrap: &Path) -> Result<String> {
    let said = |command: &mut Command| -> Result<String> {
        let output = command.output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let nginx = said(Command::new(nginx).arg("-v"))?;
    let nginx = nginx.trim().trim_start_matches("nginx version: ");
    let fcgiwrap = said(Command::new(fcgiwrap).arg("-h"))?;
    let fcgiwrap = fcgiwrap.lines().find(|line| line.contains("version"));
    let git = output(Command::new("git").arg("--version"))?;
    Ok(format!(
        "{git}, {nginx}, {}",
        fcgiwrap.unwrap_or("fcgiwrap")
    ))
}

/// nginx cannot say which port it took, so one that was free a moment ago is given to it.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn nginx_configuration(
    address: SocketAddr,
    folder: &Path,
    repositories: &Path,
    backend: &Path,
    accounting: &Path,
) -> Result<String> {
    let folder = folder.display();
    let repositories = repositories.display();
    // Started by root, nginx would serve as nobody, who may not read the repository.
    let user = if fs::metadata("/proc/self")?.uid() == 0 {
        "user root;"
    } else {
        ""
    };
    let location = |prefix: &str, program: &Path| {
        format!(
            "    location ~ ^/{prefix}(/.*)$ {{
      fastcgi_pass unix:{folder}/fcgi.sock;
      fastcgi_param SCRIPT_FILENAME {program};
      fastcgi_param PATH_INFO $1;
      fastcgi_param GIT_PROJECT_ROOT {repositories};
      fastcgi_param GIT_HTTP_EXPORT_ALL 1;
      fastcgi_param GIT_PROTOCOL $http_git_protocol;
      fastcgi_param REQUEST_METHOD $request_method;
      fastcgi_param QUERY_STRING $query_string;
      fastcgi_param CONTENT_TYPE $content_type;
      fastcgi_param CONTENT_LENGTH $content_length;
      fastcgi_param REMOTE_ADDR $remote_addr;
    }}
",
            program = program.display()
        )
    };
    let git = location("git", backend);
    let accounted = location("accounted", accounting);
    Ok(format!(
        "daemon off;
worker_processes auto;
pid {folder}/nginx.pid;
{user}
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  client_max_body_size 0;
  client_body_buffer_size 1m;
  fastcgi_read_timeout 600s;
  client_body_temp_path {folder}/nginx-body;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  proxy_temp_path {folder}/nginx-proxy;
  scgi_temp_path {folder}/nginx-scgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  server {{
    listen {address};
{git}{accounted}    location /recorded/ {{ root {folder}; }}
  }}
}}
"
    ))
}
