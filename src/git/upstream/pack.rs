//! Takes in a pack: every object is decoded and hashed before anything of it can be served.

use std::cell::RefCell;
use std::fmt::Display;
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use gix_error::{ErrorExt, message};
use gix_hash::{Kind as HashKind, oid};
use gix_object::Data;
use gix_pack::bundle::write::Options;
use gix_pack::data::input::Entry;
use gix_zlib::Compression;

use super::{Progress, UpstreamError};
use crate::durable;
use crate::git::objects::packs::{PackSet, Reader};
use crate::storage::{Reservation, StorageFull};

/// An object, or a table that one pack makes necessary, may take this much memory and no more.
const LARGEST_ALLOCATION: usize = 1 << 30;

/// Reads a pack from `input`, completes it from `local` where it is thin, indexes it in `folder`, and waits until it
/// is on disk. Returns the path of the index; none for a pack without objects.
///
/// # Errors
/// A pack that is damaged, incomplete, or larger than the space there is.
pub fn receive(
    input: &mut dyn BufRead,
    local: &PackSet,
    folder: &Path,
    progress: &Progress,
    stop: &AtomicBool,
    reservation: &mut Reservation,
) -> Result<Option<PathBuf>, UpstreamError> {
    let already = reservation.bytes();
    let room = RefCell::new(Room::new(reservation));
    let mut metered = Metered {
        input,
        progress,
        room: &room,
    };
    let options = Options {
        alloc_limit_bytes: Some(LARGEST_ALLOCATION),
        ..Options::default()
    };
    let bases = (!local.packs().is_empty()).then(|| Bases {
        reader: RefCell::new(Reader::new(local)),
        compression: options.compression,
        room: &room,
    });
    let outcome = gix_pack::Bundle::write_to_directory(
        &mut io::BufReader::with_capacity(64 << 10, &mut metered),
        Some(folder),
        &mut gix_utils::progress::Discard,
        stop,
        bases,
        HashKind::Sha1,
        options,
    );
    let outcome = outcome.map_err(|error| {
        if let Some(full) = StorageFull::of(&error) {
            full.into()
        } else if stop.load(Ordering::Relaxed) {
            UpstreamError::Stopped
        } else {
            UpstreamError::Failed(format!(
                "the upstream's pack cannot be used: {}",
                last_cause(&error)
            ))
        }
    })?;
    progress
        .objects
        .store(outcome.index.num_objects.into(), Ordering::Relaxed);

    let (Some(data), Some(index)) = (outcome.data_path, outcome.index_path) else {
        return Ok(None);
    };
    let finish = || -> io::Result<u64> {
        if let Some(keep) = &outcome.keep_path {
            std::fs::remove_file(keep)?;
        }
        durable::sync(&data)?;
        durable::sync(&index)?;
        Ok(std::fs::metadata(&data)?.len() + std::fs::metadata(&index)?.len())
    };
    let bytes = finish().map_err(UpstreamError::unwritable)?;
    let more = (already + bytes).saturating_sub(reservation.bytes());
    reservation.grow(more)?;
    reservation.set(already + bytes);
    Ok(Some(index))
}

/// Takes in a pack as [`receive`] does, while `write` writes it on a thread of its own.
///
/// # Errors
/// What `write` says, where that is why the pack is not whole; else as [`receive`].
pub fn receive_from<E: From<UpstreamError> + Display + Send>(
    write: impl FnOnce(&mut dyn Write) -> Result<(), E> + Send,
    local: &PackSet,
    folder: &Path,
    progress: &Progress,
    stop: &AtomicBool,
    reservation: &mut Reservation,
) -> Result<Option<PathBuf>, E> {
    let (output, input) = io::pipe().map_err(UpstreamError::unwritable)?;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&mut io::BufWriter::with_capacity(1 << 20, input)));
        let received = receive(
            &mut io::BufReader::new(output),
            local,
            folder,
            progress,
            stop,
            reservation,
        );
        match writer.join() {
            // Not where it only says that nobody reads any more.
            Ok(Err(error)) if received.is_err() && !error.to_string().contains("roken pipe") => {
                Err(error)
            }
            _ => Ok(received?),
        }
    })
}

/// The most that [`receive`] reserves for a pack of so many `objects`, whose entries take so many `bytes`.
pub fn most_reserved(objects: u64, bytes: u64) -> u64 {
    /// Header and checksum.
    const AROUND: u64 = 12 + 20;
    AROUND + bytes + index_bytes(objects) + STEP
}

/// What went wrong at the bottom; the layers above say only that something did.
pub(super) fn last_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let top = error.to_string();
    let bottom = cause.to_string();
    if top == bottom {
        top
    } else {
        format!("{top}: {bottom}")
    }
}

/// Objects that a thin pack builds on. Each that is found is written to the pack, before the first delta of it.
struct Bases<'a, 'r> {
    reader: RefCell<Reader<'a>>,
    compression: Compression,
    room: &'a RefCell<Room<'r>>,
}

impl gix_object::Find for Bases<'_, '_> {
    fn try_find<'a>(
        &self,
        id: &oid,
        buffer: &'a mut Vec<u8>,
    ) -> gix_error::Result<Option<Data<'a>>> {
        let mut reader = self.reader.borrow_mut();
        let Some(number) = reader.packs().find(id) else {
            return Ok(None);
        };
        let kind = reader
            .read(number, buffer)
            .map_err(|error| message!("{error}").raise())?;
        let base = Data {
            kind,
            object_hash: HashKind::Sha1,
            data: buffer,
        };
        // gix makes this entry itself, and its length is not known before: at its level, once more takes little.
        let entry = Entry::from_data_obj(&base, 0, self.compression)?;
        let reserved = self.room.borrow_mut().add_base(entry.bytes_in_pack());
        reserved.map_err(|full| io::Error::from(full).raise())?;
        Ok(Some(base))
    }
}

