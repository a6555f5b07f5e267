//! How each object goes into a new pack. What is stored well is copied as it is: no delta is thrown away that the other
//! side can resolve. New ones are made only for what the other side has an older version of, and would get whole or as a
//! long delta of something older still: a pack from `git gc` has the newest version whole and the older ones as deltas of
//! it.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use gix_pack::data::entry::Header;

use super::packs::{ObjectNumber, Pack, PackSet, Reader, base_position};
use super::set::ObjectSet;
use super::writer::PackFormat;
use super::{ObjectError, delta};

/// What is encoded anew is compressed quickly: someone waits.
const REENCODE_LEVEL: u32 = 3;
/// An entry of so many bytes is no longer than one with the id of its base.
const WORTH_A_DELTA: usize = 64;
/// A delta that is shorter than this many bytes is not replaced by one of a newer version.
const WORTH_ANOTHER_DELTA: usize = 300;
/// Bytes that object and version may have for each byte of such a delta: one of 2 kB is replaced where the file has up to
/// 16 kB. With cargo's history that is some 16 MB less to send for each second that it takes.
const BYTES_FOR_A_BYTE: u64 = 16;
/// Bytes of an object and its base, which have to be in memory for a new delta. Source code has far less.
const LARGEST_FOR_DELTA: u64 = 16 << 20;
/// Deltas that make up an object: each takes the time of the whole object. Git makes 50 in a row.
const DEEPEST_FOR_DELTA: u32 = 64;
/// Bytes that are decoded for all new deltas of a pack, a few seconds: then what is stored has to do.
const EFFORT_FOR_DELTAS: u64 = 2 << 30;
/// What of it is left for objects that would go whole, which saves most.
const EFFORT_FOR_WHOLE: u64 = EFFORT_FOR_DELTAS / 2;

/// What a stored entry can do for the new pack.
pub struct Stored {
    base: Base,
    /// What it has to begin with there, if that is not the header that it has.
    pub header: Option<Header>,
}

#[derive(PartialEq, Eq)]
enum Base {
    /// It is no delta.
    None,
    /// Goes into the new pack as well.
    Sent,
    /// The other side has it.
    Theirs(ObjectNumber),
    /// Neither, so the delta is of no use.
    Lacking,
}

/// What a new delta may cost.
struct Limits {
    /// Bytes of the object and the version.
    largest: u64,
    /// Of the pack's effort, what has to be left.
    left: u64,
    /// Its entry has fewer bytes.
    most: usize,
}

/// The new pack, as far as it is written.
pub struct NewPack<'s> {
    packs: &'s PackSet,
    objects: &'s ObjectSet,
    format: PackFormat<'s>,
    /// Bytes that may still be decoded for new deltas.
    effort: u64,
    encoder: Encoder,
    /// Where each object starts in the new pack; 0 for what was not written yet.
    offsets: Vec<u64>,
}

impl<'s> NewPack<'s> {
    /// Nothing yet of the `objects` of `packs`.
    pub fn of(packs: &'s PackSet, objects: &'s ObjectSet, format: PackFormat<'s>) -> Self {
        Self {
            packs,
            objects,
            format,
            effort: EFFORT_FOR_DELTAS,
            encoder: Encoder::new(),
            offsets: vec![0; packs.room() as usize],
        }
    }

    /// Says that the entry of `number` starts at `offset`.
    pub fn starts(&mut self, number: ObjectNumber, offset: u64) {
        self.offsets[number.0 as usize] = offset;
    }

    /// How `entry`, of the pack with the number `at`, could go into the new pack, where it would start at `here`.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`].
    pub fn stored(
        &self,
        at: usize,
        pack: &Pack,
        entry: &gix_pack::data::Entry,
        here: u64,
    ) -> Result<Stored, ObjectError> {
        let stored = |base, header| Ok(Stored { base, header });
        let Some(position) = base_position(pack, entry)? else {
            return stored(Base::None, None);
        };
        let base = self.packs.canonical(at, position);
        let by_id = match entry.header {
            Header::RefDelta { .. } => None,
            _ => Some(Header::RefDelta {
                base_id: self.packs.id(base),
            }),
        };
        if !self.objects.contains(base) {
            let thin = self
                .format
                .thin
                .is_some_and(|theirs| theirs.known.contains(base));
            return match thin {
                true => stored(Base::Theirs(base), by_id),
                false => stored(Base::Lacking, None),
            };
        }
        let base_offset = self.offsets[base.0 as usize];
        if !self.format.ofs_delta || base_offset == 0 {
            return stored(Base::Sent, by_id);
        }
        let base_distance = here - base_offset;
        let header = match entry.header {
            Header::OfsDelta {
                base_distance: same,
            } if same == base_distance => None,
            _ => Some(Header::OfsDelta { base_distance }),
        };
        stored(Base::Sent, header)
    }

