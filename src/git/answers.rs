//! Finished answers on disk: packs in the form in which they go over the wire. One writer, many readers; readers
//! follow while the writer is at it, and a reader that stalls costs an open file and a few blocks.
//!
//! Answers are derived from mirrors, so they are thrown away at start and nothing here is synced to disk.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::{Semaphore, watch};

use crate::buffers::{Buffer, read_from_memory};
use crate::durable;
use crate::git::blocks::{BLOCK, Blocks};
use crate::git::name::RepoName;
use crate::git::objects::ObjectError;
use crate::git::objects::writer::PackStats;
use crate::git::upload_pack::plan::AnswerKey;
use crate::git::upload_pack::sideband::Framed;
use crate::storage::{Evict, Part, Reservation, Storage};

/// More answers than this are not kept, however small they are.
const MOST_ANSWERS: usize = 20_000;

/// Blocks that are read from the disk at once.
static READS: Semaphore = Semaphore::const_new(8);

/// The answers of all repositories.
pub struct Answers {
    folder: PathBuf,
    storage: Arc<Storage>,
    /// SECURITY: the repository is part of the key, so no answer of one is ever found by asking another.
    kept: Mutex<HashMap<(RepoName, AnswerKey), Arc<Answer>>>,
    /// The answers that hold all that a repository has.
    whole: Mutex<HashMap<RepoName, AnswerKey>>,
    clock: AtomicU64,
    files: AtomicU64,
}

/// One answer, perhaps still being written.
pub struct Answer {
    path: PathBuf,
    /// Followed by each reader.
    state: watch::Sender<State>,
    /// CRC-32 of each finished block: a byte that rots on disk is found before it is sent.
    blocks: Mutex<Vec<u32>>,
    reservation: Mutex<Reservation>,
    /// Made ahead of time: goes on without readers.
    ahead: AtomicBool,
    last_used: AtomicU64,
    /// It could not be read: it is made anew.
    bad: AtomicBool,
}

#[derive(Clone, Debug)]
struct State {
    bytes: u64,
    end: Option<Result<PackStats, Failed>>,
}

/// Why an answer was not finished.
#[derive(Clone, Debug)]
enum Failed {
    /// There is no room to keep it.
    Full,
    Other(Arc<str>),
}

/// What asking for an answer gives.
pub enum Found {
    /// It is there, or someone is making it.
    Kept(AnswerReader),
    /// The caller has to make it: give the writer to a thread of its own.
    New(AnswerReader, AnswerWriter),
}

