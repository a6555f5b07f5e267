//! The references of a mirror: what `packed-refs` and `HEAD` say, read and written in one go.
//!
//! A mirror has no loose references. All of them stand in `packed-refs`, so that one rename changes them together and
//! stock git reads them. Where symbolic ones lead is told in its header, as traits that git does not know and ignores.
//! References that the upstream dropped stay for a while below [`KEPT_PREFIX`], which is never advertised: they keep
//! their objects from being consolidated away.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gix_hash::ObjectId;
use gix_object::bstr::{BString, ByteSlice};

use crate::durable;

/// Where dropped tips stay: `refs/warmdock/kept/<seconds since 1970>-<object id>`.
pub const KEPT_PREFIX: &str = "refs/warmdock/kept/";

/// What HEAD names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Head {
    /// A branch, born or not.
    Branch(BString),
    Detached(ObjectId),
    /// The upstream told of no HEAD.
    Unknown,
}

/// Where a reference points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub id: ObjectId,
    /// What an annotated tag names in the end.
    pub peeled: Option<ObjectId>,
}

/// The references at one moment, in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refs {
    pub head: Head,
    /// What is advertised, HEAD excepted.
    pub names: BTreeMap<BString, Target>,
    /// Which of them are symbolic, in order, and the others that they lead to in the end.
    pub symrefs: Vec<(BString, BString)>,
    /// Tips that the upstream dropped, and since when.
    pub kept: BTreeMap<ObjectId, SystemTime>,
}

impl Default for Refs {
    fn default() -> Self {
        Self {
            head: Head::Unknown,
            names: BTreeMap::new(),
            symrefs: Vec::new(),
            kept: BTreeMap::new(),
        }
    }
}

impl Refs {
    /// What HEAD comes to, when that is there.
    pub fn head_id(&self) -> Option<ObjectId> {
        match &self.head {
            Head::Branch(name) => self.names.get(name).map(|target| target.id),
            Head::Detached(id) => Some(*id),
            Head::Unknown => None,
        }
    }

    /// Takes what the upstream says of symbolic references. Those that lead to none that is mirrored are plain ones.
    pub fn set_symrefs(&mut self, mut symrefs: Vec<(BString, BString)>) {
        let is_there = |name: &BString| self.names.contains_key(name);
        symrefs.retain(|(name, target)| is_there(name) && is_there(target));
        symrefs.sort_unstable();
        self.symrefs = symrefs;
    }

    /// The reference that `name` leads to, if it is symbolic.
    pub fn symref_target(&self, name: &BString) -> Option<&BString> {
        let found = self
            .symrefs
            .binary_search_by(|(symref, _)| symref.cmp(name));
        found.ok().map(|at| &self.symrefs[at].1)
    }

