//! Brings a mirror up to date: one fetch, checked and put into place. Blocks.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant, SystemTime};

use gix_hash::ObjectId;

use super::entry::Entry;
use super::flight::Flight;
use crate::durable;
use crate::git::mirror::MirrorFolder;
use crate::git::objects::ObjectError;
use crate::git::objects::packs::{Pack, PackSet};
use crate::git::refs::{KEPT_PREFIX, Refs};
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{FetchJob, Fetched, MOST_HAVES, PackJob, Upstream, UpstreamError};
use crate::storage::{Part, Reservation, Storage};

/// What `config`, `HEAD` and the marks of a mirror take together, at most.
const SMALL_FILES: u64 = 4 << 10;

/// How gix ends its complaint of what would take more memory than it may.
const TOO_LARGE: &str = "too large to fit in memory";

/// What a fetch needs to know besides the repository.
pub(super) struct Surroundings<'a> {
    pub upstream: &'a Upstream,
    pub storage: &'a Arc<Storage>,
    /// An empty folder for this fetch.
    pub scratch: &'a Path,
    pub keep_unreachable: Duration,
    pub stop: &'a Arc<AtomicBool>,
}

/// Fetches the repository of `entry`, whose mirror is `before`, if there is one, and puts the result into service. The
/// snapshot that is returned is `before` itself when nothing changed. The caller holds `entry.busy`.
///
/// # Errors
/// [`UpstreamError`]; the mirror is then as it was.
pub(super) fn fetch(
    entry: &Entry,
    before: Option<Arc<Snapshot>>,
    flight: &Flight,
    around: &Surroundings<'_>,
) -> Result<Arc<Snapshot>, UpstreamError> {
    let asked = Instant::now();
    let mut reservation = around.storage.nothing(Part::Git);
    let nothing = PackSet::default();
    let local = before.as_ref().map_or(&nothing, |before| &before.packs);
    let fetched = around.upstream.fetch(
        entry.name.path(),
        FetchJob {
            on_refs: &|refs| flight.set_refs(asked, refs.clone()),
            pack: Some(PackJob {
                local,
                haves: before.as_deref().map(haves).unwrap_or_default(),
                folder: around.scratch,
                progress: &flight.progress,
                reservation: &mut reservation,
            }),
            stop: around.stop,
        },
    );
    let fetched = fetched.map_err(hopeless_if_too_large)?;
    let made = match &before {
        Some(before) => update(&entry.folder, before, fetched, around, &mut reservation),
        None => create(&entry.folder, fetched, around, &mut reservation),
    };
    let now = SystemTime::now();
    if made.is_ok() {
        entry.note_fetch(now);
    }
    let bytes = entry.folder.bytes();
    let mut state = entry.state();
    // Without the references that were replaced; and what a failure leaves in the folder is counted until it goes.
    state.reservation.absorb(reservation);
    state.reservation.set(bytes);
    let snapshot = made?;
    match (&before, &state.snapshot) {
        (None, None) => {}
        (Some(before), Some(now)) if Arc::ptr_eq(before, now) => {}
        // Found to be damaged while we fetched: what was built on it is of no use.
        _ => {
            return Err(UpstreamError::Failed(
                "the mirror was set aside meanwhile".to_owned(),
            ));
        }
    }
    state.snapshot = Some(Arc::clone(&snapshot));
    state.on_disk = true;
    // The references are as old as the question.
    state.fresh = Some(asked);
    state.last_fetch = Some(now);
    Ok(snapshot)
}

/// Asks for the references alone, on behalf of those who wait for `flight`, which asks for itself when it begins.
///
/// # Errors
/// [`UpstreamError`].
pub(super) fn list(
    entry: &Entry,
    flight: &Flight,
    upstream: &Upstream,
    stop: &Arc<AtomicBool>,
) -> Result<(), UpstreamError> {
    let asked = Instant::now();
    let job = FetchJob {
        on_refs: &|refs| flight.set_refs(asked, refs.clone()),
        pack: None,
        stop,
    };
    upstream.fetch(entry.name.path(), job).map(|_| ())
}

/// What to tell the upstream of: the newest tips, and commits farther and farther behind HEAD, in case the upstream
/// no longer knows the tips.
fn haves(snapshot: &Snapshot) -> Vec<ObjectId> {
    let commits = snapshot.commits();
    let numbers: HashSet<_> = snapshot
        .refs
        .tips()
        .filter_map(|tip| snapshot.commit_of(&tip, &commits))
        .collect();
    let mut tips: Vec<_> = numbers
        .into_iter()
        .map(|number| commits.get(number))
        .collect();
    tips.sort_unstable_by_key(|commit| std::cmp::Reverse((commit.time, commit.id)));
    let mut haves: Vec<ObjectId> = tips
        .into_iter()
        .take(MOST_HAVES)
        .map(|commit| commit.id)
        .collect();

    let head = snapshot
        .refs
        .head_id()
        .and_then(|head| snapshot.commit_of(&head, &commits));
    let line = std::iter::successors(head, |commit| commits.get(*commit).parents.first().copied());
    let behind = line
        .enumerate()
        .filter(|(distance, _)| distance.is_power_of_two());
    haves.extend(behind.map(|(_, commit)| commits.get(commit).id));
    haves
}