impl Answers {
    /// An empty store in `folder`; what an earlier process left there is removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(folder: PathBuf, storage: Arc<Storage>) -> io::Result<Arc<Self>> {
        durable::emptied(&folder)?;
        let answers = Arc::new(Self {
            folder,
            storage: Arc::clone(&storage),
            kept: Mutex::default(),
            whole: Mutex::default(),
            clock: AtomicU64::new(0),
            files: AtomicU64::new(0),
        });
        let weak: Weak<dyn Evict> = Arc::downgrade(&answers) as _;
        storage.add_evictor(weak);
        Ok(answers)
    }

    /// Whether the answer is there, or on its way.
    pub fn has(&self, repo: &RepoName, key: AnswerKey) -> bool {
        self.kept().contains_key(&(repo.clone(), key))
    }

    /// The answer `key` of `repo`, to be read from its start.
    pub fn get_or_new(self: &Arc<Self>, repo: &RepoName, key: AnswerKey, ahead: bool) -> Found {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let id = (repo.clone(), key);
        let mut kept = self.kept();
        if let Some(answer) = kept
            .get(&id)
            .filter(|answer| !answer.bad.load(Ordering::Relaxed))
        {
            answer.last_used.store(now, Ordering::Relaxed);
            if ahead {
                answer.ahead.store(true, Ordering::Relaxed);
            }
            return Found::Kept(AnswerReader::of(answer));
        }
        let answer = Arc::new(Answer {
            path: self
                .folder
                .join(self.files.fetch_add(1, Ordering::Relaxed).to_string()),
            state: watch::Sender::new(State {
                bytes: 0,
                end: None,
            }),
            blocks: Mutex::default(),
            reservation: Mutex::new(self.storage.nothing(Part::Answers)),
            ahead: AtomicBool::new(ahead),
            last_used: AtomicU64::new(now),
            bad: AtomicBool::new(false),
        });
        let replaced = kept.insert(id.clone(), Arc::clone(&answer));
        let too_many = kept.len() > MOST_ANSWERS;
        drop(kept);
        discard(replaced.into_iter().collect());
        if too_many {
            discard(self.take_oldest(|kept, _| kept.len() > MOST_ANSWERS * 9 / 10));
        }
        let reader = AnswerReader::of(&answer);
        Found::New(
            reader,
            AnswerWriter {
                answers: Arc::clone(self),
                id,
                answer: Some(answer),
            },
        )
    }

    /// Forgets the answers of `repo`, which is evicted: like [`Evict::evict`], this blocks on the disk until their room
    /// is given back.
    pub fn forget_repo(&self, repo: &RepoName) {
        let gone: Vec<_> = self
            .kept()
            .extract_if(|(of, _), _| of == repo)
            .map(|(_, answer)| answer)
            .collect();
        drop(gone);
        self.whole().remove(repo);
    }

    /// `key` holds everything that `repo` has now: the answer that held everything before is worth its space no more.
    pub fn supersede_whole(&self, repo: &RepoName, key: AnswerKey) {
        let old = self.whole().insert(repo.clone(), key);
        if let Some(old) = old.filter(|old| *old != key) {
            let gone = self.kept().remove(&(repo.clone(), old));
            discard(gone.into_iter().collect());
        }
    }

    fn forget(&self, id: &(RepoName, AnswerKey), answer: &Arc<Answer>) {
        let mut kept = self.kept();
        if kept.get(id).is_some_and(|found| Arc::ptr_eq(found, answer)) {
            kept.remove(id);
        }
    }

    /// Takes out finished answers that nobody reads, the least recently used first, while `more` says so.
    fn take_oldest(
        &self,
        more: impl Fn(&HashMap<(RepoName, AnswerKey), Arc<Answer>>, u64) -> bool,
    ) -> Vec<Arc<Answer>> {
        let mut gone = Vec::new();
        let mut kept = self.kept();
        let mut idle: Vec<_> = kept
            .iter()
            .filter(|(_, answer)| Arc::strong_count(answer) == 1)
            .map(|(id, answer)| (answer.last_used.load(Ordering::Relaxed), id.clone()))
            .collect();
        idle.sort_unstable_by_key(|(used, _)| *used);
        let mut freed = 0;
        for (_, id) in idle {
            if !more(&kept, freed) {
                break;
            }
            if let Some(answer) = kept.remove(&id) {
                freed += answer.reserved();
                gone.push(answer);
            }
        }
        gone
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<(RepoName, AnswerKey), Arc<Answer>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn whole(&self) -> MutexGuard<'_, HashMap<RepoName, AnswerKey>> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets go of answers, and so removes their files: outside of the lock, and not on an async worker. Their room may be
/// given back only later.
fn discard(gone: Vec<Arc<Answer>>) {
    if gone.is_empty() {
        return;
    }
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(move || drop(gone))),
        Err(_) => drop(gone),
    }
}

impl Evict for Answers {
    fn evict(&self, bytes: u64) {
        // Here and now: who sees no room given back evicts what is dearer.
        drop(self.take_oldest(|_, freed| freed < bytes));
    }
}

impl Answer {
    fn reserved(&self) -> u64 {
        self.reservation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes()
    }
}

impl Answer {
    /// Writes one more block, and tells the readers.
    fn append(&self, file: &mut File, block: &[u8]) -> io::Result<()> {
        let length = block.len() as u64;
        self.reservation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .grow(length)?;
        file.write_all(block)?;
        self.blocks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(crc32fast::hash(block));
        self.state.send_modify(|state| state.bytes += length);
        Ok(())
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // Fails only where the file was never made.
        let _ = fs::remove_file(&self.path);
    }
}

/// Why an answer cannot be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// Equal bytes can be made and sent without being kept.
    #[error("there is no room to keep the answer")]
    Full,
    #[error("{0}")]
    Making(Arc<str>),
    /// Or the disk does not give it, or the system. Equal bytes can be made as well.
    #[error("a kept answer is damaged on disk, please try again")]
    Damaged,
}

/// Reads an answer from start to end.
pub struct AnswerReader {
    answer: Arc<Answer>,
    file: Option<Arc<File>>,
    state: watch::Receiver<State>,
    block: usize,
}

