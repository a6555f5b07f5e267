//! Running the git command line, which prepares repositories and answers questions about them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs a command to its end; its errors go to the benchmark's own stderr.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

/// What a command prints, without the last line end.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout)?;
    Ok(text.trim_end().to_owned())
}

pub fn git_in(repository: &Path, arguments: &[&str]) -> Result<String> {
    output(
        Command::new("git")
            .arg("-C")
            .arg(repository)
            .args(arguments),
    )
}
