//! Real cargo through the crate cache: against crates.io where it is reachable, and against a registry that the tests
//! serve.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::crates_cache::over;
use crate::support::process::{self, Output};
use crate::support::registry::{Fault, Of, Registry};
use crate::support::warmdock::{Builder, builder, run};
use crate::support::{PATIENCE, Warmdock, http, wait_for};

/// A person's machine with a project.
struct Machine {
    folder: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Machine {
    fn new() -> Self {
        Self {
            folder: crate::support::temporary_folder(),
            environment: Vec::new(),
        }
    }

    fn app(&self) -> PathBuf {
        self.folder.path().join("app")
    }

    fn home(&self) -> PathBuf {
        self.folder.path().join("cargo-home")
    }

    /// A crate with these lines under `[dependencies]`.
    fn write_app(&self, dependencies: &str, main: &str) {
        std::fs::create_dir_all(self.app().join("src")).unwrap();
        let manifest = format!(
            "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\n{dependencies}"
        );
        std::fs::write(self.app().join("Cargo.toml"), manifest).unwrap();
        std::fs::write(self.app().join("src/main.rs"), main).unwrap();
    }

    /// An empty CARGO_HOME with this `config.toml`, and nothing built.
    fn begin_anew(&self, config: &str) {
        let _ = std::fs::remove_dir_all(self.folder.path().join("target"));
        self.empty_home(config);
    }

    /// An empty CARGO_HOME with this `config.toml`.
    fn empty_home(&self, config: &str) {
        let _ = std::fs::remove_dir_all(self.home());
        std::fs::create_dir_all(self.home()).unwrap();
        std::fs::write(self.home().join("config.toml"), config).unwrap();
    }

    fn cargo(&self, args: &[&str]) -> Output {
        process::run(self.command(args), b"", Duration::from_secs(300))
    }

    fn command(&self, args: &[&str]) -> Command {
        let cargo = PathBuf::from(std::env::var_os("CARGO").expect("cargo says where it is"));
        let rustc = cargo.with_file_name("rustc");
        let mut command = Command::new(&cargo);
        command
            .args(args)
            .current_dir(self.app())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.folder.path())
            .env("CARGO_HOME", self.home())
            .env("CARGO_TARGET_DIR", self.folder.path().join("target"))
            .env("CARGO_NET_RETRY", "0")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        if rustc.exists() {
            command.env("RUSTC", rustc);
        }
        command
    }

    /// What `cargo build` makes.
    fn program(&self) -> PathBuf {
        self.folder.path().join("target/debug/app")
    }

    fn lock(&self) -> String {
        std::fs::read_to_string(self.app().join("Cargo.lock")).unwrap()
    }
}

/// What the command `client-config cargo` prints for this service.
fn client_config(warmdock: &Warmdock) -> String {
    let url = format!("http://{}", warmdock.address());
    let config = warmdock.config_file();
    run(&[
        "client-config",
        "cargo",
        "--url",
        &url,
        "--config",
        config.to_str().unwrap(),
    ])
    .ok()
    .text()
        + "\n"
}

/// Some crates that need each other, on a registry of ours that stands for crates.io.
fn published() -> Registry {
    let registry = Registry::start();
    registry.publish(
        "leaf",
        "1.0.0",
        &[],
        "pub const WHO: &str = \"leaf 1.0.0\";",
    );
    registry.publish(
        "middle",
        "0.3.1",
        &[("leaf", "^1")],
        "pub const WHO: &str = leaf::WHO;",
    );
    registry.publish("a", "0.1.0", &[], "");
    registry.publish("ab", "0.1.0", &[], "");
    registry.publish("abc", "0.1.0", &[], "");
    registry
}

const DEPENDENCIES: &str = "middle = \"0.3\"\na = \"0.1\"\nab = \"0.1\"\nabc = \"0.1\"\n";
const MAIN: &str = "fn main() { println!(\"{}\", middle::WHO); }";

fn as_crates_io(registry: &Registry) -> Builder {
    over(registry).set(
        "/crates/registries",
        json!([{ "name": "crates.io", "url": registry.url() }]),
    )
}

#[track_caller]
fn builds(machine: &Machine, says: &str) {
    machine.cargo(&["build", "--quiet"]).ok();
    let said = process::run(
        Command::new(machine.program()),
        b"",
        Duration::from_secs(10),
    )
    .ok();
    assert_eq!(said.text(), says);
}

