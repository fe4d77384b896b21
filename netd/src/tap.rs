//! TAP devices: one queue, a virtio-net header of 12 bytes, living on when nobody has them open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::libc::O_NONBLOCK;

use crate::raw;

/// The device whose every open descriptor becomes a TAP.
const DEVICE: &str = "/dev/net/tun";
/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.2 section 5.1.6).
const HEADER_BYTES: i32 = 12;

/// Why a TAP could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}; does the module tun exist, and may this user read and write it?")]
    Device(#[source] io::Error),
    /// Another process has it open.
    #[error("another process has the TAP {0} open")]
    Busy(String),
    /// An interface of this name exists and is something else.
    #[error("the interface {0} exists and is no TAP with one queue; remove it with: ip link delete {0}")]
    Other(String),
    /// The kernel refused.
    #[error("cannot {operation} of the TAP {name}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// Name of the interface.
        name: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Opens the TAP `name`, non-blocking, and makes it when there is none.
///
/// # Errors
/// See [`TapError`].
pub fn open(name: &str) -> Result<OwnedFd, TapError> {
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_NONBLOCK)
        .open(DEVICE)
        .map_err(TapError::Device)?;
    let refused = |operation| {
        move |errno: Errno| TapError::Refused { operation, name: name.to_owned(), source: errno.into() }
    };
    raw::attach(&device, name).map_err(|errno| match errno {
        Errno::EBUSY => TapError::Busy(name.to_owned()),
        Errno::EINVAL => TapError::Other(name.to_owned()),
        errno => refused("set the type")(errno),
    })?;
    raw::set_header_size(&device, HEADER_BYTES).map_err(refused("set the header size"))?;
    // A TAP without an owner can be opened by any user of the host.
    raw::set_owner(&device, nix::unistd::geteuid().as_raw()).map_err(refused("set the owner"))?;
    raw::set_persistent(&device).map_err(refused("set the persistence"))?;
    Ok(device.into())
}
