//! The crate cache over HTTP: what it serves, and what it makes of registries that fail.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use futures_util::future::try_join_all;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::support::http::{self, Request, Response};
use crate::support::registry::{Fault, Of, Published, Registry, Validators, index_path, noise};
use crate::support::warmdock::{Builder, builder, files_below};
use crate::support::{Warmdock, wait_for};

/// A service with `registry` under the name `corp`.
pub fn over(registry: &Registry) -> Builder {
    builder("https://unused.example.test").set(
        "/crates",
        json!({ "registries": [{ "name": "corp", "url": registry.url() }], "max_age": "0s" }),
    )
}

fn get(warmdock: &Warmdock, path: &str) -> Response {
    http::get(warmdock.address(), &format!("/crates/corp/{path}"))
}

fn get_with(warmdock: &Warmdock, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
    let target = format!("/crates/corp/{path}");
    http::request(warmdock.address(), method, &target, headers, b"")
}

#[track_caller]
fn is_whole(warmdock: &Warmdock, file: &Published) {
    let response = get(warmdock, &file.path());
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(response.complete && response.body == file.bytes);
}

/// What is sent in one block is not begun before it is known to be right.
const BLOCK: usize = 64 << 10;

/// The answer is an error. Of what is larger than a block it may also break off before its last byte, or before its
/// first, when hyper learns of the trouble before it has sent anything.
#[track_caller]
fn is_refused(warmdock: &Warmdock, file: &Published) {
    let request = format!(
        "GET /crates/corp/{} HTTP/1.1\r\nHost: corp\r\nConnection: close\r\n\r\n",
        file.path()
    );
    let response = match http::exchange(warmdock.address(), request.as_bytes()) {
        Ok(response) => response,
        Err(error) if file.bytes.len() > BLOCK && error.to_string() == "no HTTP response" => return,
        Err(error) => panic!("{error}"),
    };
    let broke_off = file.bytes.len() > BLOCK
        && response.status == 200
        && !response.complete
        && response.body.len() < file.bytes.len();
    assert!(
        broke_off || response.status == 502,
        "{} with {} of {} bytes",
        response.status,
        response.body.len(),
        file.bytes.len()
    );
}

/// Files of the blob store.
fn blobs(warmdock: &Warmdock) -> Vec<PathBuf> {
    let all = files_below(&warmdock.data().join("blobs"));
    all.into_iter()
        .filter(|path| {
            let text = path.to_string_lossy();
            !["quarantine", "leftovers"]
                .iter()
                .any(|folder| text.contains(folder))
        })
        .collect()
}

#[track_caller]
fn wait_kept(warmdock: &Warmdock, file: &Published) -> PathBuf {
    wait_for("the file to be kept", || {
        blobs(warmdock)
            .into_iter()
            .find(|path| path.ends_with(&file.checksum))
    })
}

/// Waits until the store knows the file, and it is not only in its place.
#[track_caller]
fn wait_settled(warmdock: &Warmdock, file: &Published) {
    let hits = || warmdock.metric(|name| name.contains("kind=\"file\",from=\"cache\""));
    wait_for("an answer out of the store", || {
        let before = hits();
        get_with(warmdock, "HEAD", &file.path(), &[]);
        (hits() > before).then_some(())
    });
}

#[test]
fn config_names_this_service_and_the_checksum() {
    let registry = Registry::start();
    let warmdock = over(&registry).start();
    let config: Value = serde_json::from_slice(&get(&warmdock, "config.json").body).unwrap();
    let base = format!("http://{}/crates/corp", warmdock.address());
    assert_eq!(
        config["dl"],
        format!("{base}/dl/{{crate}}/{{version}}/{{sha256-checksum}}")
    );
    assert!(config["auth-required"].is_null());
    // A proxy that nobody trusts is not believed.
    let headers = [
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil.test"),
    ];
    let config: Value =
        serde_json::from_slice(&get_with(&warmdock, "GET", "config.json", &headers).body).unwrap();
    assert_eq!(config["api"], base);
    assert_eq!(
        registry.asked().len(),
        0,
        "the registry is not asked for that"
    );

    let trusting = over(&registry)
        .set("/listen/trusted_proxies", json!(["127.0.0.0/8"]))
        .start();
    let config: Value =
        serde_json::from_slice(&get_with(&trusting, "GET", "config.json", &headers).body).unwrap();
    assert_eq!(config["api"], "https://evil.test/crates/corp");
    let public = over(&registry)
        .set("/listen/public_url", "https://dock.test/x")
        .start();
    let config: Value = serde_json::from_slice(&get(&public, "config.json").body).unwrap();
    assert_eq!(config["api"], "https://dock.test/x/crates/corp");
}

#[test]
fn entries_pass_through_with_conditions_and_compression() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).set("/crates/max_age", "1h").start();
    let plain = get(&warmdock, "le/af/leaf");
    assert_eq!((plain.status, plain.text()), (200, registry.entry("leaf")));
    let etag = plain.header("etag").unwrap();
    let modified = plain.header("last-modified").unwrap();
    assert_eq!(modified, "Tue, 01 Jan 2030 00:00:00 GMT");
    let packed = get_with(
        &warmdock,
        "GET",
        "le/af/leaf",
        &[("Accept-Encoding", "gzip")],
    );
    assert_eq!(packed.header("content-encoding"), Some("gzip"));
    let mut text = String::new();
    flate2::read::GzDecoder::new(&packed.body[..])
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, registry.entry("leaf"));
    for header in [("If-None-Match", etag), ("If-Modified-Since", modified)] {
        let response = get_with(&warmdock, "GET", "le/af/leaf", &[header]);
        assert_eq!((response.status, response.body.len()), (304, 0));
        assert_eq!(response.header("etag"), Some(etag));
    }
    let head = get_with(&warmdock, "HEAD", "le/af/leaf", &[]);
    assert_eq!(head.status, 200);
    assert_eq!(
        head.header("content-length"),
        Some(&*plain.body.len().to_string())
    );
    assert_eq!(
        registry.asked_for("leaf"),
        1,
        "all of that is answered here"
    );
}

