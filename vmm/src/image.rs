//! Kernel and initramfs in guest memory: read from their files, or, for VMs that shall share equal pages (`memory.merge`), mapped.
//!
//! ```text
//!   guest memory   │ memory │ kernel file, private │ memory │ initramfs file, private │ memory │
//!                           └── what the guest writes is its own page, the file does not change
//! ```
//!
//! A stock kernel has 44 MiB. It writes more than half of that while it boots (it patches its own text). Mapped, each page of 4 KiB
//! is two or three faults; read, memory is in huge pages where the host has them, and a kernel is at its init in little more
//! than half of the time (`bench/README.md`). What a mapping saves are the 19 MiB that are only read or not touched at all.
//! Mapped files must stay as they are while the VM runs; the agent's store is written once and replaces by renaming.

use std::fs::File;
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::{self, LoadError};
use crate::virtio::device::GuestMemory;

const PAGE: u64 = 4096;
/// Least bytes that are mapped: less is read faster.
const MAP_MIN: u64 = 64 << 10;

/// How files get into guest memory, and the ranges of it, in whole pages, that are mapped from them.
#[derive(Debug, Default)]
pub struct Images {
    share: bool,
    mapped: Vec<(u64, usize)>,
}

impl Images {
    /// Files are mapped rather than read, if `share`.
    pub fn new(share: bool) -> Self {
        Self { share, mapped: vec![] }
    }

    /// Puts `length` bytes at `offset` of `file`, which has that many, to guest address `to`.
    ///
    /// # Errors
    /// The target is not memory, or the file cannot be mapped or read.
    pub fn place(
        &mut self,
        guest: &GuestMemory,
        to: u64,
        file: &File,
        offset: u64,
        length: usize,
    ) -> Result<(), LoadError> {
        let bytes = u64::try_from(length).unwrap_or(u64::MAX);
        let (start, end) = (to.next_multiple_of(PAGE), to.saturating_add(bytes) / PAGE * PAGE);
        let whole = end.saturating_sub(start);
        if !self.share || to % PAGE != offset % PAGE || whole < MAP_MIN {
            return memory::read_file(guest, to, file, offset, length);
        }
        let Ok(size) = usize::try_from(whole) else {
            return memory::read_file(guest, to, file, offset, length);
        };
        // Below the first and above the last whole page there may be something else.
        let (head, tail) = (start - to, to.saturating_add(bytes) - end);
        if !map(guest, start, file, offset.saturating_add(head), size)? {
            return memory::read_file(guest, to, file, offset, length);
        }
        self.mapped.push((start, size));
        let part = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
        memory::read_file(guest, to, file, offset, part(head))?;
        memory::read_file(guest, end, file, offset.saturating_add(end - to), part(tail))
    }

    /// The mapped pages, by their number in a memory file. Images lie below 3 GiB, where that is their number in guest memory.
    pub fn extents(&self) -> impl Iterator<Item = (u32, u32)> {
        let number = |pages: u64| u32::try_from(pages).unwrap_or(u32::MAX);
        self.mapped.iter().map(move |(start, size)| {
            (number(start / PAGE), number(u64::try_from(*size).unwrap_or(u64::MAX) / PAGE))
        })
    }
}

/// Maps a file over guest memory; false when it cannot be mapped and memory is as before.
fn map(guest: &GuestMemory, start: u64, file: &File, offset: u64, size: usize) -> Result<bool, LoadError> {
    let target = guest.get_slice(GuestAddress(start), size).map_err(LoadError::Address)?;
    let Ok(offset) = libc::off_t::try_from(offset) else { return Ok(false) };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let mapped =
        unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return Ok(false);
    }
    let place = target.ptr_guard_mut().as_ptr();
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: the source was mapped above with this size and nobody knows it; the target is `size` bytes of guest memory, to
    // which no Rust reference exists. It stays mapped, readable and writable, for as long as its region.
    let moved = unsafe { libc::mremap(mapped, size, size, how, place) };
    if moved != libc::MAP_FAILED {
        return Ok(true);
    }
    // SAFETY: the mapping was made above with this size and nobody knows it.
    unsafe { libc::munmap(mapped, size) };
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    const AT: u64 = 0x10_0000;

    fn image(size: usize) -> (File, Vec<u8>) {
        let bytes: Vec<u8> = (0..size).map(|n| (n / 3 + n / 4096) as u8 | 1).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        (file, bytes)
    }

    fn read(memory: &GuestMemory, at: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    #[test]
    fn an_image_is_in_memory_whole_wherever_it_begins_and_ends_and_its_neighbours_stay() {
        let cases = [(0, 0, 300_000), (0x10, 0x1010, 200_001), (0x10, 0, 200_000), (5, 5, 999)];
        for (share, (shift, offset, size)) in [false, true].into_iter().flat_map(|s| cases.map(|c| (s, c))) {
            let memory = memory::create(16).unwrap();
            memory.write_slice(&[7; 400_000], GuestAddress(AT - 4096)).unwrap();
            let (file, bytes) = image(size + offset as usize);
            Images::new(share).place(&memory, AT + shift, &file, offset, size).unwrap();
            assert_eq!(read(&memory, AT + shift, size), bytes[offset as usize..]);
            assert_eq!(read(&memory, AT + shift - 1, 1), [7]);
            assert_eq!(read(&memory, AT + shift + size as u64, 9), [7; 9]);
        }
    }

    #[test]
    fn a_shared_image_is_not_copied_and_what_is_written_stays_out_of_its_file() {
        let memory = memory::create(16).unwrap();
        let (file, bytes) = image(300_000);
        let mut images = Images::new(true);
        images.place(&memory, AT, &file, 0, bytes.len()).unwrap();
        assert_eq!(images.extents().collect::<Vec<_>>(), [(0x100, 73)]);
        // A page that nobody wrote is the file's own.
        file.write_all_at(b"later", 4096).unwrap();
        assert_eq!(read(&memory, AT + 4096, 5), b"later");
        memory.write_slice(b"changed", GuestAddress(AT + 9000)).unwrap();
        let mut unchanged = [0; 7];
        file.read_exact_at(&mut unchanged, 9000).unwrap();
        assert_eq!(unchanged, bytes[9000..9007]);
    }
}
