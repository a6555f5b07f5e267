//! What is in the images of warmdock itself, for both architectures, and that it runs.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use object::elf;
use serde_json::{Value, json};

use crate::archive::{Archive, Binary, Image};
use crate::docker::{self, Build, Container, Tag, text};
use crate::support::{Client, Repo, http, process, temporary_folder, wait_for};

const MEGABYTE: u64 = 1_000_000;
/// From the start of the process to the answer of `/readyz`, in the median.
const READY: Duration = Duration::from_millis(50);
const STARTS: usize = 9;
const BINARY: &str = "usr/local/bin/warmdock";

const MACHINES: [(&str, elf::Machine); 2] = [("amd64", elf::EM_X86_64), ("arm64", elf::EM_AARCH64)];

/// A build by the bake file, with what a release would say.
fn bake(target: &str) -> Build {
    let build = Build::bake(&[target]);
    // What is wanted of Debian's images is that they run: optimising two more binaries would take a quarter of an hour.
    let build = match target.ends_with("debian") {
        true => build.variable("PROFILE", "quick"),
        false => build,
    };
    build
        .variable("SOURCE", "https://git.corp.example/team/warmdock")
        .variable("REVISION", "0123456789abcdef")
        .variable("TAG", "1.2.3-image-tests")
        .variable("SOURCE_DATE_EPOCH", "1700000000")
}

/// One variant of `bake all`, for both architectures.
#[track_caller]
fn archive(variant: &str) -> Archive {
    let folder = temporary_folder();
    let file = folder.path().join("image.tar");
    bake(&format!("all-{variant}"))
        .option(format!("--set=*.output=type=oci,dest={}", file.display()))
        .run()
        .ok();
    Archive::open(&file)
}

/// What all variants have to have.
#[track_caller]
fn common(image: &Image, machine: elf::Machine) -> Binary {
    let file = image.file(BINARY);
    assert_eq!((file.mode & 0o7777, file.uid, file.gid), (0o555, 0, 0));
    let binary = Binary::of(&file.content);
    assert_eq!(binary.machine, machine);
    assert!(!binary.has_symbols, "symbols are stripped");
    for name in ["warmdock", "tokio", "rustls", "gix-pack"] {
        let found = binary.crates.iter().any(|found| found == name);
        assert!(found, "no {name} in {:?}", binary.crates);
    }

    let data = image.file("var/lib/warmdock");
    assert!(data.kind.is_dir());
    let owned = (data.mode & 0o7777, data.uid, data.gid);
    assert_eq!(owned, (0o750, 65532, 65532));
    let bundle = &image.file("etc/ssl/certs/ca-certificates.crt").content;
    let certificates = String::from_utf8_lossy(bundle);
    assert!(certificates.matches("-----BEGIN CERTIFICATE-----").count() > 50);
    assert!(image.file("config").kind.is_dir());

    let config = &image.config["config"];
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"], json!(["/usr/local/bin/warmdock"]));
    assert_eq!(
        config["Cmd"],
        Value::Null,
        "the base's command would be an argument"
    );
    assert_eq!(config["StopSignal"], "SIGTERM");
    let health = ["CMD", "/usr/local/bin/warmdock", "healthcheck"];
    assert_eq!(config["Healthcheck"]["Test"], json!(health));
    for (label, value) in [
        ("title", "warmdock"),
        ("source", "https://git.corp.example/team/warmdock"),
        ("revision", "0123456789abcdef"),
        ("version", "1.2.3-image-tests"),
        ("licenses", "Apache-2.0"),
        ("created", "2023-11-14T22:13:20Z"),
    ] {
        let label = format!("org.opencontainers.image.{label}");
        assert_eq!(config["Labels"][&label], value, "{label}");
    }
    assert_eq!(image.config["created"], "2023-11-14T22:13:20Z");
    assert!(image.efficiency() >= 0.99, "{}", image.efficiency());
    // What the project adds is one layer, and nobody gets other rights by it.
    let layer = file.layer;
    assert_eq!(
        layer + 1,
        image.manifest["layers"].as_array().unwrap().len()
    );
    for (name, file) in image.files.iter().filter(|(_, file)| file.layer == layer) {
        assert_eq!(file.mode & 0o6000, 0, "{name} is setuid or setgid");
        let writable = file.mode & 0o002 != 0 && !file.kind.is_symlink();
        assert!(!writable || name == "tmp", "{name} is writable for all");
    }
    binary
}