impl AnswerReader {
    fn of(answer: &Arc<Answer>) -> Self {
        Self {
            answer: Arc::clone(answer),
            file: None,
            state: answer.state.subscribe(),
            block: 0,
        }
    }

    /// What the pack came to, once that is known.
    pub fn stats(&self) -> Option<PackStats> {
        self.state.borrow().end.clone()?.ok()
    }

    /// The CRC-32 of each block that was read.
    pub fn read_so_far(&self) -> Vec<u32> {
        let blocks = self
            .answer
            .blocks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        blocks.iter().take(self.block).copied().collect()
    }

    /// The next block, or `None` at the end. Waits for the writer, and for memory; may be dropped and called again.
    ///
    /// # Errors
    /// [`AnswerError`], after which the answer is of no use.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AnswerError> {
        let start = (self.block * BLOCK) as u64;
        let state = self
            .state
            .wait_for(|state| state.end.is_some() || state.bytes >= start + BLOCK as u64)
            .await
            .map_err(|_| AnswerError::Making("the pack's writer went away".into()))?
            .clone();
        match state.end {
            Some(Err(Failed::Full)) => return Err(AnswerError::Full),
            Some(Err(Failed::Other(error))) => return Err(AnswerError::Making(error)),
            _ => {}
        }
        if start >= state.bytes {
            return Ok(None);
        }
        let length = (state.bytes - start).min(BLOCK as u64) as usize;
        let mut buffer = Buffer::for_client(length).await;
        let file = match &self.file {
            Some(file) if read_from_memory(file, buffer.as_mut(), start) => Arc::clone(file),
            _ => {
                // The disk has to be asked. More threads than these would read no faster.
                let turn = READS.acquire().await;
                let (answer, file) = (Arc::clone(&self.answer), self.file.clone());
                let read = tokio::task::spawn_blocking(move || {
                    // Up to the end of the reading, which goes on when the client has left.
                    let _turn = turn;
                    let file = match file {
                        Some(file) => file,
                        None => Arc::new(File::open(&answer.path)?),
                    };
                    file.read_exact_at(buffer.as_mut(), start)?;
                    Ok::<_, io::Error>((file, buffer))
                });
                let read = read.await.map_err(io::Error::other).flatten();
                let (file, filled) = read.map_err(|error| self.answer.unread(&error))?;
                buffer = filled;
                file
            }
        };
        if !self.answer.is_right(self.block, buffer.as_ref()) {
            let why = "a block does not have its checksum";
            return Err(self.answer.give_up(&why));
        }
        self.file = Some(file);
        self.block += 1;
        Ok(Some(Bytes::from_owner(buffer)))
    }
}

impl Answer {
    /// Whether a block is what was written.
    fn is_right(&self, block: usize, bytes: &[u8]) -> bool {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.get(block) == Some(&crc32fast::hash(bytes))
    }

    /// It could not be read, be it by its own fault or not.
    fn unread(&self, error: &io::Error) -> AnswerError {
        let is_lost = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof
        ) || error.raw_os_error() == Some(Errno::IO.raw_os_error());
        if is_lost {
            return self.give_up(error);
        }
        // Files or memory ran short, say: others can still read it.
        tracing::warn!(%error, "a kept answer is not read: its pack is made for one client");
        AnswerError::Damaged
    }

    /// Who asks next gets another.
    fn give_up(&self, why: &dyn fmt::Display) -> AnswerError {
        if !self.bad.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                path = %self.path.display(), error = %why,
                "a kept answer cannot be read: its pack is made anew"
            );
        }
        AnswerError::Damaged
    }
}

impl Failed {
    fn of(error: &ObjectError) -> Self {
        match error {
            full if full.is_for_want_of_room() => Self::Full,
            other => Self::Other(other.to_string().into()),
        }
    }
}

/// Writes an answer. Dropped without [`AnswerWriter::run`], readers get an error.
pub struct AnswerWriter {
    answers: Arc<Answers>,
    id: (RepoName, AnswerKey),
    answer: Option<Arc<Answer>>,
}

