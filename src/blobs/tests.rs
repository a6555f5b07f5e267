use std::fs;
use std::time::Instant;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use super::*;

struct Store {
    blobs: Arc<Blobs>,
    storage: Arc<Storage>,
    folder: tempfile::TempDir,
}

fn store(limit: u64) -> Store {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::new(limit);
    Store {
        blobs: Blobs::open(folder.path().join("blobs"), Arc::clone(&storage)).unwrap(),
        storage,
        folder,
    }
}

impl Store {
    /// As after a restart.
    fn again(&mut self) {
        self.storage = Storage::new(self.storage.limit());
        let root = self.folder.path().join("blobs");
        self.blobs = Blobs::open(root, Arc::clone(&self.storage)).unwrap();
    }

    async fn write(&self, bytes: &[u8]) -> BlobId {
        let id = id(bytes);
        let Found::New(mut writer, _) = self.blobs.find(&id, "here").await else {
            panic!("there already")
        };
        writer.write(bytes).unwrap();
        writer.finish().unwrap();
        id
    }

    async fn kept(&self, id: &BlobId) -> Option<Arc<Kept>> {
        match self.blobs.find(id, "here").await {
            Found::Kept(kept) => Some(kept),
            _ => None,
        }
    }

    /// The blob, not open for reading: so reading it fails, and not for its end.
    async fn unreadable(&self, id: &BlobId) -> Arc<Kept> {
        let whole = self.kept(id).await.unwrap();
        let mut options = fs::File::options();
        let file = options.write(true).open(self.blobs.path(id)).unwrap();
        Arc::new(Kept {
            id: id.clone(),
            file: Arc::new(file),
            size: whole.size,
            checks: Arc::clone(&whole.checks),
            was_here: false.into(),
            hot: self.blobs.hot.blocks(whole.size),
        })
    }

    /// Whether it is on disk.
    fn has(&self, id: &BlobId) -> bool {
        self.blobs.path(id).exists()
    }

    /// Bytes in quarantine.
    fn aside(&self) -> u64 {
        let files = fs::read_dir(self.blobs.quarantine.folder()).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    }

    fn set_used(&self, id: &BlobId, used: u64) {
        self.blobs.index().slots.get_mut(id).unwrap().used = used;
    }
}

fn id(bytes: &[u8]) -> BlobId {
    BlobId {
        space: "space".into(),
        digest: Digest::of(bytes),
    }
}

async fn read(reader: &mut BlobReader) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(bytes) = reader.next().await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    all
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
}

#[tokio::test]
async fn written_once_and_read_in_any_part() {
    let mut store = store(1 << 30);
    for length in [0, 1, 65_535, 65_536, 65_537, 200_000] {
        let bytes = content(length);
        let id = store.write(&bytes).await;
        for restarted in [false, true] {
            if restarted {
                store.again();
                store.blobs.load(&CancellationToken::new());
            }
            let kept = store.kept(&id).await.unwrap();
            let length = length as u64;
            for range in [
                0..length,
                0..1,
                length / 2..length,
                65_530..65_540,
                0..u64::MAX,
            ] {
                let mut reader = BlobReader::kept(Arc::clone(&kept), range.clone());
                let end = range.end.min(length) as usize;
                let expected = bytes.get(range.start as usize..end).unwrap_or_default();
                assert!(read(&mut reader).await == expected, "{length} {range:?}");
            }
        }
    }
    assert_eq!(
        store.storage.used(Part::Blobs),
        1 + 65_535 + 65_536 + 65_537 + 200_000
    );
}

#[tokio::test]
async fn the_last_byte_waits_for_the_checksum() {
    let store = store(1 << 30);
    let bytes = content(150_000);
    for (right, announced) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut id = id(&bytes);
        id.space = format!("{right}{announced}").into();
        let Found::New(mut writer, coming) = store.blobs.find(&id, "here").await else {
            panic!("there already")
        };
        let mut reader = BlobReader::coming(&coming, 0..u64::MAX);
        let Found::Coming(also) = store.blobs.find(&id, "here").await else {
            panic!("a second writer")
        };
        if announced {
            writer.expect(150_000).unwrap();
        }
        writer.write(&bytes[..100]).unwrap();
        assert_eq!(
            reader.next().await.unwrap().unwrap().len(),
            if announced { 100 } else { 99 }
        );
        let mut rest = bytes[100..].to_vec();
        if !right {
            rest[77] ^= 1;
        }
        writer.write(&rest).unwrap();
        let mut got = reader.left().start;
        while got < 149_999 {
            got += reader.next().await.unwrap().unwrap().len() as u64;
        }
        assert_eq!(got, 149_999);
        {
            let mut next = std::pin::pin!(reader.next());
            let waiting = futures_util::future::poll_immediate(next.as_mut()).await;
            assert!(waiting.is_none(), "not before it is checked");
            assert_eq!(writer.finish().is_ok(), right);
            assert_eq!(next.await.is_ok(), right);
        }
        assert_eq!(also.ended().await.is_ok(), right);
        assert_eq!(store.kept(&id).await.is_some(), right);
    }
    assert_eq!(store.storage.used(Part::Blobs), 300_000);
}