    /// The entry of `number`, made for this pack: a delta of the version that the other side has, or else the whole
    /// object; none when the one of `length` bytes that is `stored` does as well.
    ///
    /// # Errors
    /// [`ObjectError::Damaged`], or [`ObjectError::Cancelled`] once `cancelled` says so.
    pub fn anew(
        &mut self,
        reader: &mut Reader<'_>,
        number: ObjectNumber,
        stored: &Stored,
        length: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<u8>>, ObjectError> {
        let useless = stored.base == Base::Lacking;
        let limits = Limits {
            largest: LARGEST_FOR_DELTA,
            left: 0,
            most: if useless { usize::MAX } else { length },
        };
        let (worth, limits) = match stored.base {
            Base::None => (WORTH_A_DELTA, limits),
            Base::Lacking => (0, limits),
            Base::Theirs(_) => {
                let largest = LARGEST_FOR_DELTA.min(length as u64 * BYTES_FOR_A_BYTE);
                let left = EFFORT_FOR_WHOLE;
                (
                    WORTH_ANOTHER_DELTA,
                    Limits {
                        largest,
                        left,
                        ..limits
                    },
                )
            }
            Base::Sent => return Ok(None),
        };
        let version = self
            .format
            .thin
            .and_then(|theirs| theirs.known_version(number))
            .filter(|version| length > worth && stored.base != Base::Theirs(*version));
        if version.is_none() && !useless {
            return Ok(None);
        }
        // Either takes its time.
        if cancelled() {
            return Err(ObjectError::Cancelled);
        }
        if let Some(version) = version {
            match self.new_delta(reader, number, version, limits) {
                // Nobody needs it: what has to be sent will tell whether it is damaged.
                Ok(None) | Err(ObjectError::Damaged { .. }) => {}
                made => return made,
            }
        }
        useless.then(|| self.whole(reader, number)).transpose()
    }

    /// The entry of `number` as a delta of `version`, if that is within the limits.
    fn new_delta(
        &mut self,
        reader: &mut Reader<'_>,
        number: ObjectNumber,
        version: ObjectNumber,
        limits: Limits,
    ) -> Result<Option<Vec<u8>>, ObjectError> {
        let (of, from) = (reader.header(number)?, reader.header(version)?);
        if of.kind != from.kind
            || of.num_deltas.max(from.num_deltas) > DEEPEST_FOR_DELTA
            || of.object_size.saturating_add(from.object_size) > limits.largest
        {
            return Ok(None);
        }
        let effort: u64 = [of, from]
            .map(|object| object.object_size * (1 + u64::from(object.num_deltas)))
            .iter()
            .sum();
        let left = self.effort.checked_sub(effort);
        let Some(left) = left.filter(|left| *left >= limits.left) else {
            return Ok(None);
        };
        self.effort = left;
        let (mut base, mut object) = (Vec::new(), Vec::new());
        reader.read_checked(version, &mut base)?;
        reader.read_checked(number, &mut object)?;
        // Half of an object in new bytes is as much as the compressed object.
        let Some(delta) = delta::between(&base, &object, limits.most.min(object.len() / 2)) else {
            return Ok(None);
        };
        let base_id = self.packs.id(version);
        let entry = self.encoder.entry(Header::RefDelta { base_id }, &delta)?;
        Ok((entry.len() < limits.most).then_some(entry))
    }

    fn whole(
        &mut self,
        reader: &mut Reader<'_>,
        number: ObjectNumber,
    ) -> Result<Vec<u8>, ObjectError> {
        let mut data = Vec::new();
        let kind = reader.read_checked(number, &mut data)?;
        let header = match kind {
            gix_object::Kind::Commit => Header::Commit,
            gix_object::Kind::Tree => Header::Tree,
            gix_object::Kind::Blob => Header::Blob,
            gix_object::Kind::Tag => Header::Tag,
        };
        Ok(self.encoder.entry(header, &data)?)
    }
}

/// Makes entries of a pack, one after another with the same memory.
struct Encoder(ZlibEncoder<Vec<u8>>);

impl Encoder {
    fn new() -> Self {
        Self(ZlibEncoder::new(
            Vec::new(),
            Compression::new(REENCODE_LEVEL),
        ))
    }

    fn entry(&mut self, header: Header, data: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(data.len() / 2 + 32);
        header.write_to(data.len() as u64, &mut bytes)?;
        *self.0.get_mut() = bytes;
        self.0.write_all(data)?;
        self.0.reset(Vec::new())
    }
}
