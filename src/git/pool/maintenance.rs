//! Consolidates packs: many small ones become one, and what no reference reaches any more goes. Deltas are kept.
//! Blocks; runs while no fetch of the same repository does.

use std::fs;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

use crate::git::mirror::MirrorFolder;
use crate::git::objects::commits::closure;
use crate::git::objects::packs::{Pack, PackSet, Reader};
use crate::git::objects::set::ObjectSet;
use crate::git::objects::writer::{PackFormat, write_pack};
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{Progress, UpstreamError, pack::receive};
use crate::storage::{Part, Storage};

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

/// Does it. The snapshot that is returned has the same references and new packs.
///
/// # Errors
/// What went wrong; the mirror is then as it was.
pub(super) fn consolidate(
    work: Work,
    folder: &MirrorFolder,
    before: &Snapshot,
    storage: &Arc<Storage>,
    scratch: &Path,
    stop: &AtomicBool,
) -> Result<Arc<Snapshot>, UpstreamError> {
    let old = before.packs.packs();
    let (kept, merged) = match work {
        Work::Nothing | Work::MergeSmall => old.split_at(1.min(old.len())),
        Work::Rewrite => (&[][..], old),
    };
    let source = PackSet::new(merged.to_vec());
    let mut reader = Reader::new(&source);
    let objects = match work {
        Work::Rewrite => {
            let tips: Vec<_> = before
                .refs
                .tips()
                .chain(before.refs.kept.keys().copied())
                .collect();
            closure(&before.commits(), &tips, &mut reader).map_err(failed)?
        }
        Work::Nothing | Work::MergeSmall => source.all(),
    };
    drop(reader);

    let mut reservation = storage.nothing(Part::Git);
    let index = rewrite(&source, &objects, scratch, stop, &mut reservation)?;
    let mut packs = kept.to_vec();
    if let Some(index) = index {
        let installed = folder.install(&index).map_err(failed)?;
        packs.push(Arc::new(Pack::open(&installed).map_err(failed)?));
    }
    // Commits that went must not be taken for present, so history is read anew.
    let commits = if work == Work::Rewrite {
        Arc::new(RwLock::default())
    } else {
        before.shared_commits()
    };
    let snapshot =
        Snapshot::new(PackSet::new(packs), before.refs.clone(), commits).map_err(failed)?;
    for pack in merged {
        // A pack with the same objects has the same name, and is the new one.
        if !snapshot
            .packs
            .packs()
            .iter()
            .any(|new| new.path() == pack.path())
        {
            folder.remove_pack(pack.path()).map_err(failed)?;
        }
    }
    if work == Work::Rewrite {
        folder.set_garbage(false).map_err(failed)?;
    }
    Ok(Arc::new(snapshot))
}

/// Writes `objects` to a new pack and takes it in like one from outside: all is decoded and hashed once more.
fn rewrite(
    source: &PackSet,
    objects: &ObjectSet,
    scratch: &Path,
    stop: &AtomicBool,
    reservation: &mut crate::storage::Reservation,
) -> Result<Option<std::path::PathBuf>, UpstreamError> {
    fs::create_dir_all(scratch).map_err(failed)?;
    let (output, input) = io::pipe().map_err(failed)?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || {
            let mut out = BufWriter::with_capacity(1 << 20, input);
            let format = PackFormat {
                ofs_delta: true,
                thin_bases: None,
            };
            write_pack(&mut Reader::new(source), objects, format, &mut out, &|| {
                stop.load(std::sync::atomic::Ordering::Relaxed)
            })?;
            out.flush()?;
            Ok::<_, crate::git::objects::ObjectError>(())
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
            Ok(Err(error)) if !matches!(&error, crate::git::objects::ObjectError::Io(_)) => {
                Err(failed(error))
            }
            _ => received,
        }
    })
}

fn failed(error: impl std::fmt::Display) -> UpstreamError {
    UpstreamError::Failed(format!("packs cannot be consolidated: {error}"))
}
