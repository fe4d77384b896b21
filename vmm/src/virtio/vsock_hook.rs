//! Streams that the guest opens to ports of the host: the VMM opens no path, so it makes a pair of sockets and hands one end
//! to whoever holds the other end of the hook.
//!
//! One message is one SEQPACKET datagram: the port in four bytes, little-endian, with one descriptor, a connected stream
//! socket. Who does not want the stream closes it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::socket;

/// Bytes of a control message with one descriptor: a header of 16 bytes, and an int, aligned to 8.
const CONTROL: usize = 24;

/// The VMM's end of the hook.
#[derive(Debug)]
pub struct Hook(OwnedFd);

impl Hook {
    /// Uses a connected SEQPACKET socket.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        socket::set_nonblocking(&fd)?;
        Ok(Self(fd))
    }

    /// Asks for a stream to `port`; our end of it, non-blocking.
    ///
    /// # Errors
    /// Nobody takes it: there are as many as fit already, or nobody is there.
    pub fn open(&self, port: u32) -> io::Result<OwnedFd> {
        let (ours, theirs) = pair()?;
        send(self.0.as_fd(), &port.to_le_bytes(), theirs.as_fd())?;
        Ok(ours)
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the call writes two descriptors, to `fds`.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let [first, second] = fds;
    // SAFETY: the kernel just made this descriptor for us.
    let first = unsafe { OwnedFd::from_raw_fd(first) };
    // SAFETY: as above.
    let second = unsafe { OwnedFd::from_raw_fd(second) };
    Ok((first, second))
}

fn send(hook: BorrowedFd<'_>, bytes: &[u8], passed: BorrowedFd<'_>) -> io::Result<()> {
    // struct cmsghdr: length with the header, SOL_SOCKET, SCM_RIGHTS; then the descriptor. 8-byte words are aligned as it is.
    let level = u64::from(libc::SOL_SOCKET.cast_unsigned());
    let kind = u64::from(libc::SCM_RIGHTS.cast_unsigned());
    let mut control = [20u64, level | kind << 32, u64::from(passed.as_raw_fd().cast_unsigned())];
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all fields of a msghdr may be zero: no address, no control data, no pieces.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // The type of the field is that of the C library.
    message.msg_controllen = CONTROL.try_into().unwrap_or(0);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `message` names one piece and one control message of the lengths given, which live until the call returns; the
    // kernel only reads them.
    if unsafe { libc::sendmsg(hook.as_raw_fd(), &raw const message, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
