//! Writes a set of objects as a pack. What is stored well is copied as it is: no delta is thrown away that the other
//! side can resolve. New ones are made only for what the other side has an older version of, and would get whole: a
//! pack from `git gc` has the newest version whole and the older ones as deltas of it.

use std::io::Write;

use aws_lc_rs::digest;
use flate2::Compression;
use gix_pack::data::entry::Header;

use super::packs::{
    LARGE_WINDOW, ObjectNumber, Pack, PackSet, Reader, SMALL_WINDOW, Window, base_position,
};
use super::set::ObjectSet;
use super::walk::Walked;
use super::{ObjectError, delta};

/// What the reader of the pack can take.
#[derive(Clone, Copy)]
pub struct PackFormat<'s> {
    /// Deltas may name their base by the distance to it; else by its id.
    pub ofs_delta: bool,
    /// What the other side has: bases that are not sent (a thin pack).
    pub thin: Option<&'s Walked>,
}

/// What a pack came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackStats {
    pub objects: u64,
    /// Bytes with header and trailer.
    pub bytes: u64,
    /// Objects that had to be compressed anew, since their delta's base is not sent, or with a delta made for this pack.
    pub reencoded: u64,
}

/// What is encoded anew is compressed quickly: someone waits.
const REENCODE_LEVEL: u32 = 3;
/// An entry of so many bytes is no longer than one with the id of its base.
const WORTH_A_DELTA: usize = 64;
/// Bytes of an object and its base, which have to be in memory for a new delta. Source code has far less.
const LARGEST_FOR_DELTA: u64 = 16 << 20;
/// Deltas that make up an object: each takes the time of the whole object. Git makes 50 in a row.
const DEEPEST_FOR_DELTA: u32 = 64;
/// Bytes that are decoded for all new deltas of a pack, a few seconds: then what is stored has to do.
const EFFORT_FOR_DELTAS: u64 = 2 << 30;

/// Writes `objects` as a pack of version 2 to `out`: header, entries in the order in which they are stored, SHA-1.
///
/// Every entry's CRC-32 is compared with its index before it is copied, and the id of every object that is encoded anew
/// with its content, so a byte that rotted on disk is never sent.
///
/// # Errors
/// [`ObjectError::Damaged`], [`ObjectError::Io`] of `out`, or [`ObjectError::Cancelled`] once `cancelled` says so.
pub fn write_pack(
    reader: &mut Reader<'_>,
    objects: &ObjectSet,
    format: PackFormat<'_>,
    out: &mut dyn Write,
    cancelled: &dyn Fn() -> bool,
) -> Result<PackStats, ObjectError> {
    let packs = reader.packs();
    let count = u32::try_from(objects.len())
        .map_err(|_| std::io::Error::other("more objects than a pack can hold"))?;
    let mut out = HashedOut::new(out);
    out.write(b"PACK\0\0\0\x02")?;
    out.write(&count.to_be_bytes())?;

    let mut job = Job {
        packs,
        objects,
        format,
        effort: EFFORT_FOR_DELTAS,
        offsets: vec![0; packs.room() as usize],
    };
    let mut reencoded = 0;
    for (at, pack) in packs.packs().iter().enumerate() {
        let much = objects.len() >= pack.objects() as usize / 4;
        let mut window = Window::over(pack, if much { LARGE_WINDOW } else { SMALL_WINDOW });
        for (nth, (offset, position)) in pack.by_offset().iter().enumerate() {
            if nth % 1024 == 0 && cancelled() {
                return Err(ObjectError::Cancelled);
            }
            let number = packs.number(at, *position);
            if !objects.contains(number) {
                continue;
            }
            let bytes = window.checked_entry(nth)?;
            let entry = pack.parse_entry(bytes, *offset)?;
            job.offsets[number.0 as usize] = out.written;
            match job.encoding(at, pack, &entry, out.written)? {
                Encoding::Verbatim => out.write(bytes)?,
                Encoding::OtherHeader(header) => {
                    let mut head = Vec::with_capacity(32);
                    header.write_to(entry.decompressed_size, &mut head)?;
                    out.write(&head)?;
                    out.write(&bytes[entry.header_size()..])?;
                }
                Encoding::Whole { stored } => {
                    let stored = stored.then_some(bytes);
                    match job.anew(reader, number, stored, cancelled)? {
                        Some(entry) => {
                            out.write(&entry)?;
                            reencoded += 1;
                        }
                        None => out.write(bytes)?,
                    }
                }
            }
        }
    }
    let bytes = out.finish()?;
    Ok(PackStats {
        objects: u64::from(count),
        bytes,
        reencoded,
    })
}

enum Encoding {
    Verbatim,
    OtherHeader(Header),
    /// No stored delta serves: the object is stored whole, or it is a delta of what the other side lacks.
    Whole {
        stored: bool,
    },
}

struct Job<'s> {
    packs: &'s PackSet,
    objects: &'s ObjectSet,
    format: PackFormat<'s>,
    /// Bytes that may still be decoded for new deltas.
    effort: u64,
    /// Where each object starts in the new pack; 0 for what was not written yet.
    offsets: Vec<u64>,
}