/// A folder with a repository as the upstream, and a configuration that listens at `address`.
fn setup(folder: &Path, address: &str, data: &str, upstream: &str) -> Repo {
    let repo = Repo::sample(&folder.join("upstream/team/sample.git"), 1);
    let config = json!({
        "listen": { "http": address },
        "data_dir": data,
        "git": { "upstreams": [{ "host": "git.example.test", "url": format!("file://{upstream}") }] },
        "access": { "anonymous": "read" },
    });
    std::fs::write(folder.join("app_config.json"), config.to_string()).unwrap();
    repo
}

#[track_caller]
fn clone(address: &str, repo: &Repo) {
    let client = Client::new(2);
    let url = format!("http://{address}/git/git.example.test/team/sample.git");
    client.clone(&url, "clone", &[]).ok();
    let tip = client.git_in("clone", &["rev-parse", "HEAD"]).ok().text();
    assert_eq!(tip, repo.id("main"));
    client.git_in("clone", &["fsck", "--strict"]).ok();
}

/// Runs the image for this machine as the compose file does: `check`, `serve`, a clone, and a word about health.
#[track_caller]
fn runs_in_a_container(variant: &str) {
    let tag = match variant {
        "musl" => "1.2.3-image-tests".to_owned(),
        other => format!("1.2.3-image-tests-{other}"),
    };
    let tag = Tag(format!("warmdock:{tag}"));
    bake(variant).option("--load").run().ok();
    let folder = temporary_folder();
    let repo = setup(
        folder.path(),
        "0.0.0.0:8080",
        "/var/lib/warmdock",
        "/upstream",
    );
    let config = format!(
        "{}:/config/app_config.json:ro",
        text(&folder.path().join("app_config.json"))
    );
    let upstream = format!("{}:/upstream:ro", text(&folder.path().join("upstream")));
    let locked = [
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--volume",
        &config,
    ];
    let checked = docker::run(&[&["run", "--rm"], &locked[..], &[&tag.0, "check"]].concat()).ok();
    assert!(
        checked.text().contains("git.example.test"),
        "{}",
        checked.describe()
    );

    let more = [
        "--volume",
        &upstream,
        "--mount=type=volume,target=/var/lib/warmdock",
        "--publish=127.0.0.1:0:8080",
        &tag.0,
    ];
    let container = Container::start(&[&locked[..], &more].concat());
    let address = docker::run(&["port", &container.id, "8080/tcp"])
        .ok()
        .text();
    wait_for("the health check to say healthy", || {
        (container.inspect("{{.State.Health.Status}}") == "healthy").then_some(())
    });
    clone(&address, &repo);
    docker::run(&[
        "exec",
        &container.id,
        "/usr/local/bin/warmdock",
        "healthcheck",
    ])
    .ok();
}

/// A process that is killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the binary of the other architecture under an emulator, with the files of its image as its root.
#[track_caller]
fn runs_emulated(image: &Image) {
    let folder = temporary_folder();
    let root = folder.path().join("root");
    image.extract(&root);
    let data = folder.path().join("data");
    let repo = setup(
        folder.path(),
        "127.0.0.1:0",
        text(&data),
        text(&folder.path().join("upstream")),
    );
    let emulated = |argument: &str| {
        let mut command = Command::new("qemu-aarch64-static");
        command.arg("-L").arg(&root).arg(root.join(BINARY));
        command
            .args([argument, "--config"])
            .arg(folder.path().join("app_config.json"));
        command
    };
    let checked = process::run(emulated("check"), b"", Duration::from_secs(60)).ok();
    assert!(
        checked.text().contains("git.example.test"),
        "{}",
        checked.describe()
    );
    let running = Serving::start(emulated("serve"));
    clone(&running.address.to_string(), &repo);
}

/// A service that says where it listens.
struct Serving {
    process: Running,
    address: SocketAddr,
}

impl Serving {
    #[track_caller]
    fn start(mut command: Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let started = command.spawn();
        let mut process = Running(started.unwrap_or_else(|error| panic!("{command:?}: {error}")));
        let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines();
        let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
            let event: Value = serde_json::from_str(&line).ok()?;
            (event["message"] == "listening").then(|| event["address"].as_str().unwrap().to_owned())
        });
        // Whatever it logs later must have a reader.
        std::thread::spawn(move || lines.for_each(drop));
        let address = address.expect("it listens").parse().expect("an address");
        Self { process, address }
    }
}

impl Image {
    /// Writes the files into a folder, owned by whoever runs the test.
    fn extract(&self, root: &Path) {
        for (name, file) in &self.files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if file.kind.is_dir() {
                std::fs::create_dir_all(&path).unwrap();
            } else if file.kind.is_symlink() {
                let link = file.link.as_ref().unwrap();
                std::os::unix::fs::symlink(link, &path).unwrap();
            } else if file.kind.is_hard_link() {
                let other = file.link.as_ref().unwrap().trim_start_matches("./");
                std::fs::write(&path, &self.file(other).content).unwrap();
            } else if file.kind.is_file() {
                std::fs::write(&path, &file.content).unwrap();
                std::fs::set_permissions(
                    &path,
                    PermissionsExt::from_mode(file.mode & 0o777 | 0o200),
                )
                .unwrap();
            }
        }
    }
}

