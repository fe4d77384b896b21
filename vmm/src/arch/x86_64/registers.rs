//! Registers and page tables of the first vCPU at its entry into the kernel.
//!
//! Two ways in: the 64-bit entry of the Linux boot protocol (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol") and
//! PVH (32-bit protected mode without paging; Xen's docs/misc/pvh.pandoc). All values are written, none is read back first.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{BOOT_PARAMS, GDT, LOCAL_APIC, PAGE_TABLES, PVH_INFO};
use crate::virtio::device::GuestMemory;

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// In long mode with RSI at the zero page.
    Linux64 {
        /// Physical address of the first instruction.
        address: u64,
    },
    /// In protected mode with EBX at the start information.
    Pvh {
        /// Physical address of the first instruction.
        address: u32,
    },
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const APIC_ENABLED_BSP: u64 = LOCAL_APIC.start | 1 << 11 | 1 << 8;

const MSR_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2FF;
/// Enabled, all memory write-back: Linux makes no use of PAT otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;
const USER: u64 = 1 << 2;

/// A segment descriptor (Intel SDM volume 3 section 3.4.5): what KVM wants and its 8 bytes in memory.
struct Segment {
    selector: u16,
    /// Type, S, DPL, P in bits 0-7 and AVL, L, D/B, G in bits 12-15.
    flags: u16,
    limit: u32,
}

impl Segment {
    fn bit(&self, number: u32) -> u8 {
        u8::from(self.flags >> number & 1 == 1)
    }

    fn for_kvm(&self) -> kvm_segment {
        let [low, _] = self.flags.to_le_bytes();
        kvm_segment {
            base: 0,
            limit: if self.bit(15) == 1 { self.limit << 12 | 0xFFF } else { self.limit },
            selector: self.selector,
            type_: low & 0xF,
            s: self.bit(4),
            dpl: low >> 5 & 3,
            present: self.bit(7),
            avl: self.bit(12),
            l: self.bit(13),
            db: self.bit(14),
            g: self.bit(15),
            unusable: 0,
            padding: 0,
        }
    }

    fn in_memory(&self) -> u64 {
        let limit = u64::from(self.limit);
        u64::from(self.flags) << 40 & 0x00F0_FF00_0000_0000 | limit & 0xFFFF | (limit >> 16 & 0xF) << 48
    }
}

const CODE_64: Segment = Segment { selector: 0x10, flags: 0xA09B, limit: 0xF_FFFF };
const CODE_32: Segment = Segment { selector: 0x10, flags: 0xC09B, limit: 0xF_FFFF };
const DATA: Segment = Segment { selector: 0x18, flags: 0xC093, limit: 0xF_FFFF };
const TSS: Segment = Segment { selector: 0x20, flags: 0x008B, limit: 0x67 };

/// Writes descriptor table and page tables for `entry` to guest memory.
///
/// # Errors
/// Guest memory is too small for them.
pub fn write_tables(memory: &GuestMemory, entry: Entry) -> Result<(), GuestMemoryError> {
    let code = if let Entry::Linux64 { .. } = entry { &CODE_64 } else { &CODE_32 };
    let gdt = [0, 0, code.in_memory(), DATA.in_memory(), TSS.in_memory()];
    let bytes: Vec<u8> = gdt.iter().flat_map(|d| d.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(GDT.start))?;
    if let Entry::Linux64 { .. } = entry {
        let [level4, level3, level2] = [0, 1, 2].map(|page| PAGE_TABLES.start + page * 0x1000);
        memory.write_obj(level3 | PRESENT_WRITABLE, GuestAddress(level4))?;
        memory.write_obj(level2 | PRESENT_WRITABLE, GuestAddress(level3))?;
        let pages = (0..512u64).flat_map(|n| (n << 21 | LARGE_PAGE | PRESENT_WRITABLE).to_le_bytes());
        memory.write_slice(&pages.collect::<Vec<u8>>(), GuestAddress(level2))?;
    }
    Ok(())
}

/// Lets user mode use the memory that [`write_tables`] mapped, for the probe's guest.
///
/// # Errors
/// Guest memory is too small for the tables.
pub fn open_to_user(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for entry in 0..514u64 {
        // The first entry of the upper two tables and all of the third.
        let at = match entry {
            0 | 1 => PAGE_TABLES.start + entry * 0x1000,
            _ => PAGE_TABLES.start + 0x2000 + (entry - 2) * 8,
        };
        let value: u64 = memory.read_obj(GuestAddress(at))?;
        memory.write_obj(value | USER, GuestAddress(at))?;
    }
    Ok(())
}

/// Special registers for `entry`.
pub fn special(entry: Entry) -> kvm_sregs {
    let data = DATA.for_kvm();
    let long = matches!(entry, Entry::Linux64 { .. });
    kvm_sregs {
        cs: if long { CODE_64.for_kvm() } else { CODE_32.for_kvm() },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: TSS.for_kvm(),
        ldt: kvm_segment { unusable: 1, type_: 2, present: 1, ..Default::default() },
        gdt: kvm_dtable { base: GDT.start, limit: 5 * 8 - 1, padding: [0; 3] },
        idt: kvm_dtable::default(),
        cr0: if long { CR0_PE | CR0_ET | CR0_PG } else { CR0_PE | CR0_ET },
        cr3: if long { PAGE_TABLES.start } else { 0 },
        cr4: if long { CR4_PAE } else { 0 },
        efer: if long { EFER_LME | EFER_LMA } else { 0 },
        apic_base: APIC_ENABLED_BSP,
        ..Default::default()
    }
}

/// General registers for `entry`.
pub fn general(entry: Entry) -> kvm_regs {
    // Bit 1 of RFLAGS is always set.
    let none = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Linux64 { address } => kvm_regs { rip: address, rsi: BOOT_PARAMS.start, ..none },
        Entry::Pvh { address } => kvm_regs { rip: address.into(), rbx: PVH_INFO.start, ..none },
    }
}

/// Model-specific registers that differ from what KVM gives a new vCPU.
///
/// # Errors
/// Never in practice: two entries always fit.
pub fn msrs() -> Result<Msrs, vmm_sys_util::fam::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_bytes_of_the_manual() {
        assert_eq!(CODE_64.in_memory(), 0x00AF_9B00_0000_FFFF);
        assert_eq!(DATA.in_memory(), 0x00CF_9300_0000_FFFF);
        assert_eq!(TSS.in_memory(), 0x0000_8B00_0000_0067);
        let code = CODE_64.for_kvm();
        assert_eq!((code.limit, code.type_, code.s, code.l, code.db, code.g), (u32::MAX, 0xB, 1, 1, 0, 1));
    }
}
