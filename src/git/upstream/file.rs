//! Upstreams that are a folder of repositories: what is new in one is written as a pack, which then comes in like any
//! other. No `git` is run for it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use gix_hash::{Kind as HashKind, ObjectId};
use gix_object::bstr::{BString, ByteSlice};
use gix_object::{CommitRefIter, Find, Kind, TagRefIter};
use gix_pack::data::output::{bytes::FromEntriesIter, count, entry};
use gix_ref::file::ReferenceExt;
use gix_utils::progress::Discard;

use super::pack::{last_cause, receive_from};
use super::{FetchJob, Fetched, PackJob, UpstreamError, is_mirrored};
use crate::git::objects::packs::PackSet;
use crate::git::refs::{Head, Refs, Target};

/// Fetches from the repository at `path` below `root`: bare with or without `.git` in its name, or with a work tree.
pub(super) fn fetch(
    root: &Path,
    path: &str,
    namespaces: &[String],
    job: FetchJob<'_>,
) -> Result<Fetched, UpstreamError> {
    let folder = find_repository(root, path).ok_or(UpstreamError::NotFound)?;
    if extension(&folder, "objectformat").is_some_and(|format| format == "sha256") {
        return Err(UpstreamError::Sha256);
    }
    // What is not read would be taken for references that are gone. Converted, it can be read at the next try.
    if let Some(format) = extension(&folder, "refstorage")
        && format != "files"
    {
        return Err(UpstreamError::Failed(format!(
            "the repository has its references as {format:?}: expected \"files\", the only format that is read in a \
             folder; convert it with `git refs migrate --ref-format=files`, or serve it over http or ssh"
        )));
    }
    let mut objects =
        gix_odb::at(folder.join("objects"), HashKind::Sha1).map_err(|error| failed(&error))?;
    objects.prevent_pack_unload();
    let refs = read_refs(&folder, &objects, namespaces).map_err(|error| failed(&*error))?;
    (job.on_refs)(&refs);

    let FetchJob { pack, stop, .. } = job;
    let Some(pack) = pack else {
        return Ok(Fetched { refs, index: None });
    };
    let PackJob {
        local,
        folder,
        progress,
        reservation,
        ..
    } = pack;
    let new = new_history(&refs, &objects, local).map_err(|error| failed(&*error))?;
    if new.is_empty() {
        return Ok(Fetched { refs, index: None });
    }
    let index = receive_from(
        |out| write_pack(new, objects, local, out, stop).map_err(|error| failed(&*error)),
        local,
        folder,
        progress,
        stop,
        reservation,
    )?;
    Ok(Fetched { refs, index })
}

type AnyError = Box<dyn std::error::Error + Send + Sync>;

