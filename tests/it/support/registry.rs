//! A sparse registry on this machine, with crates made here, that counts what it is asked and fails in every way that
//! real ones do.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use super::http::Request;
use super::process;
use super::wait_for;

/// What goes wrong, from now on.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Connections are dropped without an answer.
    CutOff,
    /// Requests are taken and never answered.
    Hang,
    Status(u16),
    /// A page for people with status 200.
    Html,
    /// The last byte is another one.
    Wrong,
    /// A body that is shorter than the right one, and says so.
    Short,
    /// This length is told, and the connection ends behind the body.
    Announce(u64),
    /// No length is told: the body is in chunks.
    Unsized,
    /// The connection ends after this many bytes of the body.
    CutAfter(usize),
    /// The same, but only for the first request: the next one works.
    CutOnceAfter(usize),
    /// Bodies stop after this many bytes until [`Registry::release`].
    HoldAfter(usize),
}

/// What a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    Everything,
    Index,
    Files,
    /// The index entry of one crate, named in lower case.
    Entry(&'static str),
}

/// What entries come with, by which it can be asked later whether they have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validators {
    Both,
    LastModified,
    None,
}

/// A registry, until dropped.
pub struct Registry {
    folder: tempfile::TempDir,
    address: SocketAddr,
    state: Arc<State>,
}

struct State {
    settings: Mutex<Settings>,
    asked: Mutex<Vec<Request>>,
    held: Mutex<usize>,
    changed: Condvar,
}

struct Settings {
    fault: Fault,
    of: Of,
    token: Option<String>,
    /// The host that `dl` names.
    files_at: SocketAddr,
    /// Addresses by the paths that lead to them.
    redirects: BTreeMap<String, String>,
    validators: Validators,
    stopped: bool,
    entries: BTreeMap<String, String>,
    /// By path.
    files: BTreeMap<String, Vec<u8>>,
}

/// A crate as it was published.
#[derive(Clone, Debug)]
pub struct Published {
    pub name: String,
    pub version: String,
    pub checksum: String,
    pub bytes: Vec<u8>,
}

impl Published {
    /// The path of the file below a registry of the service.
    pub fn path(&self) -> String {
        format!("dl/{}/{}/{}", self.name, self.version, self.checksum)
    }
}

