//! Who may read what, whoever comes and through whichever door: principals × repositories × doors.

use std::path::Path;

use serde_json::json;

use crate::support::ssh_door::SshDoor;
use crate::support::sshd::ssh_keygen;
use crate::support::warmdock::{Warmdock, builder};
use crate::support::{Client, HOST, Repo, SAMPLE, Upstream, http, wait_for};

const OTHER: &str = "other/repo";
const ABSENT: &str = "team/absent";

/// What somebody shows.
#[derive(Clone, Copy, Debug)]
enum Credentials {
    Nothing,
    Token(&'static str),
    Key(&'static str),
    /// A key with the certificate beside it.
    Certificate(&'static str),
}

struct Setup {
    upstream: Upstream,
    sample: Repo,
    other: Repo,
    door: SshDoor,
    warmdock: Warmdock,
    tokens: tempfile::TempDir,
}

fn setup(anonymous: &str) -> Setup {
    let upstream = Upstream::start();
    let sample = upstream.sample(SAMPLE);
    let other = Repo::sample(&upstream.path(OTHER), 2);
    let door = SshDoor::new();
    for key in ["limited", "stranger", "authority", "another_authority"] {
        door.keygen(key);
    }
    // Name, authority, principals, and what else is said.
    for (name, authority, principals, options) in [
        ("certified", "authority", "builds,people", &[][..]),
        ("other_principal", "authority", "people", &[]),
        ("other_authority", "another_authority", "builds", &[]),
        (
            "expired",
            "authority",
            "builds",
            &["-V", "20200101:20200102"],
        ),
        (
            "elsewhere",
            "authority",
            "builds",
            &["-O", "source-address=192.0.2.0/24"],
        ),
        (
            "here",
            "authority",
            "builds",
            &["-O", "source-address=127.0.0.0/8"],
        ),
        (
            "forced",
            "authority",
            "builds",
            &["-O", "force-command=true"],
        ),
    ] {
        let key = door.keygen(name);
        let authority = door.path(authority);
        let words = ["-q", "-s", text(&authority), "-I", name, "-n", principals];
        let public = key.with_extension("pub");
        ssh_keygen(&[&words[..], options, &[text(&public)]].concat());
    }
    // The key without its certificate, which ssh would find beside it.
    for end in ["", ".pub"] {
        let [from, to] = ["certified", "alone"].map(|name| door.path(&format!("{name}{end}")));
        std::fs::copy(from, to).unwrap();
    }
    let tokens = crate::support::temporary_folder();
    for name in ["all", "few"] {
        std::fs::write(tokens.path().join(name), format!("token-{name}-7d1c")).unwrap();
    }
    let repos = json!([format!("{HOST}/other/*")]);
    let config = builder(&upstream.file_url())
        .set("/access/anonymous", anonymous)
        .set(
            "/access/tokens",
            json!([
                { "name": "all", "token_file": tokens.path().join("all") },
                { "name": "few", "token_file": tokens.path().join("few"), "repos": repos },
            ]),
        )
        .set(
            "/access/keys",
            json!({
                "entries": [{ "name": "limited", "public_key": door.public("limited"), "repos": repos }],
                "authorities": [{
                    "name": "corp",
                    "public_key": door.public("authority"),
                    "principals": ["builds"],
                    "repos": repos,
                }],
            }),
        );
    let warmdock = door.open(config);
    Setup {
        upstream,
        sample,
        other,
        door,
        warmdock,
        tokens,
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

impl Setup {
    /// A client with credentials, and where it finds a repository.
    fn client(&self, credentials: Credentials, name: &str) -> (Client, String) {
        let mut client = Client::new(2);
        let url = match credentials {
            Credentials::Nothing => self.warmdock.url(name),
            Credentials::Token(token) => {
                // From a URL git would send them only when asked.
                let header = format!("Authorization: Bearer token-{token}-7d1c");
                client.set("GIT_CONFIG_COUNT", "1");
                client.set("GIT_CONFIG_KEY_0", "http.extraHeader");
                client.set("GIT_CONFIG_VALUE_0", &header);
                self.warmdock.url(name)
            }
            Credentials::Key(key) | Credentials::Certificate(key) => {
                let mut ssh = self.door.ssh(key);
                if matches!(credentials, Credentials::Certificate(_)) {
                    let certificate = self.door.path(&format!("{key}-cert.pub"));
                    ssh += &format!(" -o CertificateFile={}", certificate.display());
                }
                client.set("GIT_SSH_COMMAND", &ssh);
                self.warmdock.ssh_url(name)
            }
        };
        (client, url)
    }

    fn may_read(&self, credentials: Credentials, name: &str) -> bool {
        let (client, url) = self.client(credentials, name);
        client.git(&["ls-remote", &url]).status.success()
    }
}

#[test]
fn everybody_reads_what_is_theirs_through_their_door() {
    use Credentials::{Certificate, Key, Nothing, Token};
    let (open, closed) = (setup("read"), setup("none"));
    // Whether the sample and the other repository may be read, where anonymous users may read and where not.
    let table = [
        (Nothing, [true, true], [false, false]),
        (Token("all"), [true, true], [true, true]),
        (Token("few"), [false, true], [false, true]),
        (Token("wrong"), [false, false], [false, false]),
        (Key("user"), [true, true], [true, true]),
        (Key("limited"), [false, true], [false, true]),
        (Key("stranger"), [false, false], [false, false]),
        (Key("authority"), [false, false], [false, false]),
        (Key("alone"), [false, false], [false, false]),
        (Certificate("certified"), [false, true], [false, true]),
        (Certificate("here"), [false, true], [false, true]),
        (
            Certificate("other_principal"),
            [false, false],
            [false, false],
        ),
        (
            Certificate("other_authority"),
            [false, false],
            [false, false],
        ),
        (Certificate("expired"), [false, false], [false, false]),
        (Certificate("elsewhere"), [false, false], [false, false]),
        (Certificate("forced"), [false, false], [false, false]),
    ];
    for (credentials, when_open, when_closed) in table {
        for (setup, expected) in [(&open, when_open), (&closed, when_closed)] {
            let found = [SAMPLE, OTHER].map(|name| setup.may_read(credentials, name));
            assert_eq!(found, expected, "{credentials:?}");
            assert!(!setup.may_read(credentials, ABSENT), "{credentials:?}");
        }
    }
}

/// The names of hosts are for whoever may read everything there, with a token as well as without one.
#[test]
fn who_may_read_everything_is_told_of_every_host() {
    use Credentials::{Nothing, Token};
    let (open, closed) = (setup("read"), setup("none"));
    for (setup, credentials, status) in [
        (&open, Nothing, 200),
        (&open, Token("few"), 404),
        (&closed, Nothing, 401),
        (&closed, Token("all"), 200),
        (&closed, Token("few"), 404),
    ] {
        let get = |path: &str| {
            let token = match credentials {
                Token(token) => Some(format!("Bearer token-{token}-7d1c")),
                _ => None,
            };
            let headers: Vec<_> = token.iter().map(|it| ("Authorization", &**it)).collect();
            http::request(setup.warmdock.address(), "GET", path, &headers, b"")
        };
        let config = get("/api/v1/client-config/git");
        assert_eq!(config.status, status, "{credentials:?}: {}", config.text());
        for page in [config, get("/")] {
            assert_eq!(page.text().contains(HOST), status == 200, "{credentials:?}");
        }
    }
}

/// What is denied looks like what is not there, to every principal that is let in.
#[test]
fn denied_is_like_absent() {
    let setup = setup("none");
    // Mirrored and answered before, which must not show.
    assert!(setup.may_read(Credentials::Token("all"), SAMPLE));
    for credentials in [
        Credentials::Token("few"),
        Credentials::Key("limited"),
        Credentials::Certificate("certified"),
    ] {
        let said = |name: &str| {
            let (client, url) = setup.client(credentials, name);
            let output = client.git(&["ls-remote", &url]).failed();
            output.stderr.replace(name, "NAME")
        };
        assert_eq!(said(SAMPLE), said(ABSENT), "{credentials:?}");
    }
}

/// Not by its id on another repository, and not out of the kept answers, of which both are full.
#[test]
fn objects_stay_in_their_repository() {
    let setup = setup("none");
    for protocol in ["0", "2"] {
        for (credentials, allowed, denied) in [
            (Credentials::Token("few"), OTHER, &setup.sample),
            (Credentials::Key("limited"), OTHER, &setup.sample),
            (Credentials::Certificate("certified"), OTHER, &setup.sample),
            // Who may read both does not get them mixed up either.
            (Credentials::Token("all"), SAMPLE, &setup.other),
            (Credentials::Key("user"), SAMPLE, &setup.other),
        ] {
            for name in [SAMPLE, OTHER] {
                let (client, url) = setup.client(Credentials::Key("user"), name);
                client.clone(&url, "filled", &["--mirror"]).ok();
            }
            let id = denied.id("main");
            let (client, url) = setup.client(credentials, allowed);
            client.git(&["init", "--quiet", "ours"]).ok();
            let version = format!("protocol.version={protocol}");
            let output = client
                .git_in("ours", &["-c", &version, "fetch", "--quiet", &url, &id])
                .failed();
            assert!(
                output.stderr.contains("not our ref")
                    || output.stderr.contains("unadvertised object"),
                "{credentials:?}: {}",
                output.describe()
            );
            let objects = client.git_in("ours", &["count-objects"]).text();
            assert!(objects.starts_with("0 objects"), "{objects}");
        }
    }
}

/// Wherever else a key stands, and without the certificate's authority.
#[test]
fn a_revoked_key_lets_nobody_in() {
    let setup = setup("none");
    let revoked = setup.door.path("revoked");
    std::fs::write(&revoked, "").unwrap();
    let mut config = setup.warmdock.config();
    config["access"]["keys"]["revoked_keys_file"] = json!(revoked);
    setup.warmdock.write_config(&config.to_string());
    setup.warmdock.signal("HUP");
    let may_read = |credentials| setup.may_read(credentials, OTHER);
    let (listed, signed) = (
        [Credentials::Key("user"), Credentials::Key("limited")],
        [
            Credentials::Certificate("certified"),
            Credentials::Certificate("here"),
        ],
    );
    for [first, second] in [listed, signed] {
        assert!(may_read(first) && may_read(second));
        let (Credentials::Key(key) | Credentials::Certificate(key)) = first else {
            unreachable!()
        };
        std::fs::write(&revoked, format!("# lost\n{}\n", setup.door.public(key))).unwrap();
        wait_for("the key to be refused", || (!may_read(first)).then_some(()));
        assert!(may_read(second), "{second:?}");
    }
    // What signed them all.
    std::fs::write(&revoked, setup.door.public("authority")).unwrap();
    wait_for("the certificates to be refused", || {
        (!signed.iter().any(|credentials| may_read(*credentials))).then_some(())
    });
    assert!(may_read(Credentials::Key("user")));
    // A file that is none keeps what was.
    std::fs::write(&revoked, "hello\n").unwrap();
    setup.warmdock.wait_log("what is wrong with it", |event| {
        event["level"] == "ERROR" && event.to_string().contains("access.keys.revoked_keys_file")
    });
    assert!(!may_read(signed[0]) && may_read(Credentials::Key("user")));
}

/// At the next request after the reload, on either door.
#[test]
fn what_is_revoked_is_refused() {
    let setup = setup("none");
    let all = [
        Credentials::Token("few"),
        Credentials::Key("limited"),
        Credentials::Certificate("certified"),
    ];
    for credentials in all {
        assert!(setup.may_read(credentials, OTHER), "{credentials:?}");
    }
    let mut config = setup.warmdock.config();
    config["access"]["tokens"].as_array_mut().unwrap().remove(1);
    config["access"]["keys"]["entries"] = json!([]);
    config["access"]["keys"]["authorities"] = json!([]);
    setup.warmdock.write_config(&config.to_string());
    setup.warmdock.signal("HUP");
    wait_for("the token to be refused", || {
        (!setup.may_read(Credentials::Token("few"), OTHER)).then_some(())
    });
    for credentials in all {
        assert!(!setup.may_read(credentials, OTHER), "{credentials:?}");
    }
    assert!(setup.may_read(Credentials::Key("user"), OTHER));
    drop((setup.upstream, setup.tokens));
}
