//! A service with private crates: what opens them is nowhere in what is made, and a warm service replaces their host.

use serde_json::json;

use crate::archive::Archive;
use crate::builder::client_config;
use crate::corp::{Corp, HOST};
use crate::docker::{self, Tag};
use crate::support::registry::Registry;
use crate::support::sshd::{SshFault, ssh_keygen};
use crate::support::warmdock::{Builder, files_below};

/// Where in an archive each secret was found. `markers` have to be found, or nothing was really searched.
fn search(archive: &Archive, secrets: &[(&'static str, Vec<u8>)], markers: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let mut missing: Vec<&&str> = markers.iter().collect();
    for (name, content) in archive.contents() {
        for (what, secret) in secrets {
            if contains(&content, secret) {
                found.push(format!("{what} in {name}"));
            }
        }
        missing.retain(|marker| !contains(&content, marker.as_bytes()));
    }
    assert!(
        missing.is_empty(),
        "not found, so what was searched? {missing:?}"
    );
    found
}

fn contains(content: &[u8], part: &[u8]) -> bool {
    memchr::memmem::find(content, part).is_some()
}

#[test]
fn through_the_forwarded_agent_and_no_secret_stays() {
    let corp = Corp::start();
    corp.publish_greeting("a marker in the private crate's source");
    let project = corp.greeter();
    let tag = Tag("greeter:private".to_owned());
    let secrets = corp.secrets();
    // As a job leaves it whose CARGO_HOME is in the checkout.
    let token = secrets.iter().find(|(what, _)| *what == "the token");
    let token = String::from_utf8_lossy(&token.unwrap().1);
    project.write(
        ".cargo/credentials.toml",
        &format!("[registry]\ntoken = \"{token}\"\n"),
    );
    project.write(
        ".cargo/config.toml",
        "# a marker in cargo's configuration\n",
    );
    // And a crate from a registry that only a secret names, with the same token.
    let registry = Registry::start();
    registry.require(&token);
    let ledger = registry.publish(
        "ledger",
        "0.1.0",
        &[],
        "// a marker in a registry's crate\n",
    );
    let index = format!("sparse+{}", registry.url());
    let manifest = project.read("Cargo.toml");
    project.write(
        "Cargo.toml",
        &format!("{manifest}ledger = {{ version = \"0.1.0\", registry = \"corp\" }}\n"),
    );
    let package = format!(
        "[[package]]\nname = \"ledger\"\nversion = \"0.1.0\"\nsource = \"{index}\"\nchecksum = \"{}\"\n\n",
        ledger.checksum
    );
    let tally = "[[package]]\nname = \"tally\"";
    let lock = project.read("Cargo.lock");
    let lock = lock.replace(tally, &format!("{package}{tally}"));
    let lock = lock.replace(" \"itoa\",\n", " \"itoa\",\n \"ledger\",\n");
    project.write("Cargo.lock", &lock);
    let cargo_config = project.beside("cargo_config.toml");
    // The other registry is none of this service's.
    let text = format!(
        "[registry]\nglobal-credential-providers = [\"cargo:token\"]\n\n[registries.corp]\nindex = \"{index}\"\ntoken = \"{token}\"\n\n\
         [registries.other]\nindex = \"sparse+http://unused.corp.example/index/\"\ntoken = \"{token}\"\n"
    );
    std::fs::write(&cargo_config, text).unwrap();
    let (archive, cache) = (project.beside("image.tar"), project.beside("cache"));
    // To compress the compilers takes longer than to search them.
    let bake = || {
        corp.bake_directly(&project, "private")
            .variable("CARGO_CONFIG", docker::text(&cargo_config))
    };
    let built = bake()
        .option("--set=*.attest=type=provenance,mode=max")
        .option(format!(
            "--set=*.cache-to=type=local,mode=max,compression=uncompressed,dest={}",
            cache.display()
        ))
        .option(format!(
            "--set=*.output=type=oci,dest={}",
            archive.display()
        ))
        .run()
        .ok();
    // The service comes to the host as well, for the other crate, with a key of its own.
    let key = ssh_keygen(&["-l", "-f", docker::text(&corp.sshd.path("deploy.pub"))]).ok();
    let key = key.text().split(' ').nth(1).unwrap().to_owned();
    let let_in = format!(" ssh2: ED25519 {key}");
    assert!(corp.sshd.log().contains(&let_in), "{}", built.describe());

    let image = Archive::open(&archive);
    // The version of Cargo.lock is in cargo-auditable's packed list, so the program's own text has to do.
    let markers = [
        "a marker in the private crate's source",
        "https://slsa.dev/provenance",
        "fetch-crates",
    ];
    assert_eq!(search(&image, &secrets, &markers), Vec::<String>::new());
    // All stages are in the cache, with the private crates' sources: it is as private as they are.
    let cache = Archive::open_folder(&cache);
    let markers = [
        "pub fn hello() -> &'static str",
        "cargo-auditable",
        "a marker in cargo's configuration",
        "a marker in a registry's crate",
        "[registries.corp]",
    ];
    let unused = ("another registry", b"unused.corp.example".to_vec());
    let secrets_of_cache = [&secrets[..], &[unused]].concat();
    let found = search(&cache, &secrets_of_cache, &markers);
    assert_eq!(found, Vec::<String>::new());

    bake().run().ok();
    assert_eq!(
        project.run(&tag.0),
        "a marker in the private crate's source, 41"
    );
    let history = docker::run(&["history", "--no-trunc", "--format=json", &tag.0]).ok();
    assert!(
        history.text().contains("HEALTHCHECK"),
        "{}",
        history.describe()
    );
    for (what, secret) in &secrets {
        assert!(!contains(&history.stdout, secret), "{what} in the history");
        assert!(
            !contains(built.log.as_bytes(), secret),
            "{what} in the build's log"
        );
    }
}

#[test]
fn the_search_finds_what_is_there() {
    let corp = Corp::start();
    let project = corp.greeter();
    let key = std::fs::read_to_string(corp.sshd.path("deploy")).unwrap();
    project.write("key", &key);
    project.write(
        "known_hosts",
        &std::fs::read_to_string(corp.known_hosts()).unwrap(),
    );
    let secrets = corp.secrets();
    let (_, bytes) = &secrets[0];
    std::fs::write(project.path("bytes"), bytes).unwrap();
    project.write(
        "Dockerfile",
        "FROM scratch\nCOPY key bytes known_hosts /\nARG TOKEN\nLABEL token=$TOKEN\n",
    );
    let value = |name: &str| {
        let (_, secret) = secrets.iter().find(|(what, _)| *what == name).unwrap();
        String::from_utf8(secret.clone()).unwrap()
    };
    let archive = project.beside("image.tar");
    crate::docker::Build::new(
        project.path("Dockerfile").to_str().unwrap(),
        &project.root(),
    )
    .arg("TOKEN", &value("the token"))
    .into_archive(&archive)
    .run()
    .ok();
    let found = search(&Archive::open(&archive), &secrets, &[]);
    for what in [
        "the private key's bytes ",
        "the private key ",
        "the token ",
        "the line of known_hosts ",
        "the host's name as known_hosts has it ",
    ] {
        assert!(
            found.iter().any(|found| found.starts_with(what)),
            "{what}: {found:?}"
        );
    }
}

#[test]
fn with_a_warm_service_and_the_host_away() {
    let corp = Corp::start();
    corp.publish_greeting("from a warm service");
    let project = corp.greeter();
    let tag = Tag("greeter:warm".to_owned());
    corp.warm();
    corp.sshd.fail(SshFault::Refuse);

    // Over HTTP with a token. No other build has left these crates: one has an address of its own, the other a new commit.
    let gitconfig = corp.gitconfig(&format!("http://{}", corp.warmdock.address()));
    let build = corp.build(&project).secret("gitconfig", &gitconfig);
    build
        .option("--load")
        .option(format!("--tag={}", tag.0))
        .run()
        .ok();
    assert_eq!(project.run(&tag.0), "from a warm service, 41");

    // Through the SSH door, with the developer's key that is forwarded anyway.
    let port = corp.warmdock.ssh_address().port();
    let gitconfig = corp.gitconfig(&format!("ssh://git@{HOST}:{port}"));
    let known_hosts = std::fs::read_to_string(corp.door.path("known_hosts")).unwrap();
    std::fs::write(
        project.beside("door_known_hosts"),
        known_hosts.replace("127.0.0.1", HOST),
    )
    .unwrap();
    let through_the_door = || {
        corp.build(&project)
            .secret("gitconfig", &gitconfig)
            .secret("known_hosts", &project.beside("door_known_hosts"))
            .agent(&corp.agent.socket())
    };
    // The same commits again: for a step without a cache, BuildKit makes its cache mounts anew as well.
    let built = through_the_door()
        .option("--no-cache-filter=crates")
        .option("--load")
        .option(format!("--tag={}", tag.0))
        .run()
        .ok();
    assert!(built.ran("/step/fetch-crates"), "{}", built.describe());
    let served = "warmdock_ssh_requests_total{result=\"ok\"}";
    let served = corp.warmdock.metric(|sample| sample == served);
    assert!(served >= 2.0, "{served} of two: {}", built.describe());
    assert_eq!(project.run(&tag.0), "from a warm service, 41");

    let archive = project.beside("image.tar");
    through_the_door()
        .option("--provenance=mode=max")
        .into_archive(&archive)
        .run()
        .ok();
    let mut secrets = corp.secrets();
    let door_key = known_hosts.split_whitespace().nth(2).unwrap();
    secrets.push(("the door's host key", door_key.into()));
    let markers = ["from a warm service", "https://slsa.dev/provenance"];
    let found = search(&Archive::open(&archive), &secrets, &markers);
    assert_eq!(found, Vec::<String>::new());
}

/// A service over TLS that lets nobody in without a token, and whose certificate no public authority has signed.
#[test]
fn through_a_service_with_a_certificate_of_ones_own() {
    let corp = Corp::start();
    let project = corp.greeter();
    let tag = Tag("greeter:tls".to_owned());
    corp.warm();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (cert, key) = (corp.path("cert.pem"), corp.path("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let service = Builder::of(json!({
        "listen": { "http": "127.0.0.1:0", "tls": { "cert": cert, "key": key } },
        "git": { "upstreams": [{
            "host": HOST,
            "url": format!("http://{}/git/{HOST}", corp.warmdock.address()),
            "token_file": corp.path("token"),
        }] },
        "crates": { "registries": [{ "name": "crates.io" }] },
        "access": {
            "anonymous": "none",
            "tokens": [{ "name": "builds", "token_file": corp.path("token") }],
        },
    }))
    .start();
    let url = format!("https://{}", service.address());
    let gitconfig = corp.gitconfig(&url);
    let cargo_config = corp.path("cargo_config.toml");
    let said = client_config("cargo", &service.config_file(), &url);
    // As docs/images.md says.
    let registry = "[registries.warmdock]\n";
    assert!(said.contains(registry), "{said}");
    let token = std::fs::read_to_string(corp.path("token")).unwrap();
    let with_token = format!("{registry}token = \"{}\"\n", token.trim());
    std::fs::write(&cargo_config, said.replace(registry, &with_token)).unwrap();
    // Git's client and cargo's refuse it in words of their own. Both have to ask: neither the crates' commits nor anything
    // from a registry at this address is in a cache.
    for build in [
        corp.build(&project)
            .secret("gitconfig", &gitconfig)
            .secret("cargo_config", &corp.with_one_retry()),
        corp.build_directly(&project)
            .secret("cargo_config", &cargo_config),
    ] {
        build.option("--target=crates").run().fails_with(&[
            "comes from an authority that the builder does not know",
            "--secret id=ca",
        ]);
    }
    // One of them came to the crates from Git.
    docker::forget_downloads();
    corp.bake(&project, "tls")
        .variable("GITCONFIG", docker::text(&gitconfig))
        .variable("CARGO_CONFIG", docker::text(&cargo_config))
        .variable("CA", docker::text(&cert))
        .run()
        .ok();
    assert_eq!(project.run(&tag.0), "hello from the private crate, 41");
    for kept in [format!("git/{HOST}/team/greeting.git"), "blobs".into()] {
        let files = files_below(&service.data().join(&kept));
        assert!(
            !files.is_empty(),
            "nothing in {kept}: it went past the service"
        );
    }
}
