//! OpenSSH's own server in front of a folder of repositories. Each connection is a `sshd -i` of its own behind a
//! socket of ours, so that the system chooses the port and a test can cut, stall and count what passes.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use super::process;

const SSHD: &str = "/usr/sbin/sshd";

/// What happens to what the server sends, from now on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SshFault {
    None,
    /// Connections end without a word.
    Refuse,
    /// Nothing comes.
    Hang,
    /// The connection ends after this many bytes from the server.
    CutAfter(usize),
    /// Nothing more comes after this many bytes from the server.
    HoldAfter(usize),
}

/// A server with a host key of each kind, and a user whose key it knows.
pub struct Sshd {
    folder: tempfile::TempDir,
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    config: PathBuf,
    log: PathBuf,
    settings: Mutex<Settings>,
}

struct Settings {
    fault: SshFault,
    connections: usize,
    /// Connections on which something is held back.
    held: usize,
    stopped: bool,
}

/// The kinds of host keys; the first is the one that clients prefer.
const HOST_KEYS: [&str; 3] = ["ed25519", "ecdsa", "rsa"];

impl Sshd {
    /// A server that knows the key `user` and takes `GIT_PROTOCOL`.
    pub fn start() -> Self {
        Self::start_with("AcceptEnv GIT_PROTOCOL\n")
    }

    /// A server with further lines in its configuration.
    pub fn start_with(lines: &str) -> Self {
        let folder = crate::support::temporary_folder();
        let at = |name: &str| folder.path().join(name);
        for kind in HOST_KEYS {
            keygen(&at(&format!("host_{kind}")), &["-t", kind]);
        }
        keygen(&at("user"), &["-t", "ed25519"]);
        std::fs::copy(at("user.pub"), at("authorized_keys")).unwrap();
        let mut config = format!(
            "AuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\nLogLevel VERBOSE\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\nMaxStartups 100\n",
            at("authorized_keys").display()
        );
        for kind in HOST_KEYS {
            config += &format!("HostKey {}\n", at(&format!("host_{kind}")).display());
        }
        std::fs::write(at("sshd_config"), config + lines).unwrap();
        // Where root separates privileges; a package's service makes it, and no service runs here.
        let _ = std::fs::create_dir_all("/run/sshd");

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            config: at("sshd_config"),
            log: at("sshd.log"),
            settings: Mutex::new(Settings {
                fault: SshFault::None,
                connections: 0,
                held: 0,
                stopped: false,
            }),
        });
        let shared = state.clone();
        super::accept(
            listener,
            move || {
                let mut settings = shared.settings();
                if settings.stopped {
                    return None;
                }
                settings.connections += 1;
                Some(shared.clone())
            },
            |state, stream| state.serve(stream),
        );
        Self {
            folder,
            address,
            state,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `ssh://…` of a folder on this machine.
    pub fn url(&self, root: &Path) -> String {
        format!("ssh://{}@{}{}", user(), self.address, root.display())
    }

    /// `[127.0.0.1]:port`, as known_hosts files name this server.
    pub fn name(&self) -> String {
        format!("[127.0.0.1]:{}", self.address.port())
    }

    /// Writes a known_hosts file with the host key of one kind, and gives its path.
    pub fn known_hosts(&self, kind: &str) -> PathBuf {
        let key = self.public(&format!("host_{kind}"));
        self.write("known_hosts", &format!("{} {key}\n", self.name()))
    }

    /// Writes a file into the server's folder.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Kind and key of a public key, without its comment.
    pub fn public(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap();
        text.split_whitespace()
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Makes a key beside the others, which the server does not know.
    pub fn keygen(&self, name: &str, args: &[&str]) -> PathBuf {
        keygen(&self.path(name), args);
        self.path(name)
    }

    /// Lets a key in from now on.
    pub fn authorize(&self, name: &str) {
        let text = std::fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap();
        self.write("authorized_keys", &text);
    }

    /// The entry of `git.upstreams` for repositories below `root`, with the key `user`.
    pub fn upstream(&self, root: &Path) -> Value {
        json!({
            "host": super::HOST,
            "url": self.url(root),
            "key_file": self.path("user"),
            "known_hosts_file": self.known_hosts("ed25519"),
        })
    }

    pub fn fail(&self, fault: SshFault) {
        self.state.settings().fault = fault;
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.state.settings().connections
    }

    /// Waits until a client waits for what is held back.
    #[track_caller]
    pub fn wait_held(&self) {
        super::wait_for("something to be held back", || {
            (self.state.settings().held > 0).then_some(())
        });
    }

    /// What the server's processes wrote.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("sshd.log")).unwrap_or_default()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let mut settings = self.state.settings();
        settings.stopped = true;
        settings.fault = SshFault::Refuse;
        drop(settings);
        let _ = TcpStream::connect(self.address);
        if std::thread::panicking() {
            eprintln!("--- log of sshd\n{}", self.log());
        }
    }
}

