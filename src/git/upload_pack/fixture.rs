//! Small repositories for tests, made commit by commit.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

use aws_lc_rs::digest;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use gix_hash::{Kind as HashKind, ObjectId};
use gix_object::Kind;

use crate::git::objects::commits::Commits;
use crate::git::objects::packs::PackSet;
use crate::git::refs::{Head, Refs, Target};
use crate::git::snapshot::Snapshot;

/// A repository whose commits all have the empty tree.
pub struct Repository {
    objects: Vec<(Kind, Vec<u8>)>,
    tree: ObjectId,
}

/// The id of an object that no repository has.
pub fn unknown(number: u32) -> ObjectId {
    let mut bytes = [0xee; 20];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    ObjectId::from(bytes)
}

impl Repository {
    pub fn new() -> Self {
        let mut repository = Self {
            objects: Vec::new(),
            tree: ObjectId::null(HashKind::Sha1),
        };
        repository.tree = repository.add(Kind::Tree, Vec::new());
        repository
    }

    fn add(&mut self, kind: Kind, data: Vec<u8>) -> ObjectId {
        let id = gix_object::compute_hash(HashKind::Sha1, kind, &data).unwrap();
        self.objects.push((kind, data));
        id
    }

    /// Adds a commit that differs from all others.
    pub fn commit(&mut self, parents: &[ObjectId]) -> ObjectId {
        let who = format!("A <a@example.org> {} +0000", self.objects.len());
        let parents: String = parents.iter().map(|id| format!("parent {id}\n")).collect();
        let text = format!(
            "tree {}\n{parents}author {who}\ncommitter {who}\n\n",
            self.tree
        );
        self.add(Kind::Commit, text.into_bytes())
    }

    /// The empty tree, and so many that each hold the one before. No commit has them.
    pub fn nested_trees(&mut self, number: usize) -> Vec<ObjectId> {
        let mut trees = vec![self.tree];
        for inner in 0..number {
            let data = [b"40000 a\0".as_slice(), trees[inner].as_slice()].concat();
            trees.push(self.add(Kind::Tree, data));
        }
        trees
    }

    /// Adds `length` commits, each the parent of the next.
    pub fn line(&mut self, length: usize) -> Vec<ObjectId> {
        let mut line: Vec<ObjectId> = Vec::new();
        for _ in 0..length {
            let parents = line.last().copied();
            line.push(self.commit(parents.as_slice()));
        }
        line
    }

    /// The repository with these branches, the first of which HEAD names.
    pub fn snapshot(&self, branches: &[(&str, ObjectId)]) -> Snapshot {
        let folder = tempfile::tempdir().unwrap();
        gix_pack::Bundle::write_to_directory(
            &mut &*self.pack(),
            Some(folder.path()),
            &mut gix_utils::progress::Discard,
            &AtomicBool::new(false),
            None::<gix_object::find::Never>,
            HashKind::Sha1,
            gix_pack::bundle::write::Options::default(),
        )
        .unwrap();
        // Packs stay readable when their files are gone.
        let packs = PackSet::open(folder.path()).unwrap();
        let target = |id| Target { id, peeled: None };
        let refs = Refs {
            head: Head::Branch(branches[0].0.into()),
            names: branches
                .iter()
                .map(|(name, id)| ((*name).into(), target(*id)))
                .collect(),
            ..Refs::default()
        };
        let history = Arc::new(RwLock::new(Commits::default()));
        Snapshot::new(packs, refs, history, false).unwrap()
    }

    fn pack(&self) -> Vec<u8> {
        let mut pack = b"PACK\0\0\0\x02".to_vec();
        pack.extend_from_slice(&(self.objects.len() as u32).to_be_bytes());
        for (kind, data) in &self.objects {
            let kind = match kind {
                Kind::Commit => gix_pack::data::entry::Header::Commit,
                _ => gix_pack::data::entry::Header::Tree,
            };
            kind.write_to(data.len() as u64, &mut pack).unwrap();
            let mut body = ZlibEncoder::new(&mut pack, Compression::fast());
            body.write_all(data).unwrap();
            body.finish().unwrap();
        }
        let sum = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &pack);
        pack.extend_from_slice(sum.as_ref());
        pack
    }
}
