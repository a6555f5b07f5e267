//! A registry: Debian's docker-registry on a free port. Also for the benchmark of warm builds.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Killed when dropped.
pub struct Registry {
    process: Child,
    pub address: SocketAddr,
}

impl Registry {
    /// Keeps what it is given in `folder`. Returns when it answers.
    ///
    /// # Errors
    /// The program is missing (`tests/run --images` installs it), or does not answer within half a minute.
    pub fn start(folder: &Path) -> io::Result<Self> {
        // It does not say which port it was given, so one is chosen for it.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let config = folder.join("registry.yml");
        let data = folder.join("registry");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
                data.display()
            ),
        )?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| io::Error::new(error.kind(), format!("docker-registry: {error}")))?;
        let registry = Self { process, address };
        for _ in 0..300 {
            if registry.answers().unwrap_or(false) {
                return Ok(registry);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Err(io::Error::other(format!(
            "docker-registry does not answer on {address}"
        )))
    }

    fn answers(&self) -> io::Result<bool> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /v2/ HTTP/1.0\r\n\r\n")?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok(status.ends_with(b" 200"))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
