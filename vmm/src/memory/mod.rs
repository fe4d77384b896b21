//! Guest memory: one region below 3 GiB and one above 4 GiB, anonymous or mapped from a file.
//!
//! Regions begin at a multiple of 2 MiB, so that the kernel can give them huge pages, and KVM use those for the guest:
//! it needs host and guest address to be equal in their last 21 bits. Nothing is touched or allocated in proportion to its size; pages appear when somebody writes to them.

pub mod dirty;
pub mod pages;
pub mod ram;
pub mod sparse;
pub mod userfault;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use blixard_vmm_api::snapshot::MemoryConfig;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};

use crate::layout::{HIGH_RAM_START, LOW_RAM, MIB};
use crate::virtio::device::GuestMemory;

const NAME: &CStr = c"guest-memory";

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error("memory_mib: {asked} MiB asked for, the host has {host} MiB")]
    MoreThanHost {
        /// What was asked for, in MiB.
        asked: u32,
        /// All memory of the host, in MiB.
        host: u64,
    },
    /// The memory file cannot be made.
    #[error("create memory file")]
    Create(#[source] io::Error),
    /// The memory file cannot be mapped.
    #[error("map {mib} MiB of guest memory")]
    Map {
        /// Size, in MiB.
        mib: u64,
        /// The system's answer.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// The regions do not form a memory.
    #[error("arrange guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
}

/// Why a file cannot be read into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The target is not all memory.
    #[error("guest address")]
    Address(#[source] GuestMemoryError),
    /// The file cannot be read.
    #[error("read")]
    Read(#[source] io::Error),
    /// The file is shorter than it says.
    #[error("the file ends {missing} bytes too early")]
    Truncated {
        /// How many bytes are missing.
        missing: usize,
    },
}

/// Makes `mib` MiB of guest memory.
///
/// # Errors
/// It is more than the host has, or the system refuses.
pub fn create(mib: u32) -> Result<GuestMemory, MemoryError> {
    create_as(mib, MemoryConfig::default()).map(|(memory, _)| memory)
}

/// Makes `mib` MiB of guest memory, and the file that it is mapped from, if any.
///
/// # Errors
/// It is more than the host has, or the system refuses.
pub fn create_as(mib: u32, options: MemoryConfig) -> Result<(GuestMemory, Option<Arc<File>>), MemoryError> {
    let host = host().map_err(MemoryError::Create)?.memory / MIB;
    if u64::from(mib) > host {
        return Err(MemoryError::MoreThanHost { asked: mib, host });
    }
    let size = u64::from(mib) * MIB;
    if !options.huge_pages && !options.fork_ready {
        let memory = map(None, size, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)?;
        advise(&memory, options);
        return Ok((memory, None));
    }
    let file = Arc::new(memory_file(size, options.huge_pages).map_err(MemoryError::Create)?);
    let memory = map(Some(&file), size, libc::MAP_SHARED)?;
    advise(&memory, options);
    Ok((memory, Some(file)))
}

/// Maps `file`, which has the size of a memory, so that what is written stays out of it.
///
/// # Errors
/// The system refuses.
pub fn map_private(file: &Arc<File>, size: u64, options: MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let memory = map(Some(file), size, libc::MAP_PRIVATE)?;
    advise(&memory, options);
    Ok(memory)
}

/// Maps nothing: pages come from whoever fills them in.
///
/// # Errors
/// The system refuses.
pub fn map_empty(size: u64) -> Result<GuestMemory, MemoryError> {
    map(None, size, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
}

fn map(file: Option<&Arc<File>>, size: u64, flags: libc::c_int) -> Result<GuestMemory, MemoryError> {
    let low = size.min(LOW_RAM.size);
    let region = |offset: u64, length: u64, start: u64| {
        let bytes = usize::try_from(length).map_err(|e| MemoryError::Create(io::Error::other(e)))?;
        let file = file.map(|file| FileOffset::from_arc(file.clone(), offset));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let frame = Frame::around(bytes);
        let mapping = MmapRegion::build(file, bytes, protection, flags | libc::MAP_NORESERVE)
            .map_err(|source| MemoryError::Map { mib: size / MIB, source })?;
        drop(frame);
        GuestRegionMmap::new(mapping, GuestAddress(start))
            .ok_or_else(|| MemoryError::Create(io::Error::other("guest address overflows")))
    };
    let mut regions = vec![region(0, low, LOW_RAM.start)?];
    if size > low {
        regions.push(region(low, size - low, HIGH_RAM_START)?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Arrange)
}

/// Reservations around a free place that begins at a multiple of 2 MiB and has the size of the mapping that comes next: the
/// kernel takes the highest place that fits. (It aligns large anonymous mappings itself, since Linux 6.7, and no others.)
/// Should it choose another place, memory has no huge pages, and that is all.
struct Frame(Vec<(*mut libc::c_void, usize)>);

impl Frame {
    fn around(bytes: usize) -> Option<Self> {
        const HUGE: usize = 2 << 20;
        let room = bytes.checked_add(HUGE).filter(|_| bytes >= HUGE)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let head = start.addr().next_multiple_of(HUGE) - start.addr();
        let place = start.wrapping_byte_add(head);
        drop(Self(vec![(place, bytes)]));
        Some(Self(vec![(start, head), (place.wrapping_byte_add(bytes), HUGE - head)]))
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        for (start, bytes) in self.0.iter().filter(|(_, bytes)| *bytes > 0) {
            // SAFETY: the range was mapped by `around`, and nobody knows it.
            unsafe { libc::munmap(*start, *bytes) };
        }
    }
}

/// Tells the kernel what it may do with the pages. A host without the feature does nothing.
pub(crate) fn advise(memory: &GuestMemory, options: MemoryConfig) {
    let wanted =
        [(options.transparent_huge_pages, libc::MADV_HUGEPAGE), (options.merge, libc::MADV_MERGEABLE)];
    for (_, advice) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
        for region in memory.iter() {
            let mapping = region.get_mmap();
            // SAFETY: the range is a mapping of ours; these advices change nothing that can be seen in it.
            unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
        }
    }
}

/// A file of `size` bytes in memory whose size cannot be changed.
pub(crate) fn memory_file(size: u64, huge_pages: bool) -> io::Result<File> {
    let huge = if huge_pages { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    let file = memfd(NAME, libc::MFD_ALLOW_SEALING | huge)?;
    file.set_len(size)?;
    // Without this a holder of the descriptor could shrink the file and so kill the VMM by SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: an fcntl on a descriptor that we own, with an integer argument.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes a file in memory what it is for ever. Nobody has it mapped for writing.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: an fcntl on a descriptor that we own, with an integer argument.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An empty file in memory.
///
/// # Errors
/// The system's answer.
pub fn memfd(name: &CStr, flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated string; the call has no other precondition.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Memory of the host, in bytes.
pub(crate) struct Host {
    memory: u64,
    swap: u64,
}

pub(crate) fn host() -> io::Result<Host> {
    let mut info = std::mem::MaybeUninit::<libc::sysinfo>::uninit();
    // SAFETY: the pointer is to memory large enough for the structure.
    if unsafe { libc::sysinfo(info.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the kernel filled the structure.
    let info = unsafe { info.assume_init() };
    let bytes = |units: libc::c_ulong| units.saturating_mul(u64::from(info.mem_unit));
    Ok(Host { memory: bytes(info.totalram), swap: bytes(info.totalswap) })
}

/// Reads `length` bytes at `offset` of `file` to guest address `to`. The position of the descriptor is not moved: other
/// processes may share it.
///
/// # Errors
/// The target is not memory, the file cannot be read, or it ends too early.
pub fn read_file(
    memory: &GuestMemory,
    to: u64,
    file: &File,
    offset: u64,
    length: usize,
) -> Result<(), LoadError> {
    let slice = memory.get_slice(GuestAddress(to), length).map_err(LoadError::Address)?;
    slice.bitmap().mark_dirty(0, length);
    let guard = slice.ptr_guard_mut();
    let mut done = 0;
    while done < length {
        let at = offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
        let position = libc::off_t::try_from(at).map_err(|e| LoadError::Read(io::Error::other(e)))?;
        // SAFETY: `done < length`, so the pointer stays inside the slice that the guard keeps mapped.
        let target = unsafe { guard.as_ptr().add(done) };
        // SAFETY: `length - done` bytes from `target` on lie in the slice. The memory is shared with the guest, so no
        // Rust reference to it exists, here or elsewhere.
        let got = unsafe { libc::pread(file.as_raw_fd(), target.cast(), length - done, position) };
        match usize::try_from(got) {
            Ok(0) => return Err(LoadError::Truncated { missing: length - done }),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(LoadError::Read(error)),
            },
        }
    }
    Ok(())
}

/// Size of guest memory in bytes below 3 GiB, and above 4 GiB.
pub fn sizes(memory: &GuestMemory) -> (u64, u64) {
    use vm_memory::GuestMemoryRegion;
    let mut sizes = memory.iter().map(|r| r.len());
    (sizes.next().unwrap_or(0), sizes.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_beyond_3_gib_lies_above_4_gib() {
        let memory = create(3 * 1024 + 1).unwrap();
        assert_eq!(sizes(&memory), (3 << 30, MIB));
        memory.write_obj(7u8, GuestAddress(HIGH_RAM_START + MIB - 1)).unwrap();
        assert!(memory.read_obj::<u8>(GuestAddress(LOW_RAM.end())).is_err());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn every_region_begins_where_huge_pages_can() {
        // What lies between changes where the kernel puts the next mapping; so do other threads, which a VMM does not have yet.
        let mut kept = vec![];
        for odd in [4096, 12288, 4096 * 300] {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            kept.push(MmapRegion::<()>::build(None, odd, libc::PROT_NONE, flags).unwrap());
            for options in [MemoryConfig::default(), MemoryConfig { fork_ready: true, ..Default::default() }]
            {
                let aligned = (0..50).any(|_| {
                    let (memory, file) = create_as(3 * 1024 + 64, options).unwrap();
                    assert_eq!(file.is_some(), options.fork_ready);
                    memory.iter().all(|region| region.get_mmap().as_ptr().addr() % (2 << 20) == 0)
                });
                assert!(aligned, "{options:?}");
            }
        }
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_with_both_numbers() {
        let error = create(blixard_vmm_api::config::MEMORY_MIB_MAX).unwrap_err().to_string();
        assert!(error.contains("1048576 MiB") && error.contains("the host has"), "{error}");
    }

    #[test]
    fn a_short_file_and_a_target_outside_memory_are_refused() {
        let memory = create(16).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        assert!(matches!(read_file(&memory, 0, &file, 4, 10), Err(LoadError::Truncated { missing: 4 })));
        assert!(matches!(read_file(&memory, 16 * MIB - 1, &file, 0, 2), Err(LoadError::Address(_))));
    }
}
