//! The packs of a mirror, as one numbered sequence of objects.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use aws_lc_rs::digest;
use gix_hash::{Kind as HashKind, ObjectId, oid};
use gix_object::Kind;
use gix_pack::data::decode::entry::ResolvedBase;
use gix_pack::data::decode::header::{self, Outcome};
use gix_pack::data::entry::Header;

use super::ObjectError;
use super::set::ObjectSet;
use crate::storage::Reservation;

/// An object is refused rather than decoded when it, or the sum of the deltas that make it, is larger: what a
/// client can make us decode must have a bound, and no source file comes near it.
const LARGEST_DECODED: usize = 2 << 30;

static NEXT_PACK_ID: AtomicU32 = AtomicU32::new(0);

/// The number of an object within one [`PackSet`]: packs follow each other, objects stand in the order of their ids.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ObjectNumber(pub u32);

/// One pack with its index. Immutable once opened; the files may be unlinked while it is in use.
pub struct Pack {
    index: gix_pack::index::File,
    data: gix_pack::data::File,
    /// For what is copied or verified: reading leaves no trace in our memory, as the mapping does.
    file: File,
    /// Index positions in the order of the offsets, with the offsets: what tells where an entry ends.
    by_offset: OnceLock<Vec<(u64, u32)>>,
    /// Of the index file.
    index_bytes: u64,
    /// Of a pack whose files are unlinked: whoever still reads it keeps them on the disk.
    unlinked: OnceLock<Reservation>,
}

