//! What keeps one client of the SSH door from taking what others need: places, keys, channels, memory and time. With
//! OpenSSH's client, and with one of our own that says what OpenSSH's never does.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate, load_secret_key};
use russh::{Channel, ChannelMsg, client};
use tokio::time::timeout;

use crate::ssh_door::{Setup, setup, setup_with};
use crate::support::ssh_door::Agent;
use crate::support::{Client, HOST, PATIENCE, SAMPLE, wait_for};

/// Ten may be refused, and the question of every client which ways to log in there are is one of them.
#[test]
fn keys_cannot_be_tried_for_ever() {
    let setup = setup();
    for (strangers, is_let_in) in [(8, true), (12, false)] {
        let agent = Agent::start();
        for number in 0..strangers {
            agent.add(&setup.door.keygen(&format!("stranger-{strangers}-{number}")));
        }
        agent.add(&setup.door.path("user"));
        let mut client = Client::new(2);
        client.set("GIT_SSH_COMMAND", &setup.door.ssh_without_key());
        client.set("SSH_AUTH_SOCK", &agent.socket());
        let output = client.clone(&setup.warmdock.ssh_url(SAMPLE), "ours", &[]);
        assert_eq!(output.status.success(), is_let_in, "{}", output.describe());
        let says_why = output.stderr.contains("Too many authentication attempts");
        assert_eq!(says_why, !is_let_in, "{}", output.describe());
    }
}

#[test]
fn the_number_of_connections_is_limited() {
    let setup = setup_with(|builder| builder.set("/limits/connections", 4));
    let address = setup.warmdock.ssh_address();
    let idle: Vec<_> = (0..10)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    wait_for("as many connections as are allowed", || {
        let name = "warmdock_ssh_connections";
        (setup.warmdock.metric(|sample| sample == name) == 4.0).then_some(())
    });
    // Who waits is served when they have given way.
    setup.clone("user", SAMPLE).ok();
    drop(idle);
}

#[test]
fn connections_that_do_not_log_in_are_closed() {
    let setup = setup_with(|builder| builder.set("/limits/ssh_login_timeout", "3s"));
    let address = setup.warmdock.ssh_address();
    // One says nothing, one speaks something else, one is a client of SSH up to there.
    let connections: Vec<_> = ["", "GET / HTTP/1.1\r\n\r\n", "SSH-2.0-Test\r\n"]
        .map(|first| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
            let _ = stream.write_all(first.as_bytes());
            stream
        })
        .into();
    for mut stream in connections {
        let mut said = Vec::new();
        // Reset or ended, but not open.
        if let Err(error) = stream.read_to_end(&mut said) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
        assert!(
            said.starts_with(b"SSH-2.0-warmdock_"),
            "{:?}",
            String::from_utf8_lossy(&said)
        );
    }
    setup.clone("user", SAMPLE).ok();
    wait_for("all connections to be gone", || {
        (setup
            .warmdock
            .metric(|name| name == "warmdock_ssh_connections")
            == 0.0)
            .then_some(())
    });
}

/// Whoever does nothing is asked to go, no timeout is needed; whoever runs a command stays.
#[test]
fn connections_without_a_command_give_way() {
    let setup = setup_with(|builder| {
        builder
            .set("/limits/connections", 4)
            .set("/limits/ssh_login_timeout", "1h")
    });
    let shared = setup.door.one_connection();
    let shared: Vec<&str> = shared.split(' ').collect();
    let count = |name: &str| setup.warmdock.metric(|sample| sample == name);
    let command = format!("git-upload-pack '/{HOST}/{SAMPLE}.git'");
    let mut busy = vec![setup.hold(&[], &command)];
    // One has run a command, one has logged in, and one has only come.
    setup.run("user", &shared, &[&command]).ok();
    let mut logged_in = setup.door.command(&setup.warmdock, "user", &["-N"]);
    logged_in
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let logged_in = logged_in.spawn().unwrap();
    let mut silent = TcpStream::connect(setup.warmdock.ssh_address()).unwrap();
    wait_for("all places to be taken", || {
        let logins = count("warmdock_ssh_logins_total{result=\"ok\"}");
        (count("warmdock_ssh_connections") == 4.0 && logins == 3.0).then_some(())
    });
    for number in 2..=4 {
        busy.push(setup.hold(&[], &command));
        wait_for("another place to have a command", || {
            (count("warmdock_ssh_requests_in_flight") == f64::from(number)).then_some(())
        });
    }
    let told = logged_in.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(
        told.contains("Received disconnect from") && told.contains("others wait for its place"),
        "{told}"
    );
    let mut heard = Vec::new();
    let _ = silent.read_to_end(&mut heard);
    assert!(heard.starts_with(b"SSH-2.0-warmdock_"), "{heard:?}");
    wait_for("the end of the kept connection", || {
        let check = [&shared[..], &["-O", "check"]].concat();
        (!setup.run("user", &check, &[]).status.success()).then_some(())
    });
    for mut client in busy {
        assert!(client.try_wait().unwrap().is_none(), "a command was ended");
        let _ = client.kill();
        let _ = client.wait();
    }
}