#[test]
fn an_old_entry_is_confirmed_by_one_conditional_question() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    get(&warmdock, "le/af/leaf");
    assert_eq!(get(&warmdock, "le/af/leaf").status, 200);
    let asked = registry.asked();
    assert!(asked[0].header("if-none-match").is_none());
    assert!(
        asked[0]
            .header("user-agent")
            .unwrap()
            .starts_with("warmdock/")
    );
    assert!(asked[1].header("if-none-match").is_some());
    registry.publish("leaf", "1.1.0", &[], "");
    assert_eq!(get(&warmdock, "le/af/leaf").text(), registry.entry("leaf"));
    registry.yank("leaf", "1.0.0");
    let text = get(&warmdock, "le/af/leaf").text();
    assert!(text.contains("\"yanked\":true"), "{text}");
}

#[test]
fn many_who_want_an_old_entry_share_one_question() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    get(&warmdock, "le/af/leaf");
    registry.publish("leaf", "1.1.0", &[], "");
    registry.fail(Of::Index, Fault::HoldAfter(1));
    let address = warmdock.address();
    let ask = || std::thread::spawn(move || http::get(address, "/crates/corp/le/af/leaf"));
    let first = ask();
    registry.wait_held();
    let others: Vec<_> = (0..30).map(|_| ask()).collect();
    // None of them is answered before the registry is, and nobody asks it again.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!others.iter().any(std::thread::JoinHandle::is_finished));
    registry.release();
    for answer in others.into_iter().chain([first]) {
        assert_eq!(answer.join().unwrap().text(), registry.entry("leaf"));
    }
    // Who comes after the answer asks once more.
    assert!(matches!(registry.asked_for("/le/af/leaf"), 2..=4));
}

/// Registries without ETags get one from us, and conditions work all the same.
#[test]
fn a_registry_without_etags() {
    let registry = Registry::start();
    registry.send_validators(Validators::None);
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    let etag = get(&warmdock, "le/af/leaf")
        .header("etag")
        .unwrap()
        .to_owned();
    let again = get_with(&warmdock, "GET", "le/af/leaf", &[("If-None-Match", &etag)]);
    assert_eq!(again.status, 304);
    registry.publish("leaf", "1.1.0", &[], "");
    let again = get_with(&warmdock, "GET", "le/af/leaf", &[("If-None-Match", &etag)]);
    assert_eq!((again.status, again.text()), (200, registry.entry("leaf")));
}

/// One that only dates its entries is asked by these dates, also after a restart, and clients get an ETag of ours that
/// stays for as long as the entry does.
#[test]
fn a_registry_with_dates_alone() {
    let registry = Registry::start();
    registry.send_validators(Validators::LastModified);
    registry.publish("leaf", "1.0.0", &[], "");
    let mut warmdock = over(&registry).start();
    let last_asked = || registry.asked().pop().unwrap();
    let first = get(&warmdock, "le/af/leaf");
    let (etag, date) = (first.header("etag"), first.header("last-modified"));
    assert_eq!(date, Some("Tue, 01 Jan 2030 00:00:00 GMT"));
    assert_eq!(last_asked().header("if-modified-since"), None);
    for restarted in [false, true] {
        if restarted {
            warmdock.stop();
            warmdock.start_again();
        }
        let again = get(&warmdock, "le/af/leaf");
        assert_eq!((again.status, again.text()), (200, registry.entry("leaf")));
        assert_eq!(again.header("etag"), etag);
        assert_eq!(last_asked().header("if-modified-since"), date);
        // Ours, which the registry does not know.
        assert_eq!(last_asked().header("if-none-match"), None);
        let confirmed = warmdock.metric(|name| {
            name.contains("crates_answers_total") && name.contains("\"revalidated\"")
        });
        assert_eq!(confirmed, 1.0, "restarted: {restarted}");
        for (header, value) in [("If-None-Match", etag), ("If-Modified-Since", date)] {
            let headers = [(header, value.unwrap())];
            let response = get_with(&warmdock, "GET", "le/af/leaf", &headers);
            assert_eq!((response.status, response.header("etag")), (304, etag));
        }
    }
    registry.publish("leaf", "1.1.0", &[], "");
    let headers = [("If-None-Match", etag.unwrap())];
    let new = get_with(&warmdock, "GET", "le/af/leaf", &headers);
    assert_eq!((new.status, new.text()), (200, registry.entry("leaf")));
    assert_ne!(new.header("etag"), etag);
    let new_date = new.header("last-modified");
    assert_eq!(new_date, Some("Tue, 01 Jan 2030 01:00:00 GMT"));
    let again = get(&warmdock, "le/af/leaf");
    assert_eq!(again.header("etag"), new.header("etag"));
    assert_eq!(last_asked().header("if-modified-since"), new_date);
}

#[test]
fn what_is_not_there_is_404_and_remembered() {
    let registry = Registry::start();
    let warmdock = over(&registry).set("/crates/max_age", "1h").start();
    for status in [404, 410, 451] {
        registry.fail(Of::Everything, Fault::Status(status));
        let name = format!("gone{status}");
        for _ in 0..3 {
            assert_eq!(get(&warmdock, &index_path(&name)).status, 404);
        }
        assert_eq!(registry.asked_for(&name), 1, "{status}");
    }
    registry.release();
    let digest = "0".repeat(64);
    assert_eq!(
        get(&warmdock, &format!("dl/leaf/1.0.0/{digest}")).status,
        404
    );
    for path in [
        "",
        "le/af",
        "le/af/Leaf",
        "le/af/leaf/",
        "xx/af/leaf",
        "../corp/config.json",
        "le/af/le%61f",
        "dl/leaf/1.0.0/xyz",
        "dl/../../etc",
        "config.json/",
    ] {
        assert_eq!(get(&warmdock, path).status, 404, "{path}");
    }
    assert_eq!(
        http::get(warmdock.address(), "/crates/other/config.json").status,
        404
    );
    let post = get_with(&warmdock, "POST", "le/af/leaf", &[]);
    assert_eq!(post.status, 405);
}

