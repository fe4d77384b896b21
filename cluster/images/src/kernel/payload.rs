//! The ELF kernel inside a bzImage.
//!
//! A bzImage is a small program that unpacks the real kernel into memory. Unpacking it once, when it is imported, spares
//! every start of every VM that time and the memory for both copies: a stock kernel then fits into 64 MiB. What is given up
//! is the random placement of the kernel that the small program does (KASLR), as with every VMM that starts a vmlinux.
//!
//! Where the payload lies: `payload_offset` and `payload_length` of the setup header, relative to the protected-mode code
//! (Linux `Documentation/arch/x86/boot.rst`, protocol 2.08). Its last four bytes are the unpacked length.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::elf::{self, ElfKind};
use crate::decompress::Decoder;

/// Largest unpacked kernel in bytes; distribution kernels have 30 to 80 MiB.
const KERNEL_BYTES_MAX: u64 = 512 << 20;
/// Magic number of the legacy LZ4 format (`lz4_Frame_format.md`, "Legacy frame"), which the kernel's build uses.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Size of an unpacked block of that format; only the last is smaller.
const LZ4_BLOCK: usize = 8 << 20;

/// The ELF kernel of the bzImage in `kernel`, in a file without a name in `directory`, and its length in bytes. `None` when
/// `kernel` is no bzImage, or is packed in a way that is not known here: such a kernel unpacks itself.
///
/// # Errors
/// A file cannot be read or written.
pub fn unpack(kernel: &mut File, directory: &Path) -> io::Result<Option<(File, u64)>> {
    let Some(packed) = packed(kernel)? else { return Ok(None) };
    let mut unpacked = tempfile::tempfile_in(directory)?;
    let Some(length) = expand(&packed, &mut unpacked)? else { return Ok(None) };
    let mut head = vec![0; 64];
    unpacked.rewind()?;
    if unpacked.read_exact(&mut head).is_err() || elf::kind(&head) != Some(ElfKind::Executable) {
        return Ok(None);
    }
    unpacked.rewind()?;
    Ok(Some((unpacked, length)))
}

/// The payload without the length behind it.
fn packed(kernel: &mut File) -> io::Result<Option<Vec<u8>>> {
    let mut head = [0; 0x250];
    kernel.rewind()?;
    match kernel.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    if head.get(0x202..0x206) != Some(b"HdrS") {
        return Ok(None);
    }
    let word = |at: usize| {
        let bytes = head.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)))
    };
    let sectors = match head.get(0x1f1) {
        None | Some(0) => 4,
        Some(count) => u64::from(*count),
    };
    let Some(length) = word(0x24c).checked_sub(4) else { return Ok(None) };
    kernel.seek(SeekFrom::Start((sectors + 1) * 512 + word(0x248)))?;
    let mut packed = vec![];
    kernel.take(length).read_to_end(&mut packed)?;
    Ok((packed.len() as u64 == length).then_some(packed))
}

/// Writes what `packed` expands to and answers its length; `None` when it is damaged, too large or of an unknown kind.
fn expand(packed: &[u8], out: &mut File) -> io::Result<Option<u64>> {
    if let Some(blocks) = packed.strip_prefix(&LZ4_LEGACY) {
        return expand_lz4(blocks, out);
    }
    let decoder = Decoder::new(packed)?;
    if !decoder.is_compressed() {
        return Ok(None);
    }
    // A damaged payload is not an error of this host: the caller keeps the kernel as it is.
    let mut chunk = vec![0; 1 << 20];
    let (mut decoder, mut length) = (decoder.take(KERNEL_BYTES_MAX + 1), 0);
    loop {
        let Ok(count) = decoder.read(&mut chunk) else { return Ok(None) };
        if count == 0 {
            return Ok((length <= KERNEL_BYTES_MAX).then_some(length));
        }
        out.write_all(chunk.get(..count).unwrap_or_default())?;
        length += count as u64;
    }
}

fn expand_lz4(mut blocks: &[u8], out: &mut File) -> io::Result<Option<u64>> {
    let mut block = vec![0; LZ4_BLOCK];
    let mut length = 0;
    while let Some((size, rest)) = blocks.split_first_chunk::<4>() {
        let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
        let Some((packed, rest)) = rest.split_at_checked(size) else { return Ok(None) };
        let Ok(count) = lz4_flex::block::decompress_into(packed, &mut block) else { return Ok(None) };
        length += count as u64;
        if length > KERNEL_BYTES_MAX {
            return Ok(None);
        }
        out.write_all(block.get(..count).unwrap_or_default())?;
        blocks = rest;
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::image::test_kernel;
    use super::*;

    /// A bzImage whose payload is this, with four bytes of length behind it.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut bytes = test_kernel("6.1.0");
        let offset = u32::try_from(bytes.len() - 1024).unwrap();
        let length = u32::try_from(payload.len() + 4).unwrap();
        bytes[0x248..0x24c].copy_from_slice(&offset.to_le_bytes());
        bytes[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        bytes.extend(payload);
        bytes.extend([0; 4]);
        bytes
    }

    fn vmlinux() -> Vec<u8> {
        let mut bytes = vec![0; 100_000];
        bytes[..20]
            .copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0]);
        bytes
    }

    fn unpacked(bytes: &[u8]) -> Option<Vec<u8>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let (mut file, length) = unpack(&mut file, &std::env::temp_dir()).unwrap()?;
        let mut contents = vec![];
        file.read_to_end(&mut contents).unwrap();
        assert_eq!(contents.len() as u64, length);
        Some(contents)
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut packed = LZ4_LEGACY.to_vec();
        for block in bytes.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed
    }

    #[test]
    fn a_kernel_packed_by_lz4_or_gzip_is_unpacked() {
        assert_eq!(unpacked(&bzimage(&lz4(&vmlinux()))), Some(vmlinux()));
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        gzip.write_all(&vmlinux()).unwrap();
        assert_eq!(unpacked(&bzimage(&gzip.finish().unwrap())), Some(vmlinux()));
    }

    #[test]
    fn what_is_unknown_or_damaged_is_left_as_it_is() {
        assert_eq!(unpacked(&bzimage(b"BZh91AY&SY")), None, "an unknown packing");
        assert_eq!(unpacked(&bzimage(&lz4(b"no kernel"))), None, "something else than a kernel");
        let whole = bzimage(&lz4(&vmlinux()));
        assert_eq!(unpacked(&whole[..whole.len() - 50]), None, "a truncated file");
        assert_eq!(unpacked(&vmlinux()), None, "no bzImage");
    }

    proptest! {
        #[test]
        fn arbitrary_payloads_never_panic(payload in proptest::collection::vec(any::<u8>(), 0..300), legacy: bool) {
            let magic: &[u8] = if legacy { &LZ4_LEGACY } else { &[] };
            unpacked(&bzimage(&[magic, &payload].concat()));
        }
    }
}
