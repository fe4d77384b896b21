//! Inherited descriptors by name, each taken once.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Why a descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// It is not open.
    #[error("descriptors.{name}: {number}")]
    NotOpen {
        /// Its name.
        name: String,
        /// Its number.
        number: RawFd,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It has no such name, or was taken before. A validated configuration uses each name once.
    #[error("descriptors.{0}: not there")]
    Absent(String),
}

/// Descriptors that nobody has taken yet.
pub struct Descriptors(BTreeMap<String, OwnedFd>);

impl Descriptors {
    /// Takes ownership of the descriptors with these numbers.
    ///
    /// # Errors
    /// One of them is not open.
    ///
    /// # Safety
    /// Nothing else in the process owns them, and no number comes twice.
    pub unsafe fn inherit(numbers: &BTreeMap<String, RawFd>) -> Result<Self, DescriptorError> {
        let mut given = BTreeMap::new();
        for (name, number) in numbers {
            // SAFETY: no pointers are involved.
            if unsafe { libc::fcntl(*number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
                let source = io::Error::last_os_error();
                return Err(DescriptorError::NotOpen { name: name.clone(), number: *number, source });
            }
            // SAFETY: it is open, and the caller promises that nobody else owns it.
            given.insert(name.clone(), unsafe { OwnedFd::from_raw_fd(*number) });
        }
        Ok(Self(given))
    }

    /// Takes the descriptor with this name.
    ///
    /// # Errors
    /// There is none, or it was taken before.
    pub fn take(&mut self, name: &str) -> Result<OwnedFd, DescriptorError> {
        self.0.remove(name).ok_or_else(|| DescriptorError::Absent(name.into()))
    }
}
