//! Guest memory to and from files without what is zero: a hole takes no space and costs no reading.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use super::dirty::PAGE;
use super::pages::{Extent, Pages};
use crate::virtio::device::{GuestMemory, Slice};

/// Most bytes of one call.
const CHUNK: usize = 1 << 20;
const PAGE_64: u64 = 4096;

/// Bytes of all regions: the size of a memory file.
pub fn size(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// Calls `each` with the memory of an extent in pieces, and the offset of each piece in the file.
fn pieces(
    memory: &GuestMemory,
    (first, count): Extent,
    mut each: impl FnMut(u64, &Slice<'_>) -> io::Result<()>,
) -> io::Result<()> {
    let (mut at, end) = (u64::from(first) * PAGE_64, (u64::from(first) + u64::from(count)) * PAGE_64);
    let mut start = 0;
    for region in memory.iter() {
        let region_end = start + region.len();
        while at < end.min(region_end) {
            let length = usize::try_from(end.min(region_end) - at).unwrap_or(CHUNK).min(CHUNK);
            let offset = usize::try_from(at - start).map_err(io::Error::other)?;
            let mapping = region.get_mmap();
            let slice = mapping.get_slice(offset, length).map_err(io::Error::other)?;
            each(at, &slice)?;
            at += u64::try_from(length).unwrap_or(u64::MAX);
        }
        start = region_end;
    }
    Ok(())
}

/// Whether `length` bytes at `address`, a multiple of 8 both, are zero.
fn is_zero(address: *const u8, length: usize) -> bool {
    let words = address.cast::<u64>();
    (0..length / 8).all(|word| {
        // SAFETY: the caller passes a piece of mapped guest memory, aligned to a page, of this length.
        let at = unsafe { words.add(word) };
        // SAFETY: as above. The guest does not run; if somebody else wrote meanwhile, either value would do.
        unsafe { std::ptr::read_volatile(at) == 0 }
    })
}

fn off(at: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(at).map_err(io::Error::other)
}

/// Writes the pages of `extents` to their place in `file`, except those that are zero, where the file has a hole already.
/// Answers the number of bytes.
///
/// # Errors
/// The file cannot be written.
pub fn write(memory: &GuestMemory, extents: impl Iterator<Item = Extent>, file: &File) -> io::Result<u64> {
    let mut written = 0;
    for extent in extents {
        pieces(memory, extent, |at, slice| {
            let guard = slice.ptr_guard();
            let (mut from, mut to) = (0, 0);
            // From `from` to `to` are pages with something in them, not written yet.
            while to < slice.len() {
                // SAFETY: `to` is below the length of the slice.
                let page = unsafe { guard.as_ptr().add(to) };
                let zero = is_zero(page, PAGE.min(slice.len() - to));
                if zero {
                    written += write_at(file, guard.as_ptr(), (from, to), at)?;
                    from = to + PAGE;
                }
                to += PAGE;
            }
            written += write_at(file, guard.as_ptr(), (from, to.min(slice.len())), at)?;
            Ok(())
        })?;
    }
    Ok(written)
}

fn write_at(file: &File, base: *const u8, (from, to): (usize, usize), at: u64) -> io::Result<u64> {
    let mut done = from;
    while done < to {
        let position = off(at + u64::try_from(done).unwrap_or(u64::MAX))?;
        // SAFETY: the caller's range lies inside the mapping.
        let source = unsafe { base.add(done) };
        // SAFETY: so many bytes are mapped there; the kernel only reads them.
        let got = unsafe { libc::pwrite(file.as_raw_fd(), source.cast(), to - done, position) };
        match usize::try_from(got) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(u64::try_from(to.saturating_sub(from)).unwrap_or(0))
}

/// Reads the pages of `extents` from their place in `file`.
///
/// # Errors
/// The file cannot be read or is too short.
pub fn read(memory: &GuestMemory, extents: &[Extent], file: &File) -> io::Result<()> {
    for extent in extents {
        pieces(memory, *extent, |at, slice| {
            let guard = slice.ptr_guard_mut();
            let mut done = 0;
            while done < slice.len() {
                let position = off(at + u64::try_from(done).unwrap_or(u64::MAX))?;
                // SAFETY: `done` is below the length of the slice.
                let target = unsafe { guard.as_ptr().add(done) };
                // SAFETY: so many bytes are mapped there, and no Rust reference to guest memory exists.
                let got =
                    unsafe { libc::pread(file.as_raw_fd(), target.cast(), slice.len() - done, position) };
                match usize::try_from(got) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => done += count,
                    Err(_) => match io::Error::last_os_error() {
                        error if error.kind() == io::ErrorKind::Interrupted => {}
                        error => return Err(error),
                    },
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Brings the pages of `extents` in before they are used. A kernel that cannot does nothing: they come when they are used.
pub fn prefetch(memory: &GuestMemory, extents: &[Extent]) {
    /// Linux 5.14.
    const MADV_POPULATE_READ: libc::c_int = 22;
    for extent in extents {
        let _ = pieces(memory, *extent, |_, slice| {
            let guard = slice.ptr_guard();
            // SAFETY: the range is mapped; the advice fills page tables and changes nothing that can be seen in it.
            unsafe { libc::madvise(guard.as_ptr().cast_mut().cast(), slice.len(), MADV_POPULATE_READ) };
            Ok(())
        });
    }
}

/// The pages of memory that are there: all others were never touched, or given back, and are zero. Where the host swaps, the
/// kernel does not tell a page that is swapped out from one that never was: there the answer is all pages.
///
/// # Errors
/// The system refuses.
pub fn resident(memory: &GuestMemory) -> io::Result<Pages> {
    let mut pages = Pages::new(size(memory) / PAGE_64);
    let all = (0, u32::try_from(size(memory) / PAGE_64).map_err(io::Error::other)?);
    if super::host()?.swap == 0 {
        let mut there = vec![0u8; CHUNK / PAGE];
        pieces(memory, all, |at, slice| {
            let guard = slice.ptr_guard();
            // SAFETY: the range is mapped, and begins at a page; the answer has a byte for each of its pages.
            let got = unsafe {
                libc::mincore(guard.as_ptr().cast_mut().cast(), slice.len(), there.as_mut_ptr().cast())
            };
            if got != 0 {
                return Err(io::Error::last_os_error());
            }
            let first = u32::try_from(at / PAGE_64).map_err(io::Error::other)?;
            let answers = there.iter().take(slice.len() / PAGE).zip(first..);
            answers.filter(|(there, _)| **there & 1 != 0).for_each(|(_, page)| pages.add((page, 1)));
            Ok(())
        })?;
        // Swap that appeared meanwhile may hold what was just looked for.
        if super::host()?.swap == 0 {
            return Ok(pages);
        }
    }
    pages.add(all);
    Ok(pages)
}

/// Where `file` has data, as extents of whole pages. A file system that knows no holes answers one extent.
///
/// # Errors
/// The system refuses.
pub fn data(file: &File, size: u64) -> io::Result<Vec<Extent>> {
    let seek = |at: u64, whence| {
        // SAFETY: no pointers are involved.
        let found = unsafe { libc::lseek(file.as_raw_fd(), off(at)?, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    let mut extents = vec![];
    let mut at = 0;
    while at < size {
        let start = match seek(at, libc::SEEK_DATA) {
            Ok(start) => start.min(size),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
            Err(error) => return Err(error),
        };
        let end = seek(start, libc::SEEK_HOLE)?.min(size);
        let (first, behind) = (start / PAGE_64, end.div_ceil(PAGE_64));
        let page = |number: u64| u32::try_from(number).map_err(io::Error::other);
        extents.push((page(first)?, page(behind.saturating_sub(first))?));
        at = end.max(start + 1);
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::layout::MIB;

    #[test]
    fn only_pages_with_something_in_them_are_written_and_come_back() {
        let memory = crate::memory::create(16).unwrap();
        for page in [0u64, 5, 6, 4095] {
            memory.write_obj(page + 1, GuestAddress(page * 4096 + 4088)).unwrap();
        }
        memory.write_obj(0u64, GuestAddress(9 * 4096)).unwrap();
        let pages = resident(&memory).unwrap();
        assert!([0, 5, 6, 9, 4095].into_iter().all(|page| pages.contains(page)));
        assert!(pages.count() <= 3 * 512, "at most three huge pages are touched: {}", pages.count());
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * MIB).unwrap();
        assert_eq!(write(&memory, [(0, 4096)].into_iter(), &file).unwrap(), 4 * 4096);
        assert_eq!(data(&file, 16 * MIB).unwrap().iter().map(|(_, count)| count).sum::<u32>(), 4);
        let copy = crate::memory::create(16).unwrap();
        read(&copy, &[(5, 2), (4095, 1)], &file).unwrap();
        let values = [0u64, 5, 6, 4095].map(|p| copy.read_obj::<u64>(GuestAddress(p * 4096 + 4088)).unwrap());
        assert_eq!(values, [0, 6, 7, 4096]);
        file.set_len(MIB).unwrap();
        assert!(read(&copy, &[(4095, 1)], &file).is_err());
        let mut byte = [9];
        file.read_exact_at(&mut byte, 8 * 4096).unwrap();
        assert_eq!(byte, [0]);
    }
}
