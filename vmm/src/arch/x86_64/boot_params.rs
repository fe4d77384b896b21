//! What a kernel is told at its entry: memory map, command line, initramfs, ACPI. Written as Linux zero page
//! (Documentation/arch/x86/zero-page.rst) or as PVH start information (Xen's arch-x86/hvm/start_info.h).

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{
    ACPI, BOOT_PARAMS, CMDLINE, ECAM, HIGH_RAM_START, KERNEL_START, LOW_USABLE_END, PVH_INFO,
};
use crate::memory;
use crate::virtio::device::GuestMemory;

/// Offset of the setup header in the zero page and in a bzImage.
pub const SETUP_HEADER: u64 = 0x1F1;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PVH_MAGIC: u32 = 0x336E_C578;

/// Where the initramfs lies in guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Initramfs {
    /// First address, 0 when there is none.
    pub start: u64,
    /// Length in bytes, 0 when there is none.
    pub size: u64,
}

/// Ranges of the memory map: start, size, type.
fn memory_map(guest: &GuestMemory) -> Vec<(u64, u64, u32)> {
    let (low, high) = memory::sizes(guest);
    let mut map = vec![
        (0, LOW_USABLE_END, E820_RAM),
        (LOW_USABLE_END, KERNEL_START - LOW_USABLE_END, E820_RESERVED),
        (KERNEL_START, low.saturating_sub(KERNEL_START), E820_RAM),
        (ECAM.start, ECAM.size, E820_RESERVED),
    ];
    if high > 0 {
        map.push((HIGH_RAM_START, high, E820_RAM));
    }
    map
}

/// Writes the command line with its final NUL.
///
/// # Errors
/// Guest memory is too small.
pub fn write_cmdline(guest: &GuestMemory, cmdline: &str) -> Result<(), GuestMemoryError> {
    guest.write_slice(&[cmdline.as_bytes(), &[0]].concat(), GuestAddress(CMDLINE.start))
}

/// Writes the zero page. `header` is the setup header of a bzImage; an ELF kernel has none and gets a made-up one.
///
/// # Errors
/// Guest memory is too small.
pub fn write_zero_page(
    guest: &GuestMemory,
    header: &[u8],
    initramfs: Initramfs,
) -> Result<(), GuestMemoryError> {
    let at = |offset: u64| GuestAddress(BOOT_PARAMS.start + offset);
    if header.is_empty() {
        guest.write_obj(0xAA55u16, at(0x1FE))?;
        guest.write_slice(b"HdrS", at(0x202))?;
        guest.write_obj(0x020Fu16, at(0x206))?;
        guest.write_obj(0x0100_0000u32, at(0x230))?;
    } else {
        guest.write_slice(header, at(SETUP_HEADER))?;
    }
    let word = |value: u64| u32::try_from(value).unwrap_or(0);
    guest.write_obj(0xFFFFu16, at(0x1FA))?; // vid_mode: normal
    guest.write_obj(0xFFu8, at(0x210))?; // type_of_loader: none that has a number
    guest.write_obj(1u8, at(0x211))?; // loadflags: LOADED_HIGH
    guest.write_obj(word(initramfs.start), at(0x218))?;
    guest.write_obj(word(initramfs.size), at(0x21C))?;
    guest.write_obj(word(CMDLINE.start), at(0x228))?;
    guest.write_obj(ACPI.start, at(0x070))?;
    let map = memory_map(guest);
    guest.write_obj(u8::try_from(map.len()).unwrap_or(0), at(0x1E8))?;
    let table: Vec<u8> = map
        .iter()
        .flat_map(|(start, size, kind)| {
            [start.to_le_bytes().as_slice(), &size.to_le_bytes(), &kind.to_le_bytes()].concat()
        })
        .collect();
    guest.write_slice(&table, at(0x2D0))
}

/// Writes the PVH start information.
///
/// # Errors
/// Guest memory is too small.
pub fn write_pvh(guest: &GuestMemory, initramfs: Initramfs) -> Result<(), GuestMemoryError> {
    const MODULES: u64 = 0x80;
    const MAP: u64 = 0x100;
    let map = memory_map(guest);
    let count = |n: usize| u32::try_from(n).unwrap_or(0).to_le_bytes();
    let modules = usize::from(initramfs.size > 0);
    let info = [
        PVH_MAGIC.to_le_bytes().as_slice(),
        &1u32.to_le_bytes(), // version
        &0u32.to_le_bytes(), // flags
        &count(modules),
        &(PVH_INFO.start + MODULES).to_le_bytes(),
        &CMDLINE.start.to_le_bytes(),
        &ACPI.start.to_le_bytes(),
        &(PVH_INFO.start + MAP).to_le_bytes(),
        &count(map.len()),
        &[0; 4],
    ]
    .concat();
    guest.write_slice(&info, GuestAddress(PVH_INFO.start))?;
    let module = [initramfs.start, initramfs.size, 0, 0].map(u64::to_le_bytes).concat();
    guest.write_slice(&module, GuestAddress(PVH_INFO.start + MODULES))?;
    let table: Vec<u8> = map
        .iter()
        .flat_map(|(start, size, kind)| {
            [start.to_le_bytes().as_slice(), &size.to_le_bytes(), &kind.to_le_bytes(), &[0; 4]].concat()
        })
        .collect();
    guest.write_slice(&table, GuestAddress(PVH_INFO.start + MAP))
}
