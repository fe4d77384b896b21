//! Streams that the node asks for: to a guest's exec port, to a console. The agent opens them and hands them over; it reads
//! nothing of what runs through them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use blixard_vmm_api::guest::EXEC_PORT;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use crate::launch::{CONSOLE_LOG, CONSOLE_SOCKET, VSOCK_SOCKET};

/// Longest wait for the guest's answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest first line of the answer in bytes: `OK ` and a number.
const LINE_BYTES_MAX: usize = 32;

/// Why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The VMM's socket cannot be used.
    #[error("cannot {operation}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The VMM or guest refused, or did not answer in time.
    #[error("the guest does not answer on its exec port")]
    NoAnswer,
}

fn failed<E: Into<io::Error>>(operation: &'static str) -> impl Fn(E) -> StreamError {
    move |source| StreamError::Io { operation, source: source.into() }
}

fn connect_to(path: &Path) -> Result<OwnedFd, StreamError> {
    let wrong = failed::<Errno>("connect to the VMM");
    // Without blocking: a VMM that accepts nothing must not hold up the agent.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(&wrong)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(&wrong)?).map_err(&wrong)?;
    Ok(fd)
}

fn blocking(fd: OwnedFd) -> Result<OwnedFd, StreamError> {
    let wrong = failed::<Errno>("prepare a stream");
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).map_err(&wrong)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK)).map_err(&wrong)?;
    Ok(fd)
}

/// Opens the console of the VM with this folder of sockets.
///
/// # Errors
/// See [`StreamError`].
pub fn console(sockets: &Path) -> Result<OwnedFd, StreamError> {
    blocking(connect_to(&sockets.join(CONSOLE_SOCKET))?)
}

/// Opens the console log in this folder of files for reading.
///
/// # Errors
/// See [`StreamError`].
pub fn log(files: &Path) -> Result<OwnedFd, StreamError> {
    File::open(files.join(CONSOLE_LOG)).map(Into::into).map_err(failed("open the console log"))
}

/// Opens a stream to the exec port of the guest (`CONNECT <port>`, answered by `OK <port>`).
///
/// # Errors
/// See [`StreamError`].
pub fn exec(sockets: &Path) -> Result<OwnedFd, StreamError> {
    let fd = connect_to(&sockets.join(VSOCK_SOCKET))?;
    let request = format!("CONNECT {EXEC_PORT}\n");
    send(fd.as_raw_fd(), request.as_bytes(), MsgFlags::MSG_NOSIGNAL)
        .map_err(failed("ask the VMM for a stream"))?;
    read_ok(&fd, Instant::now() + ANSWER_TIME_MAX)?;
    blocking(fd)
}

/// Reads the first line byte by byte: what follows belongs to the stream.
fn read_ok(fd: &OwnedFd, deadline: Instant) -> Result<(), StreamError> {
    let mut line = Vec::new();
    while line.len() < LINE_BYTES_MAX {
        let mut byte = [0];
        match recv(fd.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(1) => {
                let [byte] = byte;
                line.push(byte);
                if byte == b'\n' {
                    break;
                }
            }
            Err(Errno::EAGAIN) => wait(fd, deadline)?,
            Err(Errno::EINTR) => {}
            _ => return Err(StreamError::NoAnswer),
        }
    }
    if line.starts_with(b"OK ") && line.ends_with(b"\n") { Ok(()) } else { Err(StreamError::NoAnswer) }
}

fn wait(fd: &OwnedFd, deadline: Instant) -> Result<(), StreamError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(StreamError::NoAnswer);
    }
    let ms = u16::try_from(left.as_millis()).unwrap_or(u16::MAX).saturating_add(1);
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(ms)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(failed("wait for the VMM")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn answered(answer: &'static [u8]) -> (Result<OwnedFd, StreamError>, String) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join(VSOCK_SOCKET)).unwrap();
        let vmm = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 13];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(answer).unwrap();
            String::from_utf8(request.to_vec()).unwrap()
        });
        (exec(folder.path()), vmm.join().unwrap())
    }

    #[test]
    fn the_bytes_behind_the_answer_belong_to_the_stream() {
        let (stream, request) = answered(b"OK 1025\nrest");
        assert_eq!(request, "CONNECT 1025\n");
        let mut rest = String::new();
        UnixStream::from(stream.unwrap()).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn a_refusal_an_endless_line_and_a_closed_connection_are_no_stream() {
        for answer in [b"NO\n".as_slice(), b"", b"OK 0000000000000000000000000000000000000000000", b"OK "] {
            assert!(matches!(answered(answer).0, Err(StreamError::NoAnswer)), "{answer:?}");
        }
    }
}