impl Pack {
    /// Opens `pack-*.idx` and the pack beside it.
    ///
    /// # Errors
    /// A file that is missing, truncated, or not of the other one.
    pub fn open(index_path: &Path) -> Result<Self, ObjectError> {
        let damaged = |what: String| ObjectError::Damaged {
            pack: name_of(index_path),
            what,
        };
        // A lack of file handles is no damage, and what follows does not tell the two apart.
        let index_bytes = File::open(index_path)?.metadata()?.len();
        let file = File::open(index_path.with_extension("pack"))?;
        let index = gix_pack::index::File::at(index_path, HashKind::Sha1)
            .map_err(|err| damaged(format!("its index does not open: {err}")))?;
        let mut data = gix_pack::data::File::at(index_path.with_extension("pack"), HashKind::Sha1)
            .map_err(|err| damaged(format!("it does not open: {err}")))?
            .with_alloc_limit_bytes(Some(LARGEST_DECODED));
        if data.num_objects() != index.num_objects() {
            return Err(damaged(format!(
                "it has {} objects and its index {}",
                data.num_objects(),
                index.num_objects()
            )));
        }
        if data.checksum() != index.pack_checksum() {
            return Err(damaged(
                "its checksum is not the one in its index".to_owned(),
            ));
        }
        // gix derives it from the path; caches need it to be unique.
        data.id = NEXT_PACK_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            index,
            data,
            file,
            by_offset: OnceLock::new(),
            index_bytes,
            unlinked: OnceLock::new(),
        })
    }

    /// Says that its files are unlinked: what they take of `all` is counted until the last reader is done.
    pub fn unlinked(&self, all: &mut Reservation) {
        let _ = self
            .unlinked
            .set(all.split(self.bytes() + self.index_bytes));
    }

    /// The path of the pack file.
    pub fn path(&self) -> &Path {
        self.data.path()
    }

    /// Bytes of the pack file.
    pub fn bytes(&self) -> u64 {
        self.data.data_len() as u64
    }

    pub fn objects(&self) -> u32 {
        self.index.num_objects()
    }

    /// The ids of the commits and annotated tags in it, in the order in which they are stored. Looks at the head of every
    /// entry.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`].
    pub fn history(&self) -> Result<Vec<&oid>, ObjectError> {
        let mut window = Window::over(self, LARGE_WINDOW);
        let mut kinds: Vec<Option<Kind>> = vec![None; self.objects() as usize];
        let mut history = Vec::new();
        let mut deltas = Vec::new();
        for (_, position) in self.by_offset() {
            let mut at = *position;
            // A base mostly comes before its deltas, so this is a step or two.
            let kind = loop {
                if let Some(kind) = kinds[at as usize] {
                    break kind;
                }
                let entry = window.head(self.index.pack_offset_at_index(at))?;
                if let Some(kind) = entry.header.as_kind() {
                    kinds[at as usize] = Some(kind);
                    break kind;
                }
                deltas.push(at);
                let base = base_position(self, &entry)?.filter(|_| deltas.len() < kinds.len());
                at = base.ok_or_else(|| self.damaged("deltas go round in a circle"))?;
            };
            for delta in deltas.drain(..) {
                kinds[delta as usize] = Some(kind);
            }
            if matches!(kind, Kind::Commit | Kind::Tag) {
                history.push(self.id_at(*position));
            }
        }
        Ok(history)
    }

    /// Reads the whole pack and compares it with its checksum. What its index says of entries is not looked at.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`].
    pub fn verify(&self) -> Result<(), ObjectError> {
        let mut sum = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        let mut window = Window::over(self, LARGE_WINDOW);
        for piece in pieces(0..self.data.pack_end() as u64) {
            sum.update(window.bytes(piece)?);
        }
        if sum.finish().as_ref() != self.data.checksum().as_slice() {
            return Err(self.damaged("its content does not have its checksum"));
        }
        Ok(())
    }

    /// Offsets in ascending order, each with its position in the index.
    pub(super) fn by_offset(&self) -> &[(u64, u32)] {
        self.by_offset.get_or_init(|| {
            let mut order: Vec<(u64, u32)> = (0..self.index.num_objects())
                .map(|at| (self.index.pack_offset_at_index(at), at))
                .collect();
            order.sort_unstable();
            order
        })
    }

    /// The index position of the entry that starts at `offset`.
    pub(super) fn position_at(&self, offset: u64) -> Option<u32> {
        let order = self.by_offset();
        let found = order
            .binary_search_by_key(&offset, |(offset, _)| *offset)
            .ok()?;
        Some(order[found].1)
    }

    /// The entry whose bytes begin with its header, and which starts at `offset`.
    fn parse_entry(&self, bytes: &[u8], offset: u64) -> Result<gix_pack::data::Entry, ObjectError> {
        gix_pack::data::Entry::from_bytes(bytes, offset, HashKind::Sha1)
            .map_err(|err| self.damaged(&err.to_string()))
    }

    /// The entry of the object `id`, when this pack has it: where a delta names its base by id.
    fn entry_of(&self, id: &oid) -> gix_error::Result<Option<gix_pack::data::Entry>> {
        let position = self.index.lookup(id);
        let entry = position.map(|at| self.data.entry(self.index.pack_offset_at_index(at)));
        entry.transpose()
    }

    pub(super) fn entry(&self, offset: u64) -> Result<gix_pack::data::Entry, ObjectError> {
        self.data
            .entry(offset)
            .map_err(|err| self.damaged(&err.to_string()))
    }

    pub(super) fn id_at(&self, position: u32) -> &oid {
        self.index.oid_at_index(position)
    }

    pub(super) fn damaged(&self, what: &str) -> ObjectError {
        ObjectError::Damaged {
            pack: name_of(self.data.path()),
            what: what.to_owned(),
        }
    }
}

/// How much of a pack is read in one go where much of it is wanted, and where little is.
pub(super) const LARGE_WINDOW: usize = 1 << 20;
pub(super) const SMALL_WINDOW: usize = 32 << 10;

/// The size of an object with 7 bits a byte, and the id of its base.
const LONGEST_HEADER: u64 = 10 + 20;

/// A part of a pack in memory, which moves forward.
pub(super) struct Window<'p> {
    pack: &'p Pack,
    size: usize,
    start: u64,
    bytes: Vec<u8>,
}

impl<'p> Window<'p> {
    pub fn over(pack: &'p Pack, size: usize) -> Self {
        Self {
            pack,
            size,
            start: 0,
            bytes: Vec::new(),
        }
    }

