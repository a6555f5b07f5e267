//! TLS from files: HTTP/1.1 and HTTP/2 by ALPN, certificates that are exchanged while the service runs.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::json;

use crate::support::http;
use crate::support::process::{self, Output};
use crate::support::registry::{Registry, noise};
use crate::support::warmdock::{builder, target};
use crate::support::{Client, SAMPLE, Upstream, Warmdock, wait_for};

/// A certificate for this machine that it signed itself.
struct Certificate {
    cert: PathBuf,
    key: PathBuf,
}

fn openssl(args: &[&str]) -> Output {
    let mut command = Command::new("openssl");
    command.args(args);
    process::run(command, b"", Duration::from_secs(30))
}

fn make(folder: &Path, name: &str) -> Certificate {
    let (cert, key) = (
        folder.join(format!("{name}.crt")),
        folder.join(format!("{name}.key")),
    );
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        &format!("/CN={name}"),
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-keyout",
        key.to_str().unwrap(),
        "-out",
        cert.to_str().unwrap(),
    ])
    .ok();
    Certificate { cert, key }
}

impl Certificate {
    /// Puts this one's files in the place of another's.
    fn replace(&self, other: &Certificate) {
        for (new, old) in [(&self.cert, &other.cert), (&self.key, &other.key)] {
            let beside = old.with_extension("new");
            std::fs::copy(new, &beside).unwrap();
            std::fs::rename(beside, old).unwrap();
        }
    }
}

fn setup() -> (tempfile::TempDir, Certificate, Upstream, Warmdock) {
    let folder = crate::support::temporary_folder();
    let certificate = make(folder.path(), "first");
    let (upstream, _repo) = Upstream::with_sample();
    let tls = json!({ "cert": certificate.cert, "key": certificate.key });
    let warmdock = builder(&upstream.file_url())
        .set("/listen/tls", tls)
        .start();
    (folder, certificate, upstream, warmdock)
}

fn url(warmdock: &Warmdock) -> String {
    format!("https://{}{}", warmdock.address(), target(SAMPLE))
}

fn curl(warmdock: &Warmdock, cert: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "20", "--cacert"])
        .arg(cert)
        .args(args);
    command.arg(format!("https://{}/healthz", warmdock.address()));
    process::run(command, b"", Duration::from_secs(30))
}

/// Whether a client that trusts only this certificate is served.
fn shows(warmdock: &Warmdock, certificate: &Certificate) -> bool {
    curl(warmdock, &certificate.cert, &[]).status.success()
}

#[test]
fn git_clones_over_tls() {
    let (_folder, certificate, _upstream, warmdock) = setup();
    for protocol in [0, 2] {
        let client = Client::new(protocol);
        client
            .git(&[
                "config",
                "--global",
                "http.sslCAInfo",
                certificate.cert.to_str().unwrap(),
            ])
            .ok();
        client.clone(&url(&warmdock), "ours", &[]).ok();
        client.git_in("ours", &["fsck", "--strict"]).ok();
    }
    // Who does not know the certificate is not served.
    Client::new(2).clone(&url(&warmdock), "ours", &[]).failed();
}

#[test]
fn http_2_and_1_by_alpn() {
    let (_folder, certificate, _upstream, warmdock) = setup();
    for (option, version) in [("--http2", "2"), ("--http1.1", "1.1"), ("--no-alpn", "1.1")] {
        let args = [
            option,
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_version} %{http_code}",
        ];
        assert_eq!(
            curl(&warmdock, &certificate.cert, &args).ok().text(),
            format!("{version} 200")
        );
    }
}

#[test]
fn old_versions_of_tls_are_refused() {
    let (_folder, certificate, _upstream, warmdock) = setup();
    for versions in [
        ["--tlsv1.2", "--tls-max", "1.2"],
        ["--tlsv1.3", "--tls-max", "1.3"],
    ] {
        curl(&warmdock, &certificate.cert, &versions).ok();
    }
    let old = [
        "--tlsv1.0",
        "--tls-max",
        "1.1",
        "--ciphers",
        "DEFAULT@SECLEVEL=0",
    ];
    curl(&warmdock, &certificate.cert, &old).failed();
}

#[test]
fn a_new_certificate_is_taken_while_running() {
    let (folder, certificate, _upstream, warmdock) = setup();
    let second = make(folder.path(), "second");
    let first_cert = folder.path().join("kept.crt");
    std::fs::copy(&certificate.cert, &first_cert).unwrap();
    second.replace(&certificate);
    wait_for("the new certificate", || {
        shows(&warmdock, &second).then_some(())
    });
    curl(&warmdock, &first_cert, &[]).failed();
}

