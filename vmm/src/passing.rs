//! Datagrams with descriptors beside them (`SCM_RIGHTS`) on a SEQPACKET socket that never blocks.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use blixard_vmm_api::snapshot::DESCRIPTORS_MAX;

/// Room for the descriptors of a message, aligned as the kernel's header wants it.
const ROOM: usize = 16 + DESCRIPTORS_MAX * size_of::<RawFd>();

#[repr(C, align(8))]
struct Ancillary([u8; ROOM]);

/// A message that came.
pub struct Received {
    /// Its length, larger than the buffer when it was cut.
    pub length: usize,
    /// What was passed with it.
    pub descriptors: Vec<OwnedFd>,
    /// More was passed than is possible; the kernel has closed the rest.
    pub too_many: bool,
}

/// Takes the next message; none when there is none now.
///
/// # Errors
/// The system's answer.
pub fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<Received>> {
    let mut piece = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut ancillary = Ancillary([0; ROOM]);
    let mut header = message(&mut piece, &mut ancillary, ROOM);
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header refers to the buffer and to the room above with their lengths; both outlive the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let Ok(length) = usize::try_from(got) else {
        return match io::Error::last_os_error() {
            error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(None)
            }
            error => Err(error),
        };
    };
    let too_many = header.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(Some(Received { length, descriptors: descriptors(&header), too_many }))
}

/// The descriptors of a received message, which are ours from now on.
fn descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = vec![];
    // SAFETY: the header was filled by the kernel and its room is still there.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: the kernel wrote a whole control message there; reading it needs no alignment.
        let control = unsafe { next.read_unaligned() };
        if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let head = size_of::<libc::cmsghdr>();
            let bytes = usize::try_from(control.cmsg_len).unwrap_or(0).saturating_sub(head);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: `next` is a control message.
                let data = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
                // SAFETY: the message has so many descriptors.
                let at = unsafe { data.add(index) };
                // SAFETY: as above.
                let fd = unsafe { at.read_unaligned() };
                // SAFETY: the kernel has just made it for us.
                found.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        // SAFETY: as for the first.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    found
}

/// Sends a message; true when all of it is under way.
pub fn send(socket: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) -> bool {
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut ancillary = Ancillary([0; ROOM]);
    let count = descriptors.len().min(DESCRIPTORS_MAX);
    let size = size_of::<RawFd>() * count;
    let length = if count == 0 { 0 } else { 16 + size.next_multiple_of(8) };
    let header = message(&mut piece, &mut ancillary, length);
    // SAFETY: the header refers to the room above.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    if !first.is_null() && count > 0 {
        // SAFETY: an all-zero control header is valid.
        let mut control: libc::cmsghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        control.cmsg_len = (size_of::<libc::cmsghdr>() + size).try_into().unwrap_or_default();
        control.cmsg_level = libc::SOL_SOCKET;
        control.cmsg_type = libc::SCM_RIGHTS;
        // SAFETY: there is room for a control header, and it is aligned.
        unsafe { first.write(control) };
        for (index, fd) in descriptors.iter().take(count).enumerate() {
            // SAFETY: `first` is a control message.
            let data = unsafe { libc::CMSG_DATA(first) }.cast::<RawFd>();
            // SAFETY: there is room for as many descriptors as are possible.
            let at = unsafe { data.add(index) };
            // SAFETY: as above.
            unsafe { at.write_unaligned(*fd) };
        }
    }
    // SAFETY: header, bytes and room outlive the call, which only reads them.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    usize::try_from(sent) == Ok(bytes.len())
}

fn message(piece: &mut libc::iovec, ancillary: &mut Ancillary, length: usize) -> libc::msghdr {
    // SAFETY: an all-zero message header is valid: no name, no pieces, no room.
    let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    header.msg_iov = piece;
    header.msg_iovlen = 1;
    if length > 0 {
        header.msg_control = ancillary.0.as_mut_ptr().cast();
        header.msg_controllen = length.try_into().unwrap_or_default();
    }
    header
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    fn pair() -> [OwnedFd; 2] {
        let mut fds = [0; 2];
        // SAFETY: the pointer is to two descriptors.
        let made = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, fds.as_mut_ptr()) };
        assert_eq!(made, 0);
        // SAFETY: they were just made.
        fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    #[test]
    fn descriptors_arrive_in_order_and_refer_to_the_same_files() {
        let [left, right] = pair();
        let files: Vec<File> = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
        assert!(send(&left, b"three", &files.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>()));
        let mut buffer = [0; 64];
        let got = receive(&right, &mut buffer).unwrap().unwrap();
        assert_eq!(
            (got.length, &buffer[..5], got.descriptors.len(), got.too_many),
            (5, b"three".as_slice(), 3, false)
        );
        for (number, (mine, theirs)) in files.iter().zip(got.descriptors).enumerate() {
            File::from(theirs).write_all(&[number as u8]).unwrap();
            let mut byte = [9];
            let mut mine = mine;
            mine.rewind().unwrap();
            mine.read_exact(&mut byte).unwrap();
            assert_eq!(byte, [number as u8]);
        }
        assert!(receive(&right, &mut buffer).unwrap().is_none());
        drop(left);
        assert_eq!(receive(&right, &mut buffer).unwrap().unwrap().length, 0);
    }

    #[test]
    fn more_descriptors_than_possible_are_closed_and_told() {
        let [left, right] = pair();
        let file = tempfile::tempfile().unwrap();
        let mut ancillary = [0u64; 32];
        let count = DESCRIPTORS_MAX + 4;
        let mut piece = libc::iovec { iov_base: b"x".as_ptr().cast_mut().cast(), iov_len: 1 };
        // SAFETY: an all-zero message header is valid.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut piece;
        header.msg_iovlen = 1;
        header.msg_control = ancillary.as_mut_ptr().cast();
        header.msg_controllen = (16 + 4 * count) as _;
        ancillary[0] = (16 + 4 * count) as u64;
        ancillary[1] = libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32;
        for pair in &mut ancillary[2..2 + count / 2] {
            *pair = file.as_raw_fd() as u64 | (file.as_raw_fd() as u64) << 32;
        }
        // SAFETY: everything that the header refers to is there.
        assert_eq!(unsafe { libc::sendmsg(left.as_raw_fd(), &raw const header, 0) }, 1);
        let got = receive(&right, &mut [0; 8]).unwrap().unwrap();
        assert_eq!((got.descriptors.len(), got.too_many), (DESCRIPTORS_MAX, true));
    }
}