#[test]
fn the_api_says_that_it_is_not_here() {
    let registry = Registry::start();
    let warmdock = over(&registry).start();
    let response = get(&warmdock, "api/v1/crates?q=serde");
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    assert!(
        body["errors"][0]["detail"]
            .as_str()
            .unwrap()
            .contains("not its API")
    );
    assert_eq!(registry.asked().len(), 0);
}

#[test]
fn files_with_ranges_heads_and_conditions() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(200_000, 1));
    let warmdock = over(&registry).start();
    is_whole(&warmdock, &file);
    let ask = |method, headers: &[(&str, &str)]| get_with(&warmdock, method, &file.path(), headers);
    for (range, expected) in [
        ("bytes=0-0", 0..1),
        ("bytes=65530-65545", 65530..65546),
        ("bytes=150000-", 150_000..200_000),
        ("bytes=-5", 199_995..200_000),
    ] {
        let part = ask("GET", &[("Range", range)]);
        assert_eq!(part.status, 206);
        assert_eq!(part.body, file.bytes[expected.clone()], "{range}");
        let content_range = format!("bytes {}-{}/200000", expected.start, expected.end - 1);
        assert_eq!(part.header("content-range"), Some(&*content_range));
    }
    let outside = ask("GET", &[("Range", "bytes=200000-")]);
    assert_eq!(outside.status, 416);
    assert_eq!(outside.header("content-range"), Some("bytes */200000"));
    let head = ask("HEAD", &[]);
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, Some("200000"), 0)
    );
    let etag = head.header("etag").unwrap();
    assert_eq!(ask("GET", &[("If-None-Match", etag)]).status, 304);
    let other = ask("GET", &[("Range", "bytes=0-1"), ("If-Range", "\"other\"")]);
    assert_eq!((other.status, other.body.len()), (200, 200_000));
    assert_eq!(registry.asked_for("/files/big/1.0.0"), 1);
    // Cold as well.
    let warmdock = over(&registry).start();
    let head = http::request(
        warmdock.address(),
        "HEAD",
        &format!("/crates/corp/{}", file.path()),
        &[],
        b"",
    );
    assert_eq!(head.header("content-length"), Some("200000"));
    let part = http::request(
        warmdock.address(),
        "GET",
        &format!("/crates/corp/{}", file.path()),
        &[("Range", "bytes=-5")],
        b"",
    );
    assert_eq!((part.status, &part.body[..]), (206, &file.bytes[199_995..]));
}

/// However many ask, and however they are spread over the download.
/// A small file is whole before it is answered, and a large one tells its length once it is here.
#[test]
fn a_registry_that_tells_no_length() {
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(30_000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(300_000, 2));
    let warmdock = over(&registry).start();
    registry.fail(Of::Files, Fault::Unsized);
    let cold = get(&warmdock, &small.path());
    assert_eq!(cold.header("content-length"), Some("30000"));
    assert!(cold.body == small.bytes);
    is_whole(&warmdock, &large);
    wait_kept(&warmdock, &large);
    let warm = get(&warmdock, &large.path());
    assert_eq!(warm.header("content-length"), Some("300000"));
    assert!(warm.body == large.bytes);
}

#[test]
fn many_cold_clients_make_one_download_and_one_question() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(2_000_000, 2));
    let warmdock = over(&registry).set("/crates/max_age", "1h").start();
    registry.fail(Of::Files, Fault::HoldAfter(700_000));
    let address = warmdock.address();
    let ask = |path: String| {
        std::thread::spawn(move || http::get(address, &format!("/crates/corp/{path}")))
    };
    let mut asking: Vec<_> = (0..100).map(|_| ask(file.path())).collect();
    registry.wait_held();
    asking.extend((0..50).map(|_| ask(file.path())));
    let entries: Vec<_> = (0..100).map(|_| ask(index_path("big"))).collect();
    for entry in entries {
        assert_eq!(entry.join().unwrap().text(), registry.entry("big"));
    }
    // What has come is sent on at once.
    let mut stream = http::connect(address);
    write!(
        stream,
        "GET /crates/corp/{} HTTP/1.1\r\nHost: x\r\n\r\n",
        file.path()
    )
    .unwrap();
    let mut reader = BufReader::new(stream);
    assert_eq!(
        http::read_head(&mut reader)
            .unwrap()
            .header("content-length"),
        Some("2000000")
    );
    let mut first = vec![0; 600_000];
    reader.read_exact(&mut first).unwrap();
    assert!(first == file.bytes[..600_000]);
    assert_eq!(http::get(address, "/healthz").status, 200);
    registry.release();
    for answer in asking {
        let answer = answer.join().unwrap();
        assert!(
            answer.complete && answer.body == file.bytes,
            "{}",
            answer.status
        );
    }
    assert_eq!(registry.asked_for("/files/big/1.0.0"), 1);
    assert_eq!(
        registry.asked_for("/bi/g/big") + registry.asked_for("/3/b/big"),
        1
    );
}

/// A client that reads nothing holds up nobody, and is served in the end.
#[test]
fn a_stalled_client_holds_up_nobody() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(20_000_000, 3));
    let warmdock = over(&registry).start();
    let mut stalled = http::connect(warmdock.address());
    write!(
        stalled,
        "GET /crates/corp/{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        file.path()
    )
    .unwrap();
    let mut byte = [0];
    stalled.read_exact(&mut byte).unwrap();
    for _ in 0..3 {
        is_whole(&warmdock, &file);
    }
    let mut rest = Vec::new();
    stalled.read_to_end(&mut rest).unwrap();
    assert!(rest.ends_with(&file.bytes));
    assert_eq!(registry.asked_for("/files/big/1.0.0"), 1);
}