/// The right bytes, but a client was told of fewer or more.
#[tokio::test]
async fn another_length_than_announced_is_wrong() {
    let store = store(1 << 30);
    let bytes = content(150_000);
    for announced in [149_999, 150_001] {
        let mut id = id(&bytes);
        id.space = announced.to_string().into();
        let Found::New(mut writer, coming) = store.blobs.find(&id, "here").await else {
            panic!("there already")
        };
        writer.expect(announced).unwrap();
        writer.write(&bytes).unwrap();
        let finished = writer.finish();
        let text = format!("expected {announced} bytes, as was announced, found 150000");
        assert!(matches!(finished, Err(Failed::Wrong(why)) if *why == *text));
        let mut reader = BlobReader::coming(&coming, 0..announced);
        assert!(reader.next().await.is_err());
        assert!(store.kept(&id).await.is_none());
    }
    assert_eq!(store.storage.used(Part::Blobs), 0);
}

#[tokio::test]
async fn a_writer_that_goes_away_leaves_nothing() {
    let store = store(1 << 30);
    let id = id(b"content");
    let Found::New(mut writer, coming) = store.blobs.find(&id, "here").await else {
        panic!("there already")
    };
    writer.write(b"con").unwrap();
    drop(writer);
    assert!(coming.ended().await.is_err());
    assert!(matches!(
        store.blobs.find(&id, "here").await,
        Found::New(..)
    ));
    assert_eq!(store.storage.used(Part::Blobs), 0);
    let left = fs::read_dir(store.folder.path().join("blobs/tmp"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn damage_is_found_at_every_place_and_set_aside() {
    let mut store = store(1 << 30);
    let bytes = content(70_000);
    for (place, restarted) in [
        (0, false),
        (65_536, false),
        (69_999, false),
        (0, true),
        (69_999, true),
    ] {
        let id = store.write(&bytes).await;
        let path = store.blobs.path(&id);
        let mut damaged = bytes.clone();
        damaged[place] ^= 4;
        fs::write(&path, damaged).unwrap();
        if restarted {
            store.again();
            assert!(matches!(
                store.blobs.find(&id, "here").await,
                Found::New(..)
            ));
        } else {
            let kept = store.kept(&id).await.unwrap();
            let mut reader = BlobReader::kept(kept, 0..70_000);
            let damaged = loop {
                match reader.next().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("not found"),
                    Err(ReadError::Damaged(kept)) => break kept,
                    Err(error) => panic!("{error}"),
                }
            };
            assert_eq!(reader.left().start, place as u64 / 65_536 * 65_536);
            store.blobs.set_aside(&damaged);
        }
        assert!(!path.exists());
        assert_eq!(store.storage.used(Part::Blobs), store.aside());
    }
}

/// Nobody has it open, and its blocks are known from before.
#[tokio::test]
async fn another_length_is_found_before_anything_is_sent() {
    let store = store(1 << 30);
    let bytes = content(70_000);
    for length in [69_999, 65_537, 70_001] {
        let id = store.write(&bytes).await;
        store.blobs.index().open.clear();
        let path = store.blobs.path(&id);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(length).unwrap();
        assert!(matches!(
            store.blobs.find(&id, "here").await,
            Found::New(..)
        ));
        assert!(!path.exists());
        assert_eq!(store.storage.used(Part::Blobs), store.aside());
    }
}

#[tokio::test]
async fn what_the_disk_refuses_to_read_is_set_aside() {
    let store = store(1 << 30);
    let id = store.write(&content(70_000)).await;
    let broken = store.unreadable(&id).await;
    let open = (Arc::clone(&broken), u64::MAX);
    store.blobs.index().open.insert(id.clone(), open);
    let Err(ReadError::Damaged(damaged)) = BlobReader::kept(broken, 0..70_000).next().await else {
        panic!("not damaged")
    };
    store.blobs.set_aside(&damaged);
    assert!(!store.has(&id));
    assert!(matches!(
        store.blobs.find(&id, "here").await,
        Found::New(..)
    ));
}

/// Whoever goes away while the disk is slow leaves no room for others to make it slower.
#[test]
fn a_read_has_its_place_until_the_disk_has_answered() {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let store = store(1 << 30);
        let id = store.write(b"content").await;
        // Not found in memory.
        let kept = store.unreadable(&id).await;
        // The only thread stands for a disk that does not answer.
        let (release, released) = std::sync::mpsc::channel::<()>();
        tokio::task::spawn_blocking(move || released.recv());
        let mut all_taken = false;
        // Other tests may have one for a moment.
        for _ in 0..1000 {
            let mut reader = BlobReader::kept(Arc::clone(&kept), 0..7);
            assert!(reader.next().now_or_never().is_none());
            all_taken = reader::READS.available_permits() == 0;
            if all_taken {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(release);
        assert!(all_taken);
    });
}

#[tokio::test]
async fn only_the_newest_stay_in_quarantine() {
    let mut store = store(1 << 30);
    let folder = store.folder.path().join("blobs").join(QUARANTINE);
    fs::create_dir_all(&folder).unwrap();
    let path_of = |seconds: usize| {
        let digest = Digest::of(&seconds.to_le_bytes());
        folder.join(format!("{digest}-{seconds}"))
    };
    let left = || -> Vec<usize> {
        let all = 0..30;
        all.filter(|seconds| path_of(*seconds).exists()).collect()
    };
    for seconds in 0..30 {
        fs::write(path_of(seconds), "damaged").unwrap();
    }
    let of_others = folder.join("notes-1");
    fs::write(&of_others, "not ours").unwrap();
    store.again();
    store.blobs.load(&CancellationToken::new());
    assert_eq!(left(), Vec::from_iter(30 - quarantine::MOST..30));
    let id = store.write(b"content").await;
    let kept = store.kept(&id).await.unwrap();
    store.blobs.set_aside(&kept);
    // The one that was added now is the newest.
    assert_eq!(left(), Vec::from_iter(30 - quarantine::MOST + 1..30));
    assert!(of_others.exists());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), quarantine::MOST + 1);
    // They count, and go before anything else, the oldest first.
    let aside = |files: usize| (files as u64 - 1) * "damaged".len() as u64 + "content".len() as u64;
    let used = || store.storage.used(Part::Blobs);
    assert_eq!(used(), aside(quarantine::MOST));
    let before = store.write(b"a file").await;
    store.storage.set_limit(used());
    let after = store.write(b"another").await;
    assert_eq!(left(), Vec::from_iter(30 - quarantine::MOST + 2..30));
    assert_eq!(used(), aside(quarantine::MOST - 1) + 13);
    store.storage.set_limit(13 + 1000);
    store.write(&[0; 1000]).await;
    assert_eq!((left(), used()), (Vec::new(), 1013));
    assert!(store.has(&before) && store.has(&after) && of_others.exists());
}

