//! Volumes: block storage that belongs to a VM and outlives its starts.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use blixard_vmm_api::VmId;

pub mod file;

/// Why a volume was not made, opened or removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The file system has no room.
    #[error("no space left for a volume of {size_bytes} bytes in {place}")]
    NoSpace {
        /// Size of the volume in bytes.
        size_bytes: u64,
        /// Where.
        place: String,
    },
    /// `mkfs.ext4` is not there.
    #[error("mkfs.ext4 was not found; install the package e2fsprogs")]
    NoMkfs,
    /// `mkfs.ext4` failed.
    #[error("mkfs.ext4 failed: {said}")]
    Mkfs {
        /// The first 300 characters of what it said.
        said: String,
    },
    /// The system failed.
    #[error("cannot {operation} a volume")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// A kind of storage. Each call is idempotent and durable when it returns.
pub trait VolumeDriver: Send + Sync + std::fmt::Debug {
    /// Makes a volume with an empty ext4 file system, unless the VM has one. Half-made ones are never seen by `list`.
    ///
    /// # Errors
    /// See [`VolumeError`].
    fn create(&self, vm: VmId, size_bytes: u64) -> Result<(), VolumeError>;

    /// Opens a volume for reading and writing.
    ///
    /// # Errors
    /// See [`VolumeError`].
    fn open(&self, vm: VmId) -> Result<OwnedFd, VolumeError>;

    /// Removes a volume with all that was made for it; one that is not there is removed.
    ///
    /// # Errors
    /// See [`VolumeError`].
    fn remove(&self, vm: VmId) -> Result<(), VolumeError>;

    /// All volumes with their sizes in bytes.
    ///
    /// # Errors
    /// See [`VolumeError`].
    fn list(&self) -> Result<BTreeMap<VmId, u64>, VolumeError>;
}
