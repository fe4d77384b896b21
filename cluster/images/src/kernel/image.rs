//! What a kernel must look like to be started by our VMM: a 64-bit bzImage (Linux `Documentation/arch/x86/boot.rst`)
//! or an ELF vmlinux for x86-64.

use super::elf::{self, ElfKind};

/// A kernel that can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelImage {
    /// Its version as it says itself; an ELF file does not.
    pub release: Option<String>,
}

/// Why a file is refused as a kernel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAKernel {
    /// It is neither of the two formats.
    #[error("this is no Linux kernel for x86-64 (neither a bzImage nor an ELF vmlinux)")]
    Unknown,
    /// The boot protocol is too old.
    #[error("the kernel's boot protocol {major}.{minor} is too old: 2.12 is the first with a 64-bit entry")]
    Old {
        /// Before the dot.
        major: u8,
        /// Behind it.
        minor: u8,
    },
    /// The kernel has no 64-bit entry.
    #[error("the kernel cannot be entered in 64-bit mode (a 32-bit kernel?)")]
    No64Bit,
    /// The file is shorter than its header says.
    #[error("the kernel is truncated: {actual} bytes of at least {expected}")]
    Truncated {
        /// From the header.
        expected: u64,
        /// Length of the file.
        actual: u64,
    },
}

/// How many bytes of a kernel [`KernelImage::check`] needs to see.
pub const HEAD: usize = 64 << 10;

impl KernelImage {
    /// Checks a kernel of `length` bytes that begins with `head`: all of it, or at least its first 64 KiB.
    ///
    /// # Errors
    /// What keeps it from being started.
    pub fn check(head: &[u8], length: u64) -> Result<Self, NotAKernel> {
        if elf::kind(head) == Some(ElfKind::Executable) {
            return Ok(Self { release: None });
        }
        if head.get(0x202..0x206) != Some(b"HdrS") {
            return Err(NotAKernel::Unknown);
        }
        let byte = |at: usize| head.get(at).copied().unwrap_or(0);
        let (minor, major) = (byte(0x206), byte(0x207));
        if (major, minor) < (2, 12) {
            return Err(NotAKernel::Old { major, minor });
        }
        // xloadflags: XLF_KERNEL_64
        if byte(0x236) & 1 == 0 {
            return Err(NotAKernel::No64Bit);
        }
        let sectors = match byte(0x1f1) {
            0 => 4,
            count => u64::from(count),
        };
        let paragraphs = u32::from_le_bytes([byte(0x1f4), byte(0x1f5), byte(0x1f6), byte(0x1f7)]);
        let expected = (sectors + 1) * 512 + u64::from(paragraphs) * 16;
        if length < expected {
            return Err(NotAKernel::Truncated { expected, actual: length });
        }
        let text = usize::from(u16::from_le_bytes([byte(0x20e), byte(0x20f)]));
        let text = if text == 0 { None } else { head.get(text + 0x200..) };
        let word = text.and_then(|text| text.split(|byte| matches!(byte, 0 | b' ')).next());
        let release = word.and_then(|word| std::str::from_utf8(word).ok()).filter(|word| is_release(word));
        Ok(Self { release: release.map(str::to_owned) })
    }
}

/// True for a text that can be the version of a kernel.
pub fn is_release(text: &str) -> bool {
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._+~-".contains(&byte));
    plain && (1..=64).contains(&text.len()) && !text.starts_with('.')
}

/// A minimal bzImage for tests.
#[cfg(test)]
pub fn test_kernel(release: &str) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[0x1f1] = 1;
    bytes[0x1f4] = 16;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&[15, 2]);
    bytes[0x20f] = 1;
    bytes[0x236] = 1;
    let text = format!("{release} (builder) #1");
    bytes[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: &[u8]) -> Result<KernelImage, NotAKernel> {
        KernelImage::check(bytes, bytes.len() as u64)
    }

    #[test]
    fn a_bzimage_tells_its_release() {
        let release = check(&test_kernel("6.1.0-9-amd64")).unwrap().release;
        assert_eq!(release.as_deref(), Some("6.1.0-9-amd64"));
    }

    #[test]
    fn what_cannot_be_started_is_refused_with_its_reason() {
        assert_eq!(check(b"#!/bin/sh\n"), Err(NotAKernel::Unknown));
        assert_eq!(check(&super::super::elf::test_module(&[])), Err(NotAKernel::Unknown));
        let mut old = test_kernel("2.6.18");
        old[0x206] = 10;
        assert_eq!(check(&old), Err(NotAKernel::Old { major: 2, minor: 10 }));
        let mut narrow = test_kernel("5.0");
        narrow[0x236] = 0;
        assert_eq!(check(&narrow), Err(NotAKernel::No64Bit));
        let mut long = test_kernel("5.0");
        long[0x1f6] = 1;
        assert!(matches!(check(&long), Err(NotAKernel::Truncated { actual: 4096, .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..1000), header: bool) {
            if header && bytes.len() > 0x206 {
                bytes[0x202..0x206].copy_from_slice(b"HdrS");
            }
            let _any = check(&bytes);
        }
    }
}