#[tokio::test]
async fn evicts_the_least_recently_used_and_nothing_that_is_read() {
    let store = store(400);
    let mut ids = Vec::new();
    for number in 0..4_u8 {
        let id = store.write(&[number; 100]).await;
        store.set_used(&id, u64::from(number) + 1);
        ids.push(id);
    }
    let reading = store.kept(&ids[0]).await.unwrap();
    store.set_used(&ids[0], 1);
    let new = store.write(&[9; 100]).await;
    assert!(store.has(&ids[0]) && !store.has(&ids[1]) && store.has(&ids[2]));
    drop(reading);
    store.set_used(&new, 9);
    store.write(&[10; 100]).await;
    assert!(!store.has(&ids[0]) && store.has(&new));
    assert_eq!(store.storage.used(Part::Blobs), 400);
    let Found::New(mut writer, _) = store.blobs.find(&id(&[0; 401]), "here").await else {
        panic!("there already")
    };
    assert!(matches!(writer.expect(401), Err(Failed::Full)));
}

/// What is written anew while the old file is being removed.
#[tokio::test]
async fn what_leaves_takes_nothing_along() {
    let store = store(1 << 30);
    let bytes = content(1000);
    let id = id(&bytes);
    store.blobs.index().leaving.insert(id.clone());
    let Found::New(mut writer, coming) = store.blobs.find(&id, "here").await else {
        panic!("it is not to be found")
    };
    let writing = tokio::task::spawn_blocking(move || {
        writer.write(&bytes).unwrap();
        writer.finish()
    });
    coming.ended().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!store.has(&id));
    store.blobs.index().leaving.remove(&id);
    store.blobs.left.notify_all();
    writing.await.unwrap().unwrap();
    assert!(store.has(&id));
}

