//! Streams that the guest opens to ports of the host.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::vsock_packet::{Header, Operation, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::vsock_test::{Guest, data, from_guest, shutdown};

/// A hook: the device's end and ours.
fn pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two descriptors, to `fds`.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) }, 0);
    // SAFETY: the kernel just made them for us.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// The next stream: its port and our end.
fn accept(hook: &OwnedFd) -> Option<(u32, UnixStream)> {
    let (mut port, mut control) = ([0u8; 8], [0u64; 8]);
    let mut piece = libc::iovec { iov_base: port.as_mut_ptr().cast(), iov_len: 8 };
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), 64);
    // SAFETY: the message names buffers of the lengths given.
    let got = unsafe { libc::recvmsg(hook.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    if got < 0 {
        return None;
    }
    assert_eq!((got, message.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC)), (4, 0));
    assert_eq!(control[0], 20, "one descriptor");
    // SAFETY: the descriptor came with the message and nobody else owns it.
    let stream = unsafe { UnixStream::from_raw_fd(control[2] as i32) };
    stream.set_nonblocking(false).unwrap();
    Some((u32::from_le_bytes(port[..4].try_into().unwrap()), stream))
}

#[test]
fn a_stream_of_the_guest_reaches_the_holder_of_the_hook_and_bytes_pass_both_ways() {
    let mut guest = Guest::new();
    let (ours, theirs) = pair();
    guest.machine.device.set_hook(theirs).unwrap();
    let request = from_guest(8000, Operation::Request);
    guest.send(request, &[]);
    let (port, mut host) = accept(&ours).unwrap();
    assert_eq!(port, 8000);
    let (response, _) = guest.packet();
    assert_eq!(response.operation, Operation::Response);
    assert_eq!((response.source_port, response.destination_port), (8000, 5000));
    let header = Header { operation: Operation::CreditUpdate, ..request };
    guest.send(data(&header, b"to the host"), b"to the host");
    let mut got = [0; 11];
    host.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to the host");
    host.write_all(b"to the guest").unwrap();
    assert_eq!(guest.packet().1, b"to the guest");
    drop(host);
    guest.until(|guest| {
        guest.inbox.iter().fold(0, |flags, (header, _)| flags | header.flags)
            == SHUTDOWN_RECEIVE | SHUTDOWN_SEND
    });
    guest.send(shutdown(&header, SHUTDOWN_RECEIVE | SHUTDOWN_SEND), &[]);
    guest.until(|guest| guest.machine.events.watched() == 3);
}

#[test]
fn without_a_holder_or_room_the_guest_is_refused_and_a_stream_nobody_wants_ends() {
    let mut guest = Guest::new();
    guest.send(from_guest(8000, Operation::Request), &[]);
    assert_eq!(guest.packet().0.operation, Operation::Reset);
    let (ours, theirs) = pair();
    guest.machine.device.set_hook(theirs).unwrap();
    // The holder closes the stream at once.
    guest.send(from_guest(8001, Operation::Request), &[]);
    drop(accept(&ours).unwrap());
    assert_eq!(guest.packet().0.operation, Operation::Response);
    assert_eq!(guest.packet().0.operation, Operation::Shutdown);
    // It takes none: as many as fit into the socket wait, the next ones are refused.
    let mut refused = 0;
    for source_port in 6000..6400 {
        guest.send(Header { source_port, ..from_guest(8002, Operation::Request) }, &[]);
        refused += usize::from(guest.packet().0.operation == Operation::Reset);
        guest.turn();
        if refused > 0 {
            break;
        }
    }
    assert_eq!(refused, 1);
    drop(ours);
    guest.send(Header { source_port: 7000, ..from_guest(8002, Operation::Request) }, &[]);
    guest.until(|guest| {
        guest.inbox.iter().any(|(h, _)| h.operation == Operation::Reset && h.destination_port == 7000)
    });
}