    /// The bytes of the pack in `range`.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`], also where the disk does not give them: the file is open, so nothing else is amiss.
    pub fn bytes(&mut self, range: Range<u64>) -> Result<&[u8], ObjectError> {
        let end = self.start + self.bytes.len() as u64;
        if range.start < self.start || range.end > end {
            let all = self.pack.bytes();
            if range.end > all || range.start > range.end {
                return Err(self.pack.damaged("an entry lies outside of it"));
            }
            let length = (range.end - range.start).max((self.size as u64).min(all - range.start));
            self.bytes.resize(length as usize, 0);
            self.start = range.start;
            let read = self.pack.file.read_exact_at(&mut self.bytes, range.start);
            read.map_err(|error| {
                self.pack
                    .damaged(&format!("byte {} cannot be read: {error}", range.start))
            })?;
        }
        let start = (range.start - self.start) as usize;
        Ok(&self.bytes[start..start + (range.end - range.start) as usize])
    }

    /// The entry that starts at `offset`, as far as its header tells.
    pub fn head(&mut self, offset: u64) -> Result<gix_pack::data::Entry, ObjectError> {
        let pack = self.pack;
        let end = (offset + LONGEST_HEADER).min(pack.data.pack_end() as u64);
        pack.parse_entry(self.bytes(offset..end)?, offset)
    }

    /// Where the `nth` entry by offset lies, header and compressed data, after comparing their CRC-32 with the index.
    pub fn checked_entry(&mut self, nth: usize) -> Result<Range<u64>, ObjectError> {
        let pack = self.pack;
        let order = pack.by_offset();
        let (start, position) = order[nth];
        let end = order
            .get(nth + 1)
            .map_or(pack.data.pack_end() as u64, |(next, _)| *next);
        if let Some(expected) = pack.index.crc32_at_index(position) {
            let mut sum = crc32fast::Hasher::new();
            for piece in pieces(start..end) {
                sum.update(self.bytes(piece)?);
            }
            if sum.finalize() != expected {
                return Err(pack.damaged(&format!(
                    "the entry at byte {start} does not have its CRC-32"
                )));
            }
        }
        Ok(start..end)
    }
}

/// An entry in pieces, each of which a window takes: a large one need not be in memory as a whole.
pub(super) fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    let starts = range.step_by(LARGE_WINDOW);
    starts.map(move |start| start..(start + LARGE_WINDOW as u64).min(end))
}