    /// Every object that a reference or a detached HEAD names, doubles included.
    pub fn tips(&self) -> impl Iterator<Item = ObjectId> + '_ {
        let detached = match self.head {
            Head::Detached(id) => Some(id),
            _ => None,
        };
        self.names.values().map(|target| target.id).chain(detached)
    }

    /// What has to stay in a mirror, with all that it reaches: [`Refs::tips`], and those that are kept for a while.
    pub fn held(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.tips().chain(self.kept.keys().copied())
    }

    /// The references that follow `self` when the upstream says `new`: what was dropped or moved is kept from `now`
    /// on, and what was kept longer than `keep` goes.
    #[must_use]
    pub fn replaced_by(&self, new: Self, now: SystemTime, keep: Duration) -> Self {
        let mut kept = self.kept.clone();
        let current: HashSet<ObjectId> = new.tips().collect();
        for old in self.tips().filter(|old| !current.contains(old)) {
            kept.entry(old).or_insert(now);
        }
        kept.retain(|id, since| {
            !current.contains(id) && now.duration_since(*since).map_or(true, |age| age < keep)
        });
        Self { kept, ..new }
    }

    /// Whether `next`, which follows `self`, gives up a tip: one that was kept, or any where nothing is kept.
    pub fn has_forgotten(&self, next: &Self) -> bool {
        let current: HashSet<ObjectId> = next.tips().collect();
        self.held()
            .any(|tip| !next.kept.contains_key(&tip) && !current.contains(&tip))
    }

    /// Reads the references of the bare repository `folder`.
    ///
    /// # Errors
    /// A file that is missing or that is not of git's format.
    pub fn read(folder: &Path) -> std::io::Result<Self> {
        let mut refs = Self {
            head: parse_head(&std::fs::read(folder.join("HEAD"))?)?,
            ..Self::default()
        };
        let packed = match std::fs::read(folder.join("packed-refs")) {
            Ok(packed) => packed,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(err) => return Err(err),
        };
        let mut last: Option<BString> = None;
        for line in packed.lines() {
            if line.starts_with(b"#") {
                refs.symrefs = parse_symrefs(line);
                continue;
            }
            if let Some(peeled) = line.strip_prefix(b"^") {
                let peeled = parse_id(peeled)?;
                if let Some(target) = last.as_ref().and_then(|name| refs.names.get_mut(name)) {
                    target.peeled = Some(peeled);
                }
                continue;
            }
            let (id, name) = line
                .split_once_str(" ")
                .ok_or_else(|| invalid("a line without a name"))?;
            let id = parse_id(id)?;
            match name.strip_prefix(KEPT_PREFIX.as_bytes()) {
                Some(kept) => {
                    refs.kept.insert(id, parse_kept_since(kept)?);
                    last = None;
                }
                None => {
                    refs.names.insert(name.into(), Target { id, peeled: None });
                    last = Some(name.into());
                }
            }
        }
        Ok(refs)
    }

    /// Writes the references of the bare repository `folder`, so that a crash leaves the old ones or the new ones.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, folder: &Path) -> std::io::Result<()> {
        durable::write_file(&folder.join("packed-refs"), &self.packed())?;
        let head = match &self.head {
            Head::Branch(name) => [b"ref: ", name.as_slice(), b"\n"].concat(),
            Head::Detached(id) => format!("{id}\n").into_bytes(),
            Head::Unknown => b"ref: refs/heads/master\n".to_vec(),
        };
        let path = folder.join("HEAD");
        if std::fs::read(&path).ok().as_deref() == Some(&head) {
            Ok(())
        } else {
            durable::write_file(&path, &head)
        }
    }

    fn packed(&self) -> Vec<u8> {
        let kept = self.kept.iter().map(|(id, since)| {
            let seconds = since
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs();
            (
                BString::from(format!("{KEPT_PREFIX}{seconds:012}-{id}")),
                Target {
                    id: *id,
                    peeled: None,
                },
            )
        });
        let all: BTreeMap<BString, Target> = self
            .names
            .iter()
            .map(|(name, target)| (name.clone(), *target))
            .chain(kept)
            .collect();
        // Not "fully-peeled": what is kept is not peeled, and git then looks for itself.
        let mut out = b"# pack-refs with: peeled sorted ".to_vec();
        for (name, target) in &self.symrefs {
            // Names have neither spaces nor colons.
            let symref = [b"symref=".as_slice(), name, b":", target, b" "].concat();
            out.extend_from_slice(&symref);
        }
        out.push(b'\n');
        for (name, target) in all {
            out.extend_from_slice(target.id.to_string().as_bytes());
            out.push(b' ');
            out.extend_from_slice(&name);
            out.push(b'\n');
            if let Some(peeled) = target.peeled {
                out.extend_from_slice(format!("^{peeled}\n").as_bytes());
            }
        }
        out
    }
}

fn parse_head(text: &[u8]) -> std::io::Result<Head> {
    let text = text.trim();
    match text.strip_prefix(b"ref: ") {
        Some(name) => Ok(Head::Branch(name.trim().into())),
        None => parse_id(text).map(Head::Detached),
    }
}

fn parse_symrefs(header: &[u8]) -> Vec<(BString, BString)> {
    header
        .split(|byte| *byte == b' ')
        .filter_map(|one| one.strip_prefix(b"symref=")?.split_once_str(":"))
        .map(|(name, target)| (name.into(), target.into()))
        .collect()
}

fn parse_id(hex: &[u8]) -> std::io::Result<ObjectId> {
    ObjectId::from_hex(hex.trim()).map_err(|_| invalid("an object id that is no SHA-1"))
}

