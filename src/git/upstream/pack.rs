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
    let mut metered = Metered {
        input,
        progress,
        reservation,
        ungrown: 0,
        full: None,
    };
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
    if let Some(full) = metered.full.take() {
        return Err(full.into());
    }
    let outcome = outcome.map_err(|error| {
        if stop.load(Ordering::Relaxed) {
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
    let bytes = finish()
        .map_err(|error| UpstreamError::Failed(format!("cannot store the pack: {error}")))?;
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

/// Counts and reserves what is read.
struct Metered<'a> {
    input: &'a mut dyn BufRead,
    progress: &'a Progress,
    reservation: &'a mut Reservation,
    ungrown: u64,
    full: Option<StorageFull>,
}

/// Space is reserved in steps of this many bytes.
const STEP: u64 = 1 << 20;

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.progress
            .bytes
            .fetch_add(read as u64, Ordering::Relaxed);
        self.ungrown += read as u64;
        if self.ungrown >= STEP {
            if let Err(full) = self.reservation.grow(self.ungrown) {
                self.full = Some(full.clone());
                return Err(full.into());
            }
            self.ungrown = 0;
        }
        Ok(read)
    }
}