impl AnswerWriter {
    /// Makes the answer: `make` writes the pack, and asks from time to time whether somebody still wants it. Blocks
    /// on disk and processor.
    ///
    /// # Errors
    /// What went wrong, after the readers were told.
    pub fn run(
        mut self,
        make: impl FnOnce(&mut dyn Write, &dyn Fn() -> bool) -> Result<PackStats, ObjectError>,
    ) -> Result<PackStats, ObjectError> {
        // Stays in `self` until it is ended, so that readers hear of a panic as well.
        let Some(answer) = self.answer.clone() else {
            return Err(ObjectError::Cancelled);
        };
        let unwanted =
            || answer.state.receiver_count() == 0 && !answer.ahead.load(Ordering::Relaxed);
        let cancelled = || {
            if !unwanted() {
                return false;
            }
            // Under the lock nobody can join; who comes later finds it gone and makes it anew.
            let mut kept = self.answers.kept();
            let unwanted = unwanted();
            if unwanted
                && kept
                    .get(&self.id)
                    .is_some_and(|found| Arc::ptr_eq(found, &answer))
            {
                kept.remove(&self.id);
            }
            unwanted
        };
        let result = (|| {
            let mut file = File::create_new(&answer.path)?;
            let mut framed = Framed::new(Blocks::new(|block| answer.append(&mut file, block)));
            let stats = make(&mut framed, &cancelled)?;
            framed.finish()?.finish()?;
            Ok(stats)
        })();
        self.end(&answer, result.as_ref().copied().map_err(Failed::of));
        self.answer = None;
        result
    }

    fn end(&self, answer: &Arc<Answer>, result: Result<PackStats, Failed>) {
        if result.is_err() {
            self.answers.forget(&self.id, answer);
        }
        answer.state.send_modify(|state| state.end = Some(result));
    }
}

impl Drop for AnswerWriter {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            self.end(&answer, Err(Failed::Other("the pack was not made".into())));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::objects::packs::PackSet;
    use crate::git::refs::Refs;
    use crate::git::snapshot::Snapshot;
    use crate::git::upload_pack::negotiate::Common;
    use crate::git::upload_pack::plan::plan;
    use crate::git::upload_pack::request::FetchRequest;

    fn some_key() -> AnswerKey {
        let (packs, refs) = (PackSet::default(), Refs::default());
        let snapshot = Snapshot::new(packs, refs, Arc::default(), false).unwrap();
        let commits = snapshot.commits();
        let request = FetchRequest::default();
        let plan = plan(&request, &[], &Common::none(&commits), &snapshot, &commits);
        plan.unwrap().key()
    }

    #[test]
    fn an_answer_that_others_can_read_stays() {
        let folder = tempfile::tempdir().unwrap();
        let answers = Answers::open(folder.path().join("answers"), Storage::new(1 << 20)).unwrap();
        let repo = RepoName::parse("git.example.test/team/sample").unwrap();
        for (error, is_lost) in [
            (Errno::MFILE.into(), false),
            (Errno::NOMEM.into(), false),
            (io::Error::other("the service stops"), false),
            (Errno::IO.into(), true),
            (Errno::NOENT.into(), true),
            (io::ErrorKind::UnexpectedEof.into(), true),
        ] {
            let Found::New(reader, _writer) = answers.get_or_new(&repo, some_key(), false) else {
                panic!("the last one is gone");
            };
            reader.answer.unread(&error);
            let is_new = matches!(answers.get_or_new(&repo, some_key(), false), Found::New(..));
            assert_eq!(is_new, is_lost, "{error}");
        }
    }

    #[tokio::test]
    async fn what_was_evicted_is_not_counted_any_more() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::new(1 << 20);
        let answers = Answers::open(folder.path().join("answers"), Arc::clone(&storage)).unwrap();
        let repo = RepoName::parse("git.example.test/team/sample").unwrap();
        let evicting = tokio::task::spawn_blocking(move || {
            for by_repo in [false, true] {
                let Found::New(reader, writer) = answers.get_or_new(&repo, some_key(), false)
                else {
                    panic!("it was evicted");
                };
                let made = writer.run(|out, _| {
                    out.write_all(&[1; 1000])?;
                    Ok(PackStats {
                        objects: 0,
                        bytes: 1000,
                        reencoded: 0,
                    })
                });
                made.unwrap();
                drop(reader);
                assert!(storage.used(Part::Answers) >= 1000);
                if by_repo {
                    answers.forget_repo(&repo);
                } else {
                    answers.evict(1);
                }
                assert_eq!(storage.used(Part::Answers), 0);
            }
        });
        evicting.await.unwrap();
    }
}
