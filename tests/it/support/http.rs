//! HTTP/1.1 by hand, for both sides: what no well-behaved library would send must be sendable.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A request as a test's upstream received it.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub query: String,
    pub headers: Vec<(String, String)>,
    /// As it came: perhaps compressed.
    pub body: Vec<u8>,
}

impl Request {
    /// Reads one request; nothing when the connection ended instead.
    pub fn read(reader: &mut impl BufRead) -> Option<Self> {
        let line = read_line(reader).filter(|line| !line.is_empty())?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?);
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (path, query) = (path.to_owned(), query.to_owned());
        let headers = read_headers(reader)?;
        let mut request = Self {
            method,
            path,
            query,
            headers,
            body: Vec::new(),
        };
        if request.header("transfer-encoding").is_some() {
            read_chunks(reader, &mut request.body).ok()?;
        } else if let Some(length) = request.header("content-length") {
            request.body = vec![0; length.parse().ok()?];
            reader.read_exact(&mut request.body).ok()?;
        }
        Some(request)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    /// The body without its compression.
    pub fn decoded_body(&self) -> Vec<u8> {
        if self.header("content-encoding") != Some("gzip") {
            return self.body.clone();
        }
        let mut decoded = Vec::new();
        let _ = flate2::read::MultiGzDecoder::new(&self.body[..]).read_to_end(&mut decoded);
        decoded
    }
}

/// A response as a test's client received it.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Whether the body came to the end that its head promised.
    pub complete: bool,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// What a client of the tests waits for one read or write.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to the service. Reads that take unreasonably long fail.
pub fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("the service takes connections");
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Requests side by side on one connection of HTTP/2. `window` is how many bytes of each answer may come before somebody
/// reads it.
pub fn http2_client(window: Option<u32>) -> reqwest::Client {
    // reqwest wants one for plain HTTP as well.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]);
    let client = client
        .http2_prior_knowledge()
        .http2_initial_stream_window_size(window);
    client.build().unwrap()
}

/// `GET target` on a connection of its own.
#[track_caller]
pub fn get(address: SocketAddr, target: &str) -> Response {
    request(address, "GET", target, &[], b"")
}

/// A request on a connection of its own; `target` is sent as it is.
#[track_caller]
pub fn request(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    let mut head =
        format!("{method} {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if method == "POST" {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    head += "\r\n";
    exchange(address, &[head.as_bytes(), body].concat()).expect("an HTTP response")
}

/// A connection on which one request was answered.
pub fn used_connection(address: SocketAddr) -> TcpStream {
    let mut stream = connect(address);
    stream
        .write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let response = read_response(&mut BufReader::new(&stream)).unwrap();
    assert_eq!(response.status, 200);
    stream
}

/// Sends bytes and reads one response. A server may answer and close before it read everything.
pub fn exchange(address: SocketAddr, bytes: &[u8]) -> io::Result<Response> {
    let mut stream = connect(address);
    let mut writer = stream.try_clone()?;
    let bytes = bytes.to_vec();
    let sender = std::thread::spawn(move || writer.write_all(&bytes));
    let begun = Instant::now();
    let response = read_response(&mut BufReader::new(&mut stream));
    // What the readers take for a connection that ended may be one on which nothing comes.
    assert!(begun.elapsed() < PATIENCE, "neither answered nor closed");
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = sender.join();
    response
}

/// Reads the head of a response.
pub fn read_head(reader: &mut impl BufRead) -> io::Result<Response> {
    let none = || io::Error::new(io::ErrorKind::UnexpectedEof, "no HTTP response");
    let line = read_line(reader).ok_or_else(none)?;
    let status = line
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(none)?;
    let headers = read_headers(reader).ok_or_else(none)?;
    Ok(Response {
        status,
        headers,
        body: Vec::new(),
        complete: false,
    })
}

/// Reads a whole response; a body that breaks off is no error, but marked.
pub fn read_response(reader: &mut impl BufRead) -> io::Result<Response> {
    let mut response = read_head(reader)?;
    read_body(reader, &mut response);
    Ok(response)
}

/// Reads the body that belongs to the head in `response`.
pub fn read_body(reader: &mut impl BufRead, response: &mut Response) {
    let mut body = Vec::new();
    response.complete = if response.header("transfer-encoding").is_some() {
        read_chunks(reader, &mut body).is_ok()
    } else if let Some(length) = response
        .header("content-length")
        .and_then(|length| length.parse::<u64>().ok())
    {
        reader
            .take(length)
            .read_to_end(&mut body)
            .is_ok_and(|read| read as u64 == length)
    } else {
        reader.read_to_end(&mut body).is_ok()
    };
    response.body = body;
}

fn read_line(reader: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    reader
        .read_until(b'\n', &mut line)
        .ok()
        .filter(|read| *read > 0)?;
    Some(String::from_utf8_lossy(&line).trim_end().to_owned())
}

fn read_headers(reader: &mut impl BufRead) -> Option<Vec<(String, String)>> {
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Some(headers);
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    let broken = || io::Error::new(io::ErrorKind::UnexpectedEof, "the chunked body broke off");
    loop {
        let line = read_line(reader).ok_or_else(broken)?;
        let size = u64::from_str_radix(line.split(';').next().unwrap_or_default(), 16)
            .map_err(|_| broken())?;
        if size == 0 {
            while !read_line(reader).ok_or_else(broken)?.is_empty() {}
            return Ok(());
        }
        if reader.take(size).read_to_end(body)? as u64 != size {
            return Err(broken());
        }
        read_line(reader).ok_or_else(broken)?;
    }
}

fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers
        .iter()
        .find(|(found, _)| found.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}
