//! Consolidates packs: many small ones become one, and what no reference reaches any more goes. Deltas are kept.
//! Blocks; runs while no fetch of the same repository does.

use std::fs;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use crate::git::mirror::MirrorFolder;
use crate::git::objects::ObjectError;
use crate::git::objects::commits::closure;
use crate::git::objects::packs::{Pack, PackSet, Reader};
use crate::git::objects::set::ObjectSet;
use crate::git::objects::writer::{PackFormat, write_pack};
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{Progress, UpstreamError, pack::receive};
use crate::storage::Reservation;

/// Packs beside the largest, before they become one. Each look-up asks every pack.
const MOST_PACKS: usize = 8;

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Nothing,
    /// Put all packs but the largest together.
    MergeSmall,
    /// Write one pack of what references reach.
    Rewrite,
}

/// What the mirror needs.
pub(super) fn needed(folder: &MirrorFolder, snapshot: &Snapshot) -> Work {
    let packs = snapshot.packs.packs();
    let small: u64 = packs.iter().skip(1).map(|pack| pack.bytes()).sum();
    if folder.has_garbage() {
        Work::Rewrite
    } else if packs.len() <= MOST_PACKS {
        Work::Nothing
    } else if small > packs[0].bytes() / 2 {
        Work::Rewrite
    } else {
        Work::MergeSmall
    }
}

/// Why packs could not be consolidated.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    #[error("{0}")]
    Objects(#[from] ObjectError),
    #[error("{0}")]
    Other(#[from] UpstreamError),
    #[error("the mirror cannot be written: {0}")]
    Io(#[from] io::Error),
}

/// Does it. The snapshot that is returned has the same references and new packs. The caller holds `entry.busy`.
///
/// # Errors
/// What went wrong; the mirror is then as it was, but for packs that are there twice until the next attempt.
pub(super) fn consolidate(
    work: Work,
    folder: &MirrorFolder,
    before: &Snapshot,
    reservation: &mut Reservation,
    scratch: &Path,
    stop: &AtomicBool,
) -> Result<Arc<Snapshot>, Trouble> {
    let old = before.packs.packs();
    let (kept, merged) = match work {
        Work::Nothing | Work::MergeSmall => old.split_at(1.min(old.len())),
        Work::Rewrite => (&[][..], old),
    };
    let source = PackSet::new(merged.to_vec());
    let mut reader = Reader::new(&source);
    let objects = match work {
        Work::Rewrite => {
            let tips: Vec<_> = before.refs.held().collect();
            closure(|| before.commits(), &tips, &mut reader, &|| {
                stop.load(Ordering::Relaxed)
            })?
        }
        Work::Nothing | Work::MergeSmall => source.all(),
    };
    drop(reader);

    let index = rewrite(&source, &objects, scratch, stop, reservation)?;
    let mut packs = kept.to_vec();
    if let Some(index) = index {
        let installed = folder.install(&index)?;
        packs.push(Arc::new(Pack::open(&installed)?));
    }
    // Commits that went must not be taken for present, so history is read anew.
    let commits = if work == Work::Rewrite {
        Arc::new(RwLock::default())
    } else {
        before.shared_commits()
    };
    let snapshot = Snapshot::new(PackSet::new(packs), before.refs.clone(), commits, false)?;
    // All others go: those that were put together, and what an attempt that failed has left. A pack with the same objects
    // has the same name, and is the new one.
    let packs = snapshot.packs.packs();
    for index in folder.indices()? {
        let pack = index.with_extension("pack");
        if !packs.iter().any(|new| new.path() == pack) {
            folder.remove_pack(&pack)?;
        }
    }
    if work == Work::Rewrite {
        folder.set_garbage(false)?;
    }
    Ok(Arc::new(snapshot))
}

/// Writes `objects` to a new pack and takes it in like one from outside: all is decoded and hashed once more.
fn rewrite(
    source: &PackSet,
    objects: &ObjectSet,
    scratch: &Path,
    stop: &AtomicBool,
    reservation: &mut Reservation,
) -> Result<Option<PathBuf>, Trouble> {
    fs::create_dir_all(scratch)?;
    let (output, input) = io::pipe()?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let mut out = BufWriter::with_capacity(1 << 20, input);
            let format = PackFormat {
                ofs_delta: true,
                thin: None,
            };
            write_pack(&mut Reader::new(source), objects, format, &mut out, &|| {
                stop.load(Ordering::Relaxed)
            })?;
            out.flush()?;
            Ok::<_, ObjectError>(())
        });
        let nothing = PackSet::default();
        let received = receive(
            &mut BufReader::new(output),
            &nothing,
            scratch,
            &Progress::default(),
            stop,
            reservation,
        );
        match writer.join() {
            Ok(Err(error)) if !matches!(&error, ObjectError::Io(_)) => Err(error.into()),
            _ => Ok(received?),
        }
    })
}