/// A connection has channels, each with a command of its own, and no more of them than it may.
#[test]
fn channels_have_a_number() {
    let setup = setup();
    let shared = setup.door.one_connection();
    let shared: Vec<&str> = shared.split(' ').collect();
    let command = format!("git-upload-pack '/{HOST}/{SAMPLE}.git'");
    setup.run("user", &shared, &[&command]).ok();
    // Whoever finds no place on that connection shall not make another.
    let only = [&shared[..], &["-o", "ProxyCommand=false"]].concat();
    let clients: Vec<_> = (0..14).map(|_| setup.hold(&only, &command)).collect();
    wait_for("ten channels with commands", || {
        let name = "warmdock_ssh_requests_in_flight";
        (setup.warmdock.metric(|sample| sample == name) == 10.0).then_some(())
    });
    assert_eq!(
        setup
            .warmdock
            .metric(|sample| sample == "warmdock_ssh_connections"),
        1.0
    );
    for mut client in clients {
        let _ = client.kill();
        let _ = client.wait();
    }
    let _ = setup.run("user", &[&shared[..], &["-O", "exit"]].concat(), &[]);
}

/// Believes every host.
struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// A command whose answer has begun, for a client that takes `window` bytes at once; and its connection, which lives as
/// long as the handle.
async fn odd_client(
    setup: &Setup,
    window: u32,
) -> (client::Handle<Trusting>, Channel<client::Msg>) {
    let config = client::Config {
        window_size: window,
        ..client::Config::default()
    };
    let address = setup.warmdock.ssh_address();
    let connected = client::connect(Arc::new(config), address, Trusting).await;
    let mut handle = connected.unwrap();
    let key = load_secret_key(setup.door.path("user"), None).unwrap();
    let key = PrivateKeyWithHashAlg::new(Arc::new(key), None);
    let login = handle.authenticate_publickey("git", key).await.unwrap();
    assert!(login.success(), "{login:?}");
    let mut channel = handle.channel_open_session().await.unwrap();
    let command = format!("git-upload-pack '/{HOST}/{SAMPLE}.git'");
    channel.exec(true, command).await.unwrap();
    let begins = async {
        let is_data = |message| matches!(message, ChannelMsg::Data { .. });
        while !is_data(channel.wait().await.expect("an answer")) {}
    };
    timeout(PATIENCE, begins).await.expect("an answer in time");
    (handle, channel)
}

/// Standard errors of clients do not exist. What comes while the service waits for a client to take something is dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_means_nothing_takes_no_memory() {
    const FLOOD: usize = 96 << 20;
    let setup = setup();
    // russh makes it more when less than half of it is left, which one byte never is.
    let (_connection, channel) = odd_client(&setup, 1).await;
    let resident = || {
        let name = "process_resident_memory_bytes";
        setup.warmdock.metric(|sample| sample == name)
    };
    let before = resident();
    let piece = Bytes::from(vec![b'x'; 32 << 10]);
    for _ in 0..FLOOD / piece.len() {
        channel.extended_data_bytes(1, piece.clone()).await.unwrap();
    }
    let grown = resident() - before;
    assert!(grown < FLOOD as f64 / 2.0, "{grown} bytes");
}

/// The time in which a client has to say something is not that for saying anything at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_means_nothing_gives_no_time() {
    let setup = setup_with(|builder| builder.set("/limits/body_idle_timeout", "100ms"));
    let (_connection, mut channel) = odd_client(&setup, 1 << 20).await;
    let closed = timeout(PATIENCE, async {
        loop {
            match timeout(Duration::from_millis(50), channel.wait()).await {
                Ok(Some(ChannelMsg::Close)) => break,
                Ok(message) => assert!(message.is_some(), "the connection ended"),
                Err(_) => {
                    let _ = channel.window_change(80, 24, 0, 0).await;
                }
            }
        }
    });
    closed.await.expect("the channel is closed");
}