/// Whoever writes, reads and evicts at the same time: what is counted is there, and what is there is counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_written_and_evicted_at_once_is_counted_right() {
    const ROUNDS: usize = 300;
    let store = store(1 << 30);
    let contents: Arc<[Vec<u8>]> = (0..4).map(|number| content(1000 + number)).collect();
    let done = CancellationToken::new();
    let (evicting, stop) = (Arc::clone(&store.blobs), done.clone());
    let evicting = tokio::task::spawn_blocking(move || {
        while !stop.is_cancelled() {
            evicting.evict(1);
        }
    });
    let working = (0..4).map(|first| {
        let (blobs, contents) = (Arc::clone(&store.blobs), Arc::clone(&contents));
        tokio::spawn(async move {
            for round in 0..ROUNDS {
                let bytes = contents[(first + round) % contents.len()].clone();
                match blobs.find(&id(&bytes), "here").await {
                    Found::Kept(kept) => {
                        let mut reader = BlobReader::kept(kept, 0..u64::MAX);
                        assert!(read(&mut reader).await == bytes);
                    }
                    Found::Coming(coming) => coming.ended().await.unwrap(),
                    Found::New(mut writer, _) => {
                        let written = tokio::task::spawn_blocking(move || {
                            writer.write(&bytes)?;
                            writer.finish()
                        });
                        written.await.unwrap().unwrap();
                    }
                }
            }
        })
    });
    for worker in Vec::from_iter(working) {
        worker.await.unwrap();
    }
    done.cancel();
    evicting.await.unwrap();
    let index = store.blobs.index();
    assert!(index.leaving.is_empty());
    let sizes = index.slots.iter().map(|(id, slot)| {
        let metadata = store.blobs.path(id).metadata();
        assert_eq!(metadata.expect("it is there").len(), slot.size);
        slot.size
    });
    assert_eq!(index.reservation.bytes(), sizes.sum::<u64>());
    let on_disk = |bytes: &Vec<u8>| store.has(&id(bytes));
    assert_eq!(
        contents.iter().filter(|bytes| on_disk(bytes)).count(),
        index.slots.len()
    );
}

#[tokio::test]
async fn the_order_survives_a_restart_and_leftovers_do_not() {
    let mut store = store(1000);
    let (old, new) = (store.write(&[1; 100]).await, store.write(&[2; 100]).await);
    let before = SystemTime::now() - Duration::from_secs(1000);
    for (id, age) in [(&old, 2), (&new, 1)] {
        let at = before - Duration::from_secs(age);
        let times = fs::FileTimes::new().set_accessed(at).set_modified(at);
        fs::File::open(store.blobs.path(id))
            .unwrap()
            .set_times(times)
            .unwrap();
    }
    let left = store.folder.path().join("blobs/tmp/17");
    fs::write(&left, "half").unwrap();
    store.again();
    assert!(!left.exists());
    // Found before it is counted.
    assert!(store.kept(&new).await.is_some());
    store.blobs.load(&CancellationToken::new());
    assert_eq!(store.storage.used(Part::Blobs), 200);
    store.blobs.evict(1);
    assert!(!store.has(&old) && store.has(&new));
}

/// However large the store is.
#[tokio::test]
async fn a_stop_does_not_wait_for_the_count() {
    let mut store = store(1 << 30);
    store.write(b"content").await;
    store.again();
    let stopping = CancellationToken::new();
    stopping.cancel();
    store.blobs.load(&stopping);
    assert_eq!(store.storage.used(Part::Blobs), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_ask_at_once_one_learns_that_it_was_here() {
    let mut store = store(1 << 30);
    let old = store.write(&content(1_000_000)).await;
    store.again();
    store.blobs.load(&CancellationToken::new());
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let (blobs, id) = (Arc::clone(&store.blobs), old.clone());
            tokio::spawn(async move {
                let Found::Kept(kept) = blobs.find(&id, "here").await else {
                    panic!("it is kept");
                };
                kept.is_first_use()
            })
        })
        .collect();
    let mut first_uses = 0;
    for asked in asking {
        first_uses += usize::from(asked.await.unwrap());
    }
    assert_eq!(first_uses, 1);
    let new = store.write(b"new").await;
    assert!(!store.kept(&new).await.unwrap().is_first_use());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_ask_at_once_make_one_writer() {
    let store = store(1 << 30);
    let bytes = content(100_000);
    let id = id(&bytes);
    let asking: Vec<_> = (0..200)
        .map(|_| {
            let (blobs, id) = (Arc::clone(&store.blobs), id.clone());
            tokio::spawn(async move { blobs.find(&id, "here").await })
        })
        .collect();
    let mut writers = Vec::new();
    let mut readers = Vec::new();
    for found in asking {
        match found.await.unwrap() {
            Found::New(writer, _) => writers.push(writer),
            Found::Coming(coming) => readers.push(BlobReader::coming(&coming, 0..u64::MAX)),
            Found::Kept(_) => panic!("nobody wrote it"),
        }
    }
    assert_eq!((writers.len(), readers.len()), (1, 199));
    let begin = Instant::now();
    let mut writer = writers.remove(0);
    let written = bytes.clone();
    let writing = tokio::task::spawn_blocking(move || {
        for piece in written.chunks(1000) {
            writer.write(piece).unwrap();
        }
        writer.finish().unwrap();
    });
    for reader in &mut readers {
        assert!(read(reader).await == bytes);
    }
    writing.await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(60), "it hangs");
}
