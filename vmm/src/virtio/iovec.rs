//! Vectored I/O between chains and a descriptor: the one place where guest memory meets a system call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::GuestMemoryBackend;
use vm_memory::bitmap::Bitmap;

use super::chain::{ChainError, Reader, Segment, Writer};
use super::device::GuestMemory;
use super::queue::CHAIN_BUFFERS_MAX;

/// Pieces of guest memory as the kernel takes them, with the memory they are pieces of.
pub struct IoVecs {
    list: Vec<libc::iovec>,
    /// Entries before this one are done.
    first: usize,
    left: usize,
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointers of `list` lead into mappings that `memory` keeps, whichever thread has them, and they are given to
// the kernel only, never dereferenced here.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// No pieces.
    pub fn new(memory: &Arc<GuestMemory>) -> Self {
        Self { list: Vec::new(), first: 0, left: 0, memory: Arc::clone(memory) }
    }

    /// Forgets all pieces.
    pub fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
        self.left = 0;
    }

    /// Bytes ahead.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Number of pieces ahead.
    pub fn count(&self) -> usize {
        self.list.len().saturating_sub(self.first)
    }

    /// Adds what `reader` has left, to be written to a descriptor. What exceeds [`CHAIN_BUFFERS_MAX`] pieces does not fit:
    /// then false, and nothing more may be added.
    ///
    /// # Errors
    /// Guest memory went away.
    pub fn add_readable(&mut self, mut reader: Reader<'_>) -> Result<bool, ChainError> {
        self.add(|| reader.next_segment(usize::MAX), false)
    }

    /// Adds what `writer` has left, to be filled from a descriptor. As [`Self::add_readable`].
    ///
    /// # Errors
    /// Guest memory went away.
    pub fn add_writable(&mut self, mut writer: Writer<'_>) -> Result<bool, ChainError> {
        self.add(|| writer.next_segment(usize::MAX), true)
    }

    fn add(
        &mut self,
        mut next: impl FnMut() -> Option<Segment>,
        to_be_filled: bool,
    ) -> Result<bool, ChainError> {
        while let Some(segment) = next() {
            if self.count() >= CHAIN_BUFFERS_MAX {
                return Ok(false);
            }
            let length = segment.length as usize;
            // From our own memory, not from that of the reader: the pointer is good as long as `self.memory` is.
            let slice = self.memory.get_slice(segment.address, length).map_err(ChainError::Memory)?;
            if to_be_filled {
                // The kernel fills it behind our back. Nobody looks at the map before that is over.
                slice.bitmap().mark_dirty(0, length);
            }
            self.list.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: length });
            self.left += length;
        }
        Ok(true)
    }

    /// Forgets the next `count` pieces.
    pub fn drop_front(&mut self, count: usize) {
        let end = self.first.saturating_add(count).min(self.list.len());
        let dropped = self.list.get(self.first..end).unwrap_or_default();
        self.left -= dropped.iter().map(|piece| piece.iov_len).sum::<usize>();
        self.first = end;
        // Half of the list is behind: move the rest to the front, which costs less than what was done with it.
        if self.first * 2 >= self.list.len() {
            self.list.drain(..self.first);
            self.first = 0;
        }
    }

    /// Moves over `bytes` that were transferred.
    pub fn advance(&mut self, bytes: usize) {
        let mut bytes = bytes.min(self.left);
        self.left -= bytes;
        while let Some(piece) = self.list.get_mut(self.first).filter(|_| bytes > 0) {
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(bytes);
                piece.iov_len -= bytes;
                return;
            }
            bytes -= piece.iov_len;
            self.first += 1;
        }
    }

    /// The pieces ahead, as address and number for the kernel. They are valid until `self` is changed or dropped.
    pub fn raw(&self) -> (*const libc::iovec, u32) {
        let ahead = self.list.get(self.first..).unwrap_or_default();
        (ahead.as_ptr(), u32::try_from(ahead.len()).unwrap_or(0))
    }

    /// The only piece ahead, when there is one only, as address and length for the kernel. Valid as [`Self::raw`].
    pub fn single(&self) -> Option<(*mut u8, u32)> {
        match self.list.get(self.first..) {
            Some([piece]) => Some((piece.iov_base.cast(), u32::try_from(piece.iov_len).ok()?)),
            _ => None,
        }
    }

    fn raw_signed(&self) -> (*const libc::iovec, libc::c_int) {
        let (address, count) = self.raw();
        (address, libc::c_int::try_from(count).unwrap_or(0))
    }

    /// Fills the pieces from `fd`; the number of bytes.
    ///
    /// # Errors
    /// The system's answer.
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (address, count) = self.raw_signed();
        // SAFETY: the entries at `address` describe guest memory that `self.memory` keeps mapped and writable. It is memory
        // that the guest writes at any time, and no Rust reference to it exists.
        count_of(unsafe { libc::readv(fd.as_raw_fd(), address, count) })
    }

    /// Writes the pieces to `fd`; the number of bytes.
    ///
    /// # Errors
    /// The system's answer.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (address, count) = self.raw_signed();
        // SAFETY: the entries at `address` describe guest memory that `self.memory` keeps mapped; the kernel copies from it.
        count_of(unsafe { libc::writev(fd.as_raw_fd(), address, count) })
    }

    /// Sends the pieces to a stream socket without waiting and without a signal; the number of bytes.
    ///
    /// # Errors
    /// The system's answer; `WouldBlock` when there is no room.
    pub fn send_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let (address, count) = self.raw();
        // SAFETY: all fields of a msghdr may be zero: no address, no control data, no pieces.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = address.cast_mut();
        // The type of the field is that of the C library.
        message.msg_iovlen = count.try_into().unwrap_or(0);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: `message` names the pieces only, which are as in `write_to`; the kernel does not write to them.
        count_of(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
    }

    /// Fills the pieces from `fd` at `offset`; the number of bytes.
    ///
    /// # Errors
    /// The system's answer.
    pub fn read_from_at(&self, fd: BorrowedFd<'_>, offset: i64) -> io::Result<usize> {
        let (address, count) = self.raw_signed();
        // SAFETY: as in `read_from`.
        count_of(unsafe { libc::preadv(fd.as_raw_fd(), address, count, offset) })
    }

    /// Writes the pieces to `fd` at `offset`; the number of bytes.
    ///
    /// # Errors
    /// The system's answer.
    pub fn write_to_at(&self, fd: BorrowedFd<'_>, offset: i64) -> io::Result<usize> {
        let (address, count) = self.raw_signed();
        // SAFETY: as in `write_to`.
        count_of(unsafe { libc::pwritev(fd.as_raw_fd(), address, count, offset) })
    }
}

