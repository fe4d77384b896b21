//! Every guest physical address of the machine as one table, checked against overlap at compile time.
//!
//! ```text
//! 0x0000_0000  low memory: boot structures below 1 MiB, kernel from 1 MiB        RAM, up to 3 GiB
//! 0xC000_0000  boot timer page (only when configured), then nothing
//! 0xD000_0000  PCI memory window: BARs
//! 0xE000_0000  PCI configuration space (ECAM) of bus 0
//! 0xFEC0_0000  I/O APIC
//! 0xFEE0_0000  local APICs (KVM)
//! 0xFFFB_C000  pages that KVM needs on old Intel processors
//! 1_0000_0000  high memory: what does not fit below 3 GiB                        RAM
//! behind it    persistent memories, each from a multiple of 128 MiB on           their files
//! ```

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Area {
    const fn new(start: u64, size: u64) -> Self {
        Self { start, size }
    }

    /// First address behind the area.
    pub const fn end(self) -> u64 {
        self.start + self.size
    }

    /// Offset of `address` in the area, when `length` bytes from there lie inside it.
    pub fn offset(self, address: u64, length: usize) -> Option<u64> {
        let offset = address.checked_sub(self.start)?;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= self.size).then_some(offset)
    }
}

/// 1 MiB.
pub const MIB: u64 = 1 << 20;

/// Global descriptor table of the entry into the kernel.
pub const GDT: Area = Area::new(0x500, 0x100);
/// PVH start information with its memory map and module list.
pub const PVH_INFO: Area = Area::new(0x6000, 0x1000);
/// Linux zero page.
pub const BOOT_PARAMS: Area = Area::new(0x7000, 0x1000);
/// Three pages of page tables that map the first 1 GiB one to one.
pub const PAGE_TABLES: Area = Area::new(0x9000, 0x3000);
/// Kernel command line.
pub const CMDLINE: Area = Area::new(0x2_0000, 0x1000);
/// End of the memory below 1 MiB that the guest may use.
pub const LOW_USABLE_END: u64 = 0x9_FC00;
/// ACPI tables.
pub const ACPI: Area = Area::new(0xE_0000, 0x2_0000);
/// The generation id of the VM, 16 bytes between the first ACPI table and the next: memory that no guest uses otherwise.
pub const GENERATION: Area = Area::new(ACPI.start + 48, 16);
/// Where kernels may be loaded.
pub const KERNEL_START: u64 = MIB;
/// Memory below the hole.
pub const LOW_RAM: Area = Area::new(0, 3 << 30);
/// The one-byte boot timer.
pub const BOOT_TIMER: Area = Area::new(0xC000_0000, 0x1000);
/// Where the BARs of PCI functions lie.
pub const PCI_WINDOW: Area = Area::new(0xD000_0000, 0x1000_0000);
/// Configuration space of PCI bus 0 (32 devices of 8 functions of 4 KiB).
pub const ECAM: Area = Area::new(0xE000_0000, 0x10_0000);
/// I/O APIC.
pub const IOAPIC: Area = Area::new(0xFEC0_0000, 0x1000);
/// Local APICs, in the kernel.
pub const LOCAL_APIC: Area = Area::new(0xFEE0_0000, 0x1000);
/// Identity map page and three pages of TSS, which KVM needs on Intel processors without unrestricted guests.
pub const KVM_PRIVATE: Area = Area::new(0xFFFB_C000, 0x4000);
/// Where the TSS pages begin.
pub const KVM_TSS: usize = 0xFFFB_D000;
/// First address of the memory above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Persistent memories begin at multiples of this: the size of a memory section of Linux on x86-64.
pub const PMEM_ALIGNMENT: u64 = 128 * MIB;

/// Where the next persistent memory begins, when what is before it ends at `end`; none when addresses are used up. They
/// are never below the high memory.
pub fn pmem_start(end: u64) -> Option<u64> {
    end.max(HIGH_RAM_START).checked_next_multiple_of(PMEM_ALIGNMENT)
}

/// Ports of the first serial line.
pub const SERIAL_PORT: u16 = 0x3F8;
/// Number of serial ports.
pub const SERIAL_PORTS: u16 = 8;
/// I/O APIC pin of the serial line.
pub const SERIAL_PIN: u8 = 4;
/// I/O APIC pin of events that ACPI tells the guest.
pub const EVENT_PIN: u8 = 5;
/// ACPI sleep control register (ACPI 6.5 section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset control register of PC chipsets, also named by the FADT.
pub const RESET_PORT: u16 = 0xCF9;
/// Keyboard controller: data.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Keyboard controller: command and status.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Pins of the I/O APIC; interrupt numbers from here on are message signalled.
pub const IOAPIC_PINS: u8 = 24;

const BELOW_1M: [Area; 6] = [GDT, PVH_INFO, BOOT_PARAMS, PAGE_TABLES, CMDLINE, ACPI];
const ALL: [Area; 7] = [LOW_RAM, BOOT_TIMER, PCI_WINDOW, ECAM, IOAPIC, LOCAL_APIC, KVM_PRIVATE];

const fn ascends(areas: &[Area], end: u64) -> bool {
    let mut free = 0;
    let mut rest = areas;
    while let [area, tail @ ..] = rest {
        if area.start < free {
            return false;
        }
        free = area.end();
        rest = tail;
    }
    free <= end
}

const _: () = assert!(ascends(&BELOW_1M, MIB));
const _: () = assert!(CMDLINE.end() <= LOW_USABLE_END && LOW_USABLE_END <= ACPI.start);
const _: () = assert!(ascends(&ALL, HIGH_RAM_START));
const _: () = assert!(blixard_vmm_api::config::CMDLINE_MAX < 0x1000);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_exists_only_for_accesses_that_lie_inside() {
        let area = Area::new(0x1000, 0x10);
        assert_eq!(area.offset(0x100c, 4), Some(12));
        assert_eq!(area.offset(0x100d, 4), None);
        assert_eq!(area.offset(0xfff, 1), None);
        assert_eq!(area.offset(u64::MAX, 8), None);
    }

    #[test]
    fn the_check_finds_overlaps() {
        assert!(!ascends(&[Area::new(0, 2), Area::new(1, 1)], 10));
        assert!(!ascends(&[Area::new(0, 11)], 10));
    }
}