#[test]
fn nothing_wrong_is_served_or_kept() {
    let registry = Registry::start();
    let big = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 4));
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(30_000, 8));
    let warmdock = over(&registry).start();
    for fault in [
        Fault::Wrong,
        Fault::Short,
        Fault::Html,
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Status(403),
        Fault::CutOff,
        Fault::CutAfter(0),
        Fault::CutAfter(1),
    ] {
        registry.fail(Of::Files, fault);
        for file in [&big, &small] {
            is_refused(&warmdock, file);
            wait_for("the rest to be removed", || {
                blobs(&warmdock).is_empty().then_some(())
            });
        }
    }
    registry.release();
    is_whole(&warmdock, &big);
    is_whole(&warmdock, &small);
    let mismatches =
        warmdock.metric(|name| name.starts_with("warmdock_crates_checksum_mismatches_total"));
    assert_eq!(mismatches, 6.0);
}

/// Of a part as well, the last byte waits for the checksum of the whole.
#[test]
fn no_part_of_a_wrong_file_is_whole() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 4));
    let warmdock = over(&registry).start();
    let part = |range: &str| {
        let request = format!(
            "GET /crates/corp/{} HTTP/1.1\r\nHost: corp\r\nRange: bytes={range}\r\nConnection: close\r\n\r\n",
            file.path()
        );
        http::exchange(warmdock.address(), request.as_bytes())
    };
    for fault in [Fault::Wrong, Fault::Short, Fault::Html] {
        registry.fail(Of::Files, fault.clone());
        for range in ["0-0", "0-999", "1000-200000"] {
            let whole =
                part(range).is_ok_and(|response| response.status == 206 && response.complete);
            assert!(!whole, "{range} with {fault:?}");
            wait_for("the rest to be removed", || {
                blobs(&warmdock).is_empty().then_some(())
            });
        }
    }
    registry.release();
    let response = part("1000-200000").unwrap();
    assert_eq!(response.status, 206);
    assert!(response.complete && response.body == file.bytes[1000..=200_000]);
}

/// A file that is larger than all of the store goes from the registry to the client, and is checked on its way.
#[test]
fn what_is_passed_on_is_checked_and_reported() {
    let registry = Registry::start();
    let file = registry.publish_bytes("huge", "1.0.0", &[], noise(5_000_000, 4));
    let warmdock = over(&registry).set("/storage/max_size", "4MiB").start();
    is_whole(&warmdock, &file);
    registry.fail(Of::Files, Fault::Wrong);
    is_refused(&warmdock, &file);
    warmdock.wait_log("the checksum", |event| {
        event["message"] == "a crate cannot be fetched"
            && event["error"].to_string().contains("SHA-256")
    });
    let mismatches =
        warmdock.metric(|name| name.starts_with("warmdock_crates_checksum_mismatches_total"));
    assert!(mismatches >= 1.0);
    registry.release();
    is_whole(&warmdock, &file);
}

/// Without room the registry is asked once for each request: with what it answered when that was found out.
#[test]
fn what_is_passed_on_is_asked_for_once() {
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(250_000, 1));
    let huge = registry.publish_bytes("huge", "1.0.0", &[], noise(5_000_000, 2));
    let warmdock = over(&registry).set("/storage/max_size", "200000B").start();
    for file in [&small, &huge] {
        let asked = || registry.asked_for(&format!("/files/{}/1.0.0", file.name));
        is_whole(&warmdock, file);
        assert_eq!(asked(), 1, "{}", file.name);
        let part = get_with(&warmdock, "GET", &file.path(), &[("Range", "bytes=1000-")]);
        assert_eq!(part.status, 206);
        assert!(part.complete && part.body == file.bytes[1000..]);
        assert_eq!(asked(), 2, "{}", file.name);
        std::thread::scope(|scope| {
            for _ in 0..10 {
                scope.spawn(|| is_whole(&warmdock, file));
            }
        });
        assert_eq!(asked(), 12, "{}", file.name);
    }
}

/// What was learned of a registry outlives a reload that changes nothing of it.
#[test]
fn a_reload_forgets_no_registry_that_stays_as_it_is() {
    let (registry, moved) = (Registry::start(), Registry::start());
    let first = registry.publish_bytes("first", "1.0.0", &[], noise(3000, 1));
    let second = registry.publish_bytes("second", "1.0.0", &[], noise(3000, 2));
    let third = moved.publish_bytes("third", "1.0.0", &[], noise(3000, 3));
    let warmdock = over(&registry).start();
    is_whole(&warmdock, &first);
    let mut config = warmdock.config();
    let reload = |config: &Value| {
        warmdock.write_config(&config.to_string());
        warmdock.signal("HUP");
    };
    let corp = config["crates"]["registries"][0].clone();
    config["crates"]["registries"] = json!([corp, { "name": "other", "url": moved.url() }]);
    reload(&config);
    wait_for("the other registry", || {
        let answer = http::get(warmdock.address(), "/crates/other/config.json");
        (answer.status == 200).then_some(())
    });
    // Where its files are is known.
    registry.fail(Of::Index, Fault::CutOff);
    is_whole(&warmdock, &second);
    assert_eq!(registry.asked_for("/index/config.json"), 1);
    let failing = || warmdock.metric(|name| name.starts_with("warmdock_crates_registries_failing"));
    for name in ["none", "nothing", "nowhere"] {
        assert_eq!(get(&warmdock, &index_path(name)).status, 502);
    }
    assert_eq!(failing(), 1.0);
    // One that does change is another one.
    config["crates"]["registries"] = json!([{ "name": "corp", "url": moved.url() }]);
    reload(&config);
    wait_for("a file from its new address", || {
        (get(&warmdock, &third.path()).status == 200).then_some(())
    });
    assert_eq!(failing(), 0.0);
}

