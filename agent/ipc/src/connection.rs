//! Connections, listeners and typed calls. Blocking with deadlines: callers in async code use a thread of their own.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, socket, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::frame::{Assembler, DATAGRAM_MAX, FrameError, split};
use crate::{DESCRIPTORS_MAX, MESSAGE_BYTES_MAX, Peer};

/// What can go wrong between two processes.
#[derive(Debug, thiserror::Error)]
pub enum IpcError {
    /// Nobody answers at this address.
    #[error("cannot connect to {path}")]
    Connect {
        /// Address of the socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The address cannot be listened at.
    #[error("cannot listen at {path}")]
    Listen {
        /// Address of the socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The socket failed.
    #[error("cannot {operation}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The deadline passed.
    #[error("no answer in time")]
    TimedOut,
    /// The other side closed the connection before it had answered.
    #[error("the other side closed the connection")]
    Closed,
    /// The other side sent no frames.
    #[error("the other side broke the protocol")]
    Frame(#[from] FrameError),
    /// The other side sent too many descriptors, or some on a later datagram.
    #[error("the other side sent descriptors where none are allowed")]
    Descriptors,
    /// The message is not of the expected type.
    #[error("the message is not understood")]
    Decode(#[source] serde_json::Error),
    /// The message cannot be written.
    #[error("the message cannot be encoded")]
    Encode(#[source] serde_json::Error),
}

/// The bytes of a datagram and what came with them.
type Datagram = (Vec<u8>, Vec<OwnedFd>);

fn failed(operation: &'static str) -> impl Fn(Errno) -> IpcError {
    move |errno| IpcError::Socket { operation, source: errno.into() }
}

/// A message as it arrived.
#[derive(Debug)]
pub struct Message {
    /// JSON text.
    pub bytes: Vec<u8>,
    /// Passed descriptors, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

impl Message {
    /// The message as a value.
    ///
    /// # Errors
    /// It is not of this type.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, IpcError> {
        serde_json::from_slice(&self.bytes).map_err(IpcError::Decode)
    }
}

/// One end of a connection. Dropping it closes it.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl From<OwnedFd> for Connection {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Connection {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    /// [`IpcError::Connect`] with the system's answer.
    pub fn connect(path: &Path) -> Result<Self, IpcError> {
        let wrong = |errno: Errno| IpcError::Connect { path: path.into(), source: errno.into() };
        let fd =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(wrong)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path).map_err(wrong)?).map_err(wrong)?;
        Ok(Self { fd })
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// The system's answer.
    pub fn pair() -> Result<(Self, Self), IpcError> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(failed("make a socket pair"))?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// The system's answer.
    pub fn peer(&self) -> Result<Peer, IpcError> {
        Peer::of(&self.fd).map_err(failed("read the peer's credentials"))
    }

    /// Sends one message before `deadline`.
    ///
    /// # Errors
    /// [`IpcError::TimedOut`] when the other side does not read, [`IpcError::Closed`] when it is gone.
    pub fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd],
        deadline: Instant,
    ) -> Result<(), IpcError> {
        let bytes = serde_json::to_vec(message).map_err(IpcError::Encode)?;
        if bytes.len() > MESSAGE_BYTES_MAX {
            return Err(FrameError::TooLong { total: bytes.len(), limit: MESSAGE_BYTES_MAX }.into());
        }
        if descriptors.len() > DESCRIPTORS_MAX {
            return Err(IpcError::Descriptors);
        }
        let raw: Vec<i32> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let mut control: &[ControlMessage] =
            if raw.is_empty() { &[] } else { &[ControlMessage::ScmRights(&raw)] };
        for (header, part) in split(&bytes) {
            let slices = [IoSlice::new(&header), IoSlice::new(part)];
            loop {
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                match sendmsg::<()>(self.fd.as_raw_fd(), &slices, control, flags, None) {
                    Ok(_) => break,
                    Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, Some(deadline))?,
                    Err(Errno::EINTR) => {}
                    Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(IpcError::Closed),
                    Err(errno) => return Err(failed("send")(errno)),
                }
            }
            control = &[];
        }
        Ok(())
    }

