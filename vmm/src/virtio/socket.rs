//! Non-blocking operations on stream sockets that the standard library does not offer as one system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Which half of a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// We read no more.
    Read,
    /// We write no more.
    Write,
}

/// The next client of a listener, non-blocking and closed on exec.
///
/// # Errors
/// The system's answer; `WouldBlock` when there is none.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let (no_address, no_length) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the address of the client is not asked for, so the call writes nothing.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), no_address, no_length, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends some of `data`; how much.
///
/// # Errors
/// The system's answer; `WouldBlock` when there is no room.
pub fn send(socket: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: `data` is readable for its whole length while the call runs.
    let sent = unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) };
    count_of(sent)
}

/// Receives into `data` without taking it from the socket when `peek`; how much, 0 at the end of the stream.
///
/// # Errors
/// The system's answer; `WouldBlock` when there is nothing.
pub fn receive(socket: BorrowedFd<'_>, data: &mut [u8], peek: bool) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | if peek { libc::MSG_PEEK } else { 0 };
    // SAFETY: `data` is writable for its whole length while the call runs and nobody else refers to it.
    let received = unsafe { libc::recv(socket.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
    count_of(received)
}

/// Ends one half of a stream.
pub fn shut_down(socket: BorrowedFd<'_>, half: Half) {
    let how = match half {
        Half::Read => libc::SHUT_RD,
        Half::Write => libc::SHUT_WR,
    };
    // SAFETY: no memory is involved. The only possible failure is a stream that is over already.
    let _over = unsafe { libc::shutdown(socket.as_raw_fd(), how) };
}

/// Whether `fd` is a Unix stream socket that listens.
pub fn is_unix_listener(fd: BorrowedFd<'_>) -> bool {
    let option = |name| socket_option(fd, name);
    option(libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM)
        && option(libc::SO_ACCEPTCONN) == Some(1)
}

fn socket_option(fd: BorrowedFd<'_>, name: libc::c_int) -> Option<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).ok()?;
    let to = (&raw mut value).cast();
    // SAFETY: `to` has room for `length` bytes, the size of an int, which is what these options are.
    let result = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, to, &raw mut length) };
    (result == 0).then_some(value)
}

/// Makes operations on `fd` return instead of wait.
///
/// # Errors
/// The system's answer.
pub fn set_nonblocking(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: F_GETFL involves no memory.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: F_SETFL takes an int.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn count_of(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
