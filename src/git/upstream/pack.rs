//! Takes in a pack: every object is decoded and hashed before anything of it can be served.

use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use gix_hash::{Kind as HashKind, oid};
use gix_object::Data;
use gix_pack::bundle::write::Options;

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
    let mut metered = Metered::new(input, progress, reservation);
    let bases = (!local.packs().is_empty()).then(|| Bases(Mutex::new(Reader::new(local))));
    let options = Options {
        alloc_limit_bytes: Some(LARGEST_ALLOCATION),
        ..Options::default()
    };
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

/// Objects that a thin pack builds on.
struct Bases<'a>(Mutex<Reader<'a>>);

impl gix_object::Find for Bases<'_> {
    fn try_find<'a>(
        &self,
        id: &oid,
        buffer: &'a mut Vec<u8>,
    ) -> gix_error::Result<Option<Data<'a>>> {
        let mut reader = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(number) = reader.packs().find(id) else {
            return Ok(None);
        };
        let kind = reader
            .read(number, buffer)
            .map_err(|error| gix_error::ErrorExt::raise(gix_error::message!("{error}")))?;
        Ok(Some(Data {
            kind,
            object_hash: HashKind::Sha1,
            data: buffer,
        }))
    }
}

/// Counts what is read, and reserves room for it and for its index, before either is written.
struct Metered<'a> {
    input: &'a mut dyn BufRead,
    progress: &'a Progress,
    reservation: &'a mut Reservation,
    /// The pack's own: signature, version, number of objects.
    header: [u8; 12],
    read: u64,
    reserved: u64,
}

/// Space is reserved by this many bytes ahead.
const STEP: u64 = 64 << 10;

/// No entry of a pack is shorter: one byte of header and a compressed nothing.
const SMALLEST_ENTRY: u64 = 9;

impl<'a> Metered<'a> {
    fn new(
        input: &'a mut dyn BufRead,
        progress: &'a Progress,
        reservation: &'a mut Reservation,
    ) -> Self {
        Self {
            input,
            progress,
            reservation,
            header: [0; 12],
            read: 0,
            reserved: 0,
        }
    }

    /// What is read so far, and the index of the objects that can be in it. What the header promises is not believed
    /// beyond that: a lie would evict everything else.
    fn needed(&self) -> u64 {
        let [.., a, b, c, d] = self.header;
        let promised = u64::from(u32::from_be_bytes([a, b, c, d]));
        self.read + index_bytes(promised.min(self.read / SMALLEST_ENTRY))
    }
}

/// The size of an index of version 2 (gitformat-pack): header, fan-out, for each object its id, checksum and place,
/// and two checksums.
fn index_bytes(objects: u64) -> u64 {
    8 + 256 * 4 + objects * (20 + 4 + 4) + 2 * 20
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.progress
            .bytes
            .fetch_add(read as u64, Ordering::Relaxed);
        let at = self.header.len().min(self.read as usize);
        let missing = &mut self.header[at..];
        let more = missing.len().min(read);
        missing[..more].copy_from_slice(&buffer[..more]);
        self.read += read as u64;
        let needed = self.needed();
        if needed > self.reserved {
            let more = needed - self.reserved + STEP;
            self.reservation.grow(more)?;
            self.reserved += more;
        }
        Ok(read)
    }
}
