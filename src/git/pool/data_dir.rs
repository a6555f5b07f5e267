//! The folders below `data_dir`, held by one process at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

use crate::durable;
pub(super) use crate::durable::remove;

/// `data_dir`, locked.
pub(super) struct DataDir {
    root: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Makes the folders, and removes what an earlier process left in the one for temporary files.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        durable::create_folder(root).with_context(|| {
            format!(
                "data_dir {} cannot be made: choose a folder that this user may write",
                root.display()
            )
        })?;
        let lock = File::create(root.join("lock")).with_context(|| {
            format!("data_dir {} cannot be written by this user", root.display())
        })?;
        if lock.try_lock().is_err() {
            bail!(
                "data_dir {} is used by another warmdock: stop that one or choose another folder",
                root.display()
            );
        }
        let data = Self {
            root: root.to_owned(),
            _lock: lock,
        };
        durable::create_folder(&data.git())?;
        durable::emptied(&data.scratch())?;
        Ok(data)
    }

    pub fn git(&self) -> PathBuf {
        self.root.join("git")
    }

    pub fn answers(&self) -> PathBuf {
        self.root.join("answers")
    }

    pub fn scratch(&self) -> PathBuf {
        self.root.join("tmp")
    }
}
