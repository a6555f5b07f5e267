//! Writes a set of objects as a pack.

use std::io::Write;

use aws_lc_rs::digest;

use super::ObjectError;
use super::encoding::NewPack;
use super::packs::{LARGE_WINDOW, Reader, SMALL_WINDOW, Window, pieces};
use super::set::ObjectSet;
use super::walk::Walked;

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

    let mut new_pack = NewPack::of(packs, objects, format);
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
            let mut range = window.checked_entry(nth)?;
            let length = (range.end - range.start) as usize;
            let entry = window.head(*offset)?;
            new_pack.starts(number, out.written);
            let stored = new_pack.stored(at, pack, &entry, out.written)?;
            let anew = new_pack.anew(reader, number, &stored, length, cancelled)?;
            if let Some(anew) = anew {
                out.write(&anew)?;
                reencoded += 1;
                continue;
            }
            if let Some(header) = stored.header {
                let mut head = Vec::with_capacity(32);
                header.write_to(entry.decompressed_size, &mut head)?;
                out.write(&head)?;
                range.start += entry.header_size() as u64;
            }
            for piece in pieces(range) {
                out.write(window.bytes(piece)?)?;
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

/// Hashes what is written, and writes it in larger parts than most entries are.
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
            pending: Vec::with_capacity(PART),
            written: 0,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.written += bytes.len() as u64;
        if self.pending.len() + bytes.len() >= PART {
            self.pass_on()?;
        }
        if bytes.len() < PART {
            self.pending.extend_from_slice(bytes);
            return Ok(());
        }
        self.sum.update(bytes);
        self.out.write_all(bytes)
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
