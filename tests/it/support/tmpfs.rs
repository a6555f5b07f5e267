//! A small disk of a test's own, which can be really full.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{process, temporary_folder};

/// A mounted tmpfs, unmounted when dropped.
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// Of a size such as `3m`. `None` where this user may mount nothing, which a test has to say.
    ///
    /// # Panics
    /// In CI, which promises that it can be done.
    pub fn mount(size: &str) -> Option<Self> {
        let folder = temporary_folder();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
            .arg(folder.path());
        let output = process::run(mount, b"", Duration::from_secs(10));
        if output.status.success() {
            return Some(Self(folder));
        }
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI promises that a tmpfs can be mounted: {}",
            output.describe()
        );
        eprintln!("left out: a full disk, because this user may not mount a tmpfs");
        None
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all the room that is left, until the file that this makes is removed.
    pub fn fill(&self) -> std::path::PathBuf {
        let path = self.path().join("filling");
        let mut file = std::fs::File::create(&path).unwrap();
        // In pages, which is what a tmpfs counts.
        while file.write_all(&[0; 4096]).is_ok() {}
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: the service may have files open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}
