//! The ACPI tables of a hardware-reduced machine (ACPI 6.5 section 3.11.1): RSDP, XSDT, FADT, MADT, MCFG, DSDT.
//!
//! No PM timer, no legacy interrupt controller, no RTC, no keyboard: the FADT says so and a kernel does not look for them.
//! The sleep control register powers off, the reset register resets. PCI functions use MSI-X, so there is no `_PRT`.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::aml;
use crate::layout::{
    ACPI, ECAM, EVENT_PIN, GENERATION, IOAPIC, LOCAL_APIC, PCI_WINDOW, RESET_PORT, SERIAL_PIN, SERIAL_PORT,
    SERIAL_PORTS, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::virtio::device::GuestMemory;

/// Sleep type that the DSDT gives for S5; the sleep control register receives it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the reset register receives for a reset.
pub const RESET_VALUE: u8 = 0x06;

const CREATOR: &[u8; 8] = b"BLXD\x01\0\0\0";
const OEM: &[u8; 18] = b"BLXARDBLIXARD \x01\0\0\0";
const HEADER: usize = 36;

/// FADT flags (section 5.2.9): no power button, no sleep button, reset register, hardware-reduced.
const FADT_FLAGS: u32 = 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20;
/// IA-PC boot flags (section 5.2.9.3): no VGA, no ASPM, no CMOS RTC; and, by their absence, no legacy devices, no 8042.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 4 | 1 << 5;

/// Writes all tables for `vcpus` vCPUs to guest memory; the RSDP is at [`ACPI`]`.start`.
///
/// # Errors
/// Guest memory is too small for them.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    let mut at = ACPI.start + 64;
    let mut place = |table: Vec<u8>| -> Result<u64, GuestMemoryError> {
        let here = at;
        memory.write_slice(&table, GuestAddress(here))?;
        at = (at + u64::try_from(table.len()).unwrap_or(0)).next_multiple_of(16);
        Ok(here)
    };
    let dsdt = place(table(*b"DSDT", 2, &dsdt()))?;
    let tables = [place(table(*b"FACP", 6, &fadt(dsdt)))?, place(table(*b"APIC", 5, &madt(vcpus)))?, {
        place(table(*b"MCFG", 1, &mcfg()))?
    }];
    let pointers: Vec<u8> = tables.iter().flat_map(|t| t.to_le_bytes()).collect();
    let xsdt = place(table(*b"XSDT", 1, &pointers))?;
    memory.write_slice(&rsdp(xsdt), GuestAddress(ACPI.start))
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(0).to_le_bytes();
    let head = [signature.as_slice(), &length, &[revision, 0], OEM, CREATOR].concat();
    let mut table = [head.as_slice(), body].concat();
    let sum = checksum(&table);
    if let Some(field) = table.get_mut(9) {
        *field = sum;
    }
    table
}

fn rsdp(xsdt: u64) -> Vec<u8> {
    // The first checksum covers 20 bytes, the second all 36 (section 5.2.5.3).
    let mut first = b"RSD PTR \0BLXARD\x02\0\0\0\0".to_vec();
    let sum = checksum(&first);
    if let Some(field) = first.get_mut(8) {
        *field = sum;
    }
    let mut all = [first.as_slice(), &36u32.to_le_bytes(), &xsdt.to_le_bytes(), &[0; 4]].concat();
    let sum = checksum(&all);
    if let Some(field) = all.get_mut(32) {
        *field = sum;
    }
    all
}

/// Generic address structure of an 8-bit port (section 5.2.3.2).
fn port(number: u16) -> Vec<u8> {
    [&[1, 8, 0, 1], u64::from(number).to_le_bytes().as_slice()].concat()
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fields = vec![0; 276 - HEADER];
    let mut set = |offset: usize, bytes: &[u8]| {
        if let Some(to) = fields.get_mut(offset - HEADER..).and_then(|f| f.get_mut(..bytes.len())) {
            to.copy_from_slice(bytes);
        }
    };
    set(109, &BOOT_FLAGS.to_le_bytes());
    set(112, &FADT_FLAGS.to_le_bytes());
    set(116, &port(RESET_PORT));
    set(128, &[RESET_VALUE]);
    set(131, &[5]);
    set(140, &dsdt.to_le_bytes());
    set(244, &port(SLEEP_CONTROL_PORT));
    set(256, &port(SLEEP_STATUS_PORT));
    set(268, b"BLIXARD\0");
    fields
}

fn low32(address: u64) -> [u8; 4] {
    u32::try_from(address).unwrap_or(0).to_le_bytes()
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut body = [low32(LOCAL_APIC.start), [0; 4]].concat();
    for id in 0..vcpus {
        // Ids below 255 are listed this way also for local APICs in x2APIC mode (section 5.2.12.12).
        body.extend([0, 8, id, id, 1, 0, 0, 0]);
    }
    body.extend([1, 12, 0, 0]);
    body.extend(low32(IOAPIC.start));
    body.extend([0; 4]);
    // LINT1 of all processors is the NMI.
    body.extend([4, 6, 0xFF, 0, 0, 1]);
    body
}

