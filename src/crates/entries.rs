//! The entries of one index on disk: a file each, below `<root>/<the same path as in the index>`.
//!
//! The time at which the registry last confirmed an entry is the time of its file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_util::sync::CancellationToken;

use super::entry::Entry;
use super::name::CrateName;
use crate::durable;
use crate::storage::{Evict, Part, Reservation, Storage, StorageFull};

/// The files, and what they take.
pub struct Entries {
    root: PathBuf,
    storage: Arc<Storage>,
    files: Mutex<Files>,
    temporary: AtomicU64,
}

struct Files {
    /// Bytes on disk, and seconds since 1970 of the last use.
    sizes: HashMap<CrateName, (u64, u64)>,
    reservation: Reservation,
}

const TEMPORARY: &str = "tmp";

/// What file systems give out, in bytes. Most entries are smaller, and there may be hundreds of thousands.
const BLOCK: u64 = 4096;

impl Entries {
    /// Opens the folder; what an earlier process left half-written is removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(root: PathBuf, storage: &Arc<Storage>) -> io::Result<Arc<Self>> {
        durable::emptied(&root.join(TEMPORARY))?;
        let entries = Arc::new(Self {
            root,
            storage: Arc::clone(storage),
            files: Mutex::new(Files {
                sizes: HashMap::new(),
                reservation: storage.nothing(Part::Index),
            }),
            temporary: AtomicU64::new(0),
        });
        let weak: Weak<dyn Evict> = Arc::downgrade(&entries) as _;
        storage.add_evictor(weak);
        Ok(entries)
    }

    /// Counts what is on disk; not all of it at a stop. Blocks.
    pub fn load(&self, stopping: &CancellationToken) {
        let mut folders = vec![self.root.clone()];
        while !stopping.is_cancelled()
            && let Some(folder) = folders.pop()
        {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let Ok(metadata) = entry.metadata() else {
                    continue;
                };
                if metadata.is_dir() {
                    if entry.file_name() != TEMPORARY {
                        folders.push(entry.path());
                    }
                    continue;
                }
                let name = entry.file_name();
                if let Some(name) = name.to_str().and_then(CrateName::parse) {
                    let used = metadata.modified().map_or(0, seconds_of);
                    let size = on_disk(metadata.len());
                    self.count(&mut self.files(), &name, size, used);
                }
            }
        }
    }

    /// The entry, and when the registry last confirmed it. Blocks.
    pub fn read(&self, name: &CrateName) -> Option<(Entry, SystemTime)> {
        let path = self.path(name);
        let file = fs::read(&path).ok()?;
        let confirmed = path.metadata().and_then(|metadata| metadata.modified());
        let size = on_disk(file.len() as u64);
        match Entry::from_file(file) {
            Some(entry) => {
                let mut files = self.files();
                // It may have been evicted meanwhile.
                if path.exists() {
                    self.count(&mut files, name, size, seconds_of(SystemTime::now()));
                }
                drop(files);
                Some((entry, confirmed.unwrap_or(UNIX_EPOCH)))
            }
            None => {
                tracing::error!(crate = %name, "a kept index entry is damaged on disk: it is fetched again");
                self.remove(name);
                None
            }
        }
    }

    /// Keeps an entry. Blocks until it is sure to be on disk.
    ///
    /// # Errors
    /// What the file system says, or that there is no room.
    pub fn write(&self, name: &CrateName, entry: &Entry) -> io::Result<()> {
        let file = entry.to_file();
        let size = on_disk(file.len() as u64);
        let mut reservation = self.storage.nothing(Part::Index);
        reservation
            .grow(size)
            .map_err(|full: StorageFull| io::Error::from(full))?;
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.root);
        durable::create_folder(folder)?;
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(TEMPORARY).join(number.to_string());
        let written = fs::write(&temporary, &file).and_then(|()| durable::sync(&temporary));
        // Counted as it gets its place: what is evicted in between would stay counted.
        let mut files = self.files();
        if let Err(error) = written.and_then(|()| fs::rename(&temporary, &path)) {
            drop(files);
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        files.forget(name);
        files.reservation.absorb(reservation);
        let now = seconds_of(SystemTime::now());
        files.sizes.insert(name.clone(), (size, now));
        drop(files);
        durable::sync_parent(&path)
    }

    /// Writes down that the registry has confirmed the entry now. Blocks. Returns whether there is one: what nobody used may
    /// have been evicted.
    pub fn confirm(&self, name: &CrateName) -> bool {
        let touched = File::options()
            .append(true)
            .open(self.path(name))
            .and_then(|file| file.set_modified(SystemTime::now()));
        let Err(error) = touched else {
            return true;
        };
        // It will be asked for again after a restart.
        tracing::debug!(crate = %name, %error, "the time of an index entry was not written");
        error.kind() != io::ErrorKind::NotFound
    }

    /// Says that it was used now, which is only remembered: after a restart the last confirmation counts. Does not wait
    /// for whoever removes files at this moment.
    pub fn use_now(&self, name: &CrateName) {
        if let Ok(mut files) = self.files.try_lock()
            && let Some((_, used)) = files.sizes.get_mut(name)
        {
            *used = seconds_of(SystemTime::now());
        }
    }

    /// Forgets a crate. Blocks.
    pub fn remove(&self, name: &CrateName) -> bool {
        let mut files = self.files();
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(crate = %name, %error, "a kept index entry cannot be removed");
                false
            }
            _ => files.forget(name),
        }
    }

    fn count(&self, files: &mut Files, name: &CrateName, size: u64, used: u64) {
        if let Some((_, last)) = files.sizes.get_mut(name) {
            *last = used.max(*last);
            return;
        }
        let counted = self.storage.count(Part::Index, size);
        files.reservation.absorb(counted);
        files.sizes.insert(name.clone(), (size, used));
    }

    fn path(&self, name: &CrateName) -> PathBuf {
        self.root.join(Path::new(&name.index_path()))
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files {
    fn forget(&mut self, name: &CrateName) -> bool {
        let Some((size, _)) = self.sizes.remove(name) else {
            return false;
        };
        let left = self.reservation.bytes().saturating_sub(size);
        self.reservation.set(left);
        true
    }
}

impl Evict for Entries {
    fn evict(&self, bytes: u64) {
        let mut oldest: Vec<_> = self
            .files()
            .sizes
            .iter()
            .map(|(name, (size, used))| (*used, *size, name.clone()))
            .collect();
        oldest.sort_unstable();
        let mut freed = 0;
        for (_, size, name) in oldest {
            if freed >= bytes {
                return;
            }
            if self.remove(&name) {
                freed += size;
            }
        }
    }

    fn oldest(&self) -> Option<SystemTime> {
        let used = self.files().sizes.values().map(|(_, used)| *used).min();
        let used = used.map(|used| UNIX_EPOCH + Duration::from_secs(used));
        // Without any there is nothing to evict: those who have some come first.
        Some(used.unwrap_or_else(SystemTime::now))
    }
}

/// What a file of so many bytes takes.
fn on_disk(length: u64) -> u64 {
    length.next_multiple_of(BLOCK)
}

fn seconds_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::entry::Received;
    use super::*;

    fn entry(name: &str) -> Entry {
        let text = format!("{{\"name\":\"{name}\",\"vers\":\"1.0.0\",\"cksum\":\"ab\"}}\n");
        Entry::receive(name, Received::default(), Bytes::from(text)).unwrap()
    }

    fn name(text: &str) -> CrateName {
        CrateName::parse(text).unwrap()
    }

    #[test]
    fn they_outlive_the_process_and_damage_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::new(1 << 20);
        let open = || Entries::open(folder.path().join("x"), &storage).unwrap();
        let entries = open();
        entries.write(&name("serde"), &entry("serde")).unwrap();
        entries.write(&name("a"), &entry("a")).unwrap();
        let used = storage.used(Part::Index);
        drop(entries);
        assert_eq!(storage.used(Part::Index), 0);
        let left = folder.path().join("x/tmp/7");
        fs::write(&left, "half").unwrap();
        let entries = open();
        assert!(!left.exists());
        let stopping = CancellationToken::new();
        stopping.cancel();
        entries.load(&stopping);
        assert_eq!(storage.used(Part::Index), 0, "a stop does not wait for it");
        entries.load(&CancellationToken::new());
        assert_eq!(storage.used(Part::Index), used);
        let (read, confirmed) = entries.read(&name("serde")).unwrap();
        let text = |entry: Entry| io::read_to_string(entry.text()).unwrap();
        assert_eq!(text(read), text(entry("serde")));
        assert!(confirmed.elapsed().unwrap() < Duration::from_secs(60));

        let path = folder.path().join("x/se/rd/serde");
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(entries.read(&name("serde")).is_none());
        assert!(!path.exists());
        assert!(storage.used(Part::Index) < used);
    }

    #[test]
    fn whole_blocks_count_and_the_oldest_goes() {
        let folder = tempfile::tempdir().unwrap();
        let storage = Storage::new(2 * BLOCK);
        let entries = Entries::open(folder.path().join("x"), &storage).unwrap();
        entries.write(&name("aa"), &entry("aa")).unwrap();
        entries.write(&name("bb"), &entry("bb")).unwrap();
        entries.files().sizes.get_mut(&name("bb")).unwrap().1 = 1;
        entries.write(&name("cc"), &entry("cc")).unwrap();
        assert!(entries.read(&name("bb")).is_none());
        assert!(entries.read(&name("aa")).is_some() && entries.read(&name("cc")).is_some());
        assert_eq!(storage.used(Part::Index), 2 * BLOCK);
        storage.set_limit(BLOCK - 1);
        assert!(entries.write(&name("dd"), &entry("dd")).is_err());
        assert!(!folder.path().join("x/2/dd").exists());
    }

    /// Whether it was already counted or not.
    #[test]
    fn what_was_used_last_stays() {
        let ways: [fn(&Entries); 2] = [
            |entries| assert!(entries.read(&name("aa")).is_some()),
            |entries| entries.use_now(&name("aa")),
        ];
        for use_it in ways {
            let folder = tempfile::tempdir().unwrap();
            let storage = Storage::new(1 << 20);
            let entries = Entries::open(folder.path().join("x"), &storage).unwrap();
            for (text, used) in [("aa", 1), ("bb", 2)] {
                entries.write(&name(text), &entry(text)).unwrap();
                let file = File::options()
                    .append(true)
                    .open(entries.path(&name(text)))
                    .unwrap();
                file.set_modified(UNIX_EPOCH + Duration::from_secs(used))
                    .unwrap();
                entries.files().sizes.get_mut(&name(text)).unwrap().1 = used;
            }
            use_it(&entries);
            // Those that are used meanwhile are no older for that.
            entries.load(&CancellationToken::new());
            storage.set_limit(storage.used_in_all() + BLOCK - 1);
            entries.write(&name("cc"), &entry("cc")).unwrap();
            assert!(entries.read(&name("bb")).is_none());
            assert!(entries.read(&name("aa")).is_some());
        }
    }
}