/// Nor is anything lost when the CA certificates are other ones.
#[test]
fn other_ca_certificates_cut_no_download() {
    let folder = crate::support::temporary_folder();
    let bundle = folder.path().join("bundle.crt");
    let write_bundle = |names: &[&str]| {
        let made = names.iter().map(|name| {
            let made = rcgen::generate_simple_self_signed([(*name).to_owned()]);
            made.unwrap().cert.pem()
        });
        std::fs::write(&bundle, made.collect::<String>()).unwrap();
    };
    write_bundle(&["one.test"]);
    let registry = Registry::start();
    let file = registry.publish_bytes("slow", "1.0.0", &[], noise(300_000, 1));
    let second = registry.publish_bytes("second", "1.0.0", &[], noise(3000, 2));
    let warmdock = over(&registry)
        .environment("SSL_CERT_FILE", bundle.to_str().unwrap())
        .start();
    registry.fail(Of::Files, Fault::HoldAfter(100_000));
    std::thread::scope(|scope| {
        let downloading = scope.spawn(|| is_whole(&warmdock, &file));
        registry.wait_held();
        write_bundle(&["one.test", "two.test"]);
        warmdock.signal("HUP");
        warmdock.wait_log("the reload", |event| {
            event["message"] == "configuration reloaded"
        });
        assert_eq!(get(&warmdock, &index_path("second")).status, 200);
        registry.release();
        downloading.join().unwrap();
    });
    is_whole(&warmdock, &second);
    assert_eq!(registry.asked_for("/files/slow/1.0.0"), 1);
    assert_eq!(registry.asked_for("/index/config.json"), 1);
}

#[test]
fn a_registry_that_hangs_holds_up_no_other() {
    let (hanging, good) = (Registry::start(), Registry::start());
    let files: Vec<_> = (0..40)
        .map(|number| {
            hanging.publish_bytes(&format!("file{number}"), "1.0.0", &[], noise(100, number))
        })
        .collect();
    let file = good.publish_bytes("good", "1.0.0", &[], noise(3000, 7));
    let registries = json!([
        { "name": "corp", "url": hanging.url() },
        { "name": "good", "url": good.url() },
    ]);
    let warmdock = over(&hanging)
        .set("/crates/registries", registries)
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    let address = warmdock.address();
    hanging.fail(Of::Files, Fault::Hang);
    let asking: Vec<_> = files
        .iter()
        .map(|file| format!("/crates/corp/{}", file.path()))
        .map(|path| std::thread::spawn(move || ask_and_forget(address, &path)))
        .collect();
    wait_for("all that are fetched at once", || {
        let asked = hanging.asked();
        let files = asked
            .iter()
            .filter(|request| !request.path.contains("/index/"));
        (files.count() >= 32).then_some(())
    });
    let response = http::get(address, &format!("/crates/good/{}", file.path()));
    assert!(response.status == 200 && response.body == file.bytes);
    drop(warmdock);
    hanging.release();
    for asking in asking {
        asking.join().unwrap();
    }
}

/// The rest of a download that broke off is asked for, and clients do not notice.
#[test]
fn a_download_that_breaks_off_is_taken_up() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 5));
    let warmdock = over(&registry).start();
    registry.fail(Of::Files, Fault::CutOnceAfter(123_456));
    is_whole(&warmdock, &file);
    let asked = registry.asked();
    let ranges: Vec<_> = asked
        .iter()
        .filter_map(|request| request.header("range"))
        .collect();
    assert_eq!(ranges, ["bytes=123456-"]);
}

#[test]
fn a_registry_that_hangs_ends_in_an_error_and_the_rest_goes_on() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 6));
    let good = registry.publish_bytes("good", "1.0.0", &[], noise(3000, 7));
    let warmdock = over(&registry)
        .set("/limits/upstream_idle_timeout", "2s")
        .start();
    is_whole(&warmdock, &good);
    for fault in [Fault::Hang, Fault::HoldAfter(1000)] {
        registry.fail(Of::Files, fault);
        is_refused(&warmdock, &file);
        is_whole(&warmdock, &good);
    }
    registry.release();
    is_whole(&warmdock, &file);
}

/// A body that comes byte by byte would hold its place for days.
#[test]
fn a_registry_that_dribbles_ends_in_an_error() {
    let registry = Registry::start();
    let file = registry.publish_bytes("slow", "1.0.0", &[], noise(3000, 6));
    registry.redirect("/files/slow/1.0.0", &dribbling());
    let warmdock = over(&registry)
        .set("/limits/upstream_idle_timeout", "2s")
        .start();
    let response = get(&warmdock, &file.path());
    assert_eq!(response.status, 502, "{}", response.text());
    let said = response.text();
    assert!(said.contains("next to nothing, for 2s"), "{said}");
}

/// The address of a server that sends a byte of its answers now and then, for as long as somebody reads.
fn dribbling() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let dribble = |mut stream: TcpStream| {
        Request::read(&mut BufReader::new(&stream));
        let mut sent = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n");
        while sent.is_ok() {
            std::thread::sleep(Duration::from_millis(100));
            sent = stream.write_all(b"x");
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || dribble(stream));
        }
    });
    url
}

/// A build that needs hundreds of files waits for the first of them only.
#[test]
fn a_registry_that_hangs_again_and_again_is_left_alone_for_a_while() {
    let registry = Registry::start();
    let files: Vec<_> = (0..20)
        .map(|number| {
            registry.publish_bytes(&format!("file{number}"), "1.0.0", &[], noise(3000, number))
        })
        .collect();
    let warmdock = over(&registry)
        .set("/limits/upstream_idle_timeout", "2s")
        .start();
    registry.fail(Of::Files, Fault::Hang);
    for file in &files {
        is_refused(&warmdock, file);
    }
    let asked = registry.asked_for("/1.0.0");
    assert!((2..=4).contains(&asked), "asked {asked} times");
    // What is known without the files' host goes on.
    assert_eq!(
        get(&warmdock, "fi/le/file1").text(),
        registry.entry("file1")
    );
    registry.release();
    wait_for("the registry to be asked again", || {
        (get(&warmdock, &files[0].path()).status == 200).then_some(())
    });
    for file in &files {
        is_whole(&warmdock, file);
    }
}