impl Job<'_> {
    /// How the entry goes into the new pack, where it will start at `here`.
    fn encoding(
        &self,
        at: usize,
        pack: &Pack,
        entry: &gix_pack::data::Entry,
        here: u64,
    ) -> Result<Encoding, ObjectError> {
        let Some(position) = base_position(pack, entry)? else {
            return Ok(Encoding::Whole { stored: true });
        };
        let base = self.packs.canonical(at, position);
        let by_id = || match entry.header {
            Header::RefDelta { .. } => Encoding::Verbatim,
            _ => Encoding::OtherHeader(Header::RefDelta {
                base_id: self.packs.id(base),
            }),
        };
        if !self.objects.contains(base) {
            let thin = self
                .format
                .thin
                .is_some_and(|theirs| theirs.known.contains(base));
            return Ok(match thin {
                true => by_id(),
                false => Encoding::Whole { stored: false },
            });
        }
        let base_offset = self.offsets[base.0 as usize];
        if !self.format.ofs_delta || base_offset == 0 {
            return Ok(by_id());
        }
        let base_distance = here - base_offset;
        Ok(match entry.header {
            Header::OfsDelta {
                base_distance: stored,
            } if stored == base_distance => Encoding::Verbatim,
            _ => Encoding::OtherHeader(Header::OfsDelta { base_distance }),
        })
    }

    /// The entry of `number`, made for this pack: a delta of the version that the other side has, or else the whole
    /// object; none when what is `stored` does as well.
    fn anew(
        &mut self,
        reader: &mut Reader<'_>,
        number: ObjectNumber,
        stored: Option<&[u8]>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<u8>>, ObjectError> {
        let version = self
            .format
            .thin
            .and_then(|theirs| theirs.known_version(number));
        if version.is_none() && stored.is_some() {
            return Ok(None);
        }
        // Either takes its time.
        if cancelled() {
            return Err(ObjectError::Cancelled);
        }
        let most = stored.map_or(usize::MAX, <[u8]>::len);
        let delta = match version.filter(|_| most > WORTH_A_DELTA) {
            Some(version) => match self.new_delta(reader, number, version, most) {
                // Nobody needs it: what has to be sent will tell whether it is damaged.
                Err(ObjectError::Damaged { .. }) => None,
                made => made?,
            },
            None => None,
        };
        match (delta, stored) {
            (None, None) => whole(reader, number).map(Some),
            (delta, _) => Ok(delta),
        }
    }

    /// The entry of `number` as a delta of `version`, if it is shorter than `most` bytes and does not cost too much.
    fn new_delta(
        &mut self,
        reader: &mut Reader<'_>,
        number: ObjectNumber,
        version: ObjectNumber,
        most: usize,
    ) -> Result<Option<Vec<u8>>, ObjectError> {
        let (of, from) = (reader.header(number)?, reader.header(version)?);
        if of.kind != from.kind
            || of.num_deltas.max(from.num_deltas) > DEEPEST_FOR_DELTA
            || of.object_size.saturating_add(from.object_size) > LARGEST_FOR_DELTA
        {
            return Ok(None);
        }
        let effort: u64 = [of, from]
            .map(|object| object.object_size * (1 + u64::from(object.num_deltas)))
            .iter()
            .sum();
        let Some(left) = self.effort.checked_sub(effort) else {
            return Ok(None);
        };
        self.effort = left;
        let (mut base, mut object) = (Vec::new(), Vec::new());
        reader.read_checked(version, &mut base)?;
        reader.read_checked(number, &mut object)?;
        // Half of an object in new bytes is as much as the compressed object.
        let Some(delta) = delta::between(&base, &object, most.min(object.len() / 2)) else {
            return Ok(None);
        };
        let base_id = self.packs.id(version);
        let entry = compressed(Header::RefDelta { base_id }, &delta)?;
        Ok((entry.len() < most).then_some(entry))
    }
}

fn whole(reader: &mut Reader<'_>, number: ObjectNumber) -> Result<Vec<u8>, ObjectError> {
    let mut data = Vec::new();
    let kind = reader.read_checked(number, &mut data)?;
    let header = match kind {
        gix_object::Kind::Commit => Header::Commit,
        gix_object::Kind::Tree => Header::Tree,
        gix_object::Kind::Blob => Header::Blob,
        gix_object::Kind::Tag => Header::Tag,
    };
    Ok(compressed(header, &data)?)
}

/// An entry of a pack.
fn compressed(header: Header, data: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(data.len() / 2 + 32);
    header.write_to(data.len() as u64, &mut bytes)?;
    let mut encoder = flate2::write::ZlibEncoder::new(bytes, Compression::new(REENCODE_LEVEL));
    encoder.write_all(data)?;
    encoder.finish()
}

/// Hashes what is written, and writes it in larger parts than entries are.
struct HashedOut<'o> {
    out: &'o mut dyn Write,
    sum: digest::Context,
    pending: Vec<u8>,
    /// With what is pending.
    written: u64,
}

const PART: usize = 64 << 10;

impl<'o> HashedOut<'o> {
    fn new(out: &'o mut dyn Write) -> Self {
        Self {
            out,
            sum: digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY),
            pending: Vec::with_capacity(2 * PART),
            written: 0,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.written += bytes.len() as u64;
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= PART {
            self.pass_on()
        } else {
            Ok(())
        }
    }

    fn pass_on(&mut self) -> std::io::Result<()> {
        self.sum.update(&self.pending);
        self.out.write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }

    /// Writes the checksum; returns the number of all bytes.
    fn finish(mut self) -> std::io::Result<u64> {
        self.pass_on()?;
        let sum = self.sum.finish();
        self.out.write_all(sum.as_ref())?;
        Ok(self.written + sum.as_ref().len() as u64)
    }
}
