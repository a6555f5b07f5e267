//! Writes a set of objects as a pack. What is stored well is copied as it is: no delta is thrown away that the other
//! side can resolve, and none is computed.

use std::io::Write;

use aws_lc_rs::digest;
use flate2::Compression;
use gix_pack::data::entry::Header;

use super::ObjectError;
use super::packs::{
    LARGE_WINDOW, ObjectNumber, Pack, PackSet, Reader, SMALL_WINDOW, Window, base_position,
};
use super::set::ObjectSet;

/// What the reader of the pack can take.
#[derive(Clone, Copy)]
pub struct PackFormat<'s> {
    /// Deltas may name their base by the distance to it; else by its id.
    pub ofs_delta: bool,
    /// Objects that the other side has: they may be bases without being sent (a thin pack).
    pub thin_bases: Option<&'s ObjectSet>,
}

/// What a pack came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackStats {
    pub objects: u64,
    /// Bytes with header and trailer.
    pub bytes: u64,
    /// Objects that had to be compressed anew, since their delta's base is not sent.
    pub reencoded: u64,
}

/// Objects whose delta cannot be used are compressed quickly: they are few, and someone waits.
const REENCODE_LEVEL: u32 = 3;

/// Writes `objects` as a pack of version 2 to `out`: header, entries in the order in which they are stored, SHA-1.
///
/// Every entry's CRC-32 is compared with its index before it is copied, so a byte that rotted on disk is never sent.
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
                Encoding::Whole => {
                    out.write(&whole(reader, number)?)?;
                    reencoded += 1;
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
    Whole,
}

struct Job<'s> {
    packs: &'s PackSet,
    objects: &'s ObjectSet,
    format: PackFormat<'s>,
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
            return Ok(Encoding::Verbatim);
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
                .thin_bases
                .is_some_and(|known| known.contains(base));
            return Ok(if thin { by_id() } else { Encoding::Whole });
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
}

fn whole(reader: &mut Reader<'_>, number: ObjectNumber) -> Result<Vec<u8>, ObjectError> {
    let mut data = Vec::new();
    let kind = reader.read(number, &mut data)?;
    let header = match kind {
        gix_object::Kind::Commit => Header::Commit,
        gix_object::Kind::Tree => Header::Tree,
        gix_object::Kind::Blob => Header::Blob,
        gix_object::Kind::Tag => Header::Tag,
    };
    let mut bytes = Vec::with_capacity(data.len() / 2 + 32);
    header.write_to(data.len() as u64, &mut bytes)?;
    let mut encoder = flate2::write::ZlibEncoder::new(bytes, Compression::new(REENCODE_LEVEL));
    encoder.write_all(&data)?;
    Ok(encoder.finish()?)
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
