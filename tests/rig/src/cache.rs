//! The cache: finished results under a name with a key, made once, whole or not at all.
//!
//! Each kind of result has a lock file. Whoever uses a result holds the lock shared until everything it needs
//! is open; whoever makes or removes one holds it alone. Locks are taken in the order image, snapshot, guests.

use crate::leash::{self, Leash};
use crate::say::say;
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// What is cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Root disk, kernel, initramfs and key of the hosts.
    Image,
    /// A booted host of one shape.
    Snapshot,
    /// Root file systems for guests.
    Guests,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Image, Self::Snapshot, Self::Guests];

    fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Snapshot => "snapshot",
            Self::Guests => "guests",
        }
    }
}

/// What can go wrong in the cache itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither variable that could name the folder is set.
    #[error("no folder for the cache: set BLIXARD_RIG_CACHE or HOME")]
    NoFolder,
    /// A file operation failed.
    #[error("cannot {what} {path}")]
    File {
        /// The operation.
        what: &'static str,
        /// The file or folder.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A signal or the time limit came while waiting for another process.
    #[error("stopped while waiting for another process that fills the cache")]
    Waiting(#[source] leash::Error),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::File { what, path, source }
}

/// The folder of cached results.
pub struct Cache {
    root: PathBuf,
}

/// A result that stays in place as long as this exists.
pub struct Entry {
    path: PathBuf,
    _lock: File,
}

impl Entry {
    /// The folder of the result.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Cache {
    /// `$BLIXARD_RIG_CACHE`, or `~/.cache/blixard-rig-rs`. Made when missing.
    pub fn open() -> Result<Self, Error> {
        let root = match std::env::var_os("BLIXARD_RIG_CACHE").filter(|v| !v.is_empty()) {
            Some(folder) => PathBuf::from(folder),
            None => std::env::home_dir()
                .filter(|h| !h.as_os_str().is_empty())
                .ok_or(Error::NoFolder)?
                .join(".cache/blixard-rig-rs"),
        };
        Self::at(&root)
    }

    fn at(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(failed("make", root))?;
        // Absolute: paths from here end up inside disks and snapshots.
        let root = root.canonicalize().map_err(failed("find", root))?;
        Ok(Self { root })
    }

    /// Where the cache is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The result of this kind and key; `make` fills a new folder with it when there is none.
    pub fn ensure<E: From<Error>>(
        &self,
        kind: Kind,
        key: &str,
        leash: &Leash,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Entry, E> {
        let path = self.root.join(format!("{}-{key}", kind.name()));
        let lock = self.lock(kind, leash, File::try_lock_shared)?;
        if path.exists() {
            return Ok(Entry { path, _lock: lock });
        }
        drop(lock);
        let lock = self.lock(kind, leash, File::try_lock)?;
        if !path.exists() {
            let stage = self.stage(kind)?;
            make(stage.path())?;
            fs::rename(stage.path(), &path).map_err(failed("finish", &path))?;
        }
        // Shared again. Should another process slip in between and remove the result, using it fails.
        lock.lock_shared().map_err(failed("lock", &path))?;
        Ok(Entry { path, _lock: lock })
    }

    /// Removes snapshots and what older recipes left, or everything.
    pub fn clean(&self, all: bool, keep: &[String], leash: &Leash) -> Result<(), Error> {
        for kind in Kind::ALL {
            let _lock = self.lock(kind, leash, File::try_lock)?;
            for (path, name) in self.entries(kind)? {
                if all || kind == Kind::Snapshot || !keep.iter().any(|key| name.ends_with(key.as_str())) {
                    fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
                }
            }
        }
        Ok(())
    }

    /// A new folder to fill. Others of this kind were left by a process that was killed: we hold the lock.
    fn stage(&self, kind: Kind) -> Result<TempDir, Error> {
        let prefix = format!("new-{}.", kind.name());
        for (path, name) in self.folders()? {
            if name.starts_with(&prefix) {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
        }
        tempfile::Builder::new().prefix(&prefix).tempdir_in(&self.root).map_err(failed("fill", &self.root))
    }

    fn entries(&self, kind: Kind) -> Result<Vec<(PathBuf, String)>, Error> {
        let (done, new) = (format!("{}-", kind.name()), format!("new-{}.", kind.name()));
        let mut found = self.folders()?;
        found.retain(|(_, name)| name.starts_with(&done) || name.starts_with(&new));
        Ok(found)
    }

    fn folders(&self) -> Result<Vec<(PathBuf, String)>, Error> {
        let entries = fs::read_dir(&self.root).map_err(failed("read", &self.root))?;
        let folders = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir());
        Ok(folders
            .filter_map(|p| p.file_name().and_then(OsStr::to_str).map(str::to_owned).map(|n| (p, n)))
            .collect())
    }

    fn lock(
        &self,
        kind: Kind,
        leash: &Leash,
        take: impl Fn(&File) -> Result<(), TryLockError>,
    ) -> Result<File, Error> {
        let path = self.root.join(format!("{}.lock", kind.name()));
        let file = File::options().create(true).append(true).open(&path).map_err(failed("open", &path))?;
        let mut told = false;
        loop {
            match take(&file) {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(source)) => return Err(failed("lock", &path)(source)),
                Err(TryLockError::WouldBlock) => {}
            }
            leash.check().map_err(Error::Waiting)?;
            if !told {
                say(format_args!("waiting for another process that uses or makes the {}", kind.name()));
                told = true;
            }
            // A waiting lock cannot be interrupted by our signal thread; trying again can.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_made_once() {
        let (folder, leash) = (TempDir::new().unwrap(), Leash::new().unwrap());
        let cache = Cache::at(folder.path()).unwrap();
        for round in 0..2 {
            let entry = cache
                .ensure::<Error>(Kind::Image, "k", &leash, |new| {
                    assert_eq!(round, 0);
                    fs::write(new.join("f"), "x").unwrap();
                    Ok(())
                })
                .unwrap();
            assert_eq!(fs::read(entry.file("f")).unwrap(), b"x");
        }
    }

    #[test]
    fn a_failed_making_leaves_nothing_and_can_be_repeated() {
        let (folder, leash) = (TempDir::new().unwrap(), Leash::new().unwrap());
        let cache = Cache::at(folder.path()).unwrap();
        let result = cache.ensure(Kind::Image, "k", &leash, |new| {
            fs::write(new.join("half"), "x").unwrap();
            Err(Error::NoFolder)
        });
        assert!(result.is_err());
        assert!(cache.folders().unwrap().is_empty());
        assert!(cache.ensure::<Error>(Kind::Image, "k", &leash, |_| Ok(())).is_ok());
    }

    #[test]
    fn what_a_killed_process_left_is_removed_by_the_next() {
        let (folder, leash) = (TempDir::new().unwrap(), Leash::new().unwrap());
        let cache = Cache::at(folder.path()).unwrap();
        fs::create_dir(folder.path().join("new-image.abc")).unwrap();
        cache.ensure::<Error>(Kind::Image, "k", &leash, |_| Ok(())).unwrap();
        assert_eq!(cache.folders().unwrap().len(), 1);
    }

    #[test]
    fn clean_keeps_the_current_image_and_clean_all_keeps_nothing() {
        let (folder, leash) = (TempDir::new().unwrap(), Leash::new().unwrap());
        let cache = Cache::at(folder.path()).unwrap();
        for name in ["image-new", "image-old", "snapshot-new", "guests-new"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        cache.clean(false, &["new".into()], &leash).unwrap();
        let mut left: Vec<_> = cache.folders().unwrap().into_iter().map(|(_, name)| name).collect();
        left.sort();
        assert_eq!(left, ["guests-new", "image-new"]);
        cache.clean(true, &["new".into()], &leash).unwrap();
        assert!(cache.folders().unwrap().is_empty());
    }
}