#[test]
fn musl() {
    let archive = archive("musl");
    for (architecture, machine) in MACHINES {
        let image = archive.image(architecture);
        let binary = common(&image, machine);
        assert!(!binary.interpreter, "{architecture}: wants a loader");
        assert_eq!(
            binary.needed,
            Vec::<String>::new(),
            "{architecture}: wants libraries"
        );
        let (unpacked, compressed) = (image.unpacked(), image.compressed);
        eprintln!("musl, {architecture}: {unpacked} bytes unpacked, {compressed} compressed");
        assert!(
            unpacked <= 12 * MEGABYTE,
            "{architecture}: {unpacked} bytes unpacked"
        );
        assert!(
            compressed <= 6 * MEGABYTE,
            "{architecture}: {compressed} bytes compressed"
        );
        // The service, what it trusts, and folders; nobody can log in to anything.
        let files = image.files.iter().filter(|(_, file)| !file.kind.is_dir());
        let names: Vec<_> = files.map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["etc/ssl/certs/ca-certificates.crt", BINARY]);
    }
    runs_in_a_container("musl");
    is_quick_and_small(&archive.image("amd64"));
    runs_emulated(&archive.image("arm64"));
}

/// Starts the binary of this machine's architecture with an empty data folder: the comparison measures the same.
#[track_caller]
fn is_quick_and_small(image: &Image) {
    let folder = temporary_folder();
    let root = folder.path().join("root");
    image.extract(&root);
    let config = folder.path().join("app_config.json");
    let text = json!({
        "listen": { "http": "127.0.0.1:0" },
        "data_dir": folder.path().join("data"),
        "git": { "upstreams": [] },
    });
    std::fs::write(&config, text.to_string()).unwrap();
    let mut ready = Vec::new();
    let mut resident = 0;
    for start in 1..=STARTS {
        let begin = Instant::now();
        let mut serve = Command::new(root.join(BINARY));
        serve.args(["serve", "--config"]).arg(&config);
        let running = Serving::start(serve);
        while http::get(running.address, "/readyz").status != 200 {
            assert!(begin.elapsed() < Duration::from_secs(10), "not ready");
        }
        ready.push(begin.elapsed());
        let idle = if start < STARTS { 300 } else { 5000 };
        std::thread::sleep(Duration::from_millis(idle));
        let status = std::fs::read_to_string(format!("/proc/{}/status", running.process.0.id()));
        let status = status.unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kibibytes: u64 = line
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        resident = resident.max(kibibytes * 1024);
    }
    ready.sort_unstable();
    let median = ready[STARTS / 2];
    eprintln!("ready after {median:?}, {resident} bytes in memory when idle");
    assert!(median <= READY, "ready after {ready:?}");
    assert!(
        resident <= 20 * MEGABYTE,
        "{resident} bytes in memory when idle"
    );
}

#[test]
fn musl_distroless() {
    let archive = archive("musl-distroless");
    for (architecture, machine) in MACHINES {
        let image = archive.image(architecture);
        let binary = common(&image, machine);
        assert!(
            !binary.interpreter && binary.needed.is_empty(),
            "{architecture}"
        );
        assert!(
            image.files.contains_key("usr/share/zoneinfo/UTC"),
            "{architecture}"
        );
        assert!(
            image
                .file("etc/passwd")
                .content
                .windows(6)
                .any(|part| part == b":65532")
        );
        assert!(!image.files.contains_key("usr/bin/sh") && !image.files.contains_key("bin/sh"));
    }
    runs_in_a_container("musl-distroless");
    runs_emulated(&archive.image("arm64"));
}

#[test]
fn debian() {
    let archive = archive("debian");
    let libraries: BTreeSet<_> = ["libc.so.6", "libm.so.6", "libgcc_s.so.1"].into();
    for (architecture, machine) in MACHINES {
        let image = archive.image(architecture);
        let binary = common(&image, machine);
        assert!(
            binary.interpreter,
            "{architecture}: glibc comes from the image"
        );
        for library in &binary.needed {
            let known = libraries.contains(library.as_str()) || library.starts_with("ld-linux");
            assert!(known, "{architecture}: wants {library}");
            let there = image
                .files
                .keys()
                .any(|name| name.ends_with(&format!("/{library}")));
            assert!(there, "{architecture}: {library} is not in the image");
        }
    }
    runs_in_a_container("debian");
    runs_emulated(&archive.image("arm64"));
}
