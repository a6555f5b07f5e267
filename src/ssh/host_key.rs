//! The key that the service shows to clients of SSH.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use russh::keys::ssh_key::LineEnding;
use russh::keys::{Algorithm, PrivateKey, key::safe_rng};

use super::private_key::SshKey;

/// Reads the key at `path`, or makes an ed25519 key there. Touches the disk.
///
/// # Errors
/// A file that is no key, and a folder that cannot be written.
pub fn read_or_make(path: &Path) -> anyhow::Result<SshKey> {
    let shown = path.display();
    let key = match fs::read(path) {
        Ok(text) => match SshKey::read(&text, None) {
            Ok(key) => key,
            Err(wrong) => bail!("expected a private key without passphrase in {shown}, found a file {wrong}"),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {
            make(path).with_context(|| {
                format!(
                    "{shown} does not exist and cannot be made: make the folder writable, or put a key there with \
                     ssh-keygen -t ed25519 -N '' -f {shown}"
                )
            })?
        }
        Err(error) => return Err(error).with_context(|| format!("{shown} cannot be read")),
    };
    // The line for known_hosts: the file itself is readable for the service alone.
    let public_key = key.expose().public_key().to_openssh()?;
    tracing::info!(path = %shown, public_key, "host key");
    Ok(key)
}

/// Whole or not at all, and nobody else may read it.
fn make(path: &Path) -> anyhow::Result<SshKey> {
    let key = PrivateKey::random(&mut safe_rng(), Algorithm::Ed25519)?;
    let text = key.to_openssh(LineEnding::LF)?;
    let folder = path.parent().context("it has no folder")?;
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(folder)?.sync_all()?;
    Ok(SshKey::read(text.as_bytes(), None)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host_key");
        let first = read_or_make(&path).unwrap();
        let again = read_or_make(&path).unwrap();
        assert_eq!(first.expose().public_key(), again.expose().public_key());
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::write(&path, "hello").unwrap();
        assert!(
            read_or_make(&path)
                .unwrap_err()
                .to_string()
                .contains("expected a private key")
        );
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = read_or_make(Path::new("/nowhere/at/all/key")).unwrap_err();
        assert!(
            error.to_string().contains("ssh-keygen -t ed25519"),
            "{error:#}"
        );
    }
}