fn parse_kept_since(name: &[u8]) -> std::io::Result<SystemTime> {
    let seconds = name
        .split(|byte| *byte == b'-')
        .next()
        .and_then(|text| text.to_str().ok()?.parse().ok());
    seconds
        .map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds))
        .ok_or_else(|| invalid("a kept tip without a time"))
}

fn invalid(what: &str) -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::InvalidData,
        format!("the mirror's references have {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(digit: char) -> ObjectId {
        ObjectId::from_hex(digit.to_string().repeat(40).as_bytes()).unwrap()
    }

    fn refs(branches: &[(&str, char)]) -> Refs {
        let names = branches.iter().map(|(name, digit)| {
            (
                (*name).into(),
                Target {
                    id: id(*digit),
                    peeled: None,
                },
            )
        });
        Refs {
            head: Head::Branch("refs/heads/main".into()),
            names: names.collect(),
            ..Refs::default()
        }
    }

    #[test]
    fn reads_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let mut written = refs(&[("refs/heads/main", '1'), ("refs/tags/v1", '2')]);
        written
            .names
            .get_mut(&BString::from("refs/tags/v1"))
            .unwrap()
            .peeled = Some(id('3'));
        written
            .kept
            .insert(id('4'), UNIX_EPOCH + Duration::from_secs(7));
        written.set_symrefs(vec![
            ("refs/tags/v1".into(), "refs/heads/main".into()),
            ("refs/heads/main".into(), "refs/tags/v1".into()),
        ]);
        written.write(folder.path()).unwrap();
        assert_eq!(Refs::read(folder.path()).unwrap(), written);
    }

    #[test]
    fn of_symbolic_references_those_count_that_lead_to_others() {
        let mut refs = refs(&[("refs/heads/a", '1'), ("refs/heads/b", '1')]);
        let pairs = [
            ("refs/heads/b", "refs/heads/a"),
            ("refs/heads/a", "refs/pull/1/head"),
            ("refs/pull/2/head", "refs/heads/a"),
            ("HEAD", "refs/heads/a"),
        ];
        refs.set_symrefs(pairs.map(|(name, to)| (name.into(), to.into())).to_vec());
        let [a, b] = ["refs/heads/a", "refs/heads/b"].map(BString::from);
        assert_eq!(refs.symref_target(&b), Some(&a));
        assert_eq!(refs.symref_target(&a), None);
        assert_eq!(refs.symrefs.len(), 1);
    }

    #[test]
    fn keeps_what_the_upstream_dropped_until_its_time_is_over() {
        let day = Duration::from_secs(86_400);
        let start = UNIX_EPOCH + day;
        let old = refs(&[("refs/heads/main", '1'), ("refs/heads/gone", '2')]);
        let new = refs(&[("refs/heads/main", '3')]);
        let after = old.replaced_by(new.clone(), start, day);
        assert_eq!(
            after.kept.keys().copied().collect::<Vec<_>>(),
            [id('1'), id('2')]
        );
        let later = after.replaced_by(new.clone(), start + day / 2, day);
        assert_eq!(later.kept.len(), 2);
        let over = later.replaced_by(new.clone(), start + day, day);
        assert!(over.kept.is_empty());
        assert!(!old.has_forgotten(&after) && !after.has_forgotten(&later));
        assert!(later.has_forgotten(&over));
        // Where nothing is kept, it is forgotten at once.
        assert!(old.has_forgotten(&old.replaced_by(new, start, Duration::ZERO)));
    }

    #[test]
    fn what_comes_back_is_kept_no_longer() {
        let old = refs(&[("refs/heads/main", '1')]);
        let moved = old.replaced_by(
            refs(&[("refs/heads/main", '2')]),
            UNIX_EPOCH,
            Duration::from_secs(9),
        );
        let back = moved.replaced_by(
            refs(&[("refs/heads/main", '1')]),
            UNIX_EPOCH,
            Duration::from_secs(9),
        );
        assert_eq!(back.kept.keys().copied().collect::<Vec<_>>(), [id('2')]);
    }
}
