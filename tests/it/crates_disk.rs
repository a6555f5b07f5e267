//! A disk that is really full: a small tmpfs. Needs root, and says so where nobody is.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::crates_cache::over;
use crate::support::registry::{Registry, noise};
use crate::support::warmdock::files_below;
use crate::support::{http, process, wait_for};

/// A mounted tmpfs, unmounted when dropped.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    /// `None` where this user may mount nothing.
    fn mount(at: &'a Path, size: &str) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(at);
        let output = process::run(mount, b"", Duration::from_secs(10));
        output.status.success().then_some(Self(at))
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        // Lazily: the service may have files open.
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_harms_nothing_that_is_there() {
    let folder = crate::support::temporary_folder();
    let Some(tmpfs) = Tmpfs::mount(folder.path(), "3m") else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI promises that a tmpfs can be mounted"
        );
        eprintln!("left out: a full disk, because this user may not mount a tmpfs");
        return;
    };
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(500_000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(5_000_000, 2));
    let warmdock = over(&registry)
        .set("/data_dir", folder.path().to_str().unwrap())
        .start();
    let get = |path: &str| http::get(warmdock.address(), &format!("/crates/corp/{path}"));
    assert!(get(&small.path()).body == small.bytes);
    let kept = || files_below(&folder.path().join("blobs"));
    wait_for("the file to be kept", || {
        kept()
            .iter()
            .any(|path| path.ends_with(&small.checksum))
            .then_some(())
    });
    for _ in 0..3 {
        // There is no room to keep it, but a build goes on all the same.
        let response = get(&large.path());
        assert!(
            response.complete && response.body == large.bytes,
            "{}",
            response.status
        );
        assert!(get(&small.path()).body == small.bytes);
        assert_eq!(get("sm/al/small").text(), registry.entry("small"));
        wait_for("the rest to be removed", || {
            (kept().len() == 1).then_some(())
        });
    }
    assert_eq!(http::get(warmdock.address(), "/readyz").status, 200);
    drop(warmdock);
    drop(tmpfs);
}

/// The limit at the byte, without any file that could go.
#[test]
fn the_limit_holds_and_reads_go_on() {
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(100_000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(200_001, 2));
    let warmdock = over(&registry).set("/storage/max_size", "200000B").start();
    let get = |path: &str| http::get(warmdock.address(), &format!("/crates/corp/{path}"));
    assert!(get(&small.path()).body == small.bytes);
    let response = get(&large.path());
    assert!(
        response.complete && response.body == large.bytes,
        "{}",
        response.status
    );
    assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
    let used = warmdock.metric(|name| name.starts_with("warmdock_storage_bytes"));
    assert!(used <= 200_000.0, "{used}");
    assert!(get(&small.path()).body == small.bytes);
}