fn update(
    folder: &MirrorFolder,
    before: &Arc<Snapshot>,
    fetched: Fetched,
    around: &Surroundings<'_>,
    reservation: &mut Reservation,
) -> Result<Arc<Snapshot>, UpstreamError> {
    let refs = before
        .refs
        .replaced_by(fetched.refs, SystemTime::now(), around.keep_unreachable);
    if fetched.index.is_none() && refs == before.refs {
        return Ok(Arc::clone(before));
    }
    reservation.grow(bytes_of(&refs))?;
    let had_garbage = folder.has_garbage();
    // Mostly its commits are behind those of another reference.
    let has_forgotten = before.refs.has_forgotten(&refs);
    let mut packs = before.packs.packs().to_vec();
    // Should we die before all is written, something may be there that nothing reaches.
    if has_forgotten || fetched.index.is_some() {
        folder
            .set_garbage(true)
            .map_err(UpstreamError::unwritable)?;
    }
    let installed = match &fetched.index {
        Some(index) => Some(folder.install(index).map_err(UpstreamError::unwritable)?),
        None => None,
    };
    let make = || -> Result<Snapshot, ObjectError> {
        let pack = installed.as_deref().map(Pack::open).transpose()?;
        let pack = pack.map(Arc::new);
        let new = pack
            .as_ref()
            .map_or(Ok(Vec::new()), |pack| pack.history())?;
        packs.extend(pack.clone());
        let commits = before.shared_commits();
        let mut snapshot = Snapshot::new(PackSet::new(packs), refs, commits, had_garbage)?;
        if !snapshot.knows(&new)? || has_forgotten && !snapshot.reaches_all_of(before) {
            snapshot.set_garbage();
        }
        Ok(snapshot)
    };
    let snapshot = match make() {
        Ok(snapshot) => snapshot,
        Err(error) => {
            // The references are still the old ones, so nobody needs the pack.
            let undo = || -> io::Result<()> {
                if let Some(installed) = &installed {
                    folder.remove_pack(installed)?;
                }
                folder.set_garbage(had_garbage)
            };
            undo().map_err(UpstreamError::unwritable)?;
            return Err(unusable(error));
        }
    };
    snapshot
        .refs
        .write(folder.path())
        .map_err(UpstreamError::unwritable)?;
    folder
        .set_garbage(snapshot.has_garbage())
        .map_err(UpstreamError::unwritable)?;
    Ok(Arc::new(snapshot))
}

/// Makes the mirror beside its place and moves it there in one step. A damaged one that lies there goes.
fn create(
    folder: &MirrorFolder,
    fetched: Fetched,
    around: &Surroundings<'_>,
    reservation: &mut Reservation,
) -> Result<Arc<Snapshot>, UpstreamError> {
    reservation.grow(bytes_of(&fetched.refs))?;
    let new = MirrorFolder::at(around.scratch.join("mirror"));
    let make = |refs: &Refs| -> io::Result<()> {
        new.create()?;
        if let Some(index) = &fetched.index {
            new.install(index)?;
        }
        refs.write(new.path())
    };
    make(&fetched.refs).map_err(UpstreamError::unwritable)?;
    // Checked before it is put into place: every reference is there, and history is whole.
    let packs = PackSet::open(&new.packs()).map_err(unusable)?;
    let checked =
        Snapshot::new(packs, fetched.refs, Arc::new(RwLock::default()), false).map_err(unusable)?;
    let mut garbage = false;
    for pack in checked.packs.packs() {
        let new = pack.history().map_err(unusable)?;
        garbage |= !checked.knows(&new).map_err(unusable)?;
    }
    new.set_garbage(garbage)
        .map_err(UpstreamError::unwritable)?;

    let place = || -> io::Result<()> {
        let parent = folder
            .path()
            .parent()
            .ok_or_else(|| io::Error::other("the mirror has no parent folder"))?;
        durable::create_folder(parent)?;
        if folder.path().exists() {
            fs::rename(folder.path(), around.scratch.join("replaced"))?;
        }
        durable::rename(new.path(), folder.path())
    };
    place().map_err(UpstreamError::unwritable)?;
    let (packs, refs) = folder.open().map_err(unusable)?;
    Snapshot::new(packs, refs, checked.shared_commits(), garbage)
        .map(Arc::new)
        .map_err(unusable)
}

/// Bytes of `packed-refs` with these references and of the small files beside it, at most: some tips that are kept may
/// turn out to need no keeping.
fn bytes_of(refs: &Refs) -> u64 {
    /// An id with the space or the line's end that follows it.
    const ID: usize = 40 + 1;
    let names = refs.names.iter().map(|(name, target)| {
        let peeled = target.peeled.map_or(0, |_| "^".len() + ID);
        ID + name.len() + "\n".len() + peeled
    });
    let pairs = refs.symrefs.iter();
    let symrefs = pairs.map(|(name, target)| "symref=: ".len() + name.len() + target.len());
    let kept = ID + KEPT_PREFIX.len() + "000000000000-".len() + ID;
    let bytes = names.sum::<usize>() + symrefs.sum::<usize>() + refs.kept.len() * kept;
    bytes as u64 + SMALL_FILES
}

/// The next try would bring the same object. Of gix's error only the text comes this far.
fn hopeless_if_too_large(error: UpstreamError) -> UpstreamError {
    match error {
        UpstreamError::Failed(what) if what.contains(TOO_LARGE) => UpstreamError::Hopeless(what),
        other => other,
    }
}

fn unusable(error: ObjectError) -> UpstreamError {
    UpstreamError::Failed(format!("what the upstream sent is not whole: {error}"))
}
