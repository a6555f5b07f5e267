//! A small HTTP/1.1 client on a plain TCP connection: it must never be what limits a measurement, so bodies are
//! handed out as slices of the receive buffer, chunked or not.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Large enough that a side-band packet (65,520 bytes) usually lies in it whole.
const RECEIVE_BUFFER: usize = 256 << 10;
/// Far longer than any answer should take: 32 clients queue for git's few workers.
const PATIENCE: Duration = Duration::from_secs(600);

pub struct Connection {
    stream: BufReader<TcpStream>,
    host: String,
}

pub enum Method<'a> {
    Get,
    /// A body with its content type.
    Post(&'static str, &'a [u8]),
}

impl Connection {
    pub fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)
            .with_context(|| format!("cannot connect to the server at {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream: BufReader::with_capacity(RECEIVE_BUFFER, stream),
            host: address.to_string(),
        })
    }

    /// Sends a request and reads the head of its response. The body must be read to its end before the next one.
    pub fn request(&mut self, method: Method<'_>, path: &str) -> Result<Response<'_>> {
        let (verb, body) = match method {
            Method::Get => ("GET", &[][..]),
            Method::Post(_, body) => ("POST", body),
        };
        let mut message = format!(
            "{verb} {path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: git/2.47.3\r\nAccept: */*\r\nGit-Protocol: version=2\r\n",
            self.host
        );
        if let Method::Post(content_type, body) = method {
            message.push_str(&format!(
                "Content-Type: {content_type}\r\nContent-Length: {}\r\n",
                body.len()
            ));
        }
        message.push_str("\r\n");
        let mut message = message.into_bytes();
        message.extend_from_slice(body);
        self.stream.get_mut().write_all(&message)?;
        Response::read_head(&mut self.stream)
    }
}

pub struct Response<'c> {
    pub status: u16,
    /// Seconds from `Retry-After`, when the server says so.
    pub retry_after: Option<u64>,
    framing: Framing,
    stream: &'c mut BufReader<TcpStream>,
}

enum Framing {
    /// Bytes still to come.
    Length(u64),
    /// Bytes still to come of this chunk; `first` before any chunk was begun.
    Chunked {
        left: u64,
        first: bool,
    },
    Ended,
}

impl<'c> Response<'c> {
    fn read_head(stream: &'c mut BufReader<TcpStream>) -> Result<Self> {
        let status_line = read_line(stream)?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("expected an HTTP status line, found {status_line:?}"))?;
        let mut framing = None;
        let mut retry_after = None;
        loop {
            let line = read_line(stream)?;
            if line.is_empty() {
                break;
            }
            let Some((name, value)) = line.split_once(':') else {
                bail!("expected a header line, found {line:?}");
            };
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                framing = Some(Framing::Length(value.parse()?));
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                ensure!(value == "chunked", "unknown transfer encoding {value:?}");
                framing = Some(Framing::Chunked {
                    left: 0,
                    first: true,
                });
            } else if name.eq_ignore_ascii_case("retry-after") {
                retry_after = value.parse().ok();
            }
        }
        Ok(Self {
            status,
            retry_after,
            framing: framing.context("expected Content-Length or chunked, found neither")?,
            stream,
        })
    }

    /// The body as text, for error messages: no more than its beginning is kept.
    pub fn into_text(mut self) -> String {
        let mut text = Vec::new();
        let read = self.read_to_end(&mut text);
        text.truncate(300);
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        match read {
            Ok(_) => text,
            Err(error) => format!("{text} (and then: {error})"),
        }
    }

    /// Reads what is left, so that the connection can be used again.
    pub fn finish(mut self) -> io::Result<()> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }

    /// How many bytes may be taken before the framing has to be looked at again; 0 at the end of the body.
    fn allowed(&mut self) -> io::Result<u64> {
        match &mut self.framing {
            Framing::Ended => Ok(0),
            Framing::Length(left) => Ok(*left),
            Framing::Chunked { left, first } => {
                if *left > 0 {
                    return Ok(*left);
                }
                if !*first {
                    expect_empty_line(self.stream)?;
                }
                *first = false;
                let line = read_line(self.stream)?;
                let size = line.split(';').next().unwrap_or_default();
                *left = u64::from_str_radix(size.trim(), 16)
                    .map_err(|_| invalid(format!("expected a chunk size, found {line:?}")))?;
                let size = *left;
                if size == 0 {
                    while !read_line(self.stream)?.is_empty() {}
                    self.framing = Framing::Ended;
                }
                Ok(size)
            }
        }
    }
}

impl BufRead for Response<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let allowed = self.allowed()?;
        if allowed == 0 {
            return Ok(&[]);
        }
        let buffer = self.stream.fill_buf()?;
        if buffer.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the connection ended {allowed} bytes before the body or its chunk did"),
            ));
        }
        let length = buffer
            .len()
            .min(usize::try_from(allowed).unwrap_or(usize::MAX));
        Ok(&buffer[..length])
    }

    fn consume(&mut self, amount: usize) {
        match &mut self.framing {
            Framing::Length(left) | Framing::Chunked { left, .. } => *left -= amount as u64,
            Framing::Ended => debug_assert_eq!(amount, 0),
        }
        self.stream.consume(amount);
    }
}

impl Read for Response<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(into.len());
        into[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

/// One line without its CR LF.
fn read_line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.take(64 << 10).read_line(&mut line)?;
    if !line.ends_with('\n') {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("expected a whole line, found {line:?}"),
        ));
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(line)
}

fn expect_empty_line(stream: &mut BufReader<TcpStream>) -> io::Result<()> {
    let line = read_line(stream)?;
    if line.is_empty() {
        return Ok(());
    }
    Err(invalid(format!(
        "expected the end of a chunk, found {line:?}"
    )))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