/// However often they are exchanged: who has a connection keeps it, and who comes is let in.
#[test]
fn certificates_are_exchanged_under_load() {
    /// That keep their connection, and as many that have a new one for each request.
    const CLIENTS: usize = 3;
    /// Between two requests of a client: others need the processor too.
    const PAUSE: Duration = Duration::from_millis(5);
    let (folder, certificate, _upstream, warmdock) = setup();
    let others = ["second", "third"].map(|name| make(folder.path(), name));
    let all = [&certificate, &others[0], &others[1]].map(|one| one.cert.as_path());
    let trusting = trusting(&all);
    let bundle = folder.path().join("all.crt");
    let texts = all.map(|cert| std::fs::read(cert).unwrap());
    std::fs::write(&bundle, texts.concat()).unwrap();
    let git = Client::new(2);
    let option = ["http.sslCAInfo", bundle.to_str().unwrap()];
    git.git(&[&["config", "--global"], &option[..]].concat())
        .ok();
    // Of those that keep their connection, of those that do not, and of git.
    let served: [AtomicUsize; 3] = Default::default();
    std::thread::scope(|scope| {
        // Clients come as long as this lives: also a test that fails ends.
        let running = Arc::new(());
        for number in 0..2 * CLIENTS {
            let (warmdock, trusting, kind) = (&warmdock, &trusting, number % 2);
            let (served, running) = (&served[kind], Arc::downgrade(&running));
            scope.spawn(move || {
                let mut connection = connect(warmdock, trusting);
                while running.strong_count() > 0 {
                    ask(&mut connection);
                    served.fetch_add(1, Ordering::Relaxed);
                    if kind == 1 {
                        connection = connect(warmdock, trusting);
                    }
                    std::thread::sleep(PAUSE);
                }
            });
        }
        let (url, clones) = (url(&warmdock), Arc::downgrade(&running));
        let (git, served) = (&git, &served);
        scope.spawn(move || {
            while clones.strong_count() > 0 {
                let into = format!("clone-{}", served[2].load(Ordering::Relaxed));
                git.clone(&url, &into, &["--bare"]).ok();
                served[2].fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(PAUSE);
            }
        });
        for new in others.iter().cycle().take(4) {
            new.replace(&certificate);
            warmdock.signal("HUP");
            wait_for("the new certificate", || {
                shows(&warmdock, new).then_some(())
            });
            let before = served.each_ref().map(|count| count.load(Ordering::Relaxed));
            // One more than those that may have come before.
            let expected = [CLIENTS, CLIENTS, 1];
            wait_for("all kinds of clients to come since", || {
                let mut counts = served.iter().zip(before).zip(expected);
                let have_come = counts.all(|((now, before), expected)| {
                    now.load(Ordering::Relaxed) > before + expected
                });
                have_come.then_some(())
            });
        }
    });
}