#[test]
fn entries_are_served_while_the_registry_fails_and_never_wrong_ones() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    // Not known before it fails. It exists, as a 404 is a 404 also where its body breaks off.
    registry.publish("other", "1.0.0", &[], "");
    let faults = [
        Fault::Html,
        Fault::Short,
        Fault::CutAfter(20),
        Fault::Hang,
        Fault::Status(500),
        Fault::CutOff,
    ];
    let mut last = None;
    for (number, fault) in faults.into_iter().enumerate() {
        // Each has a service that knows nothing of the others, whose breaker is closed.
        registry.release();
        let warmdock = over(&registry)
            .set("/limits/upstream_idle_timeout", "2s")
            .start();
        let right = get(&warmdock, "le/af/leaf").text();
        assert_eq!(right, registry.entry("leaf"));
        registry.publish("leaf", &format!("1.{}.0", number + 1), &[], "");
        registry.fail(Of::Index, fault.clone());
        let before = registry.asked_for("/le/af/leaf");
        for _ in 0..4 {
            let response = get(&warmdock, "le/af/leaf");
            assert_eq!(
                (response.status, response.text()),
                (200, right.clone()),
                "{fault:?}"
            );
        }
        assert!(registry.asked_for("/le/af/leaf") > before, "{fault:?}");
        assert_eq!(get(&warmdock, "ot/he/other").status, 502, "{fault:?}");
        let stale = warmdock
            .metric(|name| name.contains("crates_answers_total") && name.contains("\"stale\""));
        assert_eq!(stale, 4.0, "{fault:?}");
        let failing =
            warmdock.metric(|name| name.starts_with("warmdock_crates_registries_failing"));
        if fault == Fault::CutOff {
            assert_eq!(failing, 1.0);
        }
        last = Some((warmdock, right));
    }
    let (mut warmdock, right) = last.unwrap();
    // Also what only lies on disk.
    warmdock.stop();
    warmdock.start_again();
    assert_eq!(get(&warmdock, "le/af/leaf").text(), right);
    registry.release();
    wait_for("the new entry", || {
        (get(&warmdock, "le/af/leaf").text() == registry.entry("leaf")).then_some(())
    });
}

/// After failures in a row, nobody waits for the registry any more.
#[test]
fn the_breaker_leaves_a_failing_registry_alone() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    get(&warmdock, "le/af/leaf");
    registry.fail(Of::Everything, Fault::Status(500));
    for _ in 0..20 {
        assert_eq!(get(&warmdock, "le/af/leaf").status, 200);
    }
    assert_eq!(registry.asked_for("leaf"), 3);
}

/// An answer about one crate says nothing of the registry, however often it comes.
#[test]
fn one_bad_crate_does_not_keep_the_others_from_being_fresh() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    registry.publish("known", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    get(&warmdock, "le/af/leaf");
    let old = get(&warmdock, "kn/ow/known").text();
    registry.publish("known", "1.1.0", &[], "");
    for (round, fault) in [
        Fault::Status(400),
        Fault::Status(403),
        Fault::Html,
        Fault::Short,
    ]
    .into_iter()
    .enumerate()
    {
        registry.fail(Of::Entry("known"), fault.clone());
        let asked = registry.asked_for("known");
        for _ in 0..5 {
            let response = get(&warmdock, "kn/ow/known");
            assert_eq!(
                (response.status, response.text()),
                (200, old.clone()),
                "{fault:?}"
            );
        }
        assert_eq!(registry.asked_for("known"), asked + 5, "{fault:?}");
        registry.publish("leaf", &format!("1.0.{}", round + 1), &[], "");
        assert_eq!(
            get(&warmdock, "le/af/leaf").text(),
            registry.entry("leaf"),
            "{fault:?}"
        );
    }
    // Nor do crates that are not here at all.
    for name in ["bad1", "bad2", "bad3"] {
        registry.fail(Of::Entry(name), Fault::Status(403));
        assert_eq!(get(&warmdock, &index_path(name)).status, 502);
    }
    registry.publish("leaf", "1.1.0", &[], "");
    assert_eq!(get(&warmdock, "le/af/leaf").text(), registry.entry("leaf"));
    assert_eq!(
        warmdock.metric(|name| name.starts_with("warmdock_crates_registries_failing")),
        0.0
    );
}

/// One question that is not answered is one failure, however many wait for it.
#[test]
fn many_who_wait_for_one_entry_do_not_keep_the_others_from_being_fresh() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    registry.publish("slow", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    get(&warmdock, "le/af/leaf");
    let old = get(&warmdock, "sl/ow/slow").text();
    registry.fail(Of::Entry("slow"), Fault::Hang);
    let address = warmdock.address();
    let waiting: Vec<_> = (0..5)
        .map(|_| std::thread::spawn(move || http::get(address, "/crates/corp/sl/ow/slow")))
        .collect();
    for answer in waiting {
        assert_eq!(answer.join().unwrap().text(), old);
    }
    assert_eq!(registry.asked_for("slow"), 2, "one question for all");
    registry.publish("leaf", "1.1.0", &[], "");
    assert_eq!(get(&warmdock, "le/af/leaf").text(), registry.entry("leaf"));
}

#[test]
fn an_operator_may_prefer_an_error_to_an_old_entry() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry)
        .set("/crates/when_upstream_fails", "fail")
        .start();
    get(&warmdock, "le/af/leaf");
    registry.fail(Of::Everything, Fault::Status(500));
    for _ in 0..4 {
        assert_eq!(get(&warmdock, "le/af/leaf").status, 502);
    }
}

#[test]
fn a_flipped_byte_is_found_and_fetched_again() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 8));
    let mut warmdock = over(&registry).start();
    is_whole(&warmdock, &file);
    wait_settled(&warmdock, &file);
    let path = wait_kept(&warmdock, &file);
    let flip = |place: usize| {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[place] ^= 0x10;
        // In place, as a disk does it.
        let mut open = std::fs::File::options().write(true).open(&path).unwrap();
        open.write_all(&bytes).unwrap();
    };
    for (round, place) in [0, 299_999, 150_000].into_iter().enumerate() {
        wait_settled(&warmdock, &file);
        flip(place);
        is_whole(&warmdock, &file);
        assert_eq!(registry.asked_for("/files/big/1.0.0"), 2 + round, "{place}");
    }
    wait_settled(&warmdock, &file);
    warmdock.stop();
    flip(299_999);
    warmdock.start_again();
    is_whole(&warmdock, &file);
    assert_eq!(registry.asked_for("/files/big/1.0.0"), 5);
    let aside = files_below(&warmdock.data().join("blobs/quarantine"));
    assert!(!aside.is_empty());
    // Without the registry there is an error, and nothing wrong.
    wait_settled(&warmdock, &file);
    flip(299_999);
    registry.fail(Of::Everything, Fault::CutOff);
    is_refused(&warmdock, &file);
}

