//! Landlock that denies everything: no path can be opened, no TCP port bound or connected to, no process outside signalled, no
//! abstract socket reached. What was open before stays usable. A second wall behind the seccomp filters, made of other code.
//!
//! Three system calls without the `landlock` crate, which would bring a rule builder for no rule.

use std::ffi::{c_long, c_ulong};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const ASK_VERSION: c_ulong = 1;

/// `struct landlock_ruleset_attr` (include/uapi/linux/landlock.h): what is denied unless a rule allows it.
#[repr(C)]
struct Ruleset {
    file_system: u64,
    network: u64,
    scoped: u64,
}

impl Ruleset {
    /// All that this version of the interface knows, and the size of the structure it takes.
    const fn all(version: c_long) -> (Self, usize) {
        let file_system = match version {
            ..=1 => 13,
            2 => 14,
            3 | 4 => 15,
            _ => 16,
        };
        let network = if version >= 4 { 0b11 } else { 0 };
        let scoped = if version >= 6 { 0b11 } else { 0 };
        let size = match version {
            ..=3 => 8,
            4 | 5 => 16,
            _ => 24,
        };
        (Self { file_system: (1 << file_system) - 1, network, scoped }, size)
    }
}

/// Denies everything to this thread and those it makes. The version of the interface that did it; `None` where the kernel has
/// no Landlock or it is switched off.
///
/// # Errors
/// The kernel has Landlock and refuses.
pub fn deny_all() -> io::Result<Option<u32>> {
    // SAFETY: with this flag the call takes no memory.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<Ruleset>(), 0usize, ASK_VERSION)
    };
    if version < 1 {
        return Ok(None);
    }
    let (ruleset, size) = Ruleset::all(version);
    // SAFETY: the pointer is to a structure of at least `size` bytes.
    let fd =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size, 0 as c_ulong) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor was just made and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: no pointers are involved.
    match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd.as_raw_fd(), 0 as c_ulong) } {
        0 => Ok(u32::try_from(version).ok()),
        _ => Err(io::Error::last_os_error()),
    }
}
