//! Folders for large files that end with the process.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const PREFIX: &str = "blixard-rig.";

/// No folder could be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a working folder in {parent}")]
pub struct Error {
    parent: String,
    #[source]
    source: io::Error,
}

/// A new folder in `$TMPDIR`, or in `/var/tmp`, because `/tmp` is often memory. It is locked while it is used. A
/// killed rig leaves its folder unlocked; the next one that comes along removes it.
pub struct WorkFolder {
    folder: TempDir,
    _lock: File,
}

impl WorkFolder {
    /// Makes one, and removes what was left.
    pub fn new() -> Result<Self, Error> {
        let variable = std::env::var_os("TMPDIR").filter(|value| !value.is_empty());
        let parent = variable.map_or_else(|| "/var/tmp".into(), PathBuf::from);
        sweep(&parent);
        let make = || {
            let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&parent)?;
            let lock = File::open(folder.path())?;
            lock.lock()?;
            Ok(Self { folder, _lock: lock })
        };
        make().map_err(|source| Error { parent: parent.display().to_string(), source })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // A younger folder may be between its making and its locking.
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
        if !ours || age.is_none_or(|age| age < Duration::from_secs(60)) {
            continue;
        }
        let Ok(folder) = File::open(entry.path()) else { continue };
        if folder.try_lock().is_ok() {
            _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_use_is_never_swept() {
        let parent = tempfile::tempdir().unwrap();
        let old = std::time::SystemTime::now() - Duration::from_secs(3600);
        let make = |name: &str| {
            let path = parent.path().join(format!("{PREFIX}{name}"));
            fs::create_dir(&path).unwrap();
            File::open(&path).unwrap().set_modified(old).unwrap();
            path
        };
        let (used, left) = (make("used"), make("left"));
        let lock = File::open(&used).unwrap();
        lock.lock().unwrap();
        sweep(parent.path());
        assert!(used.exists());
        assert!(!left.exists());
    }
}