    /// Receives one message of at most `limit` bytes; `None` when the other side closed the connection in good order.
    /// Without a deadline it waits for the first datagram for as long as it takes, and 30 s for each later one.
    ///
    /// # Errors
    /// The connection is of no use afterwards, except after [`IpcError::TimedOut`] before the first datagram.
    pub fn receive(&self, limit: usize, deadline: Option<Instant>) -> Result<Option<Message>, IpcError> {
        let mut assembler = Assembler::new(limit);
        let mut descriptors = Vec::new();
        loop {
            let first = assembler.is_empty();
            let until = deadline.or_else(|| (!first).then(|| Instant::now() + Duration::from_secs(30)));
            let Some((datagram, mut passed)) = self.datagram(until)? else {
                return if first { Ok(None) } else { Err(IpcError::Closed) };
            };
            if !first && !passed.is_empty() {
                return Err(IpcError::Descriptors);
            }
            descriptors.append(&mut passed);
            if let Some(bytes) = assembler.push(&datagram)? {
                return Ok(Some(Message { bytes, descriptors }));
            }
        }
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// As [`Self::send`] and [`Self::receive`]; [`IpcError::Closed`] when there is no reply.
    pub fn call<R: DeserializeOwned>(
        &self,
        request: &impl Serialize,
        descriptors: &[BorrowedFd],
        deadline: Instant,
    ) -> Result<(R, Vec<OwnedFd>), IpcError> {
        self.send(request, descriptors, deadline)?;
        let message = self.receive(MESSAGE_BYTES_MAX, Some(deadline))?.ok_or(IpcError::Closed)?;
        Ok((message.decode()?, message.descriptors))
    }

    fn datagram(&self, deadline: Option<Instant>) -> Result<Option<Datagram>, IpcError> {
        let mut buffer = vec![0; DATAGRAM_MAX + 1];
        // Room for all that a sender can pass (SCM_MAX_FD): what is cut off could not be closed again.
        let mut control = nix::cmsg_space!([i32; 253]);
        loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let result = recvmsg::<()>(self.fd.as_raw_fd(), &mut slices, Some(&mut control), flags);
            let (length, passed, cut) = match result {
                Ok(received) => {
                    let mut passed = Vec::new();
                    for message in received.cmsgs().map_err(|_| IpcError::Descriptors)? {
                        if let ControlMessageOwned::ScmRights(numbers) = message {
                            passed.extend(numbers.into_iter().map(|n| {
                                // SAFETY: the kernel has just installed this descriptor for us and nobody else knows it.
                                unsafe { OwnedFd::from_raw_fd(n) }
                            }));
                        }
                    }
                    let cut = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                    (received.bytes, passed, cut)
                }
                Err(Errno::EAGAIN) => {
                    self.wait(PollFlags::POLLIN, deadline)?;
                    continue;
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(failed("receive")(errno)),
            };
            if passed.len() > DESCRIPTORS_MAX {
                return Err(IpcError::Descriptors);
            }
            if cut {
                return Err(FrameError::NotAFrame.into());
            }
            // A datagram of ours is never empty: no bytes mean the end of the connection.
            if length == 0 {
                return Ok(None);
            }
            buffer.truncate(length);
            return Ok(Some((buffer, passed)));
        }
    }

    fn wait(&self, what: PollFlags, deadline: Option<Instant>) -> Result<(), IpcError> {
        loop {
            let timeout = match deadline {
                None => PollTimeout::NONE,
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(IpcError::TimedOut);
                    }
                    // Rounded up, so that the last wait does not spin.
                    let ms = left.as_millis().saturating_add(1);
                    PollTimeout::try_from(u32::try_from(ms).unwrap_or(u32::MAX)).unwrap_or(PollTimeout::MAX)
                }
            };
            match poll(&mut [PollFd::new(self.fd.as_fd(), what)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(failed("wait")(errno)),
            }
        }
    }
}

/// A socket that accepts connections.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Listener {
    /// Listens at `path` and replaces a socket that a dead process left there. The caller makes the folder, whose mode
    /// decides who may connect; the socket itself gets `mode`.
    ///
    /// # Errors
    /// [`IpcError::Listen`] with the system's answer; `AddrInUse` when a living process listens there.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, IpcError> {
        let wrong = |source: io::Error| IpcError::Listen { path: path.into(), source };
        match Connection::connect(path) {
            Ok(_) => return Err(wrong(io::ErrorKind::AddrInUse.into())),
            Err(IpcError::Connect { source, .. }) if source.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(wrong)?;
            }
            Err(_) => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC;
        let os = |errno: Errno| wrong(errno.into());
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(os)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path).map_err(os)?).map_err(os)?;
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path, permissions).map_err(wrong)?;
        listen(&fd, Backlog::new(128).map_err(os)?).map_err(os)?;
        Ok(Self { fd })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// The system's answer, for example when there are no more descriptors.
    pub fn accept(&self) -> Result<Connection, IpcError> {
        loop {
            match accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(number) => {
                    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
                    let fd = unsafe { OwnedFd::from_raw_fd(number) };
                    return Ok(Connection { fd });
                }
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(errno) => return Err(failed("accept")(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn a_long_message_and_a_descriptor_arrive_whole() {
        let (a, b) = Connection::pair().unwrap();
        let text = "x".repeat(1_000_000);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"seen").unwrap();
        file.rewind().unwrap();
        let sent = text.clone();
        let sender = std::thread::spawn(move || a.send(&sent, &[file.as_fd()], soon()).unwrap());
        let message = b.receive(2_000_000, Some(soon())).unwrap().unwrap();
        sender.join().unwrap();
        assert_eq!(message.decode::<String>().unwrap(), text);
        let mut seen = String::new();
        let fd = message.descriptors.into_iter().next().unwrap();
        File::from(fd).read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "seen");
    }

    #[test]
    fn a_call_gets_its_reply_and_the_caller_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = Listener::bind(&path, 0o600).unwrap();
        let server = std::thread::spawn(move || {
            let connection = listener.accept().unwrap();
            assert_eq!(connection.peer().unwrap().pid, std::process::id().cast_signed());
            let request: u32 = connection.receive(100, None).unwrap().unwrap().decode().unwrap();
            connection.send(&(request + 1), &[], soon()).unwrap();
            assert!(connection.receive(100, None).unwrap().is_none(), "the end is seen as the end");
        });
        let client = Connection::connect(&path).unwrap();
        assert_eq!(client.call::<u32>(&41, &[], soon()).unwrap().0, 42);
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn a_silent_peer_costs_the_deadline_and_no_more() {
        let (a, _b) = Connection::pair().unwrap();
        let start = Instant::now();
        let result = a.call::<u32>(&1, &[], start + Duration::from_millis(50));
        assert!(matches!(result, Err(IpcError::TimedOut)));
        assert!(start.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn a_dead_listener_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let living = Listener::bind(&path, 0o600).unwrap();
        assert!(matches!(Listener::bind(&path, 0o600), Err(IpcError::Listen { .. })));
        drop(living);
        Listener::bind(&path, 0o600).unwrap();
    }

    #[test]
    fn more_than_the_limit_is_refused() {
        let (a, b) = Connection::pair().unwrap();
        a.send(&"x".repeat(1000), &[], soon()).unwrap();
        assert!(matches!(b.receive(100, Some(soon())), Err(IpcError::Frame(FrameError::TooLong { .. }))));
    }
}
