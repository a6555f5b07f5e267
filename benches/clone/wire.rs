//! What a Git client asks of a server: protocol v2 over HTTP, in the order and with the capabilities of git 2.47.
//!
//! Two things differ from git: request bodies are not compressed (that would measure the client), and answers are
//! checked but not stored.

use std::collections::HashSet;
use std::io::{self, BufRead, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::answer::{self, Checksum, Pack};
use crate::http::{Connection, Method, Response};
use crate::pkt_line::{self, Packet};

/// Where a repository is served.
#[derive(Clone)]
pub struct Remote {
    pub address: SocketAddr,
    /// Path of the repository without a slash at the end.
    pub path: String,
    pub kind: Kind,
}

#[derive(Clone)]
pub enum Kind {
    GitServer,
    /// Recorded responses, served as files: requests become GET requests, everything else stays.
    Recorded,
}

/// What a client does, from connecting to the last byte.
#[derive(Clone)]
pub enum Work {
    /// All branches and tags with all history, as `git clone` does.
    FullClone(Checksum),
    /// The default branch at depth 1, as `git clone --depth 1` does.
    Depth1,
    /// What is new since the client's state.
    Fetch {
        haves: Vec<String>,
        wants: Vec<String>,
    },
    /// The list of references alone, without the capability advertisement.
    RefList,
    /// HEAD alone: the least that one can ask.
    Head,
}

impl Work {
    fn checksum(&self) -> Checksum {
        match self {
            Self::FullClone(checksum) => *checksum,
            _ => Checksum::Verified,
        }
    }
}

/// What a client got.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    pub refs: usize,
    pub list_bytes: u64,
    pub pack: Option<Pack>,
    /// Up to the end of the reference list.
    pub list_time: Duration,
    /// Answers of 503 after which the client asked again.
    pub refusals: usize,
}

/// Responses are copied here when they are to be served again as files.
pub type Recording<'a> = Option<&'a mut dyn FnMut(Part) -> Result<Box<dyn Write>>>;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Part {
    Capabilities,
    RefList,
    Pack,
}

impl Part {
    /// Name of its file when recorded.
    pub fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "capabilities",
            Self::RefList => "ref-list",
            Self::Pack => "pack",
        }
    }
}

/// Performs `work` on a new connection.
pub fn perform(work: &Work, remote: &Remote, recording: Recording<'_>) -> Result<Received> {
    let mut client = Client {
        connection: Connection::open(remote.address)?,
        remote,
        recording,
        refusals: 0,
    };
    let started = Instant::now();
    if !matches!(work, Work::RefList | Work::Head) {
        client.capabilities()?;
    }
    let list = client.ref_list(match work {
        Work::Head => &["HEAD"],
        _ => &["HEAD", "refs/heads/", "refs/tags/"],
    })?;
    let list_time = started.elapsed();
    let pack = match fetch_request(work, &list)? {
        Some(request) => Some(client.fetch(&request, work.checksum())?),
        None => None,
    };
    Ok(Received {
        refs: list.refs,
        list_bytes: list.text.len() as u64,
        pack,
        list_time,
        refusals: client.refusals,
    })
}

struct Client<'a, 'r> {
    connection: Connection,
    remote: &'a Remote,
    recording: Recording<'r>,
    refusals: usize,
}

impl Client<'_, '_> {
    fn capabilities(&mut self) -> Result<()> {
        self.exchange(Part::Capabilities, &[], |body| {
            let mut text = String::new();
            body.read_to_string(&mut text)?;
            ensure!(
                text.contains("version 2\n"),
                "expected protocol version 2, found {text:?}"
            );
            Ok(())
        })
    }

    fn ref_list(&mut self, prefixes: &[&str]) -> Result<RefList> {
        let mut request = Vec::new();
        command(&mut request, "ls-refs");
        for argument in ["peel", "symrefs", "unborn"] {
            pkt_line::write(&mut request, argument);
        }
        for prefix in prefixes {
            pkt_line::write(&mut request, &format!("ref-prefix {prefix}"));
        }
        request.extend_from_slice(pkt_line::FLUSH);
        self.exchange(Part::RefList, &request, RefList::read)
    }

    fn fetch(&mut self, request: &[u8], checksum: Checksum) -> Result<Pack> {
        self.exchange(Part::Pack, request, |mut body| {
            answer::read(&mut body, checksum)
        })
    }