fn failed(error: &(dyn std::error::Error + 'static)) -> UpstreamError {
    UpstreamError::Failed(format!(
        "the upstream's folder cannot be read: {}",
        last_cause(error)
    ))
}

fn find_repository(root: &Path, path: &str) -> Option<PathBuf> {
    let candidates = [
        root.join(format!("{path}.git")),
        root.join(path).join(".git"),
        root.join(path),
    ];
    let folder = candidates
        .into_iter()
        .find(|folder| folder.join("HEAD").is_file() && folder.join("objects").is_dir())?;
    // SECURITY: a link in the folder must not open what lies outside of it.
    let (real, root) = (folder.canonicalize().ok()?, root.canonicalize().ok()?);
    real.starts_with(root).then_some(folder)
}

/// The value of `extensions.<name>` in the repository's configuration, in lower case: how objects or references are kept.
fn extension(folder: &Path, name: &str) -> Option<String> {
    let config = std::fs::read(folder.join("config")).ok()?;
    let config = String::from_utf8_lossy(&config);
    let mut settings = config.lines().filter_map(|line| line.split_once('='));
    let (_, value) = settings.rfind(|(key, _)| key.trim().eq_ignore_ascii_case(name))?;
    Some(value.trim().to_ascii_lowercase())
}

fn read_refs(
    folder: &Path,
    objects: &gix_odb::Handle,
    namespaces: &[String],
) -> Result<Refs, AnyError> {
    let store = gix_ref::file::Store::at(folder.to_owned(), HashKind::Sha1);
    let mut refs = Refs::default();
    let mut symrefs = Vec::new();
    for reference in store.iter()?.all()? {
        // A reference that is broken there is not served here, as with git's own server.
        let Ok(mut reference) = reference else {
            continue;
        };
        let name = BString::from(reference.name.as_bstr());
        if !is_mirrored(&name, namespaces) {
            continue;
        }
        let Ok(peeled) = reference.peel_to_id(&store, objects) else {
            continue;
        };
        let (end, Some(id)) = behind(&store, &name)? else {
            continue;
        };
        if end != name {
            symrefs.push((name.clone(), end));
        }
        refs.names.insert(
            name,
            Target {
                id,
                peeled: (peeled != id).then_some(peeled),
            },
        );
    }
    refs.set_symrefs(symrefs);
    let head = std::fs::read(folder.join("HEAD"))?;
    refs.head = match head.strip_prefix(b"ref:") {
        Some(name) => {
            let name = BString::from(name.trim());
            // As git tells it: the branch behind others that only name one.
            let end = behind(&store, &name).ok().map(|(end, _)| end);
            let end = end.filter(|end| is_mirrored(end, namespaces));
            Head::Branch(end.unwrap_or(name))
        }
        None => Head::Detached(ObjectId::from_hex(head.trim())?),
    };
    Ok(refs)
}

/// Where `name` leads over symbolic references, and the object that this one names, if it is there. Tags are not
/// followed.
fn behind(
    store: &gix_ref::file::Store,
    name: &BString,
) -> Result<(BString, Option<ObjectId>), AnyError> {
    let mut name = name.clone();
    for _ in 0..5 {
        let Some(reference) = store.try_find(name.as_bstr())? else {
            break;
        };
        match reference.target {
            gix_ref::Target::Object(id) => return Ok((name, Some(id))),
            gix_ref::Target::Symbolic(next) => name = next.as_bstr().into(),
        }
    }
    Ok((name, None))
}

/// Commits, tags and whatever else references name that the mirror does not have.
fn new_history(
    refs: &Refs,
    objects: &gix_odb::Handle,
    local: &PackSet,
) -> Result<Vec<ObjectId>, AnyError> {
    let mut seen = std::collections::HashSet::new();
    let mut todo: Vec<ObjectId> = refs.tips().collect();
    let mut new = Vec::new();
    let mut buffer = Vec::new();
    while let Some(id) = todo.pop() {
        if local.contains(&id) || !seen.insert(id) {
            continue;
        }
        new.push(id);
        let object = objects
            .try_find(&id, &mut buffer)?
            .ok_or_else(|| format!("object {id} is missing"))?;
        match object.kind {
            Kind::Commit => {
                todo.extend(CommitRefIter::from_bytes(object.data, HashKind::Sha1).parent_ids())
            }
            Kind::Tag => {
                todo.push(TagRefIter::from_bytes(object.data, HashKind::Sha1).target_id()?)
            }
            Kind::Tree | Kind::Blob => {}
        }
    }
    Ok(new)
}

fn write_pack(
    history: Vec<ObjectId>,
    objects: gix_odb::Handle,
    local: &PackSet,
    out: &mut dyn Write,
    stop: &AtomicBool,
) -> Result<(), AnyError> {
    let options = count::objects::Options {
        thread_limit: None,
        chunk_size: 64,
        input_object_expansion: count::objects::ObjectExpansion::TreeContents,
    };
    let (mut counts, _) = count::objects(
        objects.clone(),
        Box::new(history.into_iter().map(Ok)),
        &Discard,
        stop,
        options,
    )?;
    counts.retain(|count| !local.contains(&count.id));
    let entries = u32::try_from(counts.len())?;
    // One thread keeps the chunks in order.
    let options = entry::iter_from_counts::Options {
        thread_limit: Some(1),
        ..Default::default()
    };
    let chunks = entry::iter_from_counts(counts, objects, Box::new(Discard), options)?;
    let chunks = chunks.map(|chunk| chunk.map(|(_, entries)| entries));
    for written in FromEntriesIter::new(
        chunks,
        &mut *out,
        entries,
        gix_pack::data::Version::V2,
        HashKind::Sha1,
    ) {
        written?;
    }
    out.flush()?;
    Ok(())
}