fn name_of(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The packs of a mirror at one moment. An object that stands in several packs has the number that it has in the
/// first of them, so that along a chain of deltas the numbers of packs never grow and no cycle can arise.
#[derive(Clone, Default)]
pub struct PackSet {
    packs: Vec<Arc<Pack>>,
    /// The number of the first object of each pack, and behind the last the number of all.
    first: Vec<u32>,
}

impl PackSet {
    /// Puts `packs` in order, the largest first: most objects are found at the first look.
    pub fn new(mut packs: Vec<Arc<Pack>>) -> Self {
        packs.sort_by(|a, b| {
            b.objects()
                .cmp(&a.objects())
                .then_with(|| a.path().cmp(b.path()))
        });
        let mut first = Vec::with_capacity(packs.len() + 1);
        let mut next = 0;
        for pack in &packs {
            first.push(next);
            next += pack.objects();
        }
        first.push(next);
        Self { packs, first }
    }

    /// Opens every pack in the folder `objects/pack`. A folder that is missing has none.
    ///
    /// # Errors
    /// The first pack that does not open.
    pub fn open(folder: &Path) -> Result<Self, ObjectError> {
        let mut packs = Vec::new();
        for index in index_files(folder)? {
            packs.push(Arc::new(Pack::open(&index)?));
        }
        Ok(Self::new(packs))
    }

    pub fn packs(&self) -> &[Arc<Pack>] {
        &self.packs
    }

    /// Whether `pack` is one of these, as it was opened.
    pub fn has(&self, pack: &Arc<Pack>) -> bool {
        self.packs.iter().any(|own| Arc::ptr_eq(own, pack))
    }

    /// Whether all of `others` are among these.
    pub fn has_all(&self, others: &Self) -> bool {
        others.packs.iter().all(|pack| self.has(pack))
    }

    /// The size that an [`ObjectSet`](super::set::ObjectSet) must have: every object of every pack, doubles included.
    pub fn room(&self) -> u32 {
        self.first.last().copied().unwrap_or(0)
    }

    /// Bytes of all pack files.
    pub fn bytes(&self) -> u64 {
        self.packs.iter().map(|pack| pack.bytes()).sum()
    }

    /// Bytes that these objects take in the packs.
    pub fn bytes_of(&self, objects: &ObjectSet) -> u64 {
        let in_pack = |(pack, first): (&Arc<Pack>, &u32)| -> u64 {
            let order = pack.by_offset();
            let ends = order.iter().skip(1).map(|(start, _)| *start);
            let ends = ends.chain([pack.data.pack_end() as u64]);
            let entries = order.iter().zip(ends);
            entries
                .filter(|((_, position), _)| objects.contains(ObjectNumber(first + position)))
                .map(|((start, _), end)| end - start)
                .sum()
        };
        self.packs.iter().zip(&self.first).map(in_pack).sum()
    }

    /// Every object once, also those that stand in several packs.
    pub fn all(&self) -> ObjectSet {
        let mut all = ObjectSet::with_room_for(self.room());
        for (at, pack) in self.packs.iter().enumerate() {
            for position in 0..pack.objects() {
                all.insert(self.canonical(at, position));
            }
        }
        all
    }

    pub fn find(&self, id: &oid) -> Option<ObjectNumber> {
        self.find_among(id, self.packs.len())
    }

    pub fn contains(&self, id: &oid) -> bool {
        self.find(id).is_some()
    }

    /// The number of `id`, or that it is missing.
    ///
    /// # Errors
    /// [`ObjectError::Missing`].
    pub fn require(&self, id: &oid) -> Result<ObjectNumber, ObjectError> {
        self.find(id)
            .ok_or_else(|| ObjectError::Missing(id.to_owned()))
    }

    pub fn id(&self, object: ObjectNumber) -> ObjectId {
        let (pack, position) = self.locate(object);
        self.packs[pack].id_at(position).to_owned()
    }

    /// The number that the object at `position` of pack `pack` goes by: its own, or that in an earlier pack.
    pub(super) fn canonical(&self, pack: usize, position: u32) -> ObjectNumber {
        self.find_among(self.packs[pack].id_at(position), pack)
            .unwrap_or(ObjectNumber(self.first[pack] + position))
    }

    pub(super) fn number(&self, pack: usize, position: u32) -> ObjectNumber {
        ObjectNumber(self.first[pack] + position)
    }

    pub(super) fn locate(&self, object: ObjectNumber) -> (usize, u32) {
        let pack = self.first.partition_point(|first| *first <= object.0) - 1;
        (pack, object.0 - self.first[pack])
    }

    fn find_among(&self, id: &oid, packs: usize) -> Option<ObjectNumber> {
        self.packs[..packs]
            .iter()
            .zip(&self.first)
            .find_map(|(pack, first)| {
                pack.index
                    .lookup(id)
                    .map(|position| ObjectNumber(first + position))
            })
    }
}

/// The indices in a folder of packs whose pack is there as well.
pub fn index_files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(err) => return Err(err),
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "idx")
            && path.with_extension("pack").exists()
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Memory for objects that others are deltas of, for each reader.
const DELTA_CACHE: usize = 32 << 20;

/// Reads objects of a [`PackSet`]; one for each thread, since it keeps buffers and a cache of delta bases.
pub struct Reader<'a> {
    packs: &'a PackSet,
    inflate: gix_zlib::Inflate,
    cache: gix_pack::cache::lru::MemoryCappedHashmap,
}

