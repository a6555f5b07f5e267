//! OpenSSH's client with a request on its standard input, which throws the answer away.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::git_command::git_in;
use crate::repository::Repository;
use crate::server::{Keys, Server};

/// What every client asks.
pub struct Case {
    pub name: &'static str,
    /// Packets behind the capabilities of version 2.
    request: Vec<u8>,
    has_pack: bool,
}

/// Of one case against one server: medians over the rounds, but for the processor.
pub struct Figures {
    /// From the first client's start to the last one's end.
    pub wall: Duration,
    /// From a client's start to the first byte of its pack, or of the answer where there is none.
    pub first_byte: Duration,
    /// Of the server, for each client.
    pub cpu: Duration,
}

/// Short rounds are repeated, long ones are not.
const ENOUGH: Duration = Duration::from_secs(4);
const MOST_ROUNDS: usize = 10;

impl Case {
    pub fn all(repository: &Repository) -> Result<Vec<Self>> {
        let refs = git_in(
            &repository.path,
            &["for-each-ref", "--format=%(objectname)"],
        )?;
        let mut tips: Vec<&str> = refs.lines().collect();
        tips.sort_unstable();
        tips.dedup();
        let everything = tips.iter().map(|tip| format!("want {tip}")).collect();
        let head = vec![format!("want {}", repository.head), "deepen 1".to_owned()];
        Ok(vec![
            Self {
                name: "connect and leave",
                request: b"0000".to_vec(),
                has_pack: false,
            },
            Self {
                name: "clone at depth 1",
                request: fetch(head),
                has_pack: true,
            },
            Self {
                name: "full clone",
                request: fetch(everything),
                has_pack: true,
            },
        ])
    }
}

fn fetch(arguments: Vec<String>) -> Vec<u8> {
    let line = |text: &str| format!("{:04x}{text}\n", text.len() + 5);
    let mut request = line("command=fetch") + &line("object-format=sha1") + "0001";
    let fixed = ["thin-pack", "ofs-delta", "no-progress"].map(str::to_owned);
    for argument in fixed.into_iter().chain(arguments) {
        request += &line(&argument);
    }
    // The second flush says goodbye.
    (request + &line("done") + "00000000").into_bytes()
}

/// Rounds of clients that start together.
pub fn measure(server: &Server, keys: &Keys, case: &Case, clients: usize) -> Result<Figures> {
    let (mut walls, mut firsts) = (Vec::new(), Vec::new());
    // The first one finds caches cold on either side, and is not counted.
    round(server, keys, case, 1)?;
    settle();
    let before = server.cpu_time();
    while walls.len() < MOST_ROUNDS && walls.iter().sum::<Duration>() < ENOUGH {
        let (wall, first) = round(server, keys, case, clients)?;
        walls.push(wall);
        firsts.extend(first);
    }
    settle();
    let cpu = (server.cpu_time() - before) / firsts.len() as u32;
    Ok(Figures {
        cpu,
        wall: median(walls),
        first_byte: median(firsts),
    })
}

/// Processes that are about to end have ended then, and are counted.
fn settle() {
    std::thread::sleep(Duration::from_millis(500));
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn round(
    server: &Server,
    keys: &Keys,
    case: &Case,
    clients: usize,
) -> Result<(Duration, Vec<Duration>)> {
    let barrier = Barrier::new(clients);
    let results: Result<Vec<_>> = std::thread::scope(|scope| {
        let run = || {
            barrier.wait();
            let started = Instant::now();
            let first = run(server, keys, case)?;
            Ok((started, first, Instant::now()))
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(run)).collect();
        let results = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        results.collect()
    });
    let results = results?;
    let first = results.iter().map(|(started, ..)| *started).min();
    let last = results.iter().map(|(.., ended)| *ended).max();
    let wall = last.zip(first).map(|(last, first)| last - first);
    let firsts = results.iter().map(|(started, first, _)| *first - *started);
    Ok((
        wall.context("expected at least one client")?,
        firsts.collect(),
    ))
}

/// One client to its end. Gives the time of the first byte.
fn run(server: &Server, keys: &Keys, case: &Case) -> Result<Instant> {
    let mut child = Command::new("ssh")
        .args([
            "-F",
            "none",
            "-o",
            "BatchMode=yes",
            "-o",
            "IdentitiesOnly=yes",
        ])
        .args([
            "-o",
            "SendEnv=GIT_PROTOCOL",
            "-o",
            "StrictHostKeyChecking=yes",
        ])
        .args(["-o", "GlobalKnownHostsFile=none"])
        .arg("-o")
        .arg(format!(
            "UserKnownHostsFile={}",
            server.known_hosts.display()
        ))
        .arg("-i")
        .arg(&keys.user)
        .args([
            "-p",
            &server.port.to_string(),
            "-l",
            &server.user,
            "127.0.0.1",
        ])
        .arg(format!("git-upload-pack '{}'", server.path))
        .env("GIT_PROTOCOL", "version=2")
        .env_remove("SSH_AUTH_SOCK")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start ssh")?;
    let mut input = child.stdin.take().expect("piped");
    let mut output = child.stdout.take().expect("piped");
    let request = case.request.clone();
    let writer = std::thread::spawn(move || input.write_all(&request));
    let mut buffer = vec![0; 1 << 18];
    let (mut first, mut bytes, mut seen) = (None, 0, Vec::new());
    loop {
        let read = output.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        bytes += read;
        if first.is_none() {
            seen.extend_from_slice(&buffer[..read]);
            if !case.has_pack || seen.windows(5).any(|window| window == b"\x01PACK") {
                first = Some(Instant::now());
            }
        }
    }
    let status = child.wait()?;
    writer
        .join()
        .expect("no panic")
        .context("the request was not taken")?;
    ensure!(
        status.success(),
        "{} ended with {status} after {bytes} bytes",
        case.name
    );
    first.with_context(|| format!("{}: no pack in {bytes} bytes", case.name))
}

/// Of the client.
pub fn version() -> String {
    let said = Command::new("ssh").arg("-V").output();
    let text = said.map(|said| String::from_utf8_lossy(&said.stderr).into_owned());
    text.unwrap_or_default()
        .split(',')
        .next()
        .unwrap_or_default()
        .to_owned()
}