/// What a client needs to trust any of these certificates.
fn trusting(certificates: &[&Path]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for path in certificates {
        let certificate = CertificateDer::from_pem_file(path).unwrap();
        roots.add(certificate).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Who resumes a session is shown no certificate.
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

type Connection = BufReader<StreamOwned<ClientConnection, TcpStream>>;

fn connect(warmdock: &Warmdock, trusting: &Arc<ClientConfig>) -> Connection {
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let client = ClientConnection::new(trusting.clone(), name).unwrap();
    let stream = http::connect(warmdock.address());
    BufReader::new(StreamOwned::new(client, stream))
}

/// Has the references listed.
fn ask(connection: &mut Connection) {
    let request = format!(
        "GET {}/info/refs?service=git-upload-pack HTTP/1.1\r\nHost: x\r\n\r\n",
        target(SAMPLE)
    );
    connection.get_mut().write_all(request.as_bytes()).unwrap();
    let response = http::read_response(connection).unwrap();
    assert!(
        response.status == 200 && response.complete,
        "{}",
        response.text()
    );
}

#[test]
fn a_bad_new_certificate_keeps_the_old_one() {
    let (folder, certificate, _upstream, warmdock) = setup();
    let kept = Certificate {
        cert: folder.path().join("kept.crt"),
        key: folder.path().join("kept.key"),
    };
    std::fs::copy(&certificate.cert, &kept.cert).unwrap();
    std::fs::copy(&certificate.key, &kept.key).unwrap();
    let other = make(folder.path(), "other");
    // A key that does not belong to the certificate, and no certificate at all.
    std::fs::copy(&other.key, &certificate.key).unwrap();
    warmdock.signal("HUP");
    warmdock.wait_log("a complaint about the key", |event| {
        matches!(event["level"].as_str(), Some("ERROR" | "WARN"))
            && event.to_string().contains("tls")
    });
    assert!(shows(&warmdock, &kept));
    std::fs::write(&certificate.cert, "no certificate").unwrap();
    warmdock.signal("HUP");
    warmdock.wait_log("a complaint about the certificate", |event| {
        matches!(event["level"].as_str(), Some("ERROR" | "WARN"))
            && event.to_string().contains("listen.tls.cert")
    });
    assert!(shows(&warmdock, &kept));
    // The next good one is taken.
    other.replace(&certificate);
    wait_for("the good certificate", || {
        shows(&warmdock, &other).then_some(())
    });
}

/// Clients that never finish the handshake do not hold up those who do.
#[test]
fn slow_handshakes_hold_nobody_up() {
    let folder = crate::support::temporary_folder();
    let certificate = make(folder.path(), "first");
    let (upstream, _repo) = Upstream::with_sample();
    let tls = json!({ "cert": certificate.cert, "key": certificate.key });
    let config = builder(&upstream.file_url()).set("/listen/tls", tls);
    let warmdock = config.set("/limits/tls_handshake_timeout", "3s").start();
    let mut silent: Vec<_> = (0..50)
        .map(|_| crate::support::http::connect(warmdock.address()))
        .collect();
    assert!(shows(&warmdock, &certificate));
    for stream in &mut silent {
        let mut answer = Vec::new();
        if let Err(error) = std::io::Read::read_to_end(stream, &mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
    }
    assert!(shows(&warmdock, &certificate));
}

/// The upstream's certificate is checked, with the roots that `SSL_CERT_FILE` names.
#[test]
fn an_upstream_over_tls_is_checked() {
    let (_folder, certificate, upstream, first) = setup();
    // One service is the upstream of the other.
    let over = format!("https://{}/git/{}", first.address(), crate::support::HOST);
    let trusting = builder(&over)
        .environment("SSL_CERT_FILE", certificate.cert.to_str().unwrap())
        .start();
    let client = Client::new(2);
    client
        .clone(&trusting.url(SAMPLE), "ours", &["--bare"])
        .ok();
    client
        .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
        .ok();
    crate::support::compare::assert_same(
        &client,
        "ours",
        "direct",
        crate::support::compare::Objects::Reachable,
    );
    let distrusting = builder(&over).start();
    let output = Client::new(2)
        .clone(&distrusting.url(SAMPLE), "ours", &["--bare"])
        .failed();
    assert!(
        output.stderr.contains("error: 502"),
        "{}",
        output.describe()
    );
}

/// A registry is trusted by the certificates that `SSL_CERT_FILE` names at the last reload.
#[test]
fn a_registry_is_trusted_once_its_certificate_is_in_the_bundle() {
    let folder = crate::support::temporary_folder();
    let [certificate, other] = ["first", "other"].map(|name| make(folder.path(), name));
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(3000, 1));
    let later = registry.publish_bytes("later", "1.0.0", &[], noise(3000, 2));
    let tls = json!({ "cert": certificate.cert, "key": certificate.key });
    // One service is the registry of the other.
    let first = crate::crates_cache::over(&registry)
        .set("/listen/tls", tls)
        .start();
    let url = format!("https://{}/crates/corp/", first.address());
    let bundle = folder.path().join("bundle.crt");
    std::fs::copy(&other.cert, &bundle).unwrap();
    let warmdock = builder("https://unused.example.test")
        .set(
            "/crates/registries",
            json!([{ "name": "corp", "url": url }]),
        )
        .environment("SSL_CERT_FILE", bundle.to_str().unwrap())
        .start();
    let get = |path: &str| http::get(warmdock.address(), &format!("/crates/corp/{path}"));
    for path in ["3/b/big", &file.path()] {
        let refused = get(path);
        assert_eq!(refused.status, 502, "{path}");
        assert!(refused.text().contains("certificate"), "{}", refused.text());
    }

    let both = [&other, &certificate].map(|one| std::fs::read(&one.cert).unwrap());
    std::fs::write(&bundle, both.concat()).unwrap();
    warmdock.signal("HUP");
    for path in ["3/b/big", &file.path()] {
        wait_for("the registry to be trusted", || {
            (get(path).status == 200).then_some(())
        });
    }

    // A bundle without any changes nothing.
    std::fs::write(&bundle, "no certificate").unwrap();
    warmdock.signal("HUP");
    wait_for("a complaint about the bundle", || {
        assert_eq!(get("config.json").status, 200);
        warmdock.log().contains("CA certificates").then_some(())
    });
    assert!(get(&later.path()).body == later.bytes);
}

/// Over TLS cargo opens one connection and asks for everything at once.
#[test]
fn crates_over_http_2() {
    let folder = crate::support::temporary_folder();
    let certificate = make(folder.path(), "first");
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(3_000_000, 1));
    let tls = json!({ "cert": certificate.cert, "key": certificate.key });
    let warmdock = crate::crates_cache::over(&registry)
        .set("/listen/tls", tls)
        .start();
    let base = format!("https://{}/crates/corp", warmdock.address());
    let get = |path: &str| {
        let mut command = Command::new("curl");
        command.args([
            "--silent",
            "--show-error",
            "--fail",
            "--http2",
            "--max-time",
            "20",
        ]);
        command.args(["--write-out", "%{stderr}%{http_version}", "--cacert"]);
        command.arg(&certificate.cert).arg(format!("{base}/{path}"));
        let output = process::run(command, b"", Duration::from_secs(30)).ok();
        assert_eq!(output.stderr, "2");
        output.stdout
    };
    let config: serde_json::Value = serde_json::from_slice(&get("config.json")).unwrap();
    assert_eq!(config["api"], base);
    assert_eq!(get("3/b/big"), registry.entry("big").into_bytes());
    for _ in 0..2 {
        assert!(get(&file.path()) == file.bytes);
    }
}
