//! Docker's command line: builds with their steps, and whatever else, each with a limit in time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use base64::Engine as _;
use serde_json::Value;

use crate::support::process::{self, Output};
use crate::support::wait_for;

/// A build of warmdock takes some minutes for each architecture.
const BUILD_LIMIT: Duration = Duration::from_secs(25 * 60);
const LIMIT: Duration = Duration::from_secs(120);

/// The checkout that the Dockerfiles are in.
pub const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Docker with these arguments, in the checkout, not yet run.
pub fn command(args: &[&str]) -> Command {
    assert!(
        std::env::var_os("WARMDOCK_ENGINE").is_some(),
        "no engine for image tests: run them by `tests/run --images`, or first eval \"$(tests/images/engine up)\""
    );
    let mut command = Command::new("docker");
    command
        .args(args)
        .current_dir(ROOT)
        .env("PWD", ROOT)
        // A person's own agent is none of the build's business. File access is the tests' own choice.
        .env_remove("SSH_AUTH_SOCK")
        .env("BUILDX_BAKE_ENTITLEMENTS_FS", "0");
    command
}

/// Runs Docker to its end.
#[track_caller]
pub fn run(args: &[&str]) -> Output {
    process::run(command(args), b"", LIMIT)
}

/// What BuildKit did.
pub struct Built {
    pub output: Output,
    pub steps: Vec<Step>,
    /// What the steps printed.
    pub log: String,
}

/// A step of a build, such as `[linux/amd64 crates 4/4] RUN …`.
#[derive(Debug, Default)]
pub struct Step {
    pub name: String,
    pub cached: bool,
    started: bool,
}

impl Step {
    /// It was neither found in the cache, nor not reached.
    pub fn ran(&self) -> bool {
        self.started && !self.cached
    }
}

impl Built {
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.output.status.success(), "{}", self.describe());
        self
    }

    /// Expects that the build failed by itself, and gives the sentences that say why.
    #[track_caller]
    pub fn errors(&self) -> Vec<&str> {
        assert!(
            !self.output.status.success(),
            "expected a failure: {}",
            self.describe()
        );
        self.log
            .lines()
            .filter_map(|line| line.strip_prefix("ERROR: "))
            .collect()
    }

    /// Expects that the build failed with one sentence, which has all of these parts.
    #[track_caller]
    pub fn fails_with(&self, parts: &[&str]) {
        let errors = self.errors();
        assert_eq!(errors.len(), 1, "one sentence: {}", self.describe());
        for part in parts {
            assert!(errors[0].contains(part), "no {part:?}: {}", self.describe());
        }
    }

    /// The steps whose names contain `part`.
    #[track_caller]
    pub fn steps(&self, part: &str) -> Vec<&Step> {
        let steps: Vec<_> = self
            .steps
            .iter()
            .filter(|step| step.name.contains(part))
            .collect();
        assert!(!steps.is_empty(), "no step {part:?}: {}", self.describe());
        steps
    }

    /// Whether one of the steps whose names contain `part` ran.
    pub fn ran(&self, part: &str) -> bool {
        self.steps
            .iter()
            .any(|step| step.name.contains(part) && step.ran())
    }

    pub fn describe(&self) -> String {
        let steps: Vec<_> = self
            .steps
            .iter()
            .map(|step| {
                let name: String = step.name.chars().take(100).collect();
                let what = match step {
                    Step { cached: true, .. } => "cached ",
                    Step { started: true, .. } => "ran    ",
                    _ => "not yet",
                };
                format!("{what} {name}")
            })
            .collect();
        format!(
            "{} → {}\n--- steps\n{}\n--- log\n{}\n--- messages\n{}",
            self.output.command,
            self.output.status,
            steps.join("\n"),
            self.log,
            self.output.stderr
        )
    }
}

/// A build by `docker buildx build` or `docker buildx bake`.
pub struct Build {
    command: Command,
}

impl Build {
    /// One of the Dockerfiles, over another project's checkout.
    pub fn new(dockerfile: &str, context: &Path) -> Self {
        let file = Path::new(ROOT).join(dockerfile);
        let mut build = Self {
            command: command(&["buildx", "build", "--provenance=false"]),
        };
        build.command.arg("--file").arg(file).arg(context);
        build
    }

    /// A build whose context is an address.
    pub fn at(url: &str) -> Self {
        Self {
            command: command(&["buildx", "build", "--provenance=false", url]),
        }
    }

    /// Targets of docker-bake.hcl.
    pub fn bake(targets: &[&str]) -> Self {
        let mut build = Self {
            command: command(&["buildx", "bake", "--file", "docker-bake.hcl"]),
        };
        build.command.args(targets);
        build
    }

    pub fn option(mut self, option: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(option);
        self
    }

    /// A variable of docker-bake.hcl.
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn arg(self, name: &str, value: &str) -> Self {
        self.option(format!("--build-arg={name}={value}"))
    }

    pub fn secret(self, id: &str, file: &Path) -> Self {
        self.option(format!("--secret=id={id},src={}", file.display()))
    }

    /// Hands an agent to the build.
    pub fn agent(self, socket: &str) -> Self {
        self.option(format!("--ssh=default={socket}"))
    }

    /// Lets the build's steps use this machine's network, where `name` is this machine.
    pub fn on_this_machine(self, name: &str) -> Self {
        self.option("--network=host")
            .option("--allow=network.host")
            .option(format!("--add-host={name}:127.0.0.1"))
    }