impl State {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap()
    }

    fn serve(&self, mut client: TcpStream) {
        if self.settings().fault == SshFault::Refuse {
            return;
        }
        let (mut near, far) = UnixStream::pair().unwrap();
        let (input, output): (OwnedFd, OwnedFd) = (far.try_clone().unwrap().into(), far.into());
        let mut child = Command::new(SSHD)
            .args(["-i", "-f"])
            .arg(&self.config)
            .arg("-E")
            .arg(&self.log)
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::null())
            .spawn()
            .expect("sshd starts");
        let (mut up, mut server) = (client.try_clone().unwrap(), near.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut up, &mut server);
            let _ = server.shutdown(Shutdown::Write);
        });
        self.pass_down(&mut near, &mut client);
        let _ = client.shutdown(Shutdown::Both);
        let _ = near.shutdown(Shutdown::Both);
        let _ = child.kill();
        let _ = child.wait();
    }

    fn pass_down(&self, server: &mut UnixStream, client: &mut TcpStream) {
        let mut buffer = vec![0; 16 * 1024];
        let mut sent = 0;
        while let Ok(read @ 1..) = server.read(&mut buffer) {
            if !self.pass(&buffer[..read], sent, client) {
                return;
            }
            sent += read;
        }
    }

    /// Passes on what came after `sent` bytes; whether the connection goes on.
    fn pass(&self, bytes: &[u8], sent: usize, client: &mut TcpStream) -> bool {
        let mut passed = 0;
        let mut held = None;
        loop {
            let fault = self.settings().fault;
            let end = match fault {
                SshFault::Refuse => return false,
                SshFault::None => bytes.len(),
                SshFault::Hang => passed,
                SshFault::CutAfter(limit) | SshFault::HoldAfter(limit) => {
                    limit.saturating_sub(sent).clamp(passed, bytes.len())
                }
            };
            if client.write_all(&bytes[passed..end]).is_err() {
                return false;
            }
            passed = end;
            if passed == bytes.len() {
                return true;
            }
            if matches!(fault, SshFault::CutAfter(_)) {
                return false;
            }
            held.get_or_insert_with(|| Held::new(self));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Counts a connection among those on which something is held back.
struct Held<'a>(&'a State);

impl<'a> Held<'a> {
    fn new(state: &'a State) -> Self {
        state.settings().held += 1;
        Self(state)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.settings().held -= 1;
    }
}

/// Who runs the tests, which is whom a server that is run by them can log in.
fn user() -> String {
    let mut id = Command::new("id");
    id.arg("-un");
    process::run(id, b"", Duration::from_secs(10)).ok().text()
}

/// Runs `ssh-keygen` for a new key at `path`, without a passphrase unless `args` has one.
pub fn keygen(path: &Path, args: &[&str]) {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-C", "test", "-f"]).arg(path);
    if !args.contains(&"-N") {
        command.args(["-N", ""]);
    }
    command.args(args);
    process::run(command, b"", Duration::from_secs(60)).ok();
}

/// `ssh-keygen` with these arguments, for all that is no new key.
pub fn ssh_keygen(args: &[&str]) -> process::Output {
    let mut command = Command::new("ssh-keygen");
    command.args(args);
    process::run(command, b"", Duration::from_secs(60)).ok()
}