    /// Sends one request and has `read` take its body; asks again for as long as the server is too busy.
    fn exchange<T>(
        &mut self,
        part: Part,
        request: &[u8],
        read: impl Fn(&mut dyn BufRead) -> Result<T>,
    ) -> Result<T> {
        let path = match (&self.remote.kind, part) {
            (Kind::Recorded, _) => format!("{}/{}", self.remote.path, part.name()),
            (Kind::GitServer, Part::Capabilities) => {
                format!("{}/info/refs?service=git-upload-pack", self.remote.path)
            }
            (Kind::GitServer, _) => format!("{}/git-upload-pack", self.remote.path),
        };
        loop {
            let method = match (&self.remote.kind, part) {
                (Kind::Recorded, _) | (_, Part::Capabilities) => Method::Get,
                _ => Method::Post("application/x-git-upload-pack-request", request),
            };
            let mut response = self.connection.request(method, &path)?;
            if response.status == 503 {
                let wait = response.retry_after.unwrap_or(1).min(10);
                self.refusals += 1;
                ensure!(self.refusals < 100, "refused with 503 a hundred times");
                response.finish()?;
                std::thread::sleep(Duration::from_secs(wait));
                continue;
            }
            if response.status != 200 {
                let status = response.status;
                bail!("{path}: HTTP status {status}: {}", response.into_text());
            }
            let value = match &mut self.recording {
                None => read(&mut response),
                Some(open) => read(&mut Tee {
                    copy: open(part)?,
                    from: &mut response,
                }),
            };
            let value = value.with_context(|| format!("the answer to {path} ({part:?})"))?;
            response.finish()?;
            return Ok(value);
        }
    }
}

struct RefList {
    text: String,
    refs: usize,
}

impl RefList {
    fn read(mut body: &mut dyn BufRead) -> Result<Self> {
        let mut text = String::with_capacity(1 << 20);
        let mut refs = 0;
        while let Some(packet) = pkt_line::read_head(&mut body)? {
            match packet {
                Packet::Flush => break,
                Packet::Delimiter => {}
                Packet::Data(length) => {
                    body.take(length as u64).read_to_string(&mut text)?;
                    refs += 1;
                }
            }
        }
        ensure!(refs > 0, "expected references, found none: {text:?}");
        Ok(Self { text, refs })
    }

    /// Object id and name of each reference.
    fn entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text.lines().filter_map(|line| {
            let (id, rest) = line.split_once(' ')?;
            Some((id, rest.split(' ').next()?))
        })
    }
}

/// The body of the fetch request; None for work that fetches nothing.
fn fetch_request(work: &Work, list: &RefList) -> Result<Option<Vec<u8>>> {
    let mut request = Vec::with_capacity(64 * list.refs);
    command(&mut request, "fetch");
    for argument in ["thin-pack", "no-progress"] {
        pkt_line::write(&mut request, argument);
    }
    match work {
        Work::RefList | Work::Head => return Ok(None),
        Work::FullClone(_) => {
            pkt_line::write(&mut request, "ofs-delta");
            let mut seen = HashSet::with_capacity(list.refs);
            for (id, _) in list.entries().filter(|(id, _)| *id != "unborn") {
                if seen.insert(id) {
                    pkt_line::write(&mut request, &format!("want {id}"));
                }
            }
        }
        Work::Depth1 => {
            pkt_line::write(&mut request, "include-tag");
            pkt_line::write(&mut request, "ofs-delta");
            pkt_line::write(&mut request, "deepen 1");
            let head = list.entries().find(|(_, name)| *name == "HEAD");
            let (id, _) = head.context("expected HEAD in the reference list, found none")?;
            pkt_line::write(&mut request, &format!("want {id}"));
        }
        Work::Fetch { haves, wants } => {
            pkt_line::write(&mut request, "include-tag");
            pkt_line::write(&mut request, "ofs-delta");
            for id in wants {
                pkt_line::write(&mut request, &format!("want {id}"));
            }
            for id in haves {
                pkt_line::write(&mut request, &format!("have {id}"));
            }
        }
    }
    pkt_line::write(&mut request, "done");
    request.extend_from_slice(pkt_line::FLUSH);
    Ok(Some(request))
}

/// The head of a v2 request, up to where its arguments begin.
fn command(request: &mut Vec<u8>, name: &str) {
    pkt_line::write(request, &format!("command={name}"));
    pkt_line::write(request, "agent=git/2.47.3");
    pkt_line::write(request, "object-format=sha1");
    request.extend_from_slice(pkt_line::DELIMITER);
}

/// Copies what passes through.
struct Tee<'r, 'c> {
    from: &'r mut Response<'c>,
    copy: Box<dyn Write>,
}

impl BufRead for Tee<'_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.from.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        // The bytes are in the buffer already, so this reads nothing from the network.
        let buffer = self.from.fill_buf().expect("the buffer is filled");
        self.copy
            .write_all(&buffer[..amount])
            .expect("cannot write the recording");
        self.from.consume(amount);
    }
}

impl Read for Tee<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.len().min(into.len());
        into[..length].copy_from_slice(&self.fill_buf()?[..length]);
        self.consume(length);
        Ok(length)
    }
}
