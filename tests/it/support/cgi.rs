//! `git http-backend` behind a socket: one request, one process, as a web server would run it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};

use super::http::Request;

/// The head of what http-backend answered, and the body still to be read.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: BufReader<ChildStdout>,
}

/// Runs http-backend for `request` over the repositories below `root`.
pub fn http_backend(root: &Path, request: &Request, git_protocol: Option<&str>) -> Answer {
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REMOTE_ADDR", "127.0.0.1")
        .env("REQUEST_METHOD", &request.method)
        .env("PATH_INFO", &request.path)
        .env("QUERY_STRING", &request.query)
        .env(
            "CONTENT_TYPE",
            request.header("content-type").unwrap_or_default(),
        )
        .env("CONTENT_LENGTH", request.body.len().to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some(encoding) = request.header("content-encoding") {
        command.env("HTTP_CONTENT_ENCODING", encoding);
    }
    if let Some(version) = git_protocol {
        command.env("GIT_PROTOCOL", version);
    }
    let mut child = command.spawn().expect("git http-backend starts");
    let mut input = child.stdin.take().unwrap();
    let body = request.body.clone();
    std::thread::spawn(move || input.write_all(&body));
    let mut output = BufReader::new(child.stdout.take().unwrap());
    // Nobody waits for its exit status; without this it would stay a zombie.
    std::thread::spawn(move || child.wait());

    let (mut status, mut headers) = (200, Vec::new());
    loop {
        let mut line = String::new();
        if output.by_ref().read_line(&mut line).unwrap_or(0) == 0 || line.trim_end().is_empty() {
            return Answer {
                status,
                headers,
                body: output,
            };
        }
        let (name, value) = line
            .trim_end()
            .split_once(": ")
            .unwrap_or((line.trim_end(), ""));
        if name.eq_ignore_ascii_case("status") {
            status = value
                .split(' ')
                .next()
                .and_then(|code| code.parse().ok())
                .unwrap_or(500);
        } else {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
}