/// Whichever way people get it.
#[test]
fn the_service_gives_the_configuration_that_the_command_prints() {
    let registry = published();
    let registries = json!([
        { "name": "crates.io", "url": registry.url() },
        { "name": "corp.internal", "url": registry.at("/corp/") },
    ]);
    let warmdock = as_crates_io(&registry)
        .set("/crates/registries", registries)
        .start();
    let given = http::get(warmdock.address(), "/api/v1/client-config/cargo");
    assert_eq!(given.status, 200);
    assert_eq!(given.text().trim_end(), client_config(&warmdock).trim_end());
    assert!(given.text().contains("[registries.warmdock-corp-internal]"));
}

#[test]
fn builds_and_builds_again_without_the_registry() {
    let registry = published();
    let mut warmdock = as_crates_io(&registry).start();
    let machine = Machine::new();
    machine.write_app(DEPENDENCIES, MAIN);
    let config = client_config(&warmdock);
    machine.begin_anew(&config);
    builds(&machine, "leaf 1.0.0");
    let lock = machine.lock();
    // As if it had come from crates.io itself.
    assert!(
        lock.contains("source = \"registry+https://github.com/rust-lang/crates.io-index\""),
        "{lock}"
    );
    registry.fail(Of::Everything, Fault::CutOff);
    machine.begin_anew(&config);
    builds(&machine, "leaf 1.0.0");
    assert_eq!(machine.lock(), lock);
    // And without a lock file, from old entries; also after a restart.
    std::fs::remove_file(machine.app().join("Cargo.lock")).unwrap();
    warmdock.stop();
    warmdock.start_again();
    machine.begin_anew(&client_config(&warmdock));
    builds(&machine, "leaf 1.0.0");
    assert_eq!(machine.lock(), lock);
}

#[test]
fn update_add_search_and_yanked_versions() {
    let registry = published();
    let warmdock = as_crates_io(&registry).start();
    let machine = Machine::new();
    machine.write_app("middle = \"0.3\"\n", MAIN);
    machine.begin_anew(&client_config(&warmdock));
    builds(&machine, "leaf 1.0.0");
    registry.publish(
        "leaf",
        "1.1.0",
        &[],
        "pub const WHO: &str = \"leaf 1.1.0\";",
    );
    machine.cargo(&["update", "--quiet"]).ok();
    builds(&machine, "leaf 1.1.0");
    // A yanked version stays where it is locked, and is not chosen where nothing is.
    registry.yank("leaf", "1.1.0");
    machine.begin_anew(&client_config(&warmdock));
    builds(&machine, "leaf 1.1.0");
    std::fs::remove_file(machine.app().join("Cargo.lock")).unwrap();
    builds(&machine, "leaf 1.0.0");
    machine.cargo(&["add", "--quiet", "leaf@1"]).ok();
    assert!(
        std::fs::read_to_string(machine.app().join("Cargo.toml"))
            .unwrap()
            .contains("leaf = \"1\"")
    );
    let missing = machine.cargo(&["add", "--quiet", "not-there"]).failed();
    assert!(missing.stderr.contains("not-there"), "{}", missing.stderr);
    // What is not served says so.
    let search = machine
        .cargo(&["search", "leaf", "--registry", "warmdock"])
        .failed();
    assert!(search.stderr.contains("not its API"), "{}", search.stderr);
}

/// A proxy that connects nobody, and the first line that it is sent.
fn proxy_to_nowhere() -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // Who tries again is refused.
        drop(listener);
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        let _ = sender.send(line);
    });
    (url, receiver)
}

/// `cargo search` as people type it: the service does not pass it on, cargo says which ways there are, and either way
/// says that it is not through the service.
#[test]
fn search_is_not_served_and_says_where_it_is() {
    let registry = published();
    let warmdock = as_crates_io(&registry).start();
    let mut machine = Machine::new();
    machine.write_app("", "fn main() {}");
    machine.begin_anew(&client_config(&warmdock));
    let plain = machine.cargo(&["search", "serde"]).failed().stderr;
    for expected in [
        "crates-io is replaced with",
        "warmdock",
        "`--registry crates-io`",
    ] {
        assert!(plain.contains(expected), "{expected}: {plain}");
    }
    let here = machine.cargo(&["search", "serde", "--registry", "warmdock"]);
    let here = here.failed().stderr;
    for expected in ["not its API", "search", "--registry crates-io"] {
        assert!(here.contains(expected), "{expected}: {here}");
    }
    // That leads past the service, to crates.io itself.
    let (proxy, asked) = proxy_to_nowhere();
    machine.environment.push(("HTTPS_PROXY".into(), proxy));
    let past = machine
        .cargo(&["search", "serde", "--registry", "crates-io"])
        .failed();
    assert!(!past.stderr.contains("not its API"), "{}", past.stderr);
    let line = asked.recv_timeout(PATIENCE).expect("cargo asks the proxy");
    assert!(
        line.starts_with("CONNECT ") && line.contains("crates.io:443 "),
        "{line}"
    );
    assert_eq!(registry.asked().len(), 0, "nobody is asked for us");
}

