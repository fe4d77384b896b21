//! The only `unsafe` code: the TUN/TAP control calls and the descriptor that systemd passes.
#![expect(
    unsafe_code,
    reason = "ioctl has no safe interface, and a descriptor known by its number has no owner"
)]

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ, c_char, c_short, ifreq};

/// Numbers from linux/if_tun.h. The kernel declares them with the type int and passes something else.
mod calls {
    use std::ffi::c_int;

    use nix::libc::ifreq;

    nix::ioctl_write_ptr_bad!(tunsetiff, nix::request_code_write!(b'T', 202, size_of::<c_int>()), ifreq);
    nix::ioctl_write_int_bad!(tunsetpersist, nix::request_code_write!(b'T', 203, size_of::<c_int>()));
    nix::ioctl_write_int_bad!(tunsetowner, nix::request_code_write!(b'T', 204, size_of::<c_int>()));
    nix::ioctl_write_ptr_bad!(
        tunsetvnethdrsz,
        nix::request_code_write!(b'T', 216, size_of::<c_int>()),
        c_int
    );
}

/// First descriptor that systemd passes (sd_listen_fds(3)).
const LISTEN_FDS_START: c_int = 3;

/// Makes an open `/dev/net/tun` the only queue of the TAP `name`, with a virtio-net header and without packet information;
/// creates the TAP when there is none (TUNSETIFF).
///
/// # Errors
/// `EBUSY` when another process has it open, `EINVAL` when it is no such TAP or the name is too long.
pub fn attach(device: &impl AsFd, name: &str) -> Result<(), Errno> {
    if name.is_empty() || name.len() >= IFNAMSIZ {
        return Err(Errno::EINVAL);
    }
    // SAFETY: ifreq is plain old data for which all zeroes are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = c_short::try_from(flags).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the descriptor is open, and the kernel reads and writes one whole ifreq, which lives across the call.
    unsafe { calls::tunsetiff(device.as_fd().as_raw_fd(), &raw const request) }.map(drop)
}

/// Lets the TAP live on when it is closed (TUNSETPERSIST).
///
/// # Errors
/// The system's answer.
pub fn set_persistent(tap: &impl AsFd) -> Result<(), Errno> {
    // SAFETY: the descriptor is open and the argument is a number, not an address.
    unsafe { calls::tunsetpersist(tap.as_fd().as_raw_fd(), 1) }.map(drop)
}

/// Lets only processes of this user, or with CAP_NET_ADMIN, open the TAP (TUNSETOWNER).
///
/// # Errors
/// The system's answer.
pub fn set_owner(tap: &impl AsFd, uid: u32) -> Result<(), Errno> {
    // SAFETY: the descriptor is open and the argument is a number, not an address.
    unsafe { calls::tunsetowner(tap.as_fd().as_raw_fd(), uid.cast_signed()) }.map(drop)
}

/// Sets the bytes of the virtio-net header before each frame (TUNSETVNETHDRSZ).
///
/// # Errors
/// The system's answer.
pub fn set_header_size(tap: &impl AsFd, bytes: c_int) -> Result<(), Errno> {
    // SAFETY: the descriptor is open, and the kernel reads one int, which lives across the call.
    unsafe { calls::tunsetvnethdrsz(tap.as_fd().as_raw_fd(), &raw const bytes) }.map(drop)
}

/// Takes the descriptor that systemd passed to this process. To be called once, before any other descriptor is opened.
pub fn take_passed_descriptor() -> OwnedFd {
    // SAFETY: by the protocol of sd_listen_fds(3), which the caller has checked, descriptor 3 is open and nobody's.
    unsafe { OwnedFd::from_raw_fd(LISTEN_FDS_START) }
}
