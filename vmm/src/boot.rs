//! Loads the kernel, its initramfs and what both are told into guest memory, and refuses what does not fit.
//!
//! A bzImage is entered at its 64-bit entry, an ELF kernel at its PVH entry when it has one, else at its ELF entry in
//! 64-bit mode. Of each file only the headers go through memory of the VMM; the rest is mapped, or read, to where the guest finds
//! it ([`crate::image`]).
//! Guest memory is fresh, that is zero, so no .bss is cleared.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blixard_vmm_api::VmConfig;
use blixard_vmm_api::guest::{CONFIG_PATH, GuestConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::arch::x86_64::boot_params::{self, Initramfs, SETUP_HEADER};
use crate::arch::x86_64::registers::{self, Entry};
use crate::arch::x86_64::{acpi, boot_params::write_cmdline};
use crate::elf::{self, ElfError};
use crate::image::Images;
use crate::layout::{KERNEL_START, MIB};
use crate::memory::{self, LoadError};
use crate::virtio::device::GuestMemory;

/// Page tables reach this far; a 64-bit entry must lie below.
const MAPPED_END: u64 = 1 << 30;
const PAGE: u64 = 4096;
/// Version 2.12 of the boot protocol, the first with `xloadflags`.
const PROTOCOL_MIN: u16 = 0x020C;
/// `XLF_KERNEL_64`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Highest address for an initramfs when the kernel does not say.
const INITRAMFS_MAX: u64 = 0x37FF_FFFF;

/// Why a VM cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The size of a file cannot be found out.
    #[error("{file}: size")]
    Size {
        /// `kernel` or `initramfs`.
        file: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A kernel or initramfs must be a regular file.
    #[error("{0}: not a regular file")]
    NotAFile(&'static str),
    /// The kernel's header cannot be read.
    #[error("kernel: header")]
    Header(#[source] io::Error),
    /// Neither ELF nor bzImage.
    #[error("kernel: neither a bzImage nor an ELF file")]
    NotAKernel,
    /// A bzImage that cannot be started here.
    #[error("kernel: bzImage {0}")]
    BzImage(String),
    /// A bad ELF file.
    #[error("kernel: ELF")]
    Elf(#[from] ElfError),
    /// A file ends before its last byte, or cannot be read.
    #[error("{file}")]
    Load {
        /// `kernel` or `initramfs`.
        file: &'static str,
        /// What went wrong.
        #[source]
        source: LoadError,
    },
    /// The kernel needs memory that the VM does not have.
    #[error("kernel: needs guest memory up to {needed} MiB, there are {available} MiB")]
    KernelTooBig {
        /// End of the kernel while it starts, in MiB.
        needed: u64,
        /// Memory of the VM below 3 GiB, in MiB.
        available: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error("initramfs: {size} bytes do not fit beside the kernel in {available} MiB of guest memory")]
    InitramfsTooBig {
        /// Its size in bytes.
        size: u64,
        /// Memory of the VM below 3 GiB, in MiB.
        available: u64,
    },
    /// The entry is not where code can be.
    #[error("kernel: entry {0:#x} lies outside the first GiB")]
    EntryOutside(u64),
    /// The guest configuration cannot be written as JSON.
    #[error("guest")]
    GuestConfig(#[source] serde_json::Error),
    /// Structures for the kernel do not fit.
    #[error("write boot structures")]
    Structures(#[source] GuestMemoryError),
}

/// A kernel in guest memory.
struct Kernel {
    entry: Entry,
    /// First and one past the last address that it uses while it starts.
    start: u64,
    end: u64,
    /// Its setup header; empty for ELF.
    header: Vec<u8>,
    initramfs_max: u64,
}

/// Loads everything and says how the first vCPU enters the kernel, and what is mapped from the files.
///
/// # Errors
/// A file is not what it should be or does not fit.
pub fn load(
    guest: &GuestMemory,
    config: &VmConfig,
    kernel: &File,
    initramfs: Option<&File>,
) -> Result<(Entry, Images), BootError> {
    let mut images = Images::new(config.memory.merge);
    let kernel = load_kernel(guest, &mut images, kernel)?;
    let initramfs = load_initramfs(guest, &mut images, &kernel, initramfs, config.guest.as_ref())?;
    write_structures(guest, config, &kernel, initramfs).map_err(BootError::Structures)?;
    Ok((kernel.entry, images))
}

fn write_structures(
    guest: &GuestMemory,
    config: &VmConfig,
    kernel: &Kernel,
    initramfs: Initramfs,
) -> Result<(), GuestMemoryError> {
    write_cmdline(guest, &config.cmdline)?;
    match kernel.entry {
        Entry::Linux64 { .. } => boot_params::write_zero_page(guest, &kernel.header, initramfs)?,
        Entry::Pvh { .. } => boot_params::write_pvh(guest, initramfs)?,
    }
    acpi::write(guest, config.vcpus)?;
    registers::write_tables(guest, kernel.entry)
}

fn file_size(file: &File, name: &'static str) -> Result<u64, BootError> {
    let data = file.metadata().map_err(|source| BootError::Size { file: name, source })?;
    if data.is_file() { Ok(data.len()) } else { Err(BootError::NotAFile(name)) }
}

fn load_kernel(guest: &GuestMemory, images: &mut Images, file: &File) -> Result<Kernel, BootError> {
    let size = file_size(file, "kernel")?;
    let mut head = vec![0; 4096];
    let got = file.read_at(&mut head, 0).map_err(BootError::Header)?;
    head.truncate(got);
    let kernel = match (head.get(..4), head.get(0x202..0x206)) {
        (Some(b"\x7fELF"), _) => load_elf(guest, images, file, size, &head)?,
        (_, Some(b"HdrS")) => load_bzimage(guest, images, file, size, &head)?,
        _ => return Err(BootError::NotAKernel),
    };
    let address = match kernel.entry {
        Entry::Linux64 { address } => address,
        Entry::Pvh { address } => address.into(),
    };
    if !(KERNEL_START..MAPPED_END).contains(&address) {
        return Err(BootError::EntryOutside(address));
    }
    Ok(kernel)
}

fn check_fits(guest: &GuestMemory, start: u64, size: u64) -> Result<u64, BootError> {
    let (low, _) = memory::sizes(guest);
    let end = start.checked_add(size);
    match end {
        Some(end) if end <= low => Ok(end),
        _ => {
            let needed = end.unwrap_or(u64::MAX).div_ceil(MIB);
            Err(BootError::KernelTooBig { needed, available: low / MIB })
        }
    }
}

fn load_elf(
    guest: &GuestMemory,
    images: &mut Images,
    file: &File,
    size: u64,
    head: &[u8],
) -> Result<Kernel, BootError> {
    let image = elf::parse(head, file, size)?;
    let (mut start, mut end) = (u64::MAX, 0);
    for segment in &image.segments {
        if segment.address < KERNEL_START {
            return Err(ElfError::SegmentTooLow(segment.address).into());
        }
        end = end.max(check_fits(guest, segment.address, segment.memory_size)?);
        start = start.min(segment.address);
        images
            .place(guest, segment.address, file, segment.offset, segment.file_size)
            .map_err(|source| BootError::Load { file: "kernel", source })?;
    }
    let entry = match image.pvh_entry {
        Some(address) => Entry::Pvh { address },
        None => Entry::Linux64 { address: image.entry },
    };
    Ok(Kernel { entry, start, end, header: vec![], initramfs_max: INITRAMFS_MAX })
}

fn load_bzimage(
    guest: &GuestMemory,
    images: &mut Images,
    file: &File,
    size: u64,
    head: &[u8],
) -> Result<Kernel, BootError> {
    let field = |offset: usize, length: usize| -> u64 {
        let bytes = head.get(offset..offset + length).unwrap_or_default();
        bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let refuse = |problem: &str| Err(BootError::BzImage(problem.into()));
    if field(0x1FE, 2) != 0xAA55 {
        return refuse("without boot signature");
    }
    if field(0x206, 2) < PROTOCOL_MIN.into() {
        return refuse("of a boot protocol before 2.12 (Linux 3.8)");
    }
    if field(0x236, 2) & u64::from(XLF_KERNEL_64) == 0 {
        return refuse("without 64-bit entry");
    }
    let setup_sectors = match field(0x1F1, 1) {
        0 => 4,
        sectors => sectors,
    };
    let offset = (setup_sectors + 1) * 512;
    // The header says how long the protected-mode code is, in units of 16 bytes; a file may be longer (signatures).
    let length = field(0x1F4, 4) * 16;
    if length == 0 || offset + length > size {
        return Err(BootError::BzImage(format!("is truncated: {size} bytes, {} needed", offset + length)));
    }
    let (start, init_size) = (field(0x258, 8), field(0x260, 4));
    if start < KERNEL_START || start % PAGE != 0 {
        return Err(BootError::BzImage(format!("wants to be loaded at {start:#x}")));
    }
    let end = check_fits(guest, start, init_size.max(length))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    images
        .place(guest, start, file, offset, length)
        .map_err(|source| BootError::Load { file: "kernel", source })?;
    // The header ends where the jump at 0x200 leads (its displacement is at 0x201).
    let header_end = 0x202 + usize::try_from(field(0x201, 1)).unwrap_or(0);
    let header_start = usize::try_from(SETUP_HEADER).unwrap_or(0);
    let header = head.get(header_start..header_end).unwrap_or_default().to_vec();
    let initramfs_max = field(0x22C, 4);
    Ok(Kernel { entry: Entry::Linux64 { address: start + 0x200 }, start, end, header, initramfs_max })
}

/// Places the initramfs as high as the kernel allows, or in the gap below the kernel when memory is small.
fn place(guest: &GuestMemory, kernel: &Kernel, size: u64) -> Option<u64> {
    let (low, _) = memory::sizes(guest);
    let top = low.min(kernel.initramfs_max.saturating_add(1));
    let high = top.checked_sub(size).map(|start| start / PAGE * PAGE).filter(|start| *start >= kernel.end);
    let gap =
        || kernel.start.checked_sub(size).map(|start| start / PAGE * PAGE).filter(|s| *s >= KERNEL_START);
    high.or_else(gap)
}

fn load_initramfs(
    guest: &GuestMemory,
    images: &mut Images,
    kernel: &Kernel,
    file: Option<&File>,
    config: Option<&GuestConfig>,
) -> Result<Initramfs, BootError> {
    let Some(file) = file else { return Ok(Initramfs::default()) };
    let file_size = file_size(file, "initramfs")?;
    let appended = config.map(archive).transpose()?.unwrap_or_default();
    // An archive begins at a multiple of 4; zeros before it are skipped.
    let archive_at = file_size.next_multiple_of(4);
    let size = if appended.is_empty() {
        file_size
    } else {
        archive_at.saturating_add(u64::try_from(appended.len()).unwrap_or(u64::MAX))
    };
    let too_big = || BootError::InitramfsTooBig { size, available: memory::sizes(guest).0 / MIB };
    let start = place(guest, kernel, size).ok_or_else(too_big)?;
    let length = usize::try_from(file_size).map_err(|_| too_big())?;
    if length > 0 {
        images
            .place(guest, start, file, 0, length)
            .map_err(|source| BootError::Load { file: "initramfs", source })?;
    }
    guest.write_slice(&appended, GuestAddress(start + archive_at)).map_err(BootError::Structures)?;
    Ok(Initramfs { start, size })
}

/// A newc cpio archive (Linux Documentation/driver-api/early-userspace/buffer-format.rst) with the guest configuration.
fn archive(config: &GuestConfig) -> Result<Vec<u8>, BootError> {
    let content = serde_json::to_vec(config).map_err(BootError::GuestConfig)?;
    let mut bytes = vec![];
    append(&mut bytes, CONFIG_PATH.trim_start_matches('/'), 0o100_400, &content);
    append(&mut bytes, "TRAILER!!!", 0, &[]);
    Ok(bytes)
}

fn append(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let length = |n: usize| u32::try_from(n).unwrap_or(0);
    let inode = u32::from(mode != 0);
    // inode, mode, uid, gid, links, mtime, size, device (2), node (2), length of the name with its NUL, checksum
    let fields = [inode, mode, 0, 0, 1, 0, length(content.len()), 0, 0, 0, 0, length(name.len() + 1), 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