/// A private registry that wants a token from us, behind a service that wants one from cargo.
#[test]
fn a_private_registry_with_tokens_on_both_sides() {
    let (public, private) = (published(), Registry::start());
    private.publish(
        "inner",
        "2.0.0",
        &[],
        "pub const WHO: &str = \"inner 2.0.0\";",
    );
    private.require("up-secret");
    let folder = crate::support::temporary_folder();
    let secret = |name: &str, content: &str| {
        std::fs::write(folder.path().join(name), content).unwrap();
        folder.path().join(name)
    };
    let warmdock = as_crates_io(&public)
        .set("/crates/registries", json!([
            { "name": "crates.io", "url": public.url() },
            { "name": "corp", "url": private.url(), "token_file": secret("up", "up-secret") },
        ]))
        .set("/access", json!({ "anonymous": "none", "tokens": [{ "name": "ci", "token_file": secret("ci", "ci-secret") }] }))
        .start();
    let mut machine = Machine::new();
    machine.write_app(
        "middle = \"0.3\"\ninner = { version = \"2\", registry = \"corp\" }\n",
        "fn main() { println!(\"{} {}\", middle::WHO, inner::WHO); }",
    );
    let own = format!("[registries.corp]\nindex = \"sparse+{}\"\n", private.url());
    machine.begin_anew(&(client_config(&warmdock) + &own));
    let refused = machine.cargo(&["build", "--quiet"]).failed();
    assert!(
        refused.stderr.contains("no token found") || refused.stderr.contains("401"),
        "{}",
        refused.stderr
    );
    for name in ["WARMDOCK", "WARMDOCK_CORP"] {
        machine
            .environment
            .push((format!("CARGO_REGISTRIES_{name}_TOKEN"), "ci-secret".into()));
    }
    builds(&machine, "leaf 1.0.0 inner 2.0.0");
    // The lock file names the registry by its own address: nobody else notices the detour.
    assert!(
        machine
            .lock()
            .contains(&format!("sparse+{}", private.url())),
        "{}",
        machine.lock()
    );
}

/// A certificate for this machine, and what tells cargo of it.
struct Tls {
    folder: tempfile::TempDir,
}

impl Tls {
    fn new() -> Self {
        let folder = crate::support::temporary_folder();
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        std::fs::write(folder.path().join("crt"), made.cert.pem()).unwrap();
        std::fs::write(folder.path().join("key"), made.signing_key.serialize_pem()).unwrap();
        Self { folder }
    }

    fn listen(&self) -> Value {
        json!({ "cert": self.folder.path().join("crt"), "key": self.folder.path().join("key") })
    }

    fn client_config(&self, warmdock: &Warmdock) -> String {
        let config = client_config(warmdock).replace("sparse+http://", "sparse+https://");
        let cert = self.folder.path().join("crt");
        format!("{config}\n[http]\ncainfo = {cert:?}\n")
    }
}

#[test]
fn over_tls() {
    let tls = Tls::new();
    let registry = published();
    let warmdock = as_crates_io(&registry)
        .set("/listen/tls", tls.listen())
        .start();
    let machine = Machine::new();
    machine.write_app(DEPENDENCIES, MAIN);
    machine.begin_anew(&tls.client_config(&warmdock));
    let mut talkative = machine.command(&["build"]);
    talkative
        .env("CARGO_HTTP_DEBUG", "true")
        .env("CARGO_LOG", "network=debug");
    let log = process::run(talkative, b"", Duration::from_secs(60))
        .ok()
        .stderr;
    // It asks for everything at once, on one connection.
    assert!(log.contains("< HTTP/2 200"), "{log}");
    assert!(!log.contains("< HTTP/1"), "{log}");
    builds(&machine, "leaf 1.0.0");
}

