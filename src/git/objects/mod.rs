//! The objects of a mirror: what is in its packs, how commits hang together, which objects a request needs, and how
//! they are written as a new pack. Knows no protocol, no network and no references.

pub mod commits;
mod delta;
mod encoding;
pub mod packs;
pub mod set;
mod versions;
pub mod walk;
pub mod writer;

use gix_hash::ObjectId;

use crate::storage::StorageFull;

/// Why objects could not be read or written. [`ObjectError::Missing`], [`ObjectError::Damaged`] and
/// [`ObjectError::Kind`] say that the mirror is not whole.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("object {0} is not in the mirror")]
    Missing(ObjectId),
    /// Also what the disk does not give of a pack that is open.
    #[error("pack {pack} is damaged: {what}")]
    Damaged { pack: String, what: String },
    #[error("object {id} is a {found}, expected a {expected}")]
    Kind {
        id: ObjectId,
        expected: gix_object::Kind,
        found: gix_object::Kind,
    },
    #[error("tree {0} is nested too deeply")]
    TooDeep(ObjectId),
    /// What a new pack is written to, or a lack of the machine's, such as of file handles: packs may be fine.
    #[error("cannot open or write packs: {0}")]
    Io(#[from] std::io::Error),
    #[error("nobody waits for this pack any more")]
    Cancelled,
}

impl ObjectError {
    /// Whether what was to be written did not fit.
    pub fn is_for_want_of_room(&self) -> bool {
        matches!(self, Self::Io(error) if StorageFull::of(error).is_some())
    }
}