/// Notes that the kernel has filled what `writer` has left, for snapshots.
///
/// # Errors
/// Guest memory went away.
pub fn mark_filled(memory: &GuestMemory, mut writer: Writer<'_>) -> Result<(), ChainError> {
    while let Some(segment) = writer.next_segment(usize::MAX) {
        let length = segment.length as usize;
        let slice = memory.get_slice(segment.address, length).map_err(ChainError::Memory)?;
        slice.bitmap().mark_dirty(0, length);
    }
    Ok(())
}

fn count_of(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;

    use super::*;
    use crate::virtio::guest_driver::{Buffer, DriverQueue, guest_memory};

    #[test]
    fn a_transfer_in_many_steps_is_the_transfer_in_one() {
        let memory = Arc::new(guest_memory(0x20000));
        let mut driver = DriverQueue::new(&memory, 0x1000, 8, false);
        let mut queue = driver.device_side(0);
        driver.post(&[0x4000, 0x5000, 0x6000].map(|at| Buffer::Writable(at, 100))).unwrap();
        let chain = queue.pop().unwrap().unwrap();
        let mut vecs = IoVecs::new(&memory);
        assert!(vecs.add_writable(chain.writer(&memory)).unwrap());
        let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let content: Vec<u8> = (0..=255).chain(0..44).collect();
        for (from, to) in [(0, 1), (1, 100), (100, 250), (250, 300)] {
            here.write_all(&content[from..to]).unwrap();
            let count = vecs.read_from(there.as_fd()).unwrap();
            assert_eq!(count, to - from);
            vecs.advance(count);
        }
        assert_eq!((vecs.left(), vecs.count()), (0, 0));
        vecs.clear();
        assert!(vecs.add_writable(chain.writer(&memory)).unwrap());
        vecs.write_to(there.as_fd()).unwrap();
        let mut back = vec![0; 300];
        here.read_exact(&mut back).unwrap();
        assert_eq!(back, content);
    }
}
