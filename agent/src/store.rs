//! Content by digest: images, kernels, initial RAM file systems. Copied and hashed here, never looked into.
//!
//! `blobs/HEX` is complete and verified: it got its name after it was hashed and flushed. What is being copied lies in
//! `blobs/incoming`, which is emptied when the agent starts.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blixard_agent_api::{BlobRef, Digest};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::{copy, durable};

/// Largest content in bytes (1 TiB).
pub const BLOB_BYTES_MAX: u64 = 1 << 40;
/// How long content stays that no plan names.
const UNNAMED_TIME: Duration = Duration::from_secs(600);

/// Why content was not stored or opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// More than any content may have.
    #[error("{size} bytes are announced, at most {BLOB_BYTES_MAX} are possible")]
    TooLarge {
        /// Announced size in bytes.
        size: u64,
    },
    /// What was passed is not a regular file opened for reading.
    #[error("the descriptor is not a regular file that is open for reading")]
    NotAFile,
    /// It has another size.
    #[error("the file has {found} bytes, {announced} are announced")]
    Size {
        /// Size of the file in bytes.
        found: u64,
        /// Announced size in bytes.
        announced: u64,
    },
    /// It is something else.
    #[error("the content is not {announced}")]
    Digest {
        /// Announced digest.
        announced: Digest,
    },
    /// The file system failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> StoreError {
    move |source| StoreError::Io { operation, source }
}

/// The store.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    incoming: PathBuf,
    next: AtomicU64,
    here: Mutex<BTreeMap<Digest, Entry>>,
}

#[derive(Debug)]
struct Entry {
    size: u64,
    /// Since when no plan names it.
    unnamed: Option<Instant>,
}

impl Store {
    /// Opens the store in `folder`; makes it when it does not exist.
    ///
    /// # Errors
    /// See [`StoreError::Io`].
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let incoming = folder.join("incoming");
        durable::remove_folder(&incoming).map_err(failed("empty the folder of unfinished content"))?;
        durable::folder(&incoming).map_err(failed("make the folder for content"))?;
        let mut here = BTreeMap::new();
        for entry in fs::read_dir(folder).map_err(failed("list content"))? {
            let entry = entry.map_err(failed("list content"))?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|hex| format!("sha256:{hex}").parse::<Digest>().ok());
            if let (Some(digest), Ok(data)) = (digest, entry.metadata()) {
                here.insert(digest, Entry { size: data.len(), unnamed: None });
            }
        }
        Ok(Self { folder: folder.into(), incoming, next: AtomicU64::new(0), here: Mutex::new(here) })
    }

    fn here(&self) -> MutexGuard<'_, BTreeMap<Digest, Entry>> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when this content is here.
    pub fn has(&self, blob: &BlobRef) -> bool {
        self.here().get(&blob.digest).is_some_and(|entry| entry.size == blob.size_bytes)
    }

    /// Content that is here, in order of digest.
    pub fn list(&self) -> Vec<BlobRef> {
        let blob = |(digest, entry): (&Digest, &Entry)| BlobRef { digest: *digest, size_bytes: entry.size };
        self.here().iter().map(blob).collect()
    }

    /// Copies the content of `file` and keeps the copy when it is what is announced.
    ///
    /// # Errors
    /// See [`StoreError`]; nothing is kept then.
    pub fn put(&self, blob: &BlobRef, file: OwnedFd) -> Result<(), StoreError> {
        if blob.size_bytes > BLOB_BYTES_MAX {
            return Err(StoreError::TooLarge { size: blob.size_bytes });
        }
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|_| StoreError::NotAFile)?;
        let flags = OFlag::from_bits_retain(flags);
        let readable = flags & OFlag::O_ACCMODE != OFlag::O_WRONLY && !flags.contains(OFlag::O_PATH);
        let from = File::from(file);
        let data = from.metadata().map_err(|_| StoreError::NotAFile)?;
        if !readable || !data.is_file() {
            return Err(StoreError::NotAFile);
        }
        if data.len() != blob.size_bytes {
            return Err(StoreError::Size { found: data.len(), announced: blob.size_bytes });
        }
        if self.has(blob) {
            return Ok(());
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.incoming.join(number.to_string());
        let stored = self.copy(blob, &from, &path);
        if stored.is_err() {
            // What stays behind is removed at the next start.
            let _ = durable::remove_file(&path);
        }
        stored
    }

    fn copy(&self, blob: &BlobRef, from: &File, path: &Path) -> Result<(), StoreError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let mut to = options.open(path).map_err(failed("make a file for the content"))?;
        let found = copy::hashed(from, &mut to, blob.size_bytes).map_err(failed("copy the content"))?;
        if found.map(Digest::from_bytes) != Some(blob.digest) {
            return Err(StoreError::Digest { announced: blob.digest });
        }
        to.set_permissions(fs::Permissions::from_mode(0o400)).map_err(failed("protect the content"))?;
        to.sync_all().map_err(failed("flush the content"))?;
        let place = self.path(&blob.digest);
        fs::rename(path, &place).map_err(failed("name the content"))?;
        durable::sync_folder_of(&place).map_err(failed("flush the name of the content"))?;
        self.here().insert(blob.digest, Entry { size: blob.size_bytes, unnamed: None });
        Ok(())
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    /// Opens content for reading.
    ///
    /// # Errors
    /// See [`StoreError::Io`].
    pub fn open_blob(&self, blob: &BlobRef) -> Result<OwnedFd, StoreError> {
        let file = File::open(self.path(&blob.digest)).map_err(failed("open content"))?;
        Ok(file.into())
    }

    /// Removes content that `named` has not known for ten minutes: between a plan that drops it and one that names it
    /// again it would otherwise be sent twice. True when something was removed. Open files stay readable.
    pub fn clean(&self, named: impl Fn(&Digest) -> bool, now: Instant) -> bool {
        let mut here = self.here();
        let mut removed = false;
        here.retain(|digest, entry| {
            if named(digest) {
                entry.unnamed = None;
                return true;
            }
            let since = *entry.unnamed.get_or_insert(now);
            let stays = now.saturating_duration_since(since) < UNNAMED_TIME
                || durable::remove_file(&self.folder.join(digest.hex())).is_err();
            removed |= !stays;
            stays
        });
        removed
    }
}
