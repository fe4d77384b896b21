//! Kernel and initramfs in guest memory: mapped from their files where that is possible, so that nothing is read that the guest
//! does not touch, and all VMs of one kernel share the pages that they do not write.
//!
//! ```text
//!   guest memory   │ memory │ kernel file, private │ memory │ initramfs file, private │ memory │
//!                           └── what the guest writes is its own page, the file does not change
//! ```
//!
//! A stock kernel has 45 MiB, of which it touches a part while it boots. Reading all of it costs more than everything else
//! that is done before the first instruction. Whoever takes a memory file for the memory calls [`Images::settle`] before.
//! The files must stay as they are while the VM runs; the agent's store is written once and replaces by renaming.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, LoadError};
use crate::virtio::device::GuestMemory;

const PAGE: u64 = 4096;
/// Least bytes that are mapped: less is read faster.
const MAP_MIN: u64 = 64 << 10;

/// Why memory cannot become one file again.
#[derive(Debug, thiserror::Error)]
pub enum SettleError {
    /// Memory has no file.
    #[error("guest memory at {0:#x} has no memory file")]
    NoFile(u64),
    /// Pages cannot be copied to the memory file.
    #[error("copy a mapped image to the memory file")]
    Copy(#[source] io::Error),
    /// The memory file cannot be mapped in their place.
    #[error("map the memory file in place of an image")]
    Map(#[source] io::Error),
}

/// Ranges of guest memory, in whole pages, that are mapped from other files than the memory's.
#[derive(Debug, Default)]
pub struct Images(Vec<(u64, usize)>);

impl Images {
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
        if to % PAGE != offset % PAGE || whole < MAP_MIN {
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
        self.0.push((start, size));
        let part = |bytes: u64| usize::try_from(bytes).unwrap_or(0);
        memory::read_file(guest, to, file, offset, part(head))?;
        memory::read_file(guest, end, file, offset.saturating_add(end - to), part(tail))
    }

    /// The pages, by their number in the memory file. Images lie below 3 GiB, where that is their number in guest memory.
    pub fn extents(&self) -> impl Iterator<Item = (u32, u32)> {
        let number = |pages: u64| u32::try_from(pages).unwrap_or(u32::MAX);
        self.0.iter().map(move |(start, size)| {
            (number(start / PAGE), number(u64::try_from(*size).unwrap_or(u64::MAX) / PAGE))
        })
    }

    /// Makes the memory file the memory again: copies what is mapped from elsewhere to it. No vCPU may run and no device may
    /// work meanwhile.
    ///
    /// # Errors
    /// The memory file has no room or cannot be mapped; then some ranges are still as they were.
    pub fn settle(&mut self, guest: &GuestMemory) -> Result<(), SettleError> {
        while let Some((start, size)) = self.0.last().copied() {
            settle(guest, start, size)?;
            self.0.pop();
        }
        Ok(())
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
    // Huge pages cannot be replaced in parts. The kernel finds that out before it changes anything.
    // SAFETY: the mapping was made above with this size and nobody knows it.
    unsafe { libc::munmap(mapped, size) };
    Ok(false)
}

fn settle(guest: &GuestMemory, start: u64, size: usize) -> Result<(), SettleError> {
    let address = GuestAddress(start);
    let region = guest.find_region(address).ok_or(SettleError::NoFile(start))?;
    let file = region.file_offset().ok_or(SettleError::NoFile(start))?;
    let at = file.start().saturating_add(start.saturating_sub(region.start_addr().0));
    let position = |done: usize| {
        libc::off_t::try_from(at.saturating_add(u64::try_from(done).unwrap_or(u64::MAX)))
            .map_err(|error| SettleError::Copy(io::Error::other(error)))
    };
    let slice = guest.get_slice(address, size).map_err(|_| SettleError::NoFile(start))?;
    let pointer = slice.ptr_guard_mut();
    let mut done = 0;
    while done < size {
        // SAFETY: `done < size`, so the pointer stays inside the slice that the guard keeps mapped.
        let source = unsafe { pointer.as_ptr().add(done) };
        // SAFETY: `size - done` bytes from `source` on lie in the slice; the kernel reads them.
        let count =
            unsafe { libc::pwrite(file.file().as_raw_fd(), source.cast(), size - done, position(done)?) };
        match usize::try_from(count) {
            Ok(0) => return Err(SettleError::Copy(io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(SettleError::Copy(error)),
            },
        }
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let (target, fd) = (pointer.as_ptr().cast(), file.file().as_raw_fd());
    // SAFETY: the target is `size` bytes of guest memory, to which no Rust reference exists; what replaces it has the same
    // content.
    let mapped = unsafe { libc::mmap(target, size, protection, flags, fd, position(0)?) };
    if mapped == libc::MAP_FAILED { Err(SettleError::Map(io::Error::last_os_error())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blixard_vmm_api::snapshot::MemoryConfig;
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
        for (shift, offset, size) in
            [(0, 0, 300_000), (0x10, 0x1010, 200_001), (0x10, 0, 200_000), (5, 5, 999)]
        {
            let memory = memory::create(16).unwrap();
            memory.write_slice(&[7; 400_000], GuestAddress(AT - 4096)).unwrap();
            let (file, bytes) = image(size + offset as usize);
            Images::default().place(&memory, AT + shift, &file, offset, size).unwrap();
            assert_eq!(read(&memory, AT + shift, size), bytes[offset as usize..]);
            assert_eq!(read(&memory, AT + shift - 1, 1), [7]);
            assert_eq!(read(&memory, AT + shift + size as u64, 9), [7; 9]);
        }
    }

    #[test]
    fn what_is_written_stays_out_of_the_file_and_gets_into_the_memory_file_by_settling() {
        let options = MemoryConfig { fork_ready: true, ..Default::default() };
        let (memory, _) = memory::create_as(16, options).unwrap();
        let (file, mut bytes) = image(300_000);
        let mut images = Images::default();
        images.place(&memory, AT, &file, 0, bytes.len()).unwrap();
        memory.write_slice(b"changed", GuestAddress(AT + 9000)).unwrap();
        let mut unchanged = vec![0; bytes.len()];
        file.read_exact_at(&mut unchanged, 0).unwrap();
        assert_eq!(unchanged, bytes);
        bytes[9000..9007].copy_from_slice(b"changed");
        let region = memory.find_region(GuestAddress(AT)).unwrap();
        let memory_file = region.file_offset().unwrap().file();
        let mut content = vec![0; bytes.len()];
        for text in [b"changed", b"settled"] {
            images.settle(&memory).unwrap();
            memory.write_slice(text, GuestAddress(AT + 9000)).unwrap();
            bytes[9000..9007].copy_from_slice(text);
            assert_eq!(read(&memory, AT, bytes.len()), bytes);
            memory_file.read_exact_at(&mut content, AT).unwrap();
            assert_eq!(content, bytes);
        }
    }
}
