//! Gives pages of guest memory back to the host. The guest finds other content in them later: zeroes, or what a snapshot has.
//!
//! Only whole pages of the host inside guest memory are touched, so whatever a guest names, it is its own. How a page is
//! given back depends on its mapping, and the kernel knows that best: a shared one is removed from its memory file; a
//! private one over the file of a snapshot refuses that, and there the VM's own copy is dropped and the file stays as it is.

use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use super::device::GuestMemory;

/// `HUGETLBFS_MAGIC` of Linux.
const HUGETLBFS: i64 = 0x958458f6;
const PAGE: u64 = 4096;

/// Releases ranges of guest memory.
#[derive(Debug)]
pub struct Release {
    /// Start of each region and the size of its pages.
    pages: Vec<(u64, u64)>,
    released: u64,
    failures: u64,
}

impl Release {
    /// For this memory. Asks the kernel for the size of its pages, which a running VM must not.
    pub fn new(memory: &GuestMemory) -> Self {
        let page =
            |file: Option<&vm_memory::FileOffset>| file.and_then(|f| huge_page(f.file())).unwrap_or(PAGE);
        let pages = memory.iter().map(|r| (r.start_addr().0, page(r.get_mmap().file_offset()))).collect();
        Self { pages, released: 0, failures: 0 }
    }

    /// Bytes released so far.
    pub fn released(&self) -> u64 {
        self.released
    }

    /// How often the kernel refused.
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Releases what lies in the range in whole pages of the host.
    ///
    /// # Errors
    /// The range is not wholly guest memory; then nothing is released.
    pub fn range(&mut self, memory: &GuestMemory, start: u64, length: u64) -> Result<(), GuestMemoryError> {
        let count = usize::try_from(length).unwrap_or(usize::MAX);
        if !memory.check_range(GuestAddress(start), count) {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(start)));
        }
        let end = start.saturating_add(length);
        for region in memory.iter() {
            let first = region.start_addr().0;
            let (from, to) = (start.max(first), end.min(first.saturating_add(region.len())));
            let page = self.pages.iter().find(|(start, _)| *start == first).map_or(PAGE, |(_, size)| *size);
            let (from, to) = (from.next_multiple_of(page), to / page * page);
            if from < to {
                self.pages_of(memory, from, to - from)?;
            }
        }
        Ok(())
    }

    fn pages_of(&mut self, memory: &GuestMemory, start: u64, length: u64) -> Result<(), GuestMemoryError> {
        let count = usize::try_from(length).unwrap_or(0);
        let slice = memory.get_slice(GuestAddress(start), count)?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: the range is whole pages of guest memory, which the guard keeps mapped. The guest writes there at any time, so
        // no Rust reference into it exists, and its content may change.
        let mut result = unsafe { libc::madvise(guard.as_ptr().cast(), count, libc::MADV_REMOVE) };
        if result != 0 {
            // SAFETY: as above.
            result = unsafe { libc::madvise(guard.as_ptr().cast(), count, libc::MADV_DONTNEED) };
        }
        if result == 0 {
            // A snapshot of what has changed holds these pages too, as they are now.
            slice.bitmap().mark_dirty(0, count);
            self.released += length;
        } else {
            self.failures += 1;
        }
        Ok(())
    }
}

/// Page size of a file of huge pages.
fn huge_page(file: &std::fs::File) -> Option<u64> {
    let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the pointer is to memory large enough for the structure.
    if unsafe { libc::fstatfs(file.as_raw_fd(), about.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call succeeded, so the kernel filled the structure.
    let about = unsafe { about.assume_init() };
    // The types of the fields are those of the C library.
    #[allow(
        clippy::unnecessary_fallible_conversions,
        clippy::useless_conversion,
        reason = "they differ between C libraries"
    )]
    let (kind, size) = (i64::try_from(about.f_type).ok()?, u64::try_from(about.f_bsize).ok()?);
    (kind == HUGETLBFS && size.is_power_of_two()).then_some(size)
}
