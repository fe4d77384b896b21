//! Content by digest in a folder of this node: one file per blob, named by its digest.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use blixard_agent_api::{BlobRef, Digest};

/// What went wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The folder cannot be used.
    #[error("cannot use the folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no such content here.
    #[error("content {digest} is not here")]
    Missing {
        /// Which.
        digest: Digest,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The content cannot be kept.
    #[error("cannot keep content {digest}")]
    Keep {
        /// Which.
        digest: Digest,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// The store. Clones are the same store.
#[derive(Debug, Clone)]
pub struct BlobStore {
    blobs: Arc<Path>,
    spool: Arc<Path>,
}

impl BlobStore {
    /// Opens the store below `folder`; what an interrupted upload left behind is removed.
    ///
    /// # Errors
    /// [`BlobError::Folder`].
    pub fn open_at(folder: &Path) -> Result<Self, BlobError> {
        let (blobs, spool) = (folder.join("blobs"), folder.join("spool"));
        let wrong = |path: &Path| {
            let path = path.to_owned();
            move |source| BlobError::Folder { path, source }
        };
        fs::create_dir_all(&blobs).map_err(wrong(&blobs))?;
        match fs::remove_dir_all(&spool) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(wrong(&spool)(error)),
            _ => fs::create_dir_all(&spool).map_err(wrong(&spool))?,
        }
        Ok(Self { blobs: blobs.into(), spool: spool.into() })
    }

    /// Where unfinished content lies; on the same file system as the store.
    pub fn spool(&self) -> &Path {
        &self.spool
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// The content.
    ///
    /// # Errors
    /// [`BlobError::Missing`].
    pub fn open(&self, digest: Digest) -> Result<File, BlobError> {
        File::open(self.path(digest)).map_err(|source| BlobError::Missing { digest, source })
    }

    /// Moves a finished file into the store, durably. The caller has hashed it.
    ///
    /// # Errors
    /// [`BlobError::Keep`].
    pub fn keep(&self, digest: Digest, file: &Path) -> Result<BlobRef, BlobError> {
        let keep = || -> io::Result<u64> {
            let opened = File::open(file)?;
            opened.sync_all()?;
            fs::rename(file, self.path(digest))?;
            File::open(&self.blobs)?.sync_all()?;
            Ok(opened.metadata()?.len())
        };
        let size_bytes = keep().map_err(|source| BlobError::Keep { digest, source })?;
        Ok(BlobRef { digest, size_bytes })
    }

    /// Removes all content that `needed` does not name; answers how many files went.
    ///
    /// # Errors
    /// [`BlobError::Folder`].
    pub fn sweep(&self, needed: impl Fn(Digest) -> bool) -> Result<usize, BlobError> {
        let wrong = |source| BlobError::Folder { path: self.blobs.to_path_buf(), source };
        let mut removed = 0;
        for entry in fs::read_dir(&self.blobs).map_err(wrong)? {
            let entry = entry.map_err(wrong)?;
            let digest = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse().ok());
            if digest.is_some_and(|digest| !needed(digest)) {
                fs::remove_file(entry.path()).map_err(wrong)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Bytes and number of all content.
    pub fn usage(&self) -> (u64, u64) {
        let Ok(entries) = fs::read_dir(&self.blobs) else { return (0, 0) };
        let sizes = entries.filter_map(|entry| entry.ok()?.metadata().ok()).map(|metadata| metadata.len());
        sizes.fold((0, 0), |(bytes, files), size| (bytes + size, files + 1))
    }

    /// Bytes that are free for content, as the file system says.
    pub fn free_bytes(&self) -> Option<u64> {
        let found = nix::sys::statvfs::statvfs(self.blobs.as_ref()).ok()?;
        Some(found.blocks_available().saturating_mul(found.fragment_size()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_kept_by_digest_until_nobody_needs_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = BlobStore::open_at(folder.path()).unwrap();
        let (kept, gone) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        for digest in [kept, gone] {
            let file = store.spool().join("x");
            fs::write(&file, b"content").unwrap();
            assert_eq!(store.keep(digest, &file).unwrap().size_bytes, 7);
        }
        assert_eq!(store.usage(), (14, 2));
        assert_eq!(store.sweep(|digest| digest == kept).unwrap(), 1);
        assert!(store.open(kept).is_ok());
        assert!(matches!(store.open(gone), Err(BlobError::Missing { .. })));
    }

    #[test]
    fn what_an_interrupted_upload_left_is_removed_at_start() {
        let folder = tempfile::tempdir().unwrap();
        let store = BlobStore::open_at(folder.path()).unwrap();
        fs::write(store.spool().join("half"), b"...").unwrap();
        let store = BlobStore::open_at(folder.path()).unwrap();
        assert_eq!(fs::read_dir(store.spool()).unwrap().count(), 0);
    }
}