/// Counts what is read.
struct Metered<'a, 'r> {
    input: &'a mut dyn BufRead,
    progress: &'a Progress,
    room: &'a RefCell<Room<'r>>,
}

/// Reserves room for the pack and for its index, before either is written.
struct Room<'r> {
    reservation: &'r mut Reservation,
    /// The pack's own: signature, version, number of objects.
    header: [u8; 12],
    read: u64,
    /// Bases that complete a thin pack, and the bytes of their entries.
    bases: u64,
    base_bytes: u64,
    reserved: u64,
}

/// Space is reserved by this many bytes ahead.
const STEP: u64 = 64 << 10;

/// No entry of a pack is shorter: one byte of header and a compressed nothing.
const SMALLEST_ENTRY: u64 = 9;

impl<'r> Room<'r> {
    fn new(reservation: &'r mut Reservation) -> Self {
        Self {
            reservation,
            header: [0; 12],
            read: 0,
            bases: 0,
            base_bytes: 0,
            reserved: 0,
        }
    }

    fn add_read(&mut self, bytes: &[u8]) -> Result<(), StorageFull> {
        let at = self.header.len().min(self.read as usize);
        let missing = &mut self.header[at..];
        let more = missing.len().min(bytes.len());
        missing[..more].copy_from_slice(&bytes[..more]);
        self.read += bytes.len() as u64;
        self.reserve()
    }

    fn add_base(&mut self, bytes: u64) -> Result<(), StorageFull> {
        self.bases += 1;
        self.base_bytes += bytes;
        self.reserve()
    }

    fn reserve(&mut self) -> Result<(), StorageFull> {
        let needed = self.needed();
        if needed > self.reserved {
            let more = needed - self.reserved + STEP;
            self.reservation.grow(more)?;
            self.reserved += more;
        }
        Ok(())
    }

    /// What is read so far, its bases, and the index of the objects that can be in it. What the header promises is not
    /// believed beyond that: a lie would evict everything else.
    fn needed(&self) -> u64 {
        let [.., a, b, c, d] = self.header;
        let promised = u64::from(u32::from_be_bytes([a, b, c, d]));
        let objects = promised.min(self.read / SMALLEST_ENTRY) + self.bases;
        self.read + self.base_bytes + index_bytes(objects)
    }
}

/// The size of an index of version 2 (gitformat-pack): header, fan-out, for each object its id, checksum and place,
/// and two checksums.
fn index_bytes(objects: u64) -> u64 {
    8 + 256 * 4 + objects * (20 + 4 + 4) + 2 * 20
}

impl Read for Metered<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.progress
            .bytes
            .fetch_add(read as u64, Ordering::Relaxed);
        self.room.borrow_mut().add_read(&buffer[..read])?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{digest, rand};
    use flate2::write::ZlibEncoder;
    use gix_object::Kind;
    use gix_pack::data::entry::Header;

    use super::*;
    use crate::git::mirror::bytes_below;
    use crate::storage::{Part, Storage};

    fn pack_of(header: Header, data: &[u8]) -> Vec<u8> {
        let mut pack = b"PACK\0\0\0\x02\0\0\0\x01".to_vec();
        header.write_to(data.len() as u64, &mut pack).unwrap();
        let mut body = ZlibEncoder::new(&mut pack, flate2::Compression::fast());
        body.write_all(data).unwrap();
        body.finish().unwrap();
        let sum = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &pack);
        pack.extend_from_slice(sum.as_ref());
        pack
    }

    #[test]
    fn bases_are_not_written_before_there_is_room_for_them() {
        let mut base = vec![0_u8; 1 << 20];
        rand::fill(&mut base).unwrap();
        let base_id = gix_object::compute_hash(HashKind::Sha1, Kind::Blob, &base).unwrap();
        // Of a base of 1 MiB, 16 bytes: those from its first one on.
        let delta = [0x80, 0x80, 0x40, 16, 0x90, 16];
        let thin = pack_of(Header::RefDelta { base_id }, &delta);

        let storage = Storage::new(u64::MAX);
        let [ours, new] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut reservation = storage.nothing(Part::Git);
        let mut take_in = |pack: &[u8], local: &PackSet, folder: &Path| {
            let (progress, stop) = (Progress::default(), AtomicBool::new(false));
            let received = receive(
                &mut &*pack,
                local,
                folder,
                &progress,
                &stop,
                &mut reservation,
            );
            received.map(|index| index.is_some())
        };
        let whole = pack_of(Header::Blob, &base);
        assert!(take_in(&whole, &PackSet::default(), ours.path()).unwrap());
        let local = PackSet::open(ours.path()).unwrap();
        let used = storage.used(Part::Git);
        assert_eq!(used, bytes_below(ours.path()));

        storage.set_limit(used + (512 << 10));
        let refused = take_in(&thin, &local, new.path()).unwrap_err();
        assert!(matches!(
            refused,
            UpstreamError::Storage(StorageFull::Limit { .. })
        ));
        assert_eq!(bytes_below(new.path()), 0);

        storage.set_limit(used + (2 << 20));
        assert!(take_in(&thin, &local, new.path()).unwrap());
        let written = bytes_below(new.path());
        assert!(written > 1 << 20);
        // What the failed attempt had reserved is its caller's to give back.
        assert!(storage.used(Part::Git) >= used + written);
    }
}