    /// An OCI archive as the result.
    pub fn into_archive(self, file: &Path) -> Self {
        self.option(format!("--output=type=oci,dest={}", file.display()))
    }

    #[track_caller]
    pub fn run(mut self) -> Built {
        self.command.arg("--progress=rawjson");
        let mut output = process::run(self.command, b"", BUILD_LIMIT);
        let mut steps = BTreeMap::<String, (usize, Step)>::new();
        let (mut log, mut messages) = (Vec::new(), String::new());
        for line in std::mem::take(&mut output.stderr).lines() {
            let Ok(event) = serde_json::from_str::<Value>(line) else {
                messages += &format!("{line}\n");
                continue;
            };
            for vertex in list(&event["vertexes"]) {
                let name = vertex["name"].as_str().unwrap_or_default();
                let digest = vertex["digest"].as_str().unwrap_or_default();
                let place = steps.len();
                let (_, step) = steps.entry(digest.to_owned()).or_insert_with(|| {
                    let name = name.to_owned();
                    (
                        place,
                        Step {
                            name,
                            ..Step::default()
                        },
                    )
                });
                step.started |= vertex["started"].is_string();
                step.cached |= vertex["cached"] == true;
            }
            for entry in list(&event["logs"]) {
                let data = entry["data"].as_str().unwrap_or_default();
                log.extend(
                    base64::engine::general_purpose::STANDARD
                        .decode(data)
                        .expect("logs are base64"),
                );
            }
        }
        output.stderr = messages;
        let mut steps: Vec<_> = steps.into_values().collect();
        steps.sort_by_key(|(place, _)| *place);
        Built {
            output,
            steps: steps.into_iter().map(|(_, step)| step).collect(),
            log: String::from_utf8_lossy(&log).into_owned(),
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A container that is removed when dropped.
pub struct Container {
    pub id: String,
}

impl Container {
    /// Starts a container with the arguments that `docker run` takes.
    #[track_caller]
    pub fn start(args: &[&str]) -> Self {
        let id = run(&[&["run", "--detach"], args].concat()).ok().text();
        Self { id }
    }

    /// A value of `docker inspect`.
    #[track_caller]
    pub fn inspect(&self, template: &str) -> String {
        run(&["inspect", "--format", template, &self.id])
            .ok()
            .text()
    }

    /// What it printed so far.
    pub fn logs(&self) -> String {
        let output = run(&["logs", &self.id]);
        format!("{}{}", output.text(), output.stderr)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the container\n{}", self.logs());
        }
        run(&["rm", "--force", "--volumes", &self.id]);
    }
}

/// Removes a tag, and with it what only it holds, when dropped.
pub struct Tag(pub String);

impl Drop for Tag {
    fn drop(&mut self) {
        run(&["image", "rm", "--force", &self.0]);
    }
}

/// The records of the engine's build cache: their ids with what they are.
#[track_caller]
pub fn cache_records() -> BTreeMap<String, String> {
    let text = run(&["buildx", "du", "--verbose"]).ok().text();
    let mut records = BTreeMap::new();
    let mut id = None;
    for line in text.lines() {
        match line.split_once(':') {
            Some(("ID", value)) => id = Some(value.trim().to_owned()),
            Some(("Description", value)) => {
                records.insert(
                    id.take().expect("an ID before its description"),
                    value.trim().to_owned(),
                );
            }
            _ => {}
        }
    }
    records
}

/// Removes records from the engine's build cache.
///
/// The engine then forgets other steps as well, whose layers stay, and they run again: a test that is not about that
/// takes `empty_mounts`.
#[track_caller]
pub fn prune(ids: &[String]) {
    let filter = format!("id=^({})$", ids.join("|"));
    // What another build uses at this moment stays.
    wait_for("records of the cache to be free, and then gone", || {
        run(&["buildx", "prune", "--force", "--all", "--filter", &filter]).ok();
        let left = cache_records();
        ids.iter().all(|id| !left.contains_key(id)).then_some(())
    });
}

/// The cache mounts whose id begins so: their records with their ids.
#[track_caller]
pub fn cache_mounts(prefix: &str) -> BTreeMap<String, String> {
    cache_records()
        .into_iter()
        .filter_map(|(record, what)| {
            let (_, id) = what.strip_suffix('"')?.rsplit_once("with id \"/")?;
            id.starts_with(prefix).then(|| (record, id.to_owned()))
        })
        .collect()
}

/// Leaves nothing in the cache mounts whose id begins so.
#[track_caller]
pub fn empty_mounts(prefix: &str) {
    let ids: BTreeSet<String> = cache_mounts(prefix).into_values().collect();
    let mounts: String = ids
        .iter()
        .map(|id| format!("--mount=type=cache,id={id},sharing=locked,target=/mounts/{id} "))
        .collect();
    let empty = "mkdir -p /mounts && find /mounts -mindepth 2 -delete";
    let dockerfile = format!("FROM debian:trixie-slim\nRUN {mounts}{empty}\n");
    let mut build = command(&["buildx", "build", "--no-cache", "--output=type=cacheonly"]);
    build.arg("-");
    process::run(build, dockerfile.as_bytes(), LIMIT).ok();
}

/// Empties what builds keep of the crates that they fetched.
#[track_caller]
pub fn forget_downloads() {
    empty_mounts("cargo-home");
}

/// A path as Docker's arguments want it.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A program that `tests/run` put beside the build, or one of the system.
pub fn tool(name: &str) -> PathBuf {
    let own = Path::new(ROOT).join("target/test-tools/bin").join(name);
    if own.exists() { own } else { name.into() }
}