impl<'a> Reader<'a> {
    pub fn new(packs: &'a PackSet) -> Self {
        Self {
            packs,
            inflate: gix_zlib::Inflate::default(),
            cache: gix_pack::cache::lru::MemoryCappedHashmap::new(DELTA_CACHE),
        }
    }

    pub fn packs(&self) -> &'a PackSet {
        self.packs
    }

    /// Decodes `object` into `out` and tells its kind.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`] when it does not decode.
    pub fn read(&mut self, object: ObjectNumber, out: &mut Vec<u8>) -> Result<Kind, ObjectError> {
        let (pack, position) = self.packs.locate(object);
        let pack = &self.packs.packs[pack];
        let entry = pack.entry(pack.index.pack_offset_at_index(position))?;
        let in_pack = |id: &oid, _: &mut Vec<u8>| Ok(pack.entry_of(id)?.map(ResolvedBase::InPack));
        let outcome = pack
            .data
            .decode_entry(entry, out, &mut self.inflate, &in_pack, &mut self.cache)
            .map_err(|err| {
                pack.damaged(&format!(
                    "object {} does not decode: {err}",
                    self.packs.id(object)
                ))
            })?;
        // Not `object_size`: from the cache of bases, gix gives the size of the delta there.
        Ok(outcome.kind)
    }

    /// Decodes `object` as [`Reader::read`] does, and makes sure that it is what its id says: for what others are made
    /// of, whose stored bytes no checksum was compared with.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`].
    pub fn read_checked(
        &mut self,
        object: ObjectNumber,
        out: &mut Vec<u8>,
    ) -> Result<Kind, ObjectError> {
        let kind = self.read(object, out)?;
        let mut sum = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        sum.update(&gix_object::encode::loose_header(kind, out.len() as u64));
        sum.update(out);
        let id = self.packs.id(object);
        if sum.finish().as_ref() != id.as_slice() {
            let (pack, _) = self.packs.locate(object);
            return Err(
                self.packs.packs[pack].damaged(&format!("object {id} does not have its checksum"))
            );
        }
        Ok(kind)
    }

    /// Decodes the object `id`, which must be of kind `expected`.
    ///
    /// # Errors
    /// [`ObjectError`] when it is missing, damaged or of another kind.
    pub fn read_kind(
        &mut self,
        id: &oid,
        expected: Kind,
        out: &mut Vec<u8>,
    ) -> Result<(), ObjectError> {
        let found = self.read(self.packs.require(id)?, out)?;
        if found != expected {
            return Err(ObjectError::Kind {
                id: id.to_owned(),
                expected,
                found,
            });
        }
        Ok(())
    }

    /// The kind and size of `object`, and of how many deltas it is made, without decoding all of it.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`].
    pub fn header(&mut self, object: ObjectNumber) -> Result<Outcome, ObjectError> {
        let (pack, position) = self.packs.locate(object);
        let pack = &self.packs.packs[pack];
        let entry = pack.entry(pack.index.pack_offset_at_index(position))?;
        if let Some(kind) = entry.header.as_kind() {
            return Ok(Outcome {
                kind,
                object_size: entry.decompressed_size,
                num_deltas: 0,
            });
        }
        let in_pack = |id: &oid| Ok(pack.entry_of(id)?.map(header::ResolvedBase::InPack));
        pack.data
            .decode_header(entry, &mut self.inflate, &in_pack)
            .map_err(|err| pack.damaged(&err.to_string()))
    }
}

/// The base of a delta entry, as a position in the index of its pack.
pub(super) fn base_position(
    pack: &Pack,
    entry: &gix_pack::data::Entry,
) -> Result<Option<u32>, ObjectError> {
    let position = match entry.header {
        Header::OfsDelta { base_distance } => entry
            .checked_base_pack_offset(base_distance)
            .and_then(|offset| pack.position_at(offset)),
        Header::RefDelta { base_id } => pack.index.lookup(base_id),
        _ => return Ok(None),
    };
    position
        .map(Some)
        .ok_or_else(|| pack.damaged("the base of a delta is not in it"))
}