/// Many machines begin at once: each file is fetched once, and the service answers others meanwhile.
#[test]
fn fifty_cargos_at_once() {
    let registry = published();
    let warmdock = as_crates_io(&registry).set("/crates/max_age", "1h").start();
    let config = client_config(&warmdock);
    let fetching: Vec<_> = (0..50)
        .map(|_| {
            let config = config.clone();
            std::thread::spawn(move || {
                let machine = Machine::new();
                machine.write_app(DEPENDENCIES, MAIN);
                machine.begin_anew(&config);
                machine.cargo(&["fetch", "--quiet"])
            })
        })
        .collect();
    let mut took = Vec::new();
    while fetching.iter().any(|one| !one.is_finished()) {
        let begin = Instant::now();
        assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
        took.push(begin.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    for one in fetching {
        one.join().unwrap().ok();
    }
    took.sort_unstable();
    let (median, slowest) = (took[took.len() / 2], took[took.len() - 1]);
    let said = format!(
        "{} health checks beside the cargos: median {median:?}, slowest {slowest:?}",
        took.len()
    );
    eprintln!("{said}");
    // If an answer waited for the cargos, there would be one.
    assert!(took.len() > 4, "{said}");
    let mut asked: Vec<_> = registry.asked().into_iter().map(|one| one.path).collect();
    asked.sort_unstable();
    let once = [
        "/files/a/0.1.0",
        "/files/ab/0.1.0",
        "/files/abc/0.1.0",
        "/files/leaf/1.0.0",
        "/files/middle/0.3.1",
        "/index/1/a",
        "/index/2/ab",
        "/index/3/a/abc",
        "/index/config.json",
        "/index/le/af/leaf",
        "/index/mi/dd/middle",
    ];
    assert_eq!(asked, once);
}

/// Whether crates.io can be reached from here: whether cargo can, without the service.
fn crates_io_is_reachable() -> bool {
    static REACHABLE: OnceLock<bool> = OnceLock::new();
    *REACHABLE.get_or_init(|| {
        let machine = Machine::new();
        machine.write_app("cfg-if = \"1\"\n", "fn main() {}");
        let output = machine.cargo(&["generate-lockfile"]);
        let reachable = output.status.success();
        let what = if reachable { "is" } else { "is not" };
        eprintln!("crates.io {what} reachable from here");
        let promised = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(
            reachable || !promised,
            "CI reaches it: {}",
            output.describe()
        );
        reachable
    })
}

/// A service with the crates.io of the embedded default, and the certificates of this machine.
fn through() -> Builder {
    let certificates = std::env::var("SSL_CERT_FILE").ok();
    let builder = builder("https://unused.example.test").set("/crates/max_age", "60s");
    match certificates {
        Some(path) => builder.environment("SSL_CERT_FILE", &path),
        None => builder,
    }
}

/// `data` again, by a service whose registry is cut off: whatever goes there goes to a proxy that is not there.
fn cut_off(data: &Path) -> Warmdock {
    let warmdock = through()
        .set("/data_dir", data.to_str().unwrap())
        .environment("HTTPS_PROXY", "http://127.0.0.1:9")
        .start();
    let missing = http::get(warmdock.address(), "/crates/crates.io/2/cb");
    assert_eq!(missing.status, 502, "it is really cut off");
    warmdock
}

/// Says so, and what is tested instead, where crates.io is out of reach.
fn without_crates_io() -> bool {
    let without = !crates_io_is_reachable();
    if without {
        eprintln!(
            "against a registry on this machine instead: crates_cargo::builds_and_builds_again_without_the_registry"
        );
    }
    without
}

/// A service of over 100 crates, in the versions that this project has locked.
#[test]
fn a_service_is_built_from_crates_io_and_again_without_it() {
    if without_crates_io() {
        return;
    }
    let mut warmdock = through().start();
    let machine = Machine::new();
    machine.write_app(
        "axum = \"0.8\"\n\
         clap = { version = \"4\", default-features = false, features = [\"std\", \"derive\"] }\n\
         gix-hash = { version = \"0.28\", features = [\"sha1\"] }\n\
         gix-ref = \"0.69\"\n\
         prometheus-client = \"0.25\"\n\
         schemars = \"1\"\n\
         serde_json = \"1\"\n\
         tokio = { version = \"1\", features = [\"rt\", \"net\"] }\n\
         tracing-subscriber = { version = \"0.3\", default-features = false, features = [\"json\"] }\n\
         [profile.dev]\n\
         debug = false\n",
        "fn main() { println!(\"{}\", serde_json::json!([1])); }",
    );
    // What is not needed is taken out of it by the first build.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::copy(root.join("Cargo.lock"), machine.app().join("Cargo.lock")).unwrap();
    machine.begin_anew(&client_config(&warmdock));
    builds(&machine, "[1]");
    let lock = machine.lock();
    let crates = lock.matches("checksum = ").count();
    assert!(crates > 100, "{crates}");
    warmdock.stop();
    let without = cut_off(&warmdock.data());
    machine.empty_home(&client_config(&without));
    // Every file comes anew, and cargo checks it against the lock file: only the crates that are compiled already are not
    // compiled once more.
    std::fs::remove_file(machine.program()).unwrap();
    builds(&machine, "[1]");
    assert_eq!(machine.lock(), lock);
    let cache = machine.home().join("registry/cache");
    let fetched = crate::support::warmdock::files_below(&cache).len();
    assert!(fetched > 100, "{fetched}");
}

/// Of crates.io itself. log 0.4.23 and 0.4.24 are yanked there, and what is yanked stays.
#[test]
fn update_add_and_a_yanked_version_of_crates_io() {
    if without_crates_io() {
        return;
    }
    let warmdock = through().start();
    let machine = Machine::new();
    let main = "fn main() { println!(\"{}\", log::max_level()); }";
    machine.write_app("cfg-if = \"1\"\nlog = \"0.4\"\n", main);
    machine.begin_anew(&client_config(&warmdock));
    // Whoever has locked it goes on.
    for (name, version) in [("log", "0.4.23"), ("cfg-if", "1.0.0")] {
        machine
            .cargo(&["update", "--quiet", name, "--precise", version])
            .ok();
    }
    let locked = |name: &str| {
        let lock = machine.lock();
        let (_, package) = lock.split_once(&format!("name = \"{name}\"")).unwrap();
        package.split('"').nth(1).unwrap().to_owned()
    };
    builds(&machine, "OFF");
    assert_eq!(locked("log"), "0.4.23");
    machine.empty_home(&client_config(&warmdock));
    machine.cargo(&["fetch", "--quiet", "--locked"]).ok();

    // An update leaves it behind.
    machine.cargo(&["update", "--quiet"]).ok();
    assert!(!["0.4.23", "0.4.24"].contains(&&*locked("log")));
    assert_ne!(locked("cfg-if"), "1.0.0");
    builds(&machine, "OFF");
    machine.cargo(&["add", "--quiet", "itoa@1"]).ok();
    let manifest = std::fs::read_to_string(machine.app().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("itoa = \"1\""), "{manifest}");
    builds(&machine, "OFF");
    assert!(locked("itoa").starts_with("1."));
    let missing = machine.cargo(&["add", "--quiet", "cfg-if@99"]).failed();
    assert!(missing.stderr.contains("cfg-if"), "{}", missing.stderr);

    // Nor does anybody get it who asks for it without having it locked.
    machine.write_app("log = \"=0.4.23\"\n", main);
    std::fs::remove_file(machine.app().join("Cargo.lock")).unwrap();
    let yanked = machine.cargo(&["build", "--quiet"]).failed();
    assert!(yanked.stderr.contains("yanked"), "{}", yanked.stderr);
}

/// All crates of crates.io that this project has.
#[test]
fn this_project_from_crates_io_and_again_without_it() {
    if without_crates_io() {
        return;
    }
    // Over TLS cargo asks for everything at once.
    let tls = Tls::new();
    let mut warmdock = through().set("/listen/tls", tls.listen()).start();
    let machine = Machine::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::create_dir_all(machine.app()).unwrap();
    for part in ["Cargo.toml", "Cargo.lock", "src", "benches", "tests"] {
        std::os::unix::fs::symlink(root.join(part), machine.app().join(part)).unwrap();
    }
    std::fs::remove_file(machine.app().join("Cargo.lock")).unwrap();
    std::fs::copy(root.join("Cargo.lock"), machine.app().join("Cargo.lock")).unwrap();
    let before = machine.lock();
    machine.begin_anew(&tls.client_config(&warmdock));
    machine.cargo(&["fetch", "--quiet", "--locked"]).ok();
    let files = || {
        let cache = machine.home().join("registry/cache");
        crate::support::warmdock::files_below(&cache).len()
    };
    let fetched = files();
    assert!(fetched > 100, "{fetched}");
    // Everything is on disk before the registry goes away.
    wait_for("all files to be kept", || {
        let kept = crate::support::warmdock::files_below(&warmdock.data().join("blobs")).len();
        (kept >= fetched).then_some(())
    });
    warmdock.stop();
    let without = cut_off(&warmdock.data());
    machine.begin_anew(&client_config(&without));
    machine.cargo(&["fetch", "--quiet", "--locked"]).ok();
    assert_eq!(files(), fetched);
    assert_eq!(machine.lock(), before);
}
