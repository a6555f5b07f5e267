//! One file of a repository, at one commit.

use gix_hash::{Kind as HashKind, ObjectId};
use gix_object::{CommitRefIter, Kind, TreeRefIter};

use crate::git::objects::ObjectError;
use crate::git::objects::packs::{PackSet, Reader};

/// The content of the file at `path` below the root of `commit`. `None` where there is no such file, or one that is
/// longer than `limit` bytes. Blocks.
///
/// # Errors
/// Objects that are missing or damaged.
pub fn file_at(
    packs: &PackSet,
    commit: ObjectId,
    path: &str,
    limit: u64,
) -> Result<Option<Vec<u8>>, ObjectError> {
    let mut reader = Reader::new(packs);
    let mut object = Vec::new();
    reader.read_kind(&commit, Kind::Commit, &mut object)?;
    let tree = CommitRefIter::from_bytes(&object, HashKind::Sha1).tree_id();
    let mut tree = tree.map_err(|_| ObjectError::Missing(commit))?;
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    for folder in folders.split('/').filter(|folder| !folder.is_empty()) {
        match entry(&mut reader, tree, folder, &mut object)? {
            Some((id, mode)) if mode.is_tree() => tree = id,
            _ => return Ok(None),
        }
    }
    let Some((id, mode)) = entry(&mut reader, tree, name, &mut object)? else {
        return Ok(None);
    };
    let number = packs.require(&id)?;
    if !mode.is_blob() || reader.header(number)?.object_size > limit {
        return Ok(None);
    }
    reader.read_kind(&id, Kind::Blob, &mut object)?;
    Ok(Some(object))
}

fn entry(
    reader: &mut Reader<'_>,
    tree: ObjectId,
    name: &str,
    object: &mut Vec<u8>,
) -> Result<Option<(ObjectId, gix_object::tree::EntryMode)>, ObjectError> {
    reader.read_kind(&tree, Kind::Tree, object)?;
    let mut entries = TreeRefIter::from_bytes(object, HashKind::Sha1).flatten();
    let found = entries.find(|entry| entry.filename == name.as_bytes());
    Ok(found.map(|entry| (entry.oid.to_owned(), entry.mode)))
}