impl Registry {
    pub fn start() -> Self {
        let folder = crate::support::temporary_folder();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            settings: Mutex::new(Settings {
                fault: Fault::None,
                of: Of::Everything,
                token: None,
                files_at: address,
                redirects: BTreeMap::new(),
                validators: Validators::Both,
                stopped: false,
                entries: BTreeMap::new(),
                files: BTreeMap::new(),
            }),
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

    /// Of the index.
    pub fn url(&self) -> String {
        self.at("/index/")
    }

    /// Makes and publishes a crate whose `lib.rs` is `source`; `dependencies` are names and requirements.
    pub fn publish(
        &self,
        name: &str,
        version: &str,
        dependencies: &[(&str, &str)],
        source: &str,
    ) -> Published {
        let bytes = make_crate(self.folder.path(), name, version, dependencies, source);
        self.publish_bytes(name, version, dependencies, bytes)
    }

    /// Publishes whatever bytes as a crate.
    pub fn publish_bytes(
        &self,
        name: &str,
        version: &str,
        dependencies: &[(&str, &str)],
        bytes: Vec<u8>,
    ) -> Published {
        let checksum = sha256(&bytes);
        let dependencies: Vec<Value> = dependencies
            .iter()
            .map(|(name, req)| {
                json!({ "name": name, "req": req, "features": [], "optional": false, "default_features": true,
                    "target": null, "kind": "normal" })
            })
            .collect();
        let line = json!({ "name": name, "vers": version, "deps": dependencies, "cksum": checksum, "features": {},
            "yanked": false });
        let mut settings = self.state.settings();
        let entry = settings.entries.entry(index_path(name)).or_default();
        *entry += &format!("{line}\n");
        settings
            .files
            .insert(format!("/files/{name}/{version}"), bytes.clone());
        Published {
            name: name.into(),
            version: version.into(),
            checksum,
            bytes,
        }
    }

    /// Marks a version as yanked.
    pub fn yank(&self, name: &str, version: &str) {
        let mut settings = self.state.settings();
        let entry = settings.entries.get_mut(&index_path(name)).unwrap();
        let lines = entry.lines().map(|line| {
            let mut line: Value = serde_json::from_str(line).unwrap();
            if line["vers"] == version {
                line["yanked"] = true.into();
            }
            format!("{line}\n")
        });
        *entry = lines.collect();
    }

    /// The text of an entry.
    pub fn entry(&self, name: &str) -> String {
        self.state.settings().entries[&index_path(name)].clone()
    }

    pub fn fail(&self, of: Of, fault: Fault) {
        {
            let mut settings = self.state.settings();
            settings.of = of;
            settings.fault = fault;
        }
        self.state.changed.notify_all();
    }

    /// Works again; bodies that were held go on.
    pub fn release(&self) {
        self.fail(Of::Everything, Fault::None);
    }

    /// Wants this `Authorization` from now on, for everything.
    pub fn require(&self, token: &str) {
        self.state.settings().token = Some(token.to_owned());
    }

    /// Has clients ask that host for files from now on.
    pub fn send_for_files(&self, host: &Self) {
        self.state.settings().files_at = host.address;
    }

    /// Sends whoever asks for `path` on to the address `to` from now on.
    pub fn redirect(&self, path: &str, to: &str) {
        let mut settings = self.state.settings();
        settings.redirects.insert(path.to_owned(), to.to_owned());
    }

    /// The address of what is at `path`.
    pub fn at(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends entries with these from now on.
    pub fn send_validators(&self, validators: Validators) {
        self.state.settings().validators = validators;
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Request> {
        self.state.asked.lock().unwrap().clone()
    }

    /// Requests so far to paths that end so.
    pub fn asked_for(&self, end: &str) -> usize {
        let asked = self.state.asked.lock().unwrap();
        asked
            .iter()
            .filter(|request| request.path.ends_with(end))
            .count()
    }

    /// Waits until a body is held by [`Fault::HoldAfter`].
    #[track_caller]
    pub fn wait_held(&self) {
        wait_for("a request that the registry holds", || {
            (*self.state.held.lock().unwrap() > 0).then_some(())
        });
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        {
            let mut settings = self.state.settings();
            settings.stopped = true;
            settings.fault = Fault::CutOff;
            settings.of = Of::Everything;
        }
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
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some(request) = Request::read(&mut reader) {
            self.asked.lock().unwrap().push(request.clone());
            if !self.answer(&request, &stream) {
                break;
            }
        }
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Whether the connection goes on.
    fn answer(&self, request: &Request, stream: &TcpStream) -> bool {
        let is_file = request.path.starts_with("/files/");
        let fault = {
            let mut settings = self.settings();
            let concerned = match settings.of {
                Of::Everything => true,
                Of::Index => !is_file,
                Of::Files => is_file,
                Of::Entry(name) => request.path.strip_prefix("/index/") == Some(&*index_path(name)),
            };
            let fault = if concerned {
                settings.fault.clone()
            } else {
                Fault::None
            };
            if concerned && matches!(fault, Fault::CutOnceAfter(_)) {
                settings.fault = Fault::None;
            }
            fault
        };
        match fault {
            Fault::CutOff => return false,
            Fault::Hang => {
                let settings = self.settings();
                drop(
                    self.changed
                        .wait_while(settings, |now| now.fault == Fault::Hang),
                );
                return false;
            }
            Fault::Status(status) => return self.send(stream, status, &[], b"no").is_ok(),
            Fault::Html => {
                let page = b"<!doctype html><title>Sign in</title><p>Please sign in";
                return self
                    .send(stream, 200, &[("content-type", "text/html".into())], page)
                    .is_ok();
            }
            _ => {}
        }
        let (status, headers, body) = self.right_answer(request);
        self.send_with(stream, status, &headers, body, &fault)
            .is_ok()
    }

    fn right_answer(&self, request: &Request) -> (u16, Vec<(&'static str, String)>, Vec<u8>) {
        let settings = self.settings();
        if let Some(token) = &settings.token
            && request.header("authorization") != Some(token)
        {
            return (401, vec![("www-authenticate", "Cargo".into())], Vec::new());
        }
        if request.path == "/index/config.json" {
            let dl = format!("http://{}/files/{{crate}}/{{version}}", settings.files_at);
            let config =
                json!({ "dl": dl, "api": null, "auth-required": settings.token.is_some() });
            return (200, Vec::new(), config.to_string().into_bytes());
        }
        if let Some(to) = settings.redirects.get(&request.path) {
            return (302, vec![("location", to.clone())], Vec::new());
        }
        if let Some(file) = settings.files.get(&request.path) {
            let range = request
                .header("range")
                .and_then(|range| range.strip_prefix("bytes="));
            let from = range
                .and_then(|range| range.strip_suffix('-'))
                .and_then(|from| from.parse().ok());
            return match from {
                Some(from) if from < file.len() => (206, Vec::new(), file[from..].to_vec()),
                _ => (200, Vec::new(), file.clone()),
            };
        }
        let entry = request
            .path
            .strip_prefix("/index/")
            .and_then(|path| settings.entries.get(path));
        let Some(entry) = entry else {
            return (404, Vec::new(), b"none".to_vec());
        };
        let etag = format!("\"{}\"", &sha256(entry.as_bytes())[..16]);
        // Each change takes an hour.
        let changes = entry.lines().count() - 1 + entry.matches("\"yanked\":true").count();
        let at = format!("Tue, 01 Jan 2030 {changes:02}:00:00 GMT");
        let (is_known, headers) = match settings.validators {
            Validators::Both => (
                request.header("if-none-match") == Some(&*etag),
                vec![("etag", etag), ("last-modified", at)],
            ),
            Validators::LastModified => (
                request.header("if-modified-since") == Some(&*at),
                vec![("last-modified", at)],
            ),
            Validators::None => (false, Vec::new()),
        };
        if is_known {
            return (304, headers, Vec::new());
        }
        (200, headers, entry.clone().into_bytes())
    }

    fn send(
        &self,
        stream: &TcpStream,
        status: u16,
        headers: &[(&str, String)],
        body: &[u8],
    ) -> std::io::Result<()> {
        self.send_with(stream, status, headers, body.to_vec(), &Fault::None)
    }

    fn send_with(
        &self,
        mut stream: &TcpStream,
        status: u16,
        headers: &[(&str, String)],
        mut body: Vec<u8>,
        fault: &Fault,
    ) -> std::io::Result<()> {
        match fault {
            Fault::Wrong => {
                if let Some(last) = body.last_mut() {
                    *last ^= 1;
                }
            }
            Fault::Short => body.truncate(body.len().saturating_sub(7)),
            _ => {}
        }
        let mut head = format!("HTTP/1.1 {status} X\r\n");
        if *fault == Fault::Unsized {
            head += "transfer-encoding: chunked\r\n";
            let chunk = format!("{:x}\r\n", body.len());
            body.splice(..0, chunk.into_bytes());
            body.extend_from_slice(b"\r\n0\r\n\r\n");
        } else {
            let length = match fault {
                Fault::Announce(length) => *length,
                _ => body.len() as u64,
            };
            head += &format!("content-length: {length}\r\n");
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        match fault {
            Fault::CutAfter(bytes) | Fault::CutOnceAfter(bytes) => {
                stream.write_all(&body[..body.len().min(*bytes)])?;
                Err(std::io::ErrorKind::ConnectionAborted.into())
            }
            Fault::Announce(_) => {
                stream.write_all(&body)?;
                Err(std::io::ErrorKind::ConnectionAborted.into())
            }
            Fault::HoldAfter(bytes) => {
                let (first, rest) = body.split_at(body.len().min(*bytes));
                stream.write_all(first)?;
                *self.held.lock().unwrap() += 1;
                let settings = self.settings();
                let held = |settings: &mut Settings| matches!(settings.fault, Fault::HoldAfter(_));
                let settings = self.changed.wait_while(settings, held).unwrap();
                let cut = settings.fault == Fault::CutOff;
                drop(settings);
                *self.held.lock().unwrap() -= 1;
                if cut {
                    return Err(std::io::ErrorKind::ConnectionAborted.into());
                }
                stream.write_all(rest)
            }
            _ => stream.write_all(&body),
        }
    }
}

/// Where an index has an entry.
pub fn index_path(name: &str) -> String {
    let name = name.to_lowercase();
    match name.len() {
        length @ (1 | 2) => format!("{length}/{name}"),
        3 => format!("3/{}/{name}", &name[..1]),
        _ => format!("{}/{}/{name}", &name[..2], &name[2..4]),
    }
}

/// In hex.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A `.crate` file as cargo packs one.
fn make_crate(
    folder: &Path,
    name: &str,
    version: &str,
    dependencies: &[(&str, &str)],
    source: &str,
) -> Vec<u8> {
    let root = format!("{name}-{version}");
    let files = folder.join(&root);
    std::fs::create_dir_all(files.join("src")).unwrap();
    let mut manifest = format!(
        "[package]\nname = \"{name}\"\nversion = \"{version}\"\nedition = \"2021\"\n[dependencies]\n"
    );
    for (name, req) in dependencies {
        manifest += &format!("{name} = \"{req}\"\n");
    }
    std::fs::write(files.join("Cargo.toml"), manifest).unwrap();
    std::fs::write(files.join("src/lib.rs"), source).unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(folder).args(["-czf", "-", &root]);
    process::run(tar, b"", Duration::from_secs(30)).ok().stdout
}

/// Bytes that nobody packs smaller.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    super::repo::Rng(seed).bytes(length)
}