/// Killed while it writes, at places that the registry chooses, and at any other.
#[test]
fn killed_in_the_middle_of_a_write() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(1_000_000, 9));
    let mut warmdock = over(&registry).start();
    for held in [0, 1, 100_000, 999_999] {
        registry.fail(Of::Files, Fault::HoldAfter(held));
        let (address, path) = (warmdock.address(), format!("/crates/corp/{}", file.path()));
        let asking = std::thread::spawn(move || ask_and_forget(address, &path));
        registry.wait_held();
        warmdock.kill9();
        registry.release();
        asking.join().unwrap();
        warmdock.start_again();
        assert_eq!(blobs(&warmdock), Vec::<PathBuf>::new());
    }
    for round in 0..12_u64 {
        let file = registry.publish_bytes(
            "more",
            &format!("1.0.{round}"),
            &[],
            noise(400_000, 100 + round),
        );
        let (address, path) = (warmdock.address(), format!("/crates/corp/{}", file.path()));
        let asking = std::thread::spawn(move || ask_and_forget(address, &path));
        std::thread::sleep(Duration::from_millis(round));
        warmdock.kill9();
        asking.join().unwrap();
        warmdock.start_again();
        for path in blobs(&warmdock) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(
                crate::support::registry::sha256(&std::fs::read(&path).unwrap()),
                name
            );
        }
        is_whole(&warmdock, &file);
    }
    is_whole(&warmdock, &file);
}

/// What a kill leaves behind each step of a write: the folder, some of the file, all of it before its rename, its rename
/// before the folder was synced. Made by hand, since the moments between the last steps are too short to be hit.
#[test]
fn whatever_step_a_kill_leaves_behind() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(1_000_000, 9));
    let mut warmdock = over(&registry).start();
    is_whole(&warmdock, &file);
    let place = wait_kept(&warmdock, &file);
    let temporary = warmdock.data().join("blobs/tmp");
    let asked = || {
        let asked = registry.asked();
        asked
            .iter()
            .filter(|one| one.path == "/files/big/1.0.0")
            .count()
    };
    for step in ["folder", "part", "whole", "renamed"] {
        warmdock.kill9();
        match step {
            "folder" => std::fs::remove_file(&place).unwrap(),
            "part" => {
                std::fs::write(temporary.join("0"), &file.bytes[..999_999]).unwrap();
                std::fs::remove_file(&place).unwrap();
            }
            "whole" => std::fs::rename(&place, temporary.join("0")).unwrap(),
            _ => {}
        }
        let before = asked();
        warmdock.start_again();
        wait_for("what is left to be removed", || {
            let left = files_below(&temporary);
            left.is_empty().then_some(())
        });
        let kept = usize::from(step == "renamed");
        assert_eq!(blobs(&warmdock).len(), kept, "{step}");
        is_whole(&warmdock, &file);
        assert_eq!(asked() - before, 1 - kept, "{step}");
        assert_eq!(wait_kept(&warmdock, &file), place);
        wait_for("it to be counted, and nothing else", || {
            let used = warmdock.metric(|name| name == "warmdock_storage_bytes{part=\"blobs\"}");
            ((used - 1_000_000.0).abs() < 1.0).then_some(())
        });
    }
}

/// The service may be gone before it answers.
pub fn ask_and_forget(address: SocketAddr, path: &str) {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return;
    };
    let _ = write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    );
    let _ = stream.read_to_end(&mut Vec::new());
}

#[test]
fn a_stop_does_not_wait_for_a_registry_that_hangs() {
    let registry = Registry::start();
    let mut warmdock = over(&registry)
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    registry.fail(Of::Index, Fault::Hang);
    let mut client = http::connect(warmdock.address());
    write!(
        client,
        "GET /crates/corp/le/af/leaf HTTP/1.1\r\nHost: x\r\n\r\n"
    )
    .unwrap();
    wait_for("the question", || {
        (registry.asked_for("leaf") == 1).then_some(())
    });
    // The question goes on for whoever asks next.
    drop(client);
    warmdock.stop();
    let log = warmdock.log();
    assert!(!log.contains("does not end, and is cut off"), "{log}");
}

#[test]
fn the_least_recently_used_files_go_and_the_order_survives_a_restart() {
    let registry = Registry::start();
    let files: Vec<_> = (0..10)
        .map(|number| {
            registry.publish_bytes(
                &format!("crate{number}"),
                "1.0.0",
                &[],
                noise(100_000, 20 + number),
            )
        })
        .collect();
    let mut warmdock = over(&registry).set("/storage/max_size", "1000KB").start();
    for file in &files[..9] {
        is_whole(&warmdock, file);
        wait_kept(&warmdock, file);
    }
    warmdock.stop();
    // The order of use: by hand, as it counts whole seconds.
    for (age, number) in [3, 0, 1, 2, 4, 5, 6, 7, 8].into_iter().enumerate() {
        let path = wait_kept(&warmdock, &files[number]);
        let at = std::time::SystemTime::now() - Duration::from_secs(1000 - age as u64);
        let times = std::fs::FileTimes::new().set_accessed(at).set_modified(at);
        std::fs::File::open(path).unwrap().set_times(times).unwrap();
    }
    warmdock.start_again();
    wait_for("the files to be counted", || {
        let used = warmdock
            .metric(|name| name.starts_with("warmdock_storage_bytes") && name.contains("blobs"));
        (used == 900_000.0).then_some(())
    });
    // The one that is read now is not the oldest any more.
    is_whole(&warmdock, &files[3]);
    is_whole(&warmdock, &files[9]);
    wait_kept(&warmdock, &files[9]);
    let has = |number: usize| {
        blobs(&warmdock)
            .iter()
            .any(|path| path.ends_with(&files[number].checksum))
    };
    // Not more than the limit at any time, and down to 80 % after it was met.
    is_whole(
        &warmdock,
        &registry.publish_bytes("more", "1.0.0", &[], noise(100_000, 40)),
    );
    wait_for("the eviction", || {
        (blobs(&warmdock).len() <= 8).then_some(())
    });
    assert!(has(3) && has(9) && !has(0) && !has(1));
}

