//! An upstream Git host that counts what it is asked, and fails in every way that real ones do.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::http::Request;
use super::{Repo, cgi, wait_for};

/// What goes wrong, from now on and for every request that it names.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Connections are dropped without an answer.
    CutOff,
    /// Requests are taken and never answered.
    Hang,
    /// Those below this path are.
    HangFor(&'static str),
    /// Bytes that are neither HTTP nor git.
    Garbage,
    /// HTTP 200 with bytes that are not git, under git's content type.
    GarbageBody,
    /// A page for people, with status 200: what a proxy in between likes to answer.
    Html,
    Status(u16),
    /// The same with a line in its head.
    StatusWith(u16, &'static str),
    /// To the same path below another address.
    Redirect(String),
    /// Packs end after this many bytes of the response, with the connection.
    CutPackAfter(usize),
    /// Packs stop after this many bytes until [`Upstream::release`].
    HoldPackAfter(usize),
    /// References that never end, one like the other.
    EndlessList,
    /// Instead of a pack come the small packets by which git's server says that it is still there, until another fault.
    KeepAlive,
    /// The byte at this place of a response with a pack is another one.
    DamagePackAt(usize),
    /// Requests for packs get an error status, all others work.
    NoPacks,
}

/// Who asked for what.
#[derive(Clone, Debug)]
pub struct Asked {
    pub request: Request,
    /// The `agent=` in the body; the service's own has its name in it, those of clients are passed through.
    pub agent: String,
    /// Whether a pack was in the answer.
    pub pack: bool,
}

/// A folder of repositories served over HTTP by `git http-backend`, until dropped.
pub struct Upstream {
    folder: tempfile::TempDir,
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    root: PathBuf,
    settings: Mutex<Settings>,
    asked: Mutex<Vec<Asked>>,
    /// How many packs are held now; and a notice when the settings change.
    held: Mutex<usize>,
    changed: Condvar,
}

struct Settings {
    fault: Fault,
    /// The Authorization header that is asked for.
    authorization: Option<String>,
    /// Behaves like a server from before protocol v2.
    only_v0: bool,
    /// Knows its repositories by paths without `.git` alone.
    without_git: bool,
    stopped: bool,
}

impl Upstream {
    /// Starts to listen, with no repositories yet.
    pub fn start() -> Self {
        let folder = crate::support::temporary_folder();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let settings = Settings {
            fault: Fault::None,
            authorization: None,
            only_v0: false,
            without_git: false,
            stopped: false,
        };
        let state = Arc::new(State {
            root: folder.path().to_owned(),
            settings: Mutex::new(settings),
            asked: Mutex::default(),
            held: Mutex::default(),
            changed: Condvar::new(),
        });
        let shared = state.clone();
        super::accept(
            listener,
            move || (!shared.settings().stopped).then(|| shared.clone()),
            |state, stream| state.serve(stream),
        );
        Self {
            folder,
            address,
            state,
        }
    }

    /// One with the sample repository at `team/sample.git`.
    pub fn with_sample() -> (Self, Repo) {
        let upstream = Self::start();
        let repo = upstream.sample(super::SAMPLE);
        (upstream, repo)
    }

    /// The path of a repository on the upstream's disk.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.git"))
    }

    pub fn sample(&self, name: &str) -> Repo {
        Repo::sample(&self.path(name), 1)
    }

    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// `http://…` of the folder of repositories.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// `file://…` of the folder of repositories.
    pub fn file_url(&self) -> String {
        format!("file://{}", self.folder.path().display())
    }

    /// `file://…` of one repository, to clone it without this service and without being counted.
    pub fn direct(&self, name: &str) -> String {
        format!("file://{}", self.path(name).display())
    }

    pub fn fail(&self, fault: Fault) {
        self.state.settings().fault = fault;
        self.state.changed.notify_all();
    }

    /// Works again; packs that were held go on.
    pub fn release(&self) {
        self.fail(Fault::None);
    }

    /// Asks for this Authorization header from now on.
    pub fn require(&self, authorization: &str) {
        self.state.settings().authorization = Some(authorization.to_owned());
    }

    /// Speaks nothing newer than protocol v0 from now on.
    pub fn only_v0(&self) {
        self.state.settings().only_v0 = true;
    }

    /// Knows its repositories by paths without `.git` alone from now on.
    pub fn without_git(&self) {
        self.state.settings().without_git = true;
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    /// Packs given to the service's own fetches so far; requests that it passed through for a client do not count.
    pub fn packs_for_mirror(&self) -> usize {
        self.asked()
            .iter()
            .filter(|asked| asked.pack && asked.agent.contains("warmdock"))
            .count()
    }

    /// Packs given so far, to whomever.
    pub fn packs(&self) -> usize {
        self.asked().iter().filter(|asked| asked.pack).count()
    }

    /// Waits until a pack is held by [`Fault::HoldPackAfter`].
    #[track_caller]
    pub fn wait_held(&self) {
        wait_for("a fetch that the upstream holds", || {
            (*self.state.held.lock().unwrap() > 0).then_some(())
        });
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let mut settings = self.state.settings();
        settings.stopped = true;
        settings.fault = Fault::CutOff;
        drop(settings);
        self.state.changed.notify_all();
        // Wakes the accept loop.
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap()
    }

    fn serve(&self, stream: TcpStream) {
        if self.settings().fault == Fault::CutOff {
            return;
        }
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        if let Some(request) = Request::read(&mut reader) {
            let _ = self.answer(request, &stream);
        }
        let _ = stream.shutdown(Shutdown::Both);
    }

    fn answer(&self, mut request: Request, mut stream: &TcpStream) -> std::io::Result<()> {
        let (fault, authorization, only_v0, without_git) = {
            let settings = self.settings();
            (
                settings.fault.clone(),
                settings.authorization.clone(),
                settings.only_v0,
                settings.without_git,
            )
        };
        let number = self.record(&request);
        if without_git {
            if request.path.contains(".git/") {
                return respond(stream, 404, "text/plain", "Not Found");
            }
            for tail in ["/info/refs", "/git-upload-pack"] {
                request.path = request.path.replace(tail, &format!(".git{tail}"));
            }
        }
        let asks_for_pack =
            request.method == "POST" && !contains(&request.decoded_body(), b"command=ls-refs");
        match fault {
            Fault::Hang => {
                self.wait_while(|fault| *fault == Fault::Hang);
                return Ok(());
            }
            Fault::HangFor(path) if request.path.starts_with(path) => {
                self.wait_while(|fault| *fault == Fault::HangFor(path));
                return Ok(());
            }
            Fault::Garbage => {
                return stream.write_all(b"\x00\x01 this is neither HTTP nor git \xff\xfe\r\n\r\n");
            }
            Fault::GarbageBody => {
                let kind = if request.method == "GET" {
                    "advertisement"
                } else {
                    "result"
                };
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-{kind}\r\nConnection: close\r\n\r\n"
                );
                return stream.write_all(&[head.as_bytes(), b"zzzz no packets \x00\xff"].concat());
            }
            Fault::Html => {
                return respond(
                    stream,
                    200,
                    "text/html",
                    "<html><body>Please sign in</body></html>",
                );
            }
            Fault::Status(status) => {
                return respond(stream, status, "text/plain", "the test says so\n");
            }
            Fault::StatusWith(status, line) => {
                let head = format!(
                    "HTTP/1.1 {status} Whatever\r\n{line}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                );
                return stream.write_all(head.as_bytes());
            }
            Fault::Redirect(to) => {
                let location = format!("{to}{}?{}", request.path, request.query);
                let head = format!(
                    "HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
                );
                return stream.write_all(head.as_bytes());
            }
            Fault::EndlessList if request.method == "POST" && !asks_for_pack => {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-result\r\nConnection: close\r\n\r\n";
                stream.write_all(head.as_bytes())?;
                let line = format!("{} refs/heads/{}\n", "1".repeat(40), "x".repeat(60_000));
                let line = format!("{:04x}{line}", line.len() + 4);
                loop {
                    stream.write_all(line.as_bytes())?;
                }
            }
            Fault::KeepAlive if asks_for_pack => {
                let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-result\r\nConnection: close\r\n\r\n";
                stream.write_all(&[head.as_bytes(), b"000dpackfile\n"].concat())?;
                while self.settings().fault == Fault::KeepAlive {
                    stream.write_all(b"0005\x01")?;
                    std::thread::sleep(Duration::from_millis(100));
                }
                return Ok(());
            }
            Fault::NoPacks if asks_for_pack => {
                return respond(stream, 503, "text/plain", "no packs today\n");
            }
            _ => {}
        }
        if let Some(expected) = authorization
            && request.header("authorization") != Some(&expected)
        {
            let head = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"test\"\r\nContent-Length: 0\r\n\r\n";
            return stream.write_all(head.as_bytes());
        }
        if request.path.ends_with(".keys") {
            // As GitHub and GitLab publish the keys of their users.
            let file = self.root.join(&request.path[1..]);
            return match std::fs::read_to_string(file) {
                Ok(keys) => respond(stream, 200, "text/plain", &keys),
                Err(_) => respond(stream, 404, "text/plain", "Not Found"),
            };
        }
        let protocol = request.header("git-protocol").filter(|_| !only_v0);
        let answer = cgi::http_backend(&self.root, &request, protocol);
        let mut head = format!("HTTP/1.1 {} Whatever\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes())?;
        self.pass_body(answer.body, stream, number, &fault)
    }

    /// Copies a body as chunks and does to a pack in it what `fault` says.
    fn pass_body(
        &self,
        mut body: impl Read,
        mut stream: &TcpStream,
        number: usize,
        fault: &Fault,
    ) -> std::io::Result<()> {
        let (mut sent, mut pack, mut buffer) = (0, false, vec![0; 32 * 1024]);
        // The mark of a pack may be cut in two by the pipe.
        let mut before = Vec::new();
        loop {
            let read = body.read(&mut buffer)?;
            if read == 0 {
                return stream.write_all(b"0\r\n\r\n");
            }
            let bytes = &mut buffer[..read];
            before.extend_from_slice(bytes);
            if !pack && contains(&before, b"\x01PACK") {
                pack = true;
                self.asked.lock().unwrap()[number].pack = true;
            }
            before.drain(..before.len().saturating_sub(4));
            match *fault {
                Fault::DamagePackAt(place) if pack && (sent..sent + read).contains(&place) => {
                    bytes[place - sent] ^= 0x55
                }
                Fault::CutPackAfter(place) if pack && sent + read > place => {
                    return write_chunk(stream, &bytes[..place.saturating_sub(sent)]);
                }
                Fault::HoldPackAfter(place) if pack && sent + read > place => {
                    let split = place.saturating_sub(sent);
                    write_chunk(stream, &bytes[..split])?;
                    self.hold();
                    bytes.copy_within(split.., 0);
                    write_chunk(stream, &bytes[..read - split])?;
                    sent += read;
                    continue;
                }
                _ => {}
            }
            write_chunk(stream, bytes)?;
            sent += read;
        }
    }

    fn record(&self, request: &Request) -> usize {
        let body = String::from_utf8_lossy(&request.decoded_body()).into_owned();
        let agent = body.split_once("agent=").map_or("", |(_, rest)| rest);
        let agent = agent
            .split(|c: char| c.is_whitespace() || c == '\0')
            .next()
            .unwrap_or_default()
            .to_owned();
        let mut asked = self.asked.lock().unwrap();
        asked.push(Asked {
            request: request.clone(),
            agent,
            pack: false,
        });
        asked.len() - 1
    }

    fn hold(&self) {
        *self.held.lock().unwrap() += 1;
        self.wait_while(|fault| matches!(fault, Fault::HoldPackAfter(_)));
        *self.held.lock().unwrap() -= 1;
    }

    fn wait_while(&self, condition: impl Fn(&Fault) -> bool) {
        let mut settings = self.settings();
        while condition(&settings.fault) {
            settings = self
                .changed
                .wait_timeout(settings, Duration::from_secs(1))
                .unwrap()
                .0;
        }
    }
}

fn respond(mut stream: &TcpStream, status: u16, kind: &str, text: &str) -> std::io::Result<()> {
    let length = text.len();
    stream.write_all(
        format!("HTTP/1.1 {status} Whatever\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}")
            .as_bytes(),
    )
}

fn write_chunk(mut stream: &TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes())?;
    stream.write_all(bytes)?;
    stream.write_all(b"\r\n")
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
