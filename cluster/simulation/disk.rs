//! The disk of a simulated host, under redb: what was written and not flushed is lost or torn when the power fails, and stays when
//! only a process dies. Flushes take time; a disk can be slow, full, or fail.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blixard_node::raft::log_store::Writer;
use blixard_node::raft::storage::{self, Storage};
use redb::{Database, StorageBackend};

use crate::dice::Dice;
use crate::trace::Trace;

/// What a disk writes all or nothing of.
const SECTOR: usize = 512;

/// A journal that is full after some dozens of entries.
const JOURNAL_BYTES: usize = 32 << 10;

/// How a disk behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// A flush takes up to 3 ms.
    Good,
    /// A flush takes up to 600 ms.
    Slow,
    /// Files cannot grow.
    Full,
    /// Nothing can be written.
    Broken,
}

#[derive(Debug)]
enum Change {
    Data { at: usize, bytes: Vec<u8> },
    Length(usize),
}

#[derive(Debug, Default)]
struct File {
    /// As processes see it.
    content: Vec<u8>,
    /// As it certainly is after a loss of power.
    flushed: Vec<u8>,
    /// What is not flushed, in order.
    pending: Vec<Change>,
}

fn put(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    let end = at + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    if let Some(place) = content.get_mut(at..end) {
        place.copy_from_slice(bytes);
    }
}

fn change(content: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Data { at, bytes } => put(content, *at, bytes),
        Change::Length(length) => content.resize(*length, 0),
    }
}

impl File {
    fn flush(&mut self) {
        for pending in self.pending.drain(..) {
            change(&mut self.flushed, &pending);
        }
    }

    /// Each sector that was not flushed is there or not.
    fn lose_power(&mut self, dice: &mut Dice) {
        let kept_per_mille = dice.pick(&[0, 500, 900, 1000]).unwrap_or(0);
        for pending in std::mem::take(&mut self.pending) {
            match pending {
                Change::Data { at, bytes } => {
                    let mut from = 0;
                    while from < bytes.len() {
                        // Up to the next border between sectors.
                        let to = bytes.len().min(from + SECTOR - (at + from) % SECTOR);
                        if dice.chance(kept_per_mille) {
                            put(&mut self.flushed, at + from, bytes.get(from..to).unwrap_or_default());
                        }
                        from = to;
                    }
                }
                Change::Length(_) if !dice.chance(kept_per_mille) => {}
                length @ Change::Length(_) => change(&mut self.flushed, &length),
            }
        }
        self.content.clone_from(&self.flushed);
    }
}

#[derive(Debug)]
struct Inner {
    files: BTreeMap<String, File>,
    mood: Mood,
    /// It refused something since the process began that uses it.
    refused: bool,
    dice: Dice,
}

/// The disk of one host. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct Disk(Arc<Mutex<Inner>>);

impl Disk {
    /// An empty disk.
    pub fn new(dice: Dice) -> Self {
        Self(Arc::new(Mutex::new(Inner { files: BTreeMap::new(), mood: Mood::Good, refused: false, dice })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It behaves like this from now on.
    pub fn set_mood(&self, mood: Mood) {
        self.inner().mood = mood;
    }

    /// Whether it refused something since the process began that uses it.
    pub fn has_refused(&self) -> bool {
        self.inner().refused
    }

    /// The power fails.
    pub fn lose_power(&self) {
        let Inner { files, dice, .. } = &mut *self.inner();
        files.values_mut().for_each(|file| file.lose_power(dice));
    }

    /// The disk for one process, which can use it for as long as `alive`.
    pub fn mount(&self, name: String, alive: Arc<AtomicBool>, trace: Trace) -> Mounted {
        self.inner().refused = false;
        Mounted { disk: self.clone(), alive, name, trace }
    }
}

/// A disk as one process has it.
#[derive(Debug, Clone)]
pub struct Mounted {
    disk: Disk,
    alive: Arc<AtomicBool>,
    name: String,
    trace: Trace,
}

impl Mounted {
    fn flush_time(&self) -> Duration {
        let mut inner = self.disk.inner();
        let most = if inner.mood == Mood::Slow { 600 } else { 3 };
        inner.dice.millis(0..=most)
    }
}

impl Storage for Mounted {
    fn open(&self, name: &str, cache_bytes: usize) -> Result<Database, redb::DatabaseError> {
        let file = OpenFile { mounted: self.clone(), name: name.to_owned() };
        Database::builder().set_cache_size(cache_bytes.min(1 << 20)).create_with_backend(file)
    }

    fn journal(&self) -> io::Result<(Box<dyn StorageBackend>, usize)> {
        let file = OpenFile { mounted: self.clone(), name: storage::JOURNAL.to_owned() };
        Ok((Box::new(file), JOURNAL_BYTES))
    }

    fn run(&self, mut writer: Writer) -> io::Result<()> {
        let mounted = self.clone();
        tokio::spawn(async move {
            while writer.ready().await {
                // What comes meanwhile is part of the same flush.
                tokio::time::sleep(mounted.flush_time()).await;
                writer.write();
            }
            writer.end();
        });
        Ok(())
    }
}

/// An open file.
#[derive(Debug)]
struct OpenFile {
    mounted: Mounted,
    name: String,
}

fn place(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(io::Error::other)
}

impl OpenFile {
    fn with<T>(&self, work: impl FnOnce(&mut File, Mood) -> io::Result<T>) -> io::Result<T> {
        if !self.mounted.alive.load(Ordering::SeqCst) {
            return Err(io::Error::other("the process that opened the file is dead"));
        }
        let inner = &mut *self.mounted.disk.inner();
        let result = work(inner.files.entry(self.name.clone()).or_default(), inner.mood);
        inner.refused |= result.is_err() && matches!(inner.mood, Mood::Full | Mood::Broken);
        result
    }

    fn change(&self, changed: Change) -> io::Result<()> {
        self.with(|file, mood| {
            let end = match &changed {
                Change::Data { at, bytes } => at + bytes.len(),
                Change::Length(length) => *length,
            };
            match mood {
                Mood::Broken => return Err(io::Error::other("the disk is broken")),
                Mood::Full if end > file.content.len() => return Err(io::ErrorKind::StorageFull.into()),
                _ => {}
            }
            change(&mut file.content, &changed);
            file.pending.push(changed);
            Ok(())
        })
    }
}

impl StorageBackend for OpenFile {
    fn len(&self) -> io::Result<u64> {
        self.with(|file, _| u64::try_from(file.content.len()).map_err(io::Error::other))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.with(|file, _| {
            let at = place(offset)?;
            let found = file.content.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(found);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Length(place(len)?))
    }

    fn sync_data(&self) -> io::Result<()> {
        let pending = self.with(|file, mood| {
            if mood == Mood::Broken {
                return Err(io::Error::other("the disk is broken"));
            }
            let pending = file.pending.len();
            file.flush();
            Ok(pending)
        })?;
        self.mounted.trace.note(format_args!("{} flushes {} ({pending})", self.mounted.name, self.name));
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Data { at: place(offset)?, bytes: data.to_vec() })
    }
}