fn mcfg() -> Vec<u8> {
    // Segment 0, buses 0 to 0.
    [[0; 8].as_slice(), &ECAM.start.to_le_bytes(), &[0; 8]].concat()
}

fn dsdt() -> Vec<u8> {
    let word = |address: u64| u32::try_from(address).unwrap_or(0);
    let bridge = aml::device(
        *b"PCI0",
        &[
            aml::name(*b"_HID", &aml::eisa_id(*b"PNP", 0x0A08)),
            aml::name(*b"_CID", &aml::eisa_id(*b"PNP", 0x0A03)),
            aml::name(*b"_SEG", &aml::integer(0)),
            aml::name(*b"_BBN", &aml::integer(0)),
            aml::name(*b"_UID", &aml::integer(0)),
            aml::name(*b"_CCA", &aml::integer(1)),
            aml::name(
                *b"_CRS",
                &aml::resources(&[
                    aml::bus_numbers(0, 0),
                    aml::memory_window(word(PCI_WINDOW.start), word(PCI_WINDOW.end() - 1)),
                ]),
            ),
        ],
    );
    // Linux uses a configuration space only when a motherboard device reserves it.
    let board = aml::device(
        *b"MBRD",
        &[
            aml::name(*b"_HID", &aml::eisa_id(*b"PNP", 0x0C02)),
            aml::name(*b"_UID", &aml::integer(0)),
            aml::name(*b"_CRS", &aml::resources(&[aml::memory_fixed(word(ECAM.start), word(ECAM.size))])),
        ],
    );
    let ports = u8::try_from(SERIAL_PORTS).unwrap_or(0);
    let serial = aml::device(
        *b"COM1",
        &[
            aml::name(*b"_HID", &aml::eisa_id(*b"PNP", 0x0501)),
            aml::name(*b"_UID", &aml::integer(0)),
            aml::name(
                *b"_CRS",
                &aml::resources(&[aml::ports(SERIAL_PORT, ports), aml::interrupt(SERIAL_PIN.into())]),
            ),
        ],
    );
    // The generation counter (Microsoft, "Virtual Machine Generation ID"): its name is longer than a hardware id may be, so
    // Linux also knows it by another one.
    let [low, high] = [GENERATION.start & 0xFFFF_FFFF, GENERATION.start >> 32].map(aml::integer);
    let generation = aml::device(
        *b"VGEN",
        &[
            aml::name(*b"_HID", &aml::string("VMGENCTR")),
            aml::name(*b"_CID", &aml::string("VM_Gen_Counter")),
            aml::name(*b"_DDN", &aml::string("VM_Gen_Counter")),
            aml::name(*b"ADDR", &aml::package(&[low, high])),
        ],
    );
    // Generic event device (section 5.6.9): its interrupt says that the generation has changed.
    let events = aml::device(
        *b"GED0",
        &[
            aml::name(*b"_HID", &aml::string("ACPI0013")),
            aml::name(*b"_UID", &aml::integer(0)),
            aml::name(*b"_CRS", &aml::resources(&[aml::interrupt(EVENT_PIN.into())])),
            aml::method(*b"_EVT", 1, &[aml::notify(*b"VGEN", 0x80)]),
        ],
    );
    let off = aml::integer(SLEEP_TYPE_S5.into());
    let sleep = aml::name(*b"_S5_", &aml::package(&[off.clone(), off, aml::integer(0), aml::integer(0)]));
    [aml::scope(*b"_SB_", &[bridge, board, serial, generation, events]), sleep].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_sums_to_zero_and_knows_its_length() {
        let memory = crate::memory::create(16).unwrap();
        write(&memory, 32).unwrap();
        let bytes = |at: u64, length: usize| {
            let mut data = vec![0; length];
            memory.read_slice(&mut data, GuestAddress(at)).unwrap();
            data
        };
        let long = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let rsdp = bytes(ACPI.start, 36);
        assert_eq!((checksum(&rsdp[..20]), checksum(&rsdp)), (0, 0));
        let xsdt = long(ACPI.start + 24);
        let mut found = vec![];
        let (fadt, madt, mcfg) = (long(xsdt + 36), long(xsdt + 44), long(xsdt + 52));
        for at in [xsdt, fadt, madt, mcfg, long(fadt + 140)] {
            let head = bytes(at, 8);
            let length = u32::from_le_bytes(head[4..].try_into().unwrap());
            assert_eq!(checksum(&bytes(at, length as usize)), 0);
            assert!(at + u64::from(length) <= ACPI.end());
            found.push(String::from_utf8(head[..4].to_vec()).unwrap());
        }
        assert_eq!(found, ["XSDT", "FACP", "APIC", "MCFG", "DSDT"]);
    }
}
