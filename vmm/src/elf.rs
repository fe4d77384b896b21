//! Reads what booting needs of an ELF kernel (System V ABI, ELF-64; PVH note: Xen's public/elfnote.h), every field checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
/// Most program headers: vmlinux has about 5.
const PROGRAM_HEADERS_MAX: usize = 64;
/// Largest note segment that is searched.
const NOTES_MAX: u64 = 64 << 10;
const CLASS_64_LITTLE: [u8; 2] = [2, 1];
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Why an ELF file is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The file cannot be read.
    #[error("read")]
    Read(#[source] io::Error),
    /// It ends too early.
    #[error("is truncated: {size} bytes, {needed} needed")]
    Truncated {
        /// Size of the file in bytes.
        size: u64,
        /// What the headers refer to, in bytes.
        needed: u64,
    },
    /// Not a 64-bit little-endian x86-64 executable.
    #[error("is not a 64-bit x86-64 executable")]
    WrongKind,
    /// Too many or wrongly sized program headers.
    #[error("has {count} program headers of {size} bytes")]
    ProgramHeaders {
        /// Their number.
        count: u16,
        /// The size of one, in bytes.
        size: u16,
    },
    /// A segment has more bytes in the file than in memory, or wraps around.
    #[error("has a segment of {file} bytes in {memory} bytes of memory at {address:#x}")]
    Segment {
        /// Physical address.
        address: u64,
        /// Bytes in the file.
        file: u64,
        /// Bytes in memory.
        memory: u64,
    },
    /// A segment lies where boot structures are.
    #[error("has a segment at {0:#x}, below 1 MiB")]
    SegmentTooLow(u64),
    /// There is nothing to load.
    #[error("has nothing to load")]
    Empty,
}

/// A loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file; they are inside it.
    pub file_size: usize,
    /// Bytes in memory, at least `file_size`.
    pub memory_size: u64,
}

/// What booting needs to know.
#[derive(Debug, PartialEq, Eq)]
pub struct Image {
    /// ELF entry.
    pub entry: u64,
    /// PVH entry, when there is a note.
    pub pvh_entry: Option<u32>,
    /// What to load, at least one.
    pub segments: Vec<Segment>,
}

/// Little-endian number of `length` bytes at `offset`; bytes that are not there count as 0.
fn field(bytes: &[u8], offset: usize, length: usize) -> u64 {
    let bytes = bytes.get(offset..).unwrap_or_default();
    bytes.iter().take(length).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn half(bytes: &[u8], offset: usize) -> u16 {
    u16::try_from(field(bytes, offset, 2)).unwrap_or(0)
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    u32::try_from(field(bytes, offset, 4)).unwrap_or(0)
}

/// Reads headers and notes. `head` is the beginning of `file`, which has `size` bytes.
///
/// # Errors
/// The file is not such a kernel.
pub fn parse(head: &[u8], file: &File, size: u64) -> Result<Image, ElfError> {
    if head.len() < HEADER_SIZE {
        return Err(ElfError::Truncated { size, needed: 64 });
    }
    let kind = half(head, 16);
    let fits = head.get(4..6) == Some(&CLASS_64_LITTLE) && half(head, 18) == MACHINE_X86_64;
    if !fits || (kind != TYPE_EXECUTABLE && kind != TYPE_SHARED) {
        return Err(ElfError::WrongKind);
    }
    let (entry, table) = (field(head, 24, 8), field(head, 32, 8));
    let (entry_size, count) = (half(head, 54), half(head, 56));
    if usize::from(entry_size) != PROGRAM_HEADER_SIZE || usize::from(count) > PROGRAM_HEADERS_MAX {
        return Err(ElfError::ProgramHeaders { count, size: entry_size });
    }
    let headers = read(file, table, usize::from(count) * PROGRAM_HEADER_SIZE, size)?;
    let mut image = Image { entry, pvh_entry: None, segments: vec![] };
    for header in headers.chunks_exact(PROGRAM_HEADER_SIZE) {
        let (offset, address) = (field(header, 8, 8), field(header, 24, 8));
        let (in_file, in_memory) = (field(header, 32, 8), field(header, 40, 8));
        match word(header, 0) {
            PT_LOAD if in_memory > 0 => {
                if in_file > in_memory || address.checked_add(in_memory).is_none() {
                    return Err(ElfError::Segment { address, file: in_file, memory: in_memory });
                }
                let file_size = inside(offset, in_file, size)?;
                image.segments.push(Segment { address, offset, file_size, memory_size: in_memory });
            }
            PT_NOTE if in_file <= NOTES_MAX => {
                let notes = read(file, offset, inside(offset, in_file, size)?, size)?;
                image.pvh_entry = image.pvh_entry.or_else(|| pvh_entry(&notes));
            }
            _ => {}
        }
    }
    if image.segments.is_empty() { Err(ElfError::Empty) } else { Ok(image) }
}

/// `length` as a size of memory, when that many bytes from `offset` on are in the file.
fn inside(offset: u64, length: u64, size: u64) -> Result<usize, ElfError> {
    let needed = offset.saturating_add(length);
    if needed > size {
        return Err(ElfError::Truncated { size, needed });
    }
    usize::try_from(length).map_err(|_| ElfError::Truncated { size, needed })
}

/// Reads bytes whose number is bounded by the callers.
fn read(file: &File, offset: u64, length: usize, size: u64) -> Result<Vec<u8>, ElfError> {
    inside(offset, u64::try_from(length).unwrap_or(u64::MAX), size)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).map_err(ElfError::Read)?;
    Ok(bytes)
}

fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    // Each turn takes at least 12 bytes, so this ends.
    while notes.len() >= 12 {
        let length = |offset| usize::try_from(word(notes, offset)).unwrap_or(usize::MAX);
        let (name_size, value_size, kind) = (length(0), length(4), word(notes, 8));
        let rest = notes.get(12..)?;
        let name = rest.get(..name_size)?;
        let rest = rest.get(name_size.checked_next_multiple_of(4)?..)?;
        let value = rest.get(..value_size)?;
        if (name, kind) == (b"Xen\0", NOTE_PHYS32_ENTRY) && value_size >= 4 {
            return u32::try_from(field(value, 0, value_size.min(8))).ok();
        }
        notes = rest.get(value_size.checked_next_multiple_of(4)?..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pvh_note_is_found_behind_others() {
        let other = [4u32, 5, 6].map(u32::to_le_bytes).concat();
        let mut notes = [other.as_slice(), b"GNU\0hello\0\0\0"].concat();
        notes.extend([4u32, 8, 18].map(u32::to_le_bytes).concat());
        notes.extend(b"Xen\0");
        notes.extend(0x0100_0000u64.to_le_bytes());
        assert_eq!(pvh_entry(&notes), Some(0x0100_0000));
        for end in 0..notes.len() {
            assert_eq!(pvh_entry(&notes[..end]), None);
        }
    }
}