#[test]
fn metrics_and_pages_know_the_cache() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(3000, 10));
    let warmdock = over(&registry).start();
    is_whole(&warmdock, &file);
    wait_kept(&warmdock, &file);
    is_whole(&warmdock, &file);
    let status = http::get(warmdock.address(), "/api/v1/status").body;
    let status: Value = serde_json::from_slice(&status).unwrap();
    assert_eq!(status["crates"]["registries"][0]["name"], "corp");
    assert_eq!(
        (&status["crates"]["hits"], &status["crates"]["misses"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(status["crates"]["stored_bytes"], 3000);
    assert!(
        http::get(warmdock.address(), "/")
            .text()
            .contains("corp <span")
    );
}

/// What the service has of memory, in bytes, when that grows no more.
pub fn memory_at_rest(warmdock: &Warmdock) -> f64 {
    let resident = || warmdock.metric(|name| name == "process_resident_memory_bytes");
    wait_for("memory that grows no more", || {
        let before = resident();
        std::thread::sleep(Duration::from_millis(500));
        let now = resident();
        (now <= before + 1e6).then_some(now)
    })
}

/// A registry with an entry of some 5 MB.
fn with_large_entry() -> Registry {
    let registry = Registry::start();
    let names: Vec<_> = (0..800)
        .map(|number| format!("dependency{number}"))
        .collect();
    let dependencies: Vec<_> = names.iter().map(|name| (&**name, "^1.0.0")).collect();
    for number in 0..50 {
        let version = format!("1.0.{number}");
        registry.publish_bytes("large", &version, &dependencies, noise(100, number));
    }
    registry
}

/// Clients that take no gzip get an entry unpacked while it is sent, and hold no more of it than that when they stop
/// reading.
#[test]
fn large_entries_that_nobody_reads_on_take_no_memory() {
    const READERS: usize = 24;
    let registry = with_large_entry();
    let entry = registry.entry("large");
    let warmdock = over(&registry).set("/crates/max_age", "1h").start();
    let whole = get(&warmdock, "la/rg/large");
    assert_eq!(
        whole.header("content-length"),
        Some(&*entry.len().to_string())
    );
    assert!(whole.complete && whole.body == entry.as_bytes());
    let resident = || warmdock.metric(|name| name == "process_resident_memory_bytes");
    let before = resident();
    let begin = || {
        let mut stream = http::connect(warmdock.address());
        let request =
            "GET /crates/corp/la/rg/large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream
    };
    let stalled: Vec<_> = (0..READERS).map(|_| begin()).collect();
    let grown = resident() - before;
    assert!(
        grown < (READERS * entry.len()) as f64 / 4.0,
        "{grown} bytes"
    );
    for mut stream in stalled {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest.ends_with(entry.as_bytes()));
    }
}

/// Over HTTP/2 a client may ask for a hundred at once, and take none of them: all that such clients hold is bounded.
#[test]
fn unpacked_entries_that_nobody_takes_have_a_bounded_part_of_memory() {
    const CONNECTIONS: usize = 56;
    // The service takes 100 on each.
    const STREAMS: usize = 90;
    let registry = with_large_entry();
    let entry = registry.entry("large");
    let warmdock = over(&registry).set("/crates/max_age", "1h").start();
    assert_eq!(get(&warmdock, "la/rg/large").body, entry.as_bytes());
    let url = format!("http://{}/crates/corp/la/rg/large", warmdock.address());
    let mut asking = Vec::new();
    for _ in 0..CONNECTIONS {
        let client = http::http2_client(Some(1));
        for _ in 0..STREAMS {
            asking.push(client.get(&url).send());
        }
    }
    let runtime = Runtime::new().unwrap();
    let unread = runtime.block_on(try_join_all(asking)).unwrap();
    assert!(unread.iter().all(|answer| answer.status() == 200));
    let memory = memory_at_rest(&warmdock);
    assert!(memory < 450e6, "{memory} bytes");
    drop(unread);
    assert_eq!(get(&warmdock, "la/rg/large").body, entry.as_bytes());
}

/// Where the disk is crowded, what builds use stays, though nobody can confirm it.
#[test]
fn an_old_entry_that_is_used_is_not_evicted() {
    let registry = Registry::start();
    registry.publish("leaf", "1.0.0", &[], "");
    let files = [("a", 500_000), ("b", 200_000), ("c", 400_000)];
    let [a, b, c] =
        files.map(|(name, length)| registry.publish_bytes(name, "1.0.0", &[], noise(length, 1)));
    let warmdock = over(&registry).set("/storage/max_size", "1000KB").start();
    let kept = || {
        let files = files_below(&warmdock.data().join("crates"));
        files.into_iter().find(|path| path.ends_with("le/af/leaf"))
    };
    get(&warmdock, "le/af/leaf");
    wait_for("the entry to be kept", kept);
    wait_next_second();
    is_whole(&warmdock, &a);
    wait_settled(&warmdock, &a);
    wait_next_second();
    registry.fail(Of::Entry("leaf"), Fault::Status(500));
    let stale = get(&warmdock, "le/af/leaf");
    assert_eq!((stale.status, stale.text()), (200, registry.entry("leaf")));
    for file in [&b, &c] {
        is_whole(&warmdock, file);
        wait_kept(&warmdock, file);
    }
    let has = |file: &Published| {
        blobs(&warmdock)
            .iter()
            .any(|path| path.ends_with(&file.checksum))
    };
    assert!(!has(&a) && has(&b) && has(&c));
    assert!(kept().is_some());
}

/// Use is counted in whole seconds.
fn wait_next_second() {
    let seconds = || UNIX_EPOCH.elapsed().unwrap().as_secs();
    let now = seconds();
    wait_for("the next second", || (seconds() > now).then_some(()));
}
