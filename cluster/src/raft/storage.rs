//! Where a member keeps its log and its state, and how its work with disks is run: files and threads of the host, or what a
//! simulation puts in their place.

use std::io;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{Database, StorageBackend};
use tokio::runtime::{Handle, RuntimeFlavor};

use super::ConsensusError;
use super::log_store::Writer;

/// Name of the log's journal.
pub const JOURNAL: &str = "log.journal";
/// Bytes of the journal: what a member applies anew at most after a crash, and keeps in memory meanwhile.
const JOURNAL_BYTES: usize = 4 << 20;
/// Name of the log's database.
pub const LOG: &str = "log.redb";
/// Name of the state's database.
pub const STATE: &str = "state.redb";

/// What a member stores itself in.
pub trait Storage: Send + Sync {
    /// The database with this name, which is made when there is none.
    ///
    /// # Errors
    /// redb refuses it.
    fn open(&self, name: &str, cache_bytes: usize) -> Result<Database, redb::DatabaseError>;

    /// The log's journal, which is made when there is none, and its size in bytes.
    ///
    /// # Errors
    /// It cannot be opened.
    fn journal(&self) -> io::Result<(Box<dyn StorageBackend>, usize)>;

    /// Runs the log's writer until it ends, without waiting for that.
    ///
    /// # Errors
    /// It cannot be started.
    fn run(&self, writer: Writer) -> io::Result<()>;
}

/// A folder of the host, and threads.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// The files in this folder, which exists.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The same, for a folder that is made when there is none.
    ///
    /// # Errors
    /// [`ConsensusError::Folder`].
    pub fn make(path: &Path) -> Result<Self, ConsensusError> {
        let made = std::fs::create_dir_all(path);
        made.map_err(|source| ConsensusError::Folder { path: path.to_owned(), source })?;
        Ok(Self::new(path))
    }
}

impl Storage for Folder {
    fn open(&self, name: &str, cache_bytes: usize) -> Result<Database, redb::DatabaseError> {
        Database::builder().set_cache_size(cache_bytes).create(self.0.join(name))
    }

    fn journal(&self) -> io::Result<(Box<dyn StorageBackend>, usize)> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(self.0.join(JOURNAL))?;
        // A new file has to be in its folder after a loss of power.
        std::fs::File::open(&self.0)?.sync_all()?;
        let file = FileBackend::new(file).map_err(io::Error::other)?;
        Ok((Box::new(file), JOURNAL_BYTES))
    }

    fn run(&self, writer: Writer) -> io::Result<()> {
        std::thread::Builder::new().name("raft-log".into()).spawn(move || writer.run()).map(drop)
    }
}

/// A runtime of one thread has no other one where tasks could go on. What waits for a disk is then done in place, and what
/// happens after what is determined.
fn has_threads() -> bool {
    Handle::try_current().is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// Does what waits for a disk, on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    if has_threads() { tokio::task::spawn_blocking(work).await.map_err(io::Error::other)? } else { work() }
}

/// Does what waits for a disk, on this thread; its other tasks go on elsewhere.
pub(super) fn blocking_here<T>(work: impl FnOnce() -> T) -> T {
    if has_threads() { tokio::task::block_in_place(work) } else { work() }
}
