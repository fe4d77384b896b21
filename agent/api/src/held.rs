//! What a node says of its lease in a file of its own: for those on its host that do not hear it from the agent, which may be dead.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::plan::Generation;

/// Name of the file, beside the node's socket.
pub const FILE: &str = "lease.json";
/// Largest such file in bytes.
const FILE_BYTES_MAX: u64 = 4096;

/// This boot, as leases call it.
///
/// # Errors
/// The system's answer.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A lease that a node holds. It means what [`Request::Renew`](crate::Request::Renew) with the same values means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldLease {
    /// Boot that it is about (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// Until when, in milliseconds of CLOCK_BOOTTIME.
    pub until_ms: u64,
    /// Oldest plan that it is about.
    pub generation: Generation,
}

impl HeldLease {
    /// Puts it in place of what the file says. Readers find the one or the other.
    ///
    /// # Errors
    /// The system's answer; the file is then as before.
    pub fn put(&self, path: &Path) -> io::Result<()> {
        let beside = path.with_extension("new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&beside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&beside, path)
    }

    /// What the file says; `None` when there is none. The file is the node's, whoever reads it has more rights: it does not wait for
    /// what is no file, follows no link and reads little.
    ///
    /// # Errors
    /// The system's answer; `InvalidData` when it is something else.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        if !file.metadata()?.is_file() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut text = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut text)?;
        Ok(Some(serde_json::from_slice(&text)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_and_what_is_no_such_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        assert_eq!(HeldLease::read(&path).unwrap(), None);
        for until_ms in [1, 2] {
            let held = HeldLease { boot: "b".into(), until_ms, generation: Generation(7) };
            held.put(&path).unwrap();
            assert_eq!(HeldLease::read(&path).unwrap(), Some(held));
        }
        fs::write(&path, vec![b' '; 1 << 20]).unwrap();
        assert_eq!(HeldLease::read(&path).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        HeldLease::read(&path).unwrap_err();
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(HeldLease::read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
