//! What a guest can do to PCI configuration space, BARs and the I/O APIC.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blixard_vmm::hostile::run("pci", data));
